"""Where the environments stand: written down at a checkpoint, and put back in a new process to the bit.

Four ways, the first that an environment allows:

- snapshot: it says its state itself (`get_state`, `set_state`), or keeps it in plain arrays, as Gymnasium's native vector
  envs do;
- replay: every row's open episode begins again from its seed and its executed actions are done again; a digest of all
  that came back since the reset must be the same;
- renew: what remembers something across episodes, or takes no seeds, is made anew at every checkpoint, with a seed of
  that checkpoint; in a run that is never interrupted too, so that both go on alike. The open episodes are cut there;
- restart: where that is not wanted, or nothing would come of it, environments go on, and a resumed run begins new episodes
  in new ones. It is then not the run that was interrupted, and says so.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from understudy.batch import Tree
from understudy.control.masks import mask_of, random_allowed
from understudy.control.spaces import stacked
from understudy.control.supervise import Supervised
from understudy.run.seeds import seed_shared_generators, shared_generators_kept

Way = Literal["snapshot", "replay", "renew", "restart"]
LONGEST = 10_000
"""Steps of an open episode that are replayed; at a checkpoint, a longer one is cut and all rows begin new episodes."""
FOLD = 128
"""Calls of the env that are kept as they are before they are folded into a trail."""
PROBE = 64
"""Steps after which an environment is reset, to see whether a seed makes it forget them."""
_PLAIN = (np.ndarray, np.generic, np.random.Generator, int, float, str, bool, type(None))
_CONSTANT = (gymnasium.Space, EnvSpec)


def way_of(envs: VectorEnv, *, forgets: bool) -> Way:
    """How this vector env is put back.

    Args:
        forgets: a reset with a seed leaves nothing of what was before.
    """
    inner: Any = envs.unwrapped
    if envs is inner and (_says_itself(inner) or _plain_native(inner)):
        return "snapshot"
    seeded = (
        isinstance(inner, SyncVectorEnv | AsyncVectorEnv | Supervised)
        and inner.autoreset_mode is AutoresetMode.DISABLED
    )
    if not seeded:
        return "renew"
    if isinstance(inner, SyncVectorEnv) and all(map(_says_itself, inner.envs)):
        return "snapshot"
    return "replay" if forgets else "renew"


def snapshot(envs: VectorEnv) -> Any:
    """The state of a vector env of way "snapshot"."""
    inner: Any = envs.unwrapped
    if _says_itself(inner):
        return inner.get_state()
    if isinstance(inner, SyncVectorEnv):
        return {"states": [sub.get_state() for sub in inner.envs], "observations": list(inner._env_obs)}  # pyright: ignore
    return {name: value for name, value in vars(inner).items() if not isinstance(value, _CONSTANT)}


def put_back(envs: VectorEnv, state: Any) -> None:
    """Make a fresh vector env stand where `snapshot` was taken."""
    inner: Any = envs.unwrapped
    if _says_itself(inner):
        inner.set_state(state)
        return
    envs.reset(seed=0)
    if isinstance(inner, SyncVectorEnv):
        for sub, own in zip(inner.envs, state["states"], strict=True):
            sub.set_state(own)  # pyright: ignore[reportAttributeAccessIssue]
        inner._env_obs = list(state["observations"])
        return
    for name, value in state.items():
        if isinstance(vars(inner).get(name), np.random.Generator):
            vars(inner)[name].bit_generator.state = value
        else:
            setattr(inner, name, value)


def _says_itself(env: Any) -> bool:
    """Whether an environment has both methods, under no wrapper that has a state of its own."""
    return callable(getattr(env, "get_state", None)) and callable(getattr(env, "set_state", None))


def _plain_native(env: VectorEnv) -> bool:
    """Whether nothing in a vector env but constants is anything else than numbers, arrays and a generator."""
    kinds = (*_PLAIN, *_CONSTANT)
    return not isinstance(env, SyncVectorEnv | AsyncVectorEnv) and all(isinstance(x, kinds) for x in vars(env).values())


def forgets(env: gymnasium.Env, seed: int) -> bool:
    """Whether an episode is the same after another one as it was before; the environment is closed.

    The walk is short (64 steps): what shows itself later is found by the digest when a run is resumed.
    """
    try:
        env.action_space.seed(seed)
        actions = [env.action_space.sample() for _ in range(PROBE)]
        return _walked(env, seed, actions) == _walked(env, seed, actions)
    except Exception:  # preflight has said what is wrong, if anything is
        return True
    finally:
        env.close()


def obeys_seed(made: Callable[[], gymnasium.Env], seed: int) -> bool:
    """Whether the first episodes of two fresh environments are the same from one seed; both are closed.

    An environment may draw from the shared generators, which a run seeds and its checkpoints hold.
    """
    walks = []
    for _ in range(2):
        with shared_generators_kept():
            seed_shared_generators(seed)
            with closing(made()) as env:
                env.action_space.seed(seed)
                walks.append(_walked(env, seed, [env.action_space.sample() for _ in range(PROBE)]))
    return walks[0] == walks[1]


def _walked(env: gymnasium.Env, seed: int, actions: Sequence[Any]) -> str:
    """A digest of an episode from a seed, as far as these actions go; where there is a mask, random ones that it allows."""
    found, rng = hashlib.blake2b(), np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    found.update(repr(to_bytes(obs)).encode())
    for action in actions:
        allowed = mask_of(env.action_space, obs, info)
        action = action if allowed is None else random_allowed(env.action_space, allowed, rng)
        obs, reward, terminated, truncated, info = env.step(copy.deepcopy(action))  # it may be written over
        found.update(repr((to_bytes(obs), float(reward), bool(terminated))).encode())
        if terminated or truncated:
            break
    return found.hexdigest()


def to_bytes(obs: Any) -> Any:
    """An observation, or a batch of them, as what can be compared."""
    if isinstance(obs, dict):
        return [to_bytes(obs[key]) for key in sorted(obs)]
    return [to_bytes(part) for part in obs] if isinstance(obs, tuple) else np.asarray(obs).tobytes()


class Trail:
    """What every row executed since its open episode began, and a running digest of what it saw and was paid."""

    def __init__(self, rows: int) -> None:
        self.calls: list[tuple[np.ndarray, Tree, np.ndarray, np.ndarray]] = []
        """Of the calls that are not folded yet: the actions as the env got them, what was seen before them, what they
        paid, and the rows whose next episodes began after them."""
        self.actions: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self.digests = [hashlib.blake2b() for _ in range(rows)]

    def begin(self, rows: np.ndarray) -> None:
        """New episodes in these rows, bool [rows], before the next call."""
        self.fold()
        for row in np.flatnonzero(rows):
            self.actions[row], self.digests[row] = [], hashlib.blake2b()

    def fold(self) -> None:
        """Put the calls into each row's actions and digest, from the beginning of its open episode on."""
        if not self.calls:
            return
        executed, obs, reward, over = zip(*self.calls, strict=True)
        self.calls = []
        done, ended = stacked(executed), stacked(over)  # [calls, rows, ...], [calls, rows]
        seen = np.concatenate(
            [*map(_flat, _columns(obs)), _flat(stacked(reward))], axis=2
        )  # uint8 [calls, rows, bytes]
        for row, ends in enumerate(ended.T):
            first = int(np.flatnonzero(ends)[-1]) + 1 if ends.any() else 0
            if first:
                self.actions[row], self.digests[row] = [], hashlib.blake2b()
            self.actions[row].append(done[first:, row])
            self.digests[row].update(np.ascontiguousarray(seen[first:, row]).data)

    def state(self) -> dict[str, Any]:
        """What a replay takes, and must come to."""
        self.fold()
        actions = [np.concatenate(parts) if parts else np.zeros(0) for parts in self.actions]
        return {"actions": actions, "digests": [digest.hexdigest() for digest in self.digests]}


def _columns(obs: Sequence[Tree]) -> list[np.ndarray]:
    """The leaves of observations, each [calls, rows, ...]."""
    if isinstance(obs[0], dict):
        return [stacked([tree[name] for tree in obs]) for name in sorted(obs[0])]
    return [stacked(obs)]


def _flat(array: np.ndarray) -> np.ndarray:
    """[calls, rows, ...] -> the same bytes as uint8 [calls, rows, bytes]."""
    calls, rows = array.shape[:2]
    return np.ascontiguousarray(array).reshape(calls, rows, -1).view(np.uint8)


def waiting(lengths: Sequence[int]) -> list[np.ndarray]:
    """Which rows have begun at each of the replay's calls, so that all end together: bool [rows] a call.

    >>> [w.tolist() for w in waiting([2, 0, 1])]
    [[True, False, False], [True, False, True]]
    """
    longest = max(lengths)
    return [np.array([longest - length <= call for length in lengths]) for call in range(longest)]
