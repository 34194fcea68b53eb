"""Step 2, score: bounds on what is measured. One that is broken warns, stops, goes back, or costs reward until it holds."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from understudy.run.config import RequestError, nearest

Response = Literal["hold", "warn", "stop", "rollback"]
GOES_ON = ("multipliers", "broken", "went_back", "stopped", "inside")  # of `Bounds`, in a checkpoint
WRITTEN = re.compile(r"(?P<name>.+)(?P<sense><=|>=)(?P<limit>[^:]*)(?::(?P<response>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Constraint:
    """The mean of `name` is to stay at most, or at least, at `limit`."""

    name: str
    at_most: bool
    limit: float
    response: Response

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """`NAME<=LIMIT` or `NAME>=LIMIT`; behind it `:hold`, which is meant without it too, `:warn`, `:stop` or `:rollback`.

        Raises:
            RequestError: it is written otherwise.
        """
        found = WRITTEN.fullmatch(text)
        name = found["name"].strip() if found else ""
        if found is None or not name:
            raise RequestError(f"constraint is {text!r}: write NAME<=LIMIT or NAME>=LIMIT, as in 'repetition<=0.1'")
        try:
            limit = float(found["limit"])
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise RequestError(f"constraint is {text!r}: its limit {found['limit'].strip()!r} must be a finite number")
        response = "hold" if found["response"] is None else found["response"].strip()
        if response not in get_args(Response):
            raise RequestError(
                f"constraint is {text!r}: what follows the ':' must be one of {', '.join(get_args(Response))}"
                f"{nearest(response, get_args(Response))}"
            )
        return cls(name, found["sense"] == "<=", limit, cast("Response", response))

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.at_most else '>='}{self.limit:g}"

    @property
    def sign(self) -> float:
        """1 where more is worse, -1 where less is."""
        return 1.0 if self.at_most else -1.0

    def excess(self, value: float) -> float:
        """How far a value is outside; 0 or less where it is inside."""
        return self.sign * (value - self.limit)


def adapt_multiplier(multiplier: float, excess: float, *, rate: float) -> float:
    """The next Lagrange multiplier, max(0, multiplier + rate * excess): a step on the dual (Ray et al. 2019).

    Args:
        excess: J_C - d, the mean cost less its limit. Where it stays below 0, the multiplier falls to 0: a bound that is
            not reached costs nothing.
    """
    return max(0.0, multiplier + rate * excess)


def charge(reward: Tensor, cost: Tensor, *, multiplier: float) -> Tensor:
    """The penalised reward r - multiplier * c (Tessler et al. 2019); reward and cost alike in shape.

    PPO-Lagrangian divides it by 1 + multiplier. It is left whole here: divided, a nat of KL to the reference, or of entropy,
    would cost 1 + multiplier times as much reward, and the optimum under the bound would be another one. What the division
    is for, steps of one size, standardised advantages do.
    """
    return reward - multiplier * cost


class Bounds:
    """The constraints of a run: what each multiplier is now, which are broken, and the last state in which none was.

    An iteration goes `begin`, `charge`, `close`. What is held is charged with the multiplier that has just been adapted.

    Attributes:
        stopped: why the run is to end; None as long as it is not.
        pace: what learning rates are multiplied by; every way back halves it, for the same steps would lead out again.
    """

    def __init__(self, constraints: Sequence[Constraint], *, rate: float, rollbacks: int) -> None:
        """rate: of `adapt_multiplier`.  rollbacks: how often the run may go back; then it stops, inside."""
        self.constraints: dict[str, Constraint] = {}
        for one in constraints:
            name = f"{one.name}_at_{'most' if one.at_most else 'least'}"
            names = (name, *(f"{name}_{i}" for i in range(2, len(constraints) + 1)))
            self.constraints[next(free for free in names if free not in self.constraints)] = one
        self.rate, self.rollbacks = rate, rollbacks
        self.multipliers = {name: 0.0 for name, one in self.constraints.items() if one.response == "hold"}
        self.broken = dict.fromkeys(self.constraints, False)
        self.went_back = 0
        self.stopped: str | None = None
        self.inside: tuple[Any, Any] | None = None  # model and optimizer when nothing that goes back was broken
        self._before: tuple[Any, Any] | None = None
        self._values: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """What is bounded, each once."""
        return list(dict.fromkeys(one.name for one in self.constraints.values()))

    @property
    def pace(self) -> float:
        return 0.5**self.went_back

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on must know again: plain numbers and text, and tensors where it may go back."""
        state = {name: getattr(self, name) for name in GOES_ON}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        for name in GOES_ON:
            setattr(self, name, state[name])

    def begin(self, values: Mapping[str, float], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Before the update: adapt the multipliers to what the policy, as it now is, comes to.

        Args:
            values: means by name; what is absent or nan was not measured this time, and nothing follows from it.
        """
        self._values = {name: x for name, x in values.items() if math.isfinite(x)}
        for name in self.multipliers:
            one = self.constraints[name]
            if one.name in self._values:
                excess = one.excess(self._values[one.name])
                self.multipliers[name] = adapt_multiplier(self.multipliers[name], excess, rate=self.rate)
        if any(one.response == "rollback" for one in self.constraints.values()):
            self._before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def charge(self, reward: Tensor, cost: Mapping[str, Tensor]) -> Tensor:
        """The reward with every held cost taken off; costs by name, each of the reward's shape."""
        for name, multiplier in self.multipliers.items():
            one = self.constraints[name]
            reward = charge(reward, one.sign * cost[one.name].to(reward), multiplier=multiplier)
        return reward

    def close(
        self,
        values: Mapping[str, float],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        event: Callable[..., None],
    ) -> dict[str, float]:
        """After the update: say what broke and what holds again, stop or go back; the iteration's metrics.

        Args:
            values: what was measured since `begin`.
            event: `(kind, **about)`, told of a bound that breaks or holds again, of a way back and of a stop.
        """
        found = self._values | {name: x for name, x in values.items() if math.isfinite(x)}
        metrics, outside, unknown = {}, None, False
        for name, one in self.constraints.items():
            if one.name not in found:
                unknown |= one.response == "rollback"
                continue
            value, limit = found[one.name], one.limit
            metrics |= {f"constraint_{one.name}": value, f"constraint_{name}": limit}
            if name in self.multipliers:
                metrics[f"constraint_{name}_multiplier"] = self.multipliers[name]
            broken = one.excess(value) > 0
            if broken != self.broken[name]:
                about = {"value": value, "limit": limit, "broken": broken, "response": one.response}
                event("constraint", constraint=str(one), text=_said(one, value, broken), **about)
            self.broken[name] = broken
            if broken and one.response == "stop":
                self.stopped = _said(one, value, broken)
            if broken and one.response == "rollback":
                outside = _said(one, value, broken)
        if outside is not None:
            self._go_back(outside, model, optimizer, event)
        elif self._before is not None and not unknown:
            self.inside = self._before
        self._before, self._values = None, {}
        if self.stopped is not None:
            event("stopped", text=self.stopped)
        return metrics

    def _go_back(
        self, why: str, model: nn.Module, optimizer: torch.optim.Optimizer, event: Callable[..., None]
    ) -> None:
        """Weights and optimizer as they last were inside, if they ever were; half the learning rate from now on."""
        if self.inside is None:
            return
        weights, steps = self.inside
        for group in steps["param_groups"]:
            group["lr"] /= 2
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(steps))
        if self.went_back == self.rollbacks:
            self.stopped = f"{why}, after all {self.rollbacks} ways back that constraint_rollbacks allows"
        else:
            self.went_back += 1
        event("rolled_back", text=why, times=self.went_back)


def _said(one: Constraint, value: float, broken: bool) -> str:
    return f"{one.name} is {value:.4g}: {'outside' if broken else 'within'} {one}"
