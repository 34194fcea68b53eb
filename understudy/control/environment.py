"""Environments by id, entry point or object, as one vector env; what is missing or misspelt is said in a sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium
import yaml
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from understudy.control.infos import SendableInfo, merge
from understudy.control.parallel import Async
from understudy.control.masks import check_mask, with_mask, with_masks
from understudy.control.rows import Rows, quicken
from understudy.control.spaces import check_action_space, check_observation_space
from understudy.control.supervise import Supervised
from understudy.run.config import RequestError, nearest
from understudy.run.installation import install_hint

# the extra of this package that brings what an environment's own package needs, told by its entry point
EXTRAS = {"box2d": "box2d", "mujoco": "mujoco"}


def make(
    env: str,
    *,
    num_envs: int,
    vectorization: str = "sync",
    options: dict[str, Any] | None = None,
    wrappers: tuple[str, ...] = (),
    render: bool = False,
    step_timeout: float | None = None,
    seed: int = 0,
) -> VectorEnv:
    """A vector env of `num_envs` copies; sync, async and supervised ones never reset by themselves.

    Args:
        env: a Gymnasium id, `module:id`, or an entry point `module:Class`.
        vectorization: "sync", "async" (a process each), "supervised" (the same, restarted on faults), "native" (the id's
            own vector env), or "envpool".
        options: keyword arguments of the environment.
        wrappers: each "Name key=value ...", Name from gymnasium.wrappers or `module:Class`; the first is innermost.
        step_timeout: only for supervised ones, seconds that a step or a reset may take; None for no limit.
        seed: only for EnvPool, which takes it when it is made.

    Raises:
        RequestError: unknown id, missing extra, unknown wrapper, unsupported space.
    """
    options = dict(options or {})
    if render:
        options["render_mode"] = "rgb_array"
    if vectorization == "envpool":
        envs = _envpool(env, num_envs, options, wrappers, seed)
    elif vectorization == "native":
        envs = _native(env, num_envs, options, wrappers)
    else:
        kinds: dict[str, Any] = {"sync": partial(Rows, copy=False)}  # a walker copies what it keeps
        kinds["async"] = Async
        kinds["supervised"] = partial(Supervised, step_timeout=step_timeout)
        envs = kinds[vectorization]([single(env, options, wrappers)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    try:
        check_spaces(env, envs.single_observation_space, envs.single_action_space)
    except RequestError:
        envs.close()
        raise
    return envs


def check_spaces(env: str, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
    """Refuse an environment whose spaces a policy cannot read or act in."""
    try:
        check_observation_space(observation_space)
        check_action_space(action_space)
        check_mask(observation_space, action_space)
    except ValueError as error:
        raise RequestError(f"env is {env!r}: its {error}") from error


def adopt(env: gymnasium.Env | VectorEnv, seed_of: Callable[[int, int], int]) -> VectorEnv:
    """A user's own env as a vector env whose episodes get their seeds where that is possible.

    A single env becomes a vector env of one. In a `SyncVectorEnv` that resets by itself each sub-env is wrapped so that
    its resets are seeded; other vector envs that reset by themselves are seeded once, at the start.
    """
    if isinstance(env, gymnasium.Env) and isinstance(env, VectorEnv):  # EnvPool's are both
        return SeededWhenMade(env)
    if isinstance(env, gymnasium.Env):
        return Rows([lambda: with_mask(env)], autoreset_mode=AutoresetMode.DISABLED)
    inner = env.unwrapped
    if not isinstance(inner, SyncVectorEnv):
        return with_masks(env)
    inner.envs = [with_mask(sub) for sub in inner.envs]
    if inner.autoreset_mode is not AutoresetMode.DISABLED:
        # one that was adopted before, for another run, gets the seeds of this one
        subs = [sub.env if isinstance(sub, SeededResets) else sub for sub in inner.envs]
        inner.envs = [SeededResets(sub, seed_of, row) for row, sub in enumerate(subs)]
    return env


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


def single(
    env: str, options: dict[str, Any] | None = None, wrappers: tuple[str, ...] = ()
) -> Callable[[], gymnasium.Env]:
    """Makes one environment, wrapped. Its names are resolved now, so that a wrong one is refused before any process."""
    maker = _maker(env)
    wraps = [_wrapper(text) for text in wrappers]

    def build() -> gymnasium.Env:
        with _explained(env, options or {}):
            made = maker(**(options or {}))
        if isinstance(made, gymnasium.Env):
            quicken(made)
        for text, (wrap, arguments) in zip(wrappers, wraps, strict=True):
            try:
                made = wrap(made, **arguments)
            except (TypeError, ValueError, AssertionError, gymnasium.error.Error) as error:
                raise RequestError(f"wrappers has {text!r}, which does not fit: {first_sentence(error)}") from error
        return with_mask(made) if isinstance(made, gymnasium.Env) else made

    return build


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
    """The return at which the environment counts as solved, where it says one."""
    spec = envs.spec or getattr(next(iter(getattr(envs.unwrapped, "envs", [])), None), "spec", None)
    return None if spec is None else spec.reward_threshold


def first_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _maker(env: str) -> Callable[..., gymnasium.Env]:
    module, _, name = env.rpartition(":")
    if module:
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            raise RequestError(f"env is {env!r}: module {module!r} cannot be imported ({error}); install it") from error
        if hasattr(loaded, name):
            return getattr(loaded, name)
    if name not in gymnasium.registry:
        raise RequestError(f"env is {env!r}, which Gymnasium does not know{nearest(name, gymnasium.registry)}")
    # the passive checker looks at the first step only; the walker looks at all of them
    return lambda **options: gymnasium.make(name, disable_env_checker=True, **options)


def _wrapper(text: str) -> tuple[Callable[..., gymnasium.Env], dict[str, Any]]:
    name, *pairs = text.split()
    module, _, attribute = name.rpartition(":")
    try:
        source = importlib.import_module(module or "gymnasium.wrappers")
        wrap = getattr(source, attribute)
    except (ImportError, AttributeError) as error:
        close = "" if module else nearest(attribute, dir(gymnasium.wrappers))
        raise RequestError(f"wrappers has {text!r}: there is no {name!r}{close}") from error
    if any("=" not in pair for pair in pairs):
        raise RequestError(f"wrappers has {text!r}: write its arguments as key=value")
    return wrap, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def _native(env: str, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...]) -> VectorEnv:
    maker = _maker(env)
    name = env.rpartition(":")[2]
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: a native vector env takes none; use vectorization sync")
    if name not in gymnasium.registry:
        return with_masks(maker(num_envs=num_envs, **options))  # pyright: ignore[reportArgumentType]
    if gymnasium.registry[name].vector_entry_point is None:
        raise RequestError(f"vectorization is 'native', but {env!r} has no vector env of its own: use sync or async")
    with _explained(env, options):
        envs = gymnasium.make_vec(name, num_envs, vectorization_mode="vector_entry_point", **options)
    quicken(envs)
    return with_masks(envs)


def _envpool(env: str, num_envs: int, options: dict[str, Any], wrappers: tuple[str, ...], seed: int) -> VectorEnv:
    if wrappers:
        raise RequestError(f"wrappers is {wrappers!r}: EnvPool takes none; use vectorization sync")
    try:
        import envpool  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise RequestError(f"vectorization is 'envpool', and EnvPool is missing: {install_hint('envpool')}") from error
    if env not in envpool.list_all_envs():
        raise RequestError(f"env is {env!r}, which EnvPool does not know{nearest(env, envpool.list_all_envs())}")
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
    except (gymnasium.error.Error, TypeError) as error:
        raise RequestError(f"env is {env!r} with env_options {options}: {first_sentence(error)}") from error
