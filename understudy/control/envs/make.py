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

from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv
from understudy.control.envs.infos import merge_info
from understudy.control.envs.masks import check_mask, with_mask, with_masks
from understudy.control.envs.parallel import ManagedAsyncVectorEnv
from understudy.control.envs.spaces import check_action_space, check_observation_space
from understudy.control.envs.wrappers import EvaluationWrapper, PicklableInfo, RewardAccumulator
from understudy.control.fast.vector_env import FastSyncVectorEnv, use_fast_action_space
from understudy.run.config import RequestError, did_you_mean
from understudy.run.installation import install_hint
from understudy.run.origin import listed, user_error_location

# the extra of this package that brings what an environment's own package needs, told by its entry point
EXTRAS = {"box2d": "box2d", "mujoco": "mujoco"}


EnvFunction = Callable[..., gymnasium.Env]


@dataclass(frozen=True)
class EnvFactory:
    """Makes one environment, wrapped, here or in another process that it is sent to."""

    env: str | EnvFunction
    """A Gymnasium id, `module:id`, an entry point `module:Class` or `FILE.py:Class`; or a function that makes one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    wrappers: tuple[str, ...] = ()
    """Each "Name key=value ...", Name from gymnasium.wrappers or as an entry point; the first is innermost."""
    outer_wrappers: tuple[Callable[[gymnasium.Env], gymnasium.Env], ...] = ()
    """Wrappers of our own, outside these."""
    evaluation_max_steps: int | None = None
    """Give the reward below all wrappers, and cut episodes at this many steps."""
    spec: EnvSpec | None = None
    """What an id stands for, where it is sent to a process that has not registered it."""

    def __call__(self) -> gymnasium.Env:
        if self.spec is not None:
            gymnasium.registry.setdefault(self.spec.id, self.spec)
        make_env = _resolve_env_function(self.env)
        with _explain_errors(env_name(self.env), self.options):
            env: Any = make_env(**self.options)
        if not isinstance(env, gymnasium.Env):
            raise RequestError(
                f"env is {env_name(self.env)!r}, which makes a {type(env).__name__}: it must be a gymnasium.Env"
            )
        use_fast_action_space(env)
        accumulator = None
        if self.evaluation_max_steps is not None:
            env = accumulator = RewardAccumulator(env)
        for text in self.wrappers:
            wrap, arguments = _parse_wrapper(text)
            try:
                env = wrap(env, **arguments)
            except (TypeError, ValueError, AssertionError, gymnasium.error.Error) as error:
                raise RequestError(f"wrappers has {text!r}, which does not fit: {one_line_message(error)}") from error
        env = with_mask(env)
        for wrap in self.outer_wrappers:
            env = wrap(env)
        return (
            env
            if accumulator is None or self.evaluation_max_steps is None
            else EvaluationWrapper(env, accumulator, self.evaluation_max_steps)
        )


def make_factory(
    env: str | EnvFunction,
    options: dict[str, Any] | None = None,
    wrappers: tuple[str, ...] = (),
    **factory_options: Any,
) -> EnvFactory:
    """Makes one environment. Its names are resolved now, so that a wrong one is refused before any process begins."""
    _resolve_env_function(env)
    for text in wrappers:
        _parse_wrapper(text)
    env_spec = gymnasium.registry.get(env.rpartition(":")[2]) if isinstance(env, str) else None
    return EnvFactory(env, dict(options or {}), wrappers, spec=env_spec, **factory_options)


def make(
    env: str | EnvFunction,
    *,
    num_envs: int,
    vectorization: str = "sync",
    options: dict[str, Any] | None = None,
    wrappers: tuple[str, ...] = (),
    step_timeout: float | None = None,
    check_bounds: bool = True,
    seed: int = 0,
    **factory_options: Any,
) -> VectorEnv:
    """A vector env of `num_envs` copies; sync, async and supervised ones never reset by themselves.

    Args:
        env, options, wrappers: of `EnvFactory`, as are `factory_options`.
        vectorization: "sync", "async" (a process each), "fault_tolerant" (the same, restarted on faults), "native" (the id's
            own vector env), or "envpool".
        step_timeout: only for supervised ones, seconds that a step or a reset may take; None for no limit.
        check_bounds: only for supervised ones, whether an observation outside the bounds of its space is a fault.
        seed: only for EnvPool, which takes it when it is made.

    Raises:
        RequestError: unknown id, missing extra, unknown wrapper, unsupported space.
    """
    options = dict(options or {})
    if vectorization == "envpool":
        envs = _make_envpool(env, num_envs, options, wrappers, seed)
    elif vectorization == "native":
        envs = _make_native(env, num_envs, options, wrappers)
    else:
        factory = make_factory(env, options, wrappers, **factory_options)
        if vectorization == "sync":
            envs = make_sync_envs(factory, num_envs)
        elif vectorization == "async":
            factories = [replace(factory, outer_wrappers=(*factory.outer_wrappers, PicklableInfo))] * num_envs
            try:
                envs = ManagedAsyncVectorEnv(factories, autoreset_mode=AutoresetMode.DISABLED)
            except (EOFError, ConnectionError) as error:
                raise RequestError(
                    f"env is {env_name(env)!r}, and the process of a copy ended while it was made: what it wrote is above; "
                    "fix it, or set vectorization to sync"
                ) from error
        else:
            fault_options: dict[str, Any] = {"step_timeout": step_timeout, "check_bounds": check_bounds}
            envs = FaultTolerantVectorEnv([factory] * num_envs, autoreset_mode=AutoresetMode.DISABLED, **fault_options)
    try:
        refuse_shared_copies(env_name(env), envs)
        check_spaces(env_name(env), envs.single_observation_space, envs.single_action_space)
    except RequestError:
        envs.close()
        raise
    return envs


def make_sync_envs(factory: Callable[[], gymnasium.Env], num_envs: int) -> FastSyncVectorEnv:
    """Copies that are stepped in turn. Where one cannot be made, those before it are closed."""
    envs: list[gymnasium.Env] = []
    try:
        for _ in range(num_envs):
            envs.append(factory())
    except BaseException:
        for env in envs:
            env.close()
        raise
    # the walker copies what it keeps
    return FastSyncVectorEnv(
        [partial(_return_env, env) for env in envs], copy=False, autoreset_mode=AutoresetMode.DISABLED
    )


def _return_env(env: gymnasium.Env) -> gymnasium.Env:
    return env


def env_name(env: Any) -> str:
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


def single_envs(envs: VectorEnv) -> list[gymnasium.Env]:
    """The environments of this process that a vector env steps, without their wrappers; none where they are elsewhere."""
    unwrapped = envs.unwrapped
    return [env.unwrapped for env in unwrapped.envs] if isinstance(unwrapped, SyncVectorEnv) else []


def refuse_shared_copies(name: str, envs: VectorEnv, field: str = "env") -> None:
    """Refuse copies that are one object: a step or reset of one would move the others."""
    first: dict[int, int] = {}  # the copy in which an object was met
    for copy, env in enumerate(single_envs(envs)):
        if first.setdefault(id(env), copy) != copy:
            raise RequestError(
                f"{field} is {name!r}, whose copies {first[id(env)]} and {copy} are one and the same object: make a new "
                "environment at each call"
            )


def as_vector_env(
    env: gymnasium.Env | VectorEnv,
    seed_of: Callable[[int, int], int],
    outer_wrappers: tuple[Callable[[gymnasium.Env], gymnasium.Env], ...] = (),
) -> VectorEnv:
    """A user's own env as a vector env whose episodes get their seeds where that is possible.

    A single env becomes a vector env of one. In a `SyncVectorEnv` that resets by itself each sub-env is wrapped so that
    its resets are seeded; other vector envs that reset by themselves are seeded once, at the start.

    Args:
        outer_wrappers: wrappers of our own around a single env.
    """
    if isinstance(env, gymnasium.Env) and isinstance(env, VectorEnv):  # EnvPool's are both
        return EnvPoolVectorEnv(env)
    if isinstance(env, gymnasium.Env):
        for wrap in outer_wrappers:
            env = wrap(env)
        return FastSyncVectorEnv([lambda: with_mask(env)], autoreset_mode=AutoresetMode.DISABLED)
    unwrapped: Any = env.unwrapped
    if isinstance(unwrapped, SyncVectorEnv | AsyncVectorEnv):
        unwrapped._add_info = partial(merge_info, num_envs=unwrapped.num_envs)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(unwrapped, SyncVectorEnv):
        return with_masks(env)
    refuse_shared_copies(env_name(env), env)
    unwrapped.envs = [with_mask(sub) for sub in unwrapped.envs]
    if unwrapped.autoreset_mode is not AutoresetMode.DISABLED:
        # one that was adopted before, for another run, gets the seeds of this one
        sub_envs = [sub.env if isinstance(sub, SeededResets) else sub for sub in unwrapped.envs]
        unwrapped.envs = [SeededResets(sub, seed_of, row) for row, sub in enumerate(sub_envs)]
    return env


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """When a vector env resets copies whose episode is over; NEXT_STEP where it does not say."""
    return AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))


def seeds_rows(envs: VectorEnv) -> bool:
    """Whether every copy takes a seed of its own; native vector envs that reset by themselves share one generator."""
    each = isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv | FaultTolerantVectorEnv)
    return each or autoreset_mode(envs) is AutoresetMode.DISABLED


class SeededResets(gymnasium.Wrapper):
    """Gives every reset the seed of its row and episode, whoever asks for it."""

    def __init__(self, env: gymnasium.Env, seed_of: Callable[[int, int], int], row: int) -> None:
        super().__init__(env)
        self.seed_of, self.row, self.episode = seed_of, row, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.episode += 1
        return self.env.reset(seed=self.seed_of(self.row, self.episode), options=options)


class EnvPoolVectorEnv(VectorWrapper):
    """An EnvPool, which has had its seed and warns when it is given another."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset()


def check_env_or_wrapper(field: str, name: str) -> None:
    """Refuse `module:NAME` that is neither an environment or wrapper nor a registered id. It is imported, never called.

    For code that nobody but a run's config names: `os:system` is callable too.
    """
    module, _, attribute = name.rpartition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise RequestError(
            f"{field} is {name!r}: module {module!r} cannot be imported ({error}); install it"
        ) from error
    if field == "env" and loaded is None and attribute in gymnasium.registry:
        return
    base_classes = (gymnasium.Env, VectorEnv) if field == "env" else (gymnasium.Wrapper, VectorWrapper)
    if not (isinstance(loaded, type) and issubclass(loaded, base_classes)):
        description = "no environment" if field == "env" else "no wrapper"
        raise RequestError(f"{field} is {name!r}, which is {description}: name one yourself with --{field}")


def reward_threshold(envs: VectorEnv) -> float | None:
    """The return at which an environment counts as solved; None where it says none, or a wrapper may pay otherwise."""
    spec = envs.spec or getattr(next(iter(getattr(envs.unwrapped, "envs", [])), None), "spec", None)
    if spec is None:
        return None
    kinds: list[Any] = []
    if isinstance(spec, EnvSpec):  # EnvPool's is none
        known = gymnasium.registry.get(spec.id)  # the wrappers that are part of an id are meant by its threshold
        own = 0 if known is None else len(known.additional_wrappers)
        kinds = [_load_entry_point(wrapper.entry_point) for wrapper in spec.additional_wrappers[own:]]
    while isinstance(envs, VectorWrapper):
        kinds.append(type(envs))
        envs = envs.env
    return spec.reward_threshold if all(map(_keeps_rewards, kinds)) else None


def _load_entry_point(entry_point: str) -> Any:
    try:
        return load_env_creator(entry_point)
    except (ImportError, AttributeError, ValueError):  # a class within a function, say
        return None


def _keeps_rewards(kind: Any) -> bool:
    """Whether rewards pass a kind of wrapper as they are: Gymnasium's own and ours, and those that leave `step` to them."""
    step = getattr(kind, "step", None)
    ours = step is not None and step.__module__.partition(".")[0] in ("gymnasium", "understudy")
    return ours and not issubclass(kind, gymnasium.RewardWrapper | VectorRewardWrapper)


def one_line_message(error: BaseException) -> str:
    """An error's message on one line, with the line of the user's that it came from."""
    place = user_error_location(error)
    return (" ".join(str(error).split()) or type(error).__name__) + (f" ({place})" if place else "")


def _resolve_env_function(env: str | EnvFunction) -> EnvFunction:
    if not isinstance(env, str):
        return env
    module, _, name = env.rpartition(":")
    if (file := env.removesuffix(":")).endswith(".py"):
        _refuse_file(f"env is {env!r}", file)
    if module:
        loaded = _import_module(module, f"env is {env!r}")
        if hasattr(loaded, name):
            return getattr(loaded, name)
        if module.endswith(".py"):
            raise RequestError(f"env is {env!r}, but that file has no {name!r}{did_you_mean(name, dir(loaded))}")
    if name not in gymnasium.registry:
        raise RequestError(f"env is {env!r}, which Gymnasium does not know{did_you_mean(name, gymnasium.registry)}")
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
    loaded = _import_module(module, f"{field} is {text!r}")
    if not hasattr(loaded, name):
        raise RequestError(f"{field} is {text!r}, but there is no {name!r} in it{did_you_mean(name, dir(loaded))}")
    return getattr(loaded, name)


def _refuse_file(what: str, file: str) -> NoReturn:
    if not Path(file).is_file():
        raise RequestError(f"{what}: there is no file {file!r} in '{Path.cwd()}'; give its path, as FILE.py:CLASS")
    raise RequestError(f"{what}, a file and no class in it: write {file}:CLASS{listed(file, ast.ClassDef)}")


def _import_module(name: str, context: str) -> Any:
    """A module by its name, or by its file, FILE.py, which is found from the current directory.

    Raises:
        RequestError: it cannot be imported.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        file = Path(name).resolve()
        imported = sys.modules.get(file.stem)
        if imported is not None and getattr(imported, "__file__", None) == str(file):
            return imported
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise RequestError(f"{context}: there is no file {name!r} in '{Path.cwd()}'; give its path")
        loaded = importlib.util.module_from_spec(spec)
        if imported is None:
            sys.modules[file.stem] = loaded  # where classes of its own are looked up
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec.loader.exec_module(loaded)
        return loaded
    except RequestError:
        raise
    except ImportError as error:
        raise RequestError(f"{context}: module {name!r} cannot be imported ({error}); install it") from error
    except Exception as error:  # whatever a user's file raises
        raise RequestError(
            f"{context}: importing {name!r} raises {type(error).__name__}: {one_line_message(error)}; fix it"
        ) from error


def _parse_wrapper(text: str) -> tuple[Callable[..., gymnasium.Env], dict[str, Any]]:
    name, *pairs = text.split()
    module, _, attribute = name.rpartition(":")
    wrapper_class = getattr(_import_module(module or "gymnasium.wrappers", f"wrappers has {text!r}"), attribute, None)
    if wrapper_class is None:
        suggestion = "" if module else did_you_mean(attribute, dir(gymnasium.wrappers))
        raise RequestError(f"wrappers has {text!r}: there is no {name!r}{suggestion}")
    if any("=" not in pair for pair in pairs):
        raise RequestError(f"wrappers has {text!r}: write its arguments as key=value")
    return wrapper_class, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def _make_native(
    env: str | EnvFunction, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...]
) -> VectorEnv:
    env_function = _resolve_env_function(env)
    name = env.rpartition(":")[2] if isinstance(env, str) else ""
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: a native vector env takes none; use vectorization sync")
    if name not in gymnasium.registry:
        with _explain_errors(env_name(env), options):
            return with_masks(env_function(num_envs=num_envs, **options))  # pyright: ignore[reportArgumentType]
    if gymnasium.registry[name].vector_entry_point is None:
        raise RequestError(f"vectorization is 'native', but {env!r} has no vector env of its own: use sync or async")
    with _explain_errors(name, options):
        envs = gymnasium.make_vec(name, num_envs, vectorization_mode="vector_entry_point", **options)
    use_fast_action_space(envs)
    return with_masks(envs)


def _make_envpool(
    env: str | EnvFunction, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...], seed: int
) -> VectorEnv:
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: EnvPool takes none; use vectorization sync")
    try:
        import envpool  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise RequestError(f"vectorization is 'envpool', and EnvPool is missing: {install_hint('envpool')}") from error
    if not isinstance(env, str) or env not in envpool.list_all_envs():
        suggestion = did_you_mean(env_name(env), envpool.list_all_envs())
        raise RequestError(f"env is {env_name(env)!r}, which EnvPool does not know{suggestion}")
    with _explain_errors(env, options):
        envs: Any = envpool.make(env, env_type="gymnasium", num_envs=num_envs, seed=seed, **options)
    return EnvPoolVectorEnv(envs)


@contextmanager
def _explain_errors(env: str, options: dict[str, Any]) -> Iterator[None]:
    """What keeps an environment from being made, said in a sentence."""
    try:
        yield
    except gymnasium.error.DependencyNotInstalled as error:
        spec = gymnasium.registry.get(env.rpartition(":")[2])
        entry_point = str(spec.entry_point) if spec is not None else ""
        fix = next((install_hint(extra) for word, extra in EXTRAS.items() if word in entry_point), None)
        raise RequestError(
            f"env is {env!r}, which needs a package that is missing: {fix or one_line_message(error)}"
        ) from error
    except RequestError:
        raise
    except (Exception, GeneratorExit) as error:  # whatever a user's environment raises
        error_name = "" if isinstance(error, gymnasium.error.Error | TypeError) else f"{type(error).__name__}: "
        raise RequestError(
            f"env is {env!r} with env_options {options}: {error_name}{one_line_message(error)}"
        ) from error
