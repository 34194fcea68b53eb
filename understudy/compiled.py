"""Step 5, update, of a small network: optimizer steps as compiled code, traced from the functions that run without.

Gradient, clipping and Adam of a minibatch become one graph over one flat parameter vector. On tiny Tensors a step costs what
it costs to start its operations; here it is started once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from understudy.batch import Batch, Trajectory, map_tensors
from understudy.reduce import per_step
from understudy.update import LOSS, NORM, finite, left_out, mean_of, split

MOMENTS = ("exp_avg", "exp_avg_sq")


class Compiled:
    """`update` in compiled code, for records of at most `steps` chosen steps a row.

    During an update the weights that learn are its own. They are written back at the end, unless something was not finite:
    then policy and optimizer are what they were before it. Equal to the plain steps to rounding; on one machine, with one
    number of threads, always the same.

    Args:
        varying: keywords of the objective whose numbers may change from update to update.
    """

    def __init__(self, steps: int, *, varying: tuple[str, ...]) -> None:
        self.steps, self.varying = steps, varying
        self.traced: dict[Any, tuple[Callable[..., Tensor], list[str]]] = {}

    def update(
        self,
        policy: Any,
        optimizer: torch.optim.Optimizer,
        record: Trajectory,
        objective: Any,
        *,
        epochs: int,
        minibatches: int,
        max_grad_norm: float | None,
        refresh: None = None,
        prepare: Callable[[Any], Batch] | None = None,
        steer: None = None,
        reshuffle: bool = True,
        guard: Callable[[FloatingPointError], None] | None = None,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """As `understudy.update.update`: a policy without memory, one group of Adam's, an objective that is a `partial`."""
        batch, order = record.steps(), None  # pyright: ignore[reportAttributeAccessIssue]
        self._begin(policy, optimizer, objective, prepare, max_grad_norm)
        whole = self.steps * len(record)
        self.rows = -(-whole // minibatches)
        self.batch = map_tensors(partial(_filled, size=whole), batch)  # always as long, whatever was masked
        self.columns = leaves(self.batch)
        try:
            for _ in range(epochs if len(batch) else 0):
                if reshuffle or order is None:
                    order = torch.randperm(len(batch), generator=generator)
                for rows in split(len(batch), minibatches):
                    self._step(order[rows])
            self._finish()
        except FloatingPointError as error:
            return left_out(error, guard, policy, optimizer, None)
        last = [
            dict(zip(self.names, said[1:], strict=True)) for said in self.said[-min(minibatches, len(batch) or 1) :]
        ]
        return mean_of(last) | {"optimizer_steps": len(self.said), "epochs": epochs}

    def _begin(self, policy: Any, optimizer: Any, objective: Any, prepare: Any, limit: float | None) -> None:
        """Weights and moments become flat vectors."""
        (group,) = optimizer.param_groups
        self.policy, self.optimizer, self.parameters = policy, optimizer, group["params"]
        self.objective, self.prepare, self.limit = objective, prepare, limit
        state = [optimizer.state[p] for p in self.parameters]
        self.weights = _flat(self.parameters)
        blank = torch.zeros_like(self.weights)
        self.moments = [_flat([x[name] for x in state]) if state[0] else blank.clone() for name in MOMENTS]
        self.count = torch.tensor(float(state[0]["step"]) if state[0] else 0.0, dtype=torch.float64)
        changing = [objective.keywords[name] for name in self.varying if name in objective.keywords]
        self.numbers = torch.tensor([group["lr"], *changing], dtype=torch.float64)
        self.settings = (*group["betas"], group["eps"])
        self.buffers = dict(policy.named_buffers())
        self.said: list[Tensor] = []

    def _step(self, rows: Tensor) -> None:
        """An optimizer step on some rows of the record."""
        given = [self.weights, *self.moments, self.count, self.numbers, _filled(rows, self.rows)]
        given += [torch.arange(self.rows) < len(rows), *self.buffers.values(), *self.columns]
        key = self.objective.func, *((k, v) for k, v in self.objective.keywords.items() if k not in self.varying)
        if key not in self.traced:
            self.traced[key] = self._trace(given)
        run, self.names = self.traced[key]
        with torch.no_grad():
            self.said.append(run(*given))

    def _finish(self) -> None:
        """The policy and its optimizer take over what was learned.

        Raises:
            FloatingPointError: a loss or gradient was not finite; nothing was written.
        """
        for loss, *_, norm in torch.stack(self.said) if self.said else ():
            finite("loss", loss, LOSS)
            finite("gradient's norm", norm, NORM)
        state = self.optimizer.state
        for parameter in self.parameters if self.said else ():
            if not state[parameter]:
                state[parameter] |= {name: torch.zeros_like(parameter) for name in MOMENTS}
            state[parameter]["step"] = self.count.float()
        sizes = [p.numel() for p in self.parameters]
        kinds = [self.parameters, *([state[p].get(name) for p in self.parameters] for name in MOMENTS)]
        with torch.no_grad():
            for into, flat in zip(kinds, (self.weights, *self.moments), strict=True) if self.said else ():
                for x, p in zip(flat.split(sizes), into, strict=True):
                    p.copy_(x.view_as(p))

    def _trace(self, given: list[Tensor]) -> tuple[Callable[..., Tensor], list[str]]:
        """The step as one compiled function, and the names of what it returns after the loss."""
        from torch._inductor import compile as compile_graph  # seconds, and only here
        from torch.fx.experimental.proxy_tensor import make_fx

        names: list[str] = []
        learn = partial(
            _learn, self.policy, list(self.buffers), self.batch, self.objective, self.varying, self.prepare, self.limit,
            self.settings, names,
        )  # fmt: skip
        graph = make_fx(learn, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
        with torch.no_grad():
            # calls in C++ too; in this process: workers would stay beside the run, and keep it from ending at once
            run: Any = compile_graph(graph, [*given], options={"compile_threads": 1, "cpp_wrapper": True})
        return run, [*names, "grad_norm"]


def available() -> bool:
    """Whether there is a C++ compiler, which torch needs for it."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def leaves(tree: Any) -> list[Tensor]:
    """Every Tensor that `map_tensors` meets, in its order."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, tree)
    return found


def _learn(
    policy, buffers, record, objective, varying, prepare, limit, settings, names,
    weights, mean, square, count, numbers, rows, valid, *rest,
) -> Tensor:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015, alg. 1), in place on weights, mean, square and count; [loss, metrics, norm]."""
    held, columns = rest[: len(buffers)], iter(rest[len(buffers) :])
    batch = map_tensors(lambda _: next(columns)[rows], record)
    batch = Batch.of(batch, mask=batch.mask & valid[:, None])
    batch = batch if prepare is None else prepare(batch)
    leaf = weights.detach().requires_grad_()
    own = dict(policy.named_parameters())
    parts = [x.view_as(p) for x, p in zip(leaf.split([p.numel() for p in own.values()]), own.values(), strict=True)]
    tensors = dict(zip([*own, *buffers], [*parts, *held], strict=True))
    changing = [name for name in varying if name in objective.keywords]
    changed = dict(zip(changing, numbers[1:].to(leaf.dtype).unbind(), strict=True))
    loss, metrics = partial(objective, **changed)(lambda *args: functional_call(policy, tensors, args), batch)
    weight = per_step(batch.mask)
    total = (loss * weight).sum()
    (gradient,) = torch.autograd.grad(total, [leaf])
    norm = gradient.norm()
    if limit is not None:
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    beta1, beta2, eps = settings
    count.add_(1)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
    step_size = (numbers[0] / (1 - beta1**count)).to(leaf.dtype)
    spread = (1 - beta2**count).sqrt().to(leaf.dtype)
    weights.sub_(step_size * mean / (square.sqrt() / spread + eps))
    names.extend(metrics)
    means = (torch.stack(list(metrics.values())) * weight).sum(dim=(1, 2))
    return torch.cat([total.detach()[None], means, norm[None]])


def _filled(x: Tensor, size: int) -> Tensor:
    """x with zeros behind it: [N, ...] -> [size, ...]."""
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])
