"""Environments that break something, named on the command line as `badly_behaved:NAME`."""

import multiprocessing
import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Plain(gymnasium.Env):
    """One observation, one reward, ends at step 5; each subclass breaks one thing."""

    observation_space: gymnasium.Space = spaces.Box(-1.0, 1.0, (2,))
    action_space: gymnasium.Space = spaces.Discrete(2)
    count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self.see(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self.see(), self.pay(), self.count == 5, False, {}

    def see(self) -> Any:
        return np.zeros(2, np.float32)

    def pay(self) -> Any:
        return 1.0


class WrongShape(Plain):
    def see(self) -> Any:
        return np.zeros(3, np.float32)


class OutOfBounds(Plain):
    def see(self) -> Any:
        return np.full(2, 7.0, np.float32)


class NanObservationLater(Plain):
    def see(self) -> Any:
        return np.full(2, np.nan if self.count == 4 else 0.0, np.float32)


class NanRewardLater(Plain):
    def pay(self) -> Any:
        return float("nan") if self.count == 4 else 1.0


class NanRewardAtOnce(Plain):
    def pay(self) -> Any:
        return float("nan")


class IntegerBox(Plain):
    action_space = spaces.Box(0, 3, (1,), np.int32)


class Talks(Plain):
    observation_space = spaces.Text(5)


class RaisesAtOnce(Plain):
    def see(self) -> Any:
        raise RuntimeError("the simulator is not there")


class RaisesLater(Plain):
    def pay(self) -> Any:
        if self.count == 4:
            raise RuntimeError("the simulator\nwent away")
        return 1.0


class RaisesSilentlyLater(Plain):
    kind: type[BaseException] = StopIteration

    def pay(self) -> Any:
        if self.count == 4:
            raise self.kind
        return 1.0


class RaisesGeneratorExitLater(RaisesSilentlyLater):
    kind = GeneratorExit


class RaisesMemoryErrorLater(RaisesSilentlyLater):
    kind = MemoryError


class EndsItsProcessLater(Plain):
    def pay(self) -> Any:
        if self.count == 4 and multiprocessing.parent_process() is not None:  # not in preflight
            os._exit(7)
        return 1.0


class RaisesGeneratorExitAtOnce(Plain):
    def see(self) -> Any:
        raise GeneratorExit


class RaisesWhenClosed(Plain):
    def close(self) -> None:
        raise RuntimeError("the window was gone")


class RaisesWhenClosedLater(Plain):
    closed = 0

    def close(self) -> None:
        RaisesWhenClosedLater.closed += 1
        if RaisesWhenClosedLater.closed > 3:  # three that preflight opens
            raise RuntimeError("the window was gone")
