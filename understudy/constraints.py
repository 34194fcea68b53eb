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

from understudy.run.config import RequestError, did_you_mean

Response = Literal["hold", "warn", "stop", "rollback"]
STATE_FIELDS = (
    "multipliers",
    "broken",
    "num_rollbacks",
    "stop_reason",
    "last_feasible_state",
)  # of `Bounds`, in a checkpoint
CONSTRAINT_PATTERN = re.compile(r"(?P<name>.+)(?P<sense><=|>=)(?P<limit>[^:]*)(?::(?P<response>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Constraint:
    """The mean of `name` is to stay at most, or at least, at `limit`."""

    name: str
    is_upper_bound: bool
    limit: float
    response: Response

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """`NAME<=LIMIT` or `NAME>=LIMIT`; behind it `:hold`, which is meant without it too, `:warn`, `:stop` or `:rollback`.

        Raises:
            RequestError: it is written otherwise.
        """
        match = CONSTRAINT_PATTERN.fullmatch(text)
        name = match["name"].strip() if match else ""
        if match is None or not name:
            raise RequestError(f"constraint is {text!r}: write NAME<=LIMIT or NAME>=LIMIT, as in 'repetition<=0.1'")
        try:
            limit = float(match["limit"])
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise RequestError(f"constraint is {text!r}: its limit {match['limit'].strip()!r} must be a finite number")
        response = "hold" if match["response"] is None else match["response"].strip()
        if response not in get_args(Response):
            raise RequestError(
                f"constraint is {text!r}: what follows the ':' must be one of {', '.join(get_args(Response))}"
                f"{did_you_mean(response, get_args(Response))}"
            )
        return cls(name, match["sense"] == "<=", limit, cast("Response", response))

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.is_upper_bound else '>='}{self.limit:g}"

    @property
    def sign(self) -> float:
        """1 where more is worse, -1 where less is."""
        return 1.0 if self.is_upper_bound else -1.0

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


def subtract_constraint_cost(reward: Tensor, cost: Tensor, *, multiplier: float) -> Tensor:
    """The penalised reward r - multiplier * c (Tessler et al. 2019); reward and cost alike in shape.

    PPO-Lagrangian divides it by 1 + multiplier. It is left whole here: divided, a nat of KL to the reference, or of entropy,
    would cost 1 + multiplier times as much reward, and the optimum under the bound would be another one. What the division
    is for, steps of one size, standardised advantages do.
    """
    return reward - multiplier * cost


class LagrangianConstraints:
    """The constraints of a run: what each multiplier is now, which are broken, and the last state in which none was.

    An iteration goes `begin`, `subtract_constraint_costs`, `close`. What is held is charged with the multiplier that
    has just been adapted.

    Attributes:
        stop_reason: why the run is to end; None as long as it is not.
        lr_scale: what learning rates are multiplied by; every way back halves it, for the same steps would lead out again.
    """

    def __init__(self, constraints: Sequence[Constraint], *, rate: float, max_rollbacks: int) -> None:
        """rate: of `adapt_multiplier`.  rollbacks: how often the run may go back; then it stops, inside."""
        self.constraints: dict[str, Constraint] = {}
        for constraint in constraints:
            name = f"{constraint.name}_at_{'most' if constraint.is_upper_bound else 'least'}"
            names = (name, *(f"{name}_{i}" for i in range(2, len(constraints) + 1)))
            self.constraints[next(free for free in names if free not in self.constraints)] = constraint
        self.rate, self.max_rollbacks = rate, max_rollbacks
        self.multipliers = {name: 0.0 for name, constraint in self.constraints.items() if constraint.response == "hold"}
        self.broken = dict.fromkeys(self.constraints, False)
        self.num_rollbacks = 0
        self.stop_reason: str | None = None
        self.last_feasible_state: tuple[Any, Any] | None = (
            None  # model and optimizer when nothing that goes back was broken
        )
        self._state_before_update: tuple[Any, Any] | None = None
        self._values: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """What is bounded, each once."""
        return list(dict.fromkeys(constraint.name for constraint in self.constraints.values()))

    @property
    def lr_scale(self) -> float:
        return 0.5**self.num_rollbacks

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on must know again: plain numbers and text, and tensors where it may go back."""
        state = {name: getattr(self, name) for name in STATE_FIELDS}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        for name in STATE_FIELDS:
            setattr(self, name, state[name])

    def begin(self, values: Mapping[str, float], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Before the update: adapt the multipliers to what the policy, as it now is, comes to.

        Args:
            values: means by name; what is absent or nan was not measured this time, and nothing follows from it.
        """
        self._values = {name: x for name, x in values.items() if math.isfinite(x)}
        for name in self.multipliers:
            constraint = self.constraints[name]
            if constraint.name in self._values:
                excess = constraint.excess(self._values[constraint.name])
                self.multipliers[name] = adapt_multiplier(self.multipliers[name], excess, rate=self.rate)
        if any(constraint.response == "rollback" for constraint in self.constraints.values()):
            self._state_before_update = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def subtract_constraint_costs(self, reward: Tensor, cost: Mapping[str, Tensor]) -> Tensor:
        """The reward with every held cost taken off; costs by name, each of the reward's shape."""
        for name, multiplier in self.multipliers.items():
            constraint = self.constraints[name]
            reward = subtract_constraint_cost(
                reward, constraint.sign * cost[constraint.name].to(reward), multiplier=multiplier
            )
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
            event: `(kind, **fields)`, told of a bound that breaks or holds again, of a way back and of a stop.
        """
        measured = self._values | {name: x for name, x in values.items() if math.isfinite(x)}
        metrics, violation, has_unmeasured = {}, None, False
        for name, constraint in self.constraints.items():
            if constraint.name not in measured:
                has_unmeasured |= constraint.response == "rollback"
                continue
            value, limit = measured[constraint.name], constraint.limit
            metrics |= {f"constraint_{constraint.name}": value, f"constraint_{name}": limit}
            if name in self.multipliers:
                metrics[f"constraint_{name}_multiplier"] = self.multipliers[name]
            broken = constraint.excess(value) > 0
            if broken != self.broken[name]:
                fields = {"value": value, "limit": limit, "broken": broken, "response": constraint.response}
                event(
                    "constraint", constraint=str(constraint), text=_describe_value(constraint, value, broken), **fields
                )
            self.broken[name] = broken
            if broken and constraint.response == "stop":
                self.stop_reason = _describe_value(constraint, value, broken)
            if broken and constraint.response == "rollback":
                violation = _describe_value(constraint, value, broken)
        if violation is not None:
            self._roll_back(violation, model, optimizer, event)
        elif self._state_before_update is not None and not has_unmeasured:
            self.last_feasible_state = self._state_before_update
        self._state_before_update, self._values = None, {}
        if self.stop_reason is not None:
            event("stopped", text=self.stop_reason)
        return metrics

    def _roll_back(
        self, reason: str, model: nn.Module, optimizer: torch.optim.Optimizer, event: Callable[..., None]
    ) -> None:
        """Weights and optimizer as they last were inside, if they ever were; half the learning rate from now on."""
        if self.last_feasible_state is None:
            return
        weights, optimizer_state = self.last_feasible_state
        for group in optimizer_state["param_groups"]:
            group["lr"] /= 2
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        if self.num_rollbacks == self.max_rollbacks:
            self.stop_reason = f"{reason}, after all {self.max_rollbacks} ways back that constraint_rollbacks allows"
        else:
            self.num_rollbacks += 1
        event("rolled_back", text=reason, times=self.num_rollbacks)


def _describe_value(constraint: Constraint, value: float, broken: bool) -> str:
    return f"{constraint.name} is {value:.4g}: {'outside' if broken else 'within'} {constraint}"
