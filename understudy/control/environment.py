"""Environments by id, entry point, function or object, as one vector env; what is misspelt is said in a sentence."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import gymnasium
import yaml
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import (
    AsyncVectorEnv,
    AutoresetMode,
    SyncVectorEnv,
    VectorEnv,
    VectorRewardWrapper,
    VectorWrapper,
)

from understudy.control.infos import merge
from understudy.control.masks import check_mask, with_mask, with_masks
from understudy.control.parallel import Async
from understudy.control.rows import Rows, quicken
from understudy.control.spaces import check_action_space, check_observation_space
from understudy.control.supervise import Supervised
from understudy.control.wrappers import Evaluated, RewardSum, SendableInfo
from understudy.run.config import RequestError, nearest
from understudy.run.installation import install_hint
from understudy.run.origin import listed, origin

# the extra of this package that brings what an environment's own package needs, told by its entry point
EXTRAS = {"box2d": "box2d", "mujoco": "mujoco"}


Function = Callable[..., gymnasium.Env]


@dataclass(frozen=True)
class Maker:
    """Makes one environment, wrapped, here or in another process that it is sent to."""

    env: str | Function
    """A Gymnasium id, `module:id`, an entry point `module:Class` or `FILE.py:Class`; or a function that makes one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    wrappers: tuple[str, ...] = ()
    """Each "Name key=value ...", Name from gymnasium.wrappers or as an entry point; the first is innermost."""
    outer: tuple[Callable[[gymnasium.Env], gymnasium.Env], ...] = ()
    """Wrappers of our own, outside these."""
    evaluated: int | None = None
    """Give the reward below all wrappers, and cut episodes at this many steps."""
    spec: EnvSpec | None = None
    """What an id stands for, where it is sent to a process that has not registered it."""

    def __call__(self) -> gymnasium.Env:
        if self.spec is not None:
            gymnasium.registry.setdefault(self.spec.id, self.spec)
        make = _maker(self.env)
        with _explained(named(self.env), self.options):
            made: Any = make(**self.options)
        if not isinstance(made, gymnasium.Env):
            raise RequestError(
                f"env is {named(self.env)!r}, which makes a {type(made).__name__}: it must be a gymnasium.Env"
            )
        quicken(made)
        own = None
        if self.evaluated is not None:
            made = own = RewardSum(made)
        for text in self.wrappers:
            wrap, arguments = _wrapper(text)
            try:
                made = wrap(made, **arguments)
            except (TypeError, ValueError, AssertionError, gymnasium.error.Error) as error:
                raise RequestError(f"wrappers has {text!r}, which does not fit: {first_sentence(error)}") from error
        made = with_mask(made)
        for wrap in self.outer:
            made = wrap(made)
        return made if own is None or self.evaluated is None else Evaluated(made, own, self.evaluated)


def single(
    env: str | Function, options: dict[str, Any] | None = None, wrappers: tuple[str, ...] = (), **more: Any
) -> Maker:
    """Makes one environment. Its names are resolved now, so that a wrong one is refused before any process begins."""
    _maker(env)
    for text in wrappers:
        _wrapper(text)
    known = gymnasium.registry.get(env.rpartition(":")[2]) if isinstance(env, str) else None
    return Maker(env, dict(options or {}), wrappers, spec=known, **more)


def make(
    env: str | Function,
    *,
    num_envs: int,
    vectorization: str = "sync",
    options: dict[str, Any] | None = None,
    wrappers: tuple[str, ...] = (),
    step_timeout: float | None = None,
    bounds: bool = True,
    seed: int = 0,
    **more: Any,
) -> VectorEnv:
    """A vector env of `num_envs` copies; sync, async and supervised ones never reset by themselves.

    Args:
        env, options, wrappers: of `Maker`, as are `more`.
        vectorization: "sync", "async" (a process each), "supervised" (the same, restarted on faults), "native" (the id's
            own vector env), or "envpool".
        step_timeout: only for supervised ones, seconds that a step or a reset may take; None for no limit.
        bounds: only for supervised ones, whether an observation outside the bounds of its space is a fault.
        seed: only for EnvPool, which takes it when it is made.

    Raises:
        RequestError: unknown id, missing extra, unknown wrapper, unsupported space.
    """
    options = dict(options or {})
    if vectorization == "envpool":
        envs = _envpool(env, num_envs, options, wrappers, seed)
    elif vectorization == "native":
        envs = _native(env, num_envs, options, wrappers)
    else:
        maker = single(env, options, wrappers, **more)
        if vectorization == "sync":
            envs = in_this_process(maker, num_envs)
        elif vectorization == "async":
            makers = [replace(maker, outer=(*maker.outer, SendableInfo))] * num_envs
            envs = Async(makers, autoreset_mode=AutoresetMode.DISABLED)
        else:
            how: dict[str, Any] = {"step_timeout": step_timeout, "bounds": bounds}
            envs = Supervised([maker] * num_envs, autoreset_mode=AutoresetMode.DISABLED, **how)
    try:
        check_spaces(named(env), envs.single_observation_space, envs.single_action_space)
    except RequestError:
        envs.close()
        raise
    return envs


def in_this_process(maker: Callable[[], gymnasium.Env], num_envs: int) -> Rows:
    """Copies that are stepped in turn. Where one cannot be made, those before it are closed."""
    made: list[gymnasium.Env] = []
    try:
        for _ in range(num_envs):
            made.append(maker())
    except BaseException:
        for env in made:
            env.close()
        raise
    # the walker copies what it keeps
    return Rows([partial(_given, env) for env in made], copy=False, autoreset_mode=AutoresetMode.DISABLED)


def _given(env: gymnasium.Env) -> gymnasium.Env:
    return env


def named(env: Any) -> str:
    """What an environment is called in a sentence: its name, or its function's, or its class's."""
    if isinstance(env, str):
        return env
    if isinstance(env, gymnasium.Env | VectorEnv):
        return type(env.unwrapped).__name__
    return getattr(env, "__qualname__", type(env).__name__)


def check_spaces(env: str, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Refuse an environment whose spaces a policy cannot read or act in."""
    try:
        check_observation_space(observation_space)
        check_action_space(action_space)
        check_mask(observation_space, action_space)
    except ValueError as error:
        raise RequestError(f"env is {env!r}: its {error}") from error


def adopt(
    env: gymnasium.Env | VectorEnv,
    seed_of: Callable[[int, int], int],
    outer: tuple[Callable[[gymnasium.Env], gymnasium.Env], ...] = (),
) -> VectorEnv:
    """A user's own env as a vector env whose episodes get their seeds where that is possible.

    A single env becomes a vector env of one. In a `SyncVectorEnv` that resets by itself each sub-env is wrapped so that
    its resets are seeded; other vector envs that reset by themselves are seeded once, at the start.

    Args:
        outer: wrappers of our own around a single env.
    """
    if isinstance(env, gymnasium.Env) and isinstance(env, VectorEnv):  # EnvPool's are both
        return SeededWhenMade(env)
    if isinstance(env, gymnasium.Env):
        for wrap in outer:
            env = wrap(env)
        return Rows([lambda: with_mask(env)], autoreset_mode=AutoresetMode.DISABLED)
    inner: Any = env.unwrapped
    if isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
        inner._add_info = partial(merge, num_envs=inner.num_envs)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(inner, SyncVectorEnv):
        return with_masks(env)
    inner.envs = [with_mask(sub) for sub in inner.envs]
    if inner.autoreset_mode is not AutoresetMode.DISABLED:
        # one that was adopted before, for another run, gets the seeds of this one
        subs = [sub.env if isinstance(sub, SeededResets) else sub for sub in inner.envs]
        inner.envs = [SeededResets(sub, seed_of, row) for row, sub in enumerate(subs)]
    return env


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """When a vector env resets copies whose episode is over; NEXT_STEP where it does not say."""
    return AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))


def seeds_rows(envs: VectorEnv) -> bool:
    """Whether every copy takes a seed of its own; native vector envs that reset by themselves share one generator."""
    each = isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv | Supervised)
    return each or autoreset_mode(envs) is AutoresetMode.DISABLED


class SeededResets(gymnasium.Wrapper):
    """Gives every reset the seed of its row and episode, whoever asks for it."""

    def __init__(self, env: gymnasium.Env, seed_of: Callable[[int, int], int], row: int) -> None:
        super().__init__(env)
        self.seed_of, self.row, self.episode = seed_of, row, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.episode += 1
        return self.env.reset(seed=self.seed_of(self.row, self.episode), options=options)


class SeededWhenMade(VectorWrapper):
    """An EnvPool, which has had its seed and warns when it is given another."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset()


def check_kind(field: str, name: str) -> None:
    """Refuse `module:NAME` that is neither an environment or wrapper nor a registered id. It is imported, never called.

    For code that nobody but a run's config names: `os:system` is callable too.
    """
    module, _, attribute = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise RequestError(
            f"{field} is {name!r}: module {module!r} cannot be imported ({error}); install it"
        ) from error
    if field == "env" and found is None and attribute in gymnasium.registry:
        return
    kinds = (gymnasium.Env, VectorEnv) if field == "env" else (gymnasium.Wrapper, VectorWrapper)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        what = "no environment" if field == "env" else "no wrapper"
        raise RequestError(f"{field} is {name!r}, which is {what}: name one yourself with --{field}")


def threshold(envs: VectorEnv) -> float | None:
    """The return at which an environment counts as solved; None where it says none, or a wrapper may pay otherwise."""
    spec = envs.spec or getattr(next(iter(getattr(envs.unwrapped, "envs", [])), None), "spec", None)
    if spec is None:
        return None
    kinds: list[Any] = []
    if isinstance(spec, EnvSpec):  # EnvPool's is none
        known = gymnasium.registry.get(spec.id)  # the wrappers that are part of an id are meant by its threshold
        own = 0 if known is None else len(known.additional_wrappers)
        kinds = [_kind(wrapper.entry_point) for wrapper in spec.additional_wrappers[own:]]
    while isinstance(envs, VectorWrapper):
        kinds.append(type(envs))
        envs = envs.env
    return spec.reward_threshold if all(map(_keeps_rewards, kinds)) else None


def _kind(entry_point: str) -> Any:
    try:
        return load_env_creator(entry_point)
    except (ImportError, AttributeError, ValueError):  # a class within a function, say
        return None


def _keeps_rewards(kind: Any) -> bool:
    """Whether rewards pass a kind of wrapper as they are: Gymnasium's own and ours, and those that leave `step` to them."""
    step = getattr(kind, "step", None)
    ours = step is not None and step.__module__.partition(".")[0] in ("gymnasium", "understudy")
    return ours and not issubclass(kind, gymnasium.RewardWrapper | VectorRewardWrapper)


def first_sentence(error: BaseException) -> str:
    """An error's message on one line, with the line of the user's that it came from."""
    place = origin(error)
    return (" ".join(str(error).split()) or type(error).__name__) + (f" ({place})" if place else "")


def _maker(env: str | Function) -> Function:
    if not isinstance(env, str):
        return env
    module, _, name = env.rpartition(":")
    if (file := env.removesuffix(":")).endswith(".py"):
        _refuse_file(f"env is {env!r}", file)
    if module:
        loaded = _module(module, f"env is {env!r}")
        if hasattr(loaded, name):
            return getattr(loaded, name)
        if module.endswith(".py"):
            raise RequestError(f"env is {env!r}, but that file has no {name!r}{nearest(name, dir(loaded))}")
    if name not in gymnasium.registry:
        raise RequestError(f"env is {env!r}, which Gymnasium does not know{nearest(name, gymnasium.registry)}")
    # the passive checker looks at the first step only; the walker looks at all of them
    return lambda **options: gymnasium.make(name, disable_env_checker=True, **options)


def imported(field: str, text: str) -> Any:
    """What FILE.py:NAME or module:NAME is, named by the user as a field.

    Raises:
        RequestError: there is no such thing.
    """
    module, _, name = text.rpartition(":")
    if (file := text.removesuffix(":")).endswith(".py"):
        _refuse_file(f"{field} is {text!r}", file)
    if not module:
        raise RequestError(f"{field} is {text!r}: write FILE.py:NAME or module:NAME")
    loaded = _module(module, f"{field} is {text!r}")
    if not hasattr(loaded, name):
        raise RequestError(f"{field} is {text!r}, but there is no {name!r} in it{nearest(name, dir(loaded))}")
    return getattr(loaded, name)


def _refuse_file(what: str, file: str) -> NoReturn:
    if not Path(file).is_file():
        raise RequestError(f"{what}: there is no file {file!r} in '{Path.cwd()}'; give its path, as FILE.py:CLASS")
    raise RequestError(f"{what}, a file and no class in it: write {file}:CLASS{listed(file, ast.ClassDef)}")


def _module(name: str, what: str) -> Any:
    """A module by its name, or by its file, FILE.py, which is found from the current directory.

    Raises:
        RequestError: it cannot be imported.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        file = Path(name).resolve()
        known = sys.modules.get(file.stem)
        if known is not None and getattr(known, "__file__", None) == str(file):
            return known
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise RequestError(f"{what}: there is no file {name!r} in '{Path.cwd()}'; give its path")
        loaded = importlib.util.module_from_spec(spec)
        if known is None:
            sys.modules[file.stem] = loaded  # where classes of its own are looked up
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec.loader.exec_module(loaded)
        return loaded
    except RequestError:
        raise
    except ImportError as error:
        raise RequestError(f"{what}: module {name!r} cannot be imported ({error}); install it") from error
    except Exception as error:  # whatever a user's file raises
        raise RequestError(
            f"{what}: importing {name!r} raises {type(error).__name__}: {first_sentence(error)}; fix it"
        ) from error


def _wrapper(text: str) -> tuple[Callable[..., gymnasium.Env], dict[str, Any]]:
    name, *pairs = text.split()
    module, _, attribute = name.rpartition(":")
    wrap = getattr(_module(module or "gymnasium.wrappers", f"wrappers has {text!r}"), attribute, None)
    if wrap is None:
        close = "" if module else nearest(attribute, dir(gymnasium.wrappers))
        raise RequestError(f"wrappers has {text!r}: there is no {name!r}{close}")
    if any("=" not in pair for pair in pairs):
        raise RequestError(f"wrappers has {text!r}: write its arguments as key=value")
    return wrap, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def _native(env: str | Function, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...]) -> VectorEnv:
    maker = _maker(env)
    name = env.rpartition(":")[2] if isinstance(env, str) else ""
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: a native vector env takes none; use vectorization sync")
    if name not in gymnasium.registry:
        with _explained(named(env), options):
            return with_masks(maker(num_envs=num_envs, **options))  # pyright: ignore[reportArgumentType]
    if gymnasium.registry[name].vector_entry_point is None:
        raise RequestError(f"vectorization is 'native', but {env!r} has no vector env of its own: use sync or async")
    with _explained(name, options):
        envs = gymnasium.make_vec(name, num_envs, vectorization_mode="vector_entry_point", **options)
    quicken(envs)
    return with_masks(envs)


def _envpool(
    env: str | Function, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...], seed: int
) -> VectorEnv:
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: EnvPool takes none; use vectorization sync")
    try:
        import envpool  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise RequestError(f"vectorization is 'envpool', and EnvPool is missing: {install_hint('envpool')}") from error
    if not isinstance(env, str) or env not in envpool.list_all_envs():
        close = nearest(named(env), envpool.list_all_envs())
        raise RequestError(f"env is {named(env)!r}, which EnvPool does not know{close}")
    with _explained(env, options):
        made: Any = envpool.make(env, env_type="gymnasium", num_envs=num_envs, seed=seed, **options)
    return SeededWhenMade(made)


@contextmanager
def _explained(env: str, options: dict[str, Any]) -> Iterator[None]:
    """What keeps an environment from being made, said in a sentence."""
    try:
        yield
    except gymnasium.error.DependencyNotInstalled as error:
        spec = gymnasium.registry.get(env.rpartition(":")[2])
        point = str(spec.entry_point) if spec is not None else ""
        mend = next((install_hint(extra) for word, extra in EXTRAS.items() if word in point), None)
        raise RequestError(
            f"env is {env!r}, which needs a package that is missing: {mend or first_sentence(error)}"
        ) from error
    except RequestError:
        raise
    except Exception as error:  # whatever a user's environment raises
        kind = "" if isinstance(error, gymnasium.error.Error | TypeError) else f"{type(error).__name__}: "
        raise RequestError(f"env is {env!r} with env_options {options}: {kind}{first_sentence(error)}") from error
