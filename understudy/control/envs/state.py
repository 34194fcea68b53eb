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
from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv
from understudy.control.envs.masks import find_action_mask, sample_allowed_action
from understudy.control.envs.spaces import fast_stack
from understudy.run.seeds import preserve_shared_generators, seed_shared_generators

RestoreMethod = Literal["snapshot", "replay", "renew", "restart"]
MAX_REPLAY_STEPS = 10_000
"""Steps of an open episode that are replayed; at a checkpoint, a longer one is cut and all rows begin new episodes."""
MAX_UNFOLDED_CALLS = 128
"""Calls of the env that are kept as they are before they are folded into a trail."""
PROBE_STEPS = 64
"""Steps after which an environment is reset, to see whether a seed makes it forget them."""
_PLAIN_TYPES = (np.ndarray, np.generic, np.random.Generator, int, float, str, bool, type(None))
_CONSTANT_TYPES = (gymnasium.Space, EnvSpec)


def choose_restore_method(envs: VectorEnv, *, resets_are_reproducible: bool) -> RestoreMethod:
    """How this vector env is put back.

    Args:
        resets_are_reproducible: a reset with a seed leaves nothing of what was before.
    """
    unwrapped: Any = envs.unwrapped
    if envs is unwrapped and (_has_state_methods(unwrapped) or _has_plain_state(unwrapped)):
        return "snapshot"
    can_be_seeded = (
        isinstance(unwrapped, SyncVectorEnv | AsyncVectorEnv | FaultTolerantVectorEnv)
        and unwrapped.autoreset_mode is AutoresetMode.DISABLED
    )
    if not can_be_seeded:
        return "renew"
    if isinstance(unwrapped, SyncVectorEnv) and all(map(_has_state_methods, unwrapped.envs)):
        return "snapshot"
    return "replay" if resets_are_reproducible else "renew"


def snapshot(envs: VectorEnv) -> Any:
    """The state of a vector env of way "snapshot"."""
    unwrapped: Any = envs.unwrapped
    if _has_state_methods(unwrapped):
        return unwrapped.get_state()
    if isinstance(unwrapped, SyncVectorEnv):
        return {"states": [sub.get_state() for sub in unwrapped.envs], "observations": list(unwrapped._env_obs)}  # pyright: ignore
    return {name: value for name, value in vars(unwrapped).items() if not isinstance(value, _CONSTANT_TYPES)}


def restore_snapshot(envs: VectorEnv, state: Any) -> None:
    """Make a fresh vector env stand where `snapshot` was taken."""
    unwrapped: Any = envs.unwrapped
    if _has_state_methods(unwrapped):
        unwrapped.set_state(state)
        return
    envs.reset(seed=0)
    if isinstance(unwrapped, SyncVectorEnv):
        for sub, sub_state in zip(unwrapped.envs, state["states"], strict=True):
            sub.set_state(sub_state)  # pyright: ignore[reportAttributeAccessIssue]
        unwrapped._env_obs = list(state["observations"])
        return
    for name, value in state.items():
        if isinstance(vars(unwrapped).get(name), np.random.Generator):
            vars(unwrapped)[name].bit_generator.state = value
        else:
            setattr(unwrapped, name, value)


def _has_state_methods(env: Any) -> bool:
    """Whether an environment has both methods, under no wrapper that has a state of its own."""
    return callable(getattr(env, "get_state", None)) and callable(getattr(env, "set_state", None))


def _has_plain_state(env: VectorEnv) -> bool:
    """Whether nothing in a vector env but constants is anything else than numbers, arrays and a generator."""
    allowed_types = (*_PLAIN_TYPES, *_CONSTANT_TYPES)
    return not isinstance(env, SyncVectorEnv | AsyncVectorEnv) and all(
        isinstance(x, allowed_types) for x in vars(env).values()
    )


def has_reproducible_resets(env: gymnasium.Env, seed: int) -> bool:
    """Whether an episode is the same after another one as it was before; the environment is closed.

    The walk is short (64 steps): what shows itself later is found by the digest when a run is resumed.
    """
    try:
        env.action_space.seed(seed)
        actions = [env.action_space.sample() for _ in range(PROBE_STEPS)]
        return _digest_episode(env, seed, actions) == _digest_episode(env, seed, actions)
    except (Exception, GeneratorExit):  # preflight has said what is wrong, if anything is
        return True
    finally:
        env.close()


def obeys_seed(made: Callable[[], gymnasium.Env], seed: int) -> bool:
    """Whether the first episodes of two fresh environments are the same from one seed; both are closed.

    An environment may draw from the shared generators, which a run seeds and its checkpoints hold.
    """
    walks = []
    for _ in range(2):
        with preserve_shared_generators():
            seed_shared_generators(seed)
            with closing(made()) as env:
                env.action_space.seed(seed)
                walks.append(_digest_episode(env, seed, [env.action_space.sample() for _ in range(PROBE_STEPS)]))
    return walks[0] == walks[1]


def _digest_episode(env: gymnasium.Env, seed: int, actions: Sequence[Any]) -> str:
    """A digest of an episode from a seed, as far as these actions go; where there is a mask, random ones that it allows."""
    digest, rng = hashlib.blake2b(), np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    digest.update(repr(to_bytes(obs)).encode())
    for action in actions:
        allowed = find_action_mask(env.action_space, obs, info)
        action = action if allowed is None else sample_allowed_action(env.action_space, allowed, rng)
        obs, reward, terminated, truncated, info = env.step(copy.deepcopy(action))  # it may be written over
        digest.update(repr((to_bytes(obs), float(reward), bool(terminated))).encode())
        if terminated or truncated:
            break
    return digest.hexdigest()


def to_bytes(obs: Any) -> Any:
    """An observation, or a batch of them, as what can be compared."""
    if isinstance(obs, dict):
        return [to_bytes(obs[key]) for key in sorted(obs)]
    return [to_bytes(part) for part in obs] if isinstance(obs, tuple) else np.asarray(obs).tobytes()


class ActionLog:
    """What every row executed since its open episode began, and a running digest of what it saw and was paid."""

    def __init__(self, num_rows: int) -> None:
        self.calls: list[tuple[np.ndarray, Tree, np.ndarray, np.ndarray]] = []
        """Of the calls that are not folded yet: the actions as the env got them, what was seen before them, what they
        paid, and the rows whose next episodes began after them."""
        self.actions: list[list[np.ndarray]] = [[] for _ in range(num_rows)]
        self.digests = [hashlib.blake2b() for _ in range(num_rows)]

    def begin_episodes(self, rows: np.ndarray) -> None:
        """New episodes in these rows, bool [rows], before the next call."""
        self.fold_calls()
        for row in np.flatnonzero(rows):
            self.actions[row], self.digests[row] = [], hashlib.blake2b()

    def fold_calls(self) -> None:
        """Put the calls into each row's actions and digest, from the beginning of its open episode on."""
        if not self.calls:
            return
        env_actions, obs, reward, done = zip(*self.calls, strict=True)
        self.calls = []
        stacked_actions, stacked_done = fast_stack(env_actions), fast_stack(done)  # [calls, rows, ...], [calls, rows]
        stacked_bytes = np.concatenate(
            [*map(_as_bytes, _stack_leaves(obs)), _as_bytes(fast_stack(reward))], axis=2
        )  # uint8 [calls, rows, bytes]
        for row, row_done in enumerate(stacked_done.T):
            start = int(np.flatnonzero(row_done)[-1]) + 1 if row_done.any() else 0
            if start:
                self.actions[row], self.digests[row] = [], hashlib.blake2b()
            self.actions[row].append(stacked_actions[start:, row])
            self.digests[row].update(np.ascontiguousarray(stacked_bytes[start:, row]).data)

    def state(self) -> dict[str, Any]:
        """What a replay takes, and must come to."""
        self.fold_calls()
        actions = [np.concatenate(parts) if parts else np.zeros(0) for parts in self.actions]
        return {"actions": actions, "digests": [digest.hexdigest() for digest in self.digests]}


def _stack_leaves(obs: Sequence[Tree]) -> list[np.ndarray]:
    """The leaves of observations, each [calls, rows, ...]."""
    if isinstance(obs[0], dict):
        return [fast_stack([tree[name] for tree in obs]) for name in sorted(obs[0])]
    return [fast_stack(obs)]


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """[calls, rows, ...] -> the same bytes as uint8 [calls, rows, bytes]."""
    num_calls, num_rows = array.shape[:2]
    return np.ascontiguousarray(array).reshape(num_calls, num_rows, -1).view(np.uint8)


def replay_schedule(lengths: Sequence[int]) -> list[np.ndarray]:
    """Which rows have begun at each of the replay's calls, so that all end together: bool [rows] a call.

    >>> [w.tolist() for w in replay_schedule([2, 0, 1])]
    [[True, False, False], [True, False, True]]
    """
    longest = max(lengths)
    return [np.array([longest - length <= call for length in lengths]) for call in range(longest)]
