"""Step 5, update, of a small network: optimizer steps as compiled code, traced from the functions that run without.

Gradient, clipping and Adam of a minibatch become one graph over one flat parameter vector. On tiny Tensors a step costs what
it costs to start its operations; here it is started once.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.func import functional_call
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from understudy.batch import Batch, Trajectory, leaves, map_tensors
from understudy.reduce import per_step
from understudy.update import LOSS, NORM, finite, left_out, split

MOMENTS = ("exp_avg", "exp_avg_sq")
aten = torch.ops.aten
LAID_OUT = {"memory_format": torch.contiguous_format}
OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # in this process: workers would stay beside the run, and keep it from ending at once
    "cpp_wrapper": True,  # calls in C++ too
    "cpp.enable_floating_point_contract_flag": "fast",  # a x + b in one
}
NARROW = 4
"""Up to how long a side of a product is summed over in the operations around it, instead of in a library's call."""
WIDE = 8.5
RATIONAL = (
    (1.42692196e-08, 2.12510369e-05, 0.00353402636, 0.134132465, 0.999999988),
    (8.14511956e-07, 0.000334886402, 0.0260227494, 0.467465692, 1.0),
)
"""tanh(x) / x for |x| up to `WIDE`, where float32's tanh is 1, as a quotient of polynomials in x^2, highest powers first.
Relative error 1.2e-8 (least squares, weighted anew until it is the same everywhere); worked out in float32, 4e-7."""
CHUNK = 4096
"""Rows whose gradient is made at once; of a larger minibatch it is summed up chunk by chunk, so that what is kept for the
backward pass stays in the processor's cache, and no memory is asked of the system for it."""


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
        self._begin(policy, optimizer, objective, prepare, max_grad_norm, steps=epochs * minibatches)
        whole = self.steps * len(record)
        self.chunks = math.ceil(whole / minibatches / CHUNK)
        self.rows = self.chunks * math.ceil(whole / minibatches / self.chunks)
        # always as long, whatever was masked
        self.batch = batch if len(batch) == whole else map_tensors(partial(_filled, size=whole), batch)
        parts = split(len(batch), minibatches)
        valid = {size: torch.arange(self.rows) < size for size in {part.stop - part.start for part in parts}}
        self.learned = [self.weights, *self.moments]
        self.fixed = [*self.buffers.values(), *leaves(self.batch)]
        key = self.objective.func, *((k, v) for k, v in self.objective.keywords.items() if k not in self.varying)
        if key not in self.traced:
            self.traced[key] = self._traced()
        self.run, self.names = self.traced[key]
        try:
            for _ in range(epochs if len(batch) else 0):
                if reshuffle or order is None:
                    order = torch.randperm(len(batch), generator=generator)
                    order = _filled(order, len(batch) + self.rows)  # what a minibatch has too many of is not valid
                for part in parts:
                    self._step(order[part.start : part.start + self.rows], valid[part.stop - part.start])
            told = self._finish()
        except FloatingPointError as error:
            return left_out(error, guard, policy, optimizer, None)
        last = told[-min(minibatches, len(batch)) :, 1:].mean(dim=0).tolist() if len(told) else []
        means: dict[str, float] = dict(zip(self.names, last, strict=True)) if last else {}
        return means | {"optimizer_steps": len(told), "epochs": epochs}

    def _begin(self, policy, optimizer: Any, objective: Any, prepare: Any, limit: float | None, *, steps: int) -> None:
        """Weights and moments become flat vectors; what Adam needs to know of each step is said beforehand."""
        (group,) = optimizer.param_groups
        self.policy, self.optimizer, self.parameters = policy, optimizer, group["params"]
        self.objective, self.prepare, self.limit = objective, prepare, limit
        state = [optimizer.state[p] for p in self.parameters]
        self.weights = _flat(self.parameters)
        self.moments = [
            _flat([x[name] for x in state]) if state[0] else torch.zeros_like(self.weights) for name in MOMENTS
        ]
        self.before = float(state[0]["step"]) if state[0] else 0.0
        changing = [objective.keywords[name] for name in self.varying if name in objective.keywords]
        (beta1, beta2), counts = group["betas"], range(int(self.before) + 1, int(self.before) + steps + 1)
        numbers = [(group["lr"] / (1 - beta1**t), math.sqrt(1 - beta2**t), *changing) for t in counts]
        self.numbers = torch.tensor(numbers, dtype=torch.float64).unbind()
        self.settings = beta1, beta2, group["eps"]
        self.buffers = dict(policy.named_buffers())
        self.said: list[Tensor] = []

    def _step(self, rows: Tensor, valid: Tensor) -> None:
        """An optimizer step on those rows of the record that are valid."""
        numbers = self.numbers[len(self.said)]
        self.said.append(self.run(*self.learned, numbers, rows, valid, *self.fixed))

    def _finish(self) -> Tensor:
        """The policy and its optimizer take over what was learned. Of each step: [loss, metrics, norm].

        Raises:
            FloatingPointError: a loss or gradient was not finite; nothing was written.
        """
        if not self.said:
            return torch.zeros(0)
        told = torch.stack(self.said)
        if not math.isfinite(told.sum()):
            for loss, *_, norm in told:
                finite("loss", loss, LOSS)
                finite("gradient's norm", norm, NORM)
        state, count = self.optimizer.state, torch.tensor(self.before + len(told))
        for parameter in self.parameters:
            if not state[parameter]:
                state[parameter] |= {name: torch.zeros_like(parameter) for name in MOMENTS}
            state[parameter]["step"] = count.clone()
        kinds = [self.parameters, *([state[p][name] for p in self.parameters] for name in MOMENTS)]
        with torch.no_grad():
            for into, flat in zip(kinds, (self.weights, *self.moments), strict=True):
                torch._foreach_copy_(into, _unflatten_dense_tensors(flat, into))  # pyright: ignore[reportPrivateImportUsage]
        return told

    def _traced(self) -> tuple[Callable[..., Tensor], list[str]]:
        """The step as one compiled function, or as three where it is made in chunks; the names of what it says."""
        names: list[str] = []
        take = partial(_take, self.batch, self.prepare)
        pull = partial(_pull, self.policy, list(self.buffers), self.batch, self.objective, self.varying, names)
        move = partial(_move, self.limit, self.settings)
        step = partial(_learn, len(self.buffers), self.chunks)
        if self.chunks == 1:
            return _compiled(partial(step, take, pull, move)), names
        return partial(step, _compiled(take), _compiled(pull), _compiled(move)), names


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Tensors as compiled code, from its first call on."""
    found: list[Any] = []

    @torch.no_grad()
    def run(*given: Tensor) -> Any:
        if not found:
            from torch._inductor import compile as compile_graph  # seconds, and only here
            from torch.fx.experimental.proxy_tensor import make_fx

            _lower_products()
            with torch.enable_grad():
                graph = _arranged(make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*given))
            settings: Any = torch.compiler.config
            # else what another version of this file made of the same graph would be found again
            with settings.patch(cache_key_tag=f"understudy {crc32(Path(__file__).read_bytes())}"):
                found.append(compile_graph(graph, [*given], options=OPTIONS))
        return found[0](*given)

    return run


@cache
def _lower_products() -> None:
    """Have the compiler call oneDNN for `understudy::product` directly: by itself it would go through Python for it."""
    from torch._inductor import ir, lowering, mkldnn_ir

    class Product(mkldnn_ir.LinearUnary):
        """b' of a' b stays turned, and is not laid out for it: oneDNN reads it as it lies, and sooner."""

        @classmethod
        def require_contiguous(cls, x: Any) -> Any:
            turned = list(x.get_stride()) == [1, x.get_size()[0]]
            return x if turned else super().require_contiguous(x)

    def lowered(x: Any, weight: Any, bias: Any) -> Any:
        return ir.TensorBox.create(Product.create(x, weight, bias, "none", [], ""))

    lowering.register_lowering(torch.ops.understudy.product.default, type_promotion_kind=None)(lowered)


def _arranged(traced: Any) -> Any:
    """The same graph in operations that the compiler and torch's libraries are quick in; equal to rounding."""
    graph = traced.graph
    for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        _compare(graph, node)
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _sum_up(graph, node)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        _turn(graph, node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.understudy.product.default):
        _lay_out(graph, node)
    replace_pattern_with_filters(traced, _exponential, _quotient, [_single])
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _compare(graph: Any, node: Any) -> None:
    """What one place of each row is given, by comparing places: nothing is left to be called."""
    zeros, _, index, source = node.args
    if _width(index) == 1:
        with graph.inserting_before(node):
            here = graph.call_function(
                aten.eq.Tensor, (index, graph.call_function(aten.arange.default, (_width(zeros),)))
            )
            node.replace_all_uses_with(graph.call_function(aten.where.self, (here, source, zeros)))


def _sum_up(graph: Any, node: Any) -> None:
    """A product with a side of at most `NARROW`, as a sum: it becomes part of what comes before and after it."""
    from torch._inductor.inductor_prims import force_stride_order

    *total, left, right = node.args
    rows, columns = left.meta["val"].shape[0], _width(right)

    def part(x: Any, dim: int, k: int) -> Any:
        return graph.call_function(aten.slice.Tensor, (x, dim, k, k + 1))

    with graph.inserting_before(node):
        if _width(left) <= NARROW:  # the sum of columns times rows
            right = graph.call_function(force_stride_order, (right, [columns, 1]))
            for k in range(_width(left)):
                term = graph.call_function(aten.mul.Tensor, (part(left, 1, k), part(right, 0, k)))
                total = [graph.call_function(aten.add.Tensor, (*total, term)) if total else term]
            node.replace_all_uses_with(*total)
        elif left.target is aten.t.default and min(rows, columns) <= NARROW:  # a' b, a column or a row at a time
            dim, few, many = (0, left.args[0], right) if rows <= columns else (1, right, left.args[0])
            sums = [graph.call_function(aten.mul.Tensor, (part(few, 1, k), many)) for k in range(min(rows, columns))]
            sums = [graph.call_function(aten.sum.dim_IntList, (x, [0])) for x in sums]
            sums = [graph.call_function(aten.unsqueeze.default, (x, dim)) for x in sums]
            node.replace_all_uses_with(graph.call_function(aten.cat.default, (sums, dim)))


def _turn(graph: Any, node: Any) -> None:
    """a' b of MKL with the wider factor on the right: as (b' a)'."""
    left, right = node.args
    if left.target is aten.t.default and _width(right) < _width(left.args[0]):
        with graph.inserting_before(node):
            turned = graph.call_function(aten.t.default, (right,))
            product = graph.call_function(aten.mm.default, (turned, left.args[0]))
            turned = graph.call_function(aten.t.default, (product,))
            node.replace_all_uses_with(graph.call_function(aten.clone.default, (turned,), LAID_OUT))


def _lay_out(graph: Any, node: Any) -> None:
    """a' b of oneDNN with a' laid out, where that can be part of what makes it; the operation itself would copy it."""
    if node.args[0].target is aten.t.default:
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(aten.clone.default, (node.args[0],), LAID_OUT))


def _exponential(x: Any) -> Any:
    """tanh as `understudy.products.Tanh` has it."""
    return aten.rsub.Scalar(aten.sigmoid.default(aten.mul.Tensor(x, 2)), -1, -2)


def _quotient(x: Any) -> Any:
    """tanh of float32 as a quotient, which takes a third of the time of an exponential."""
    x = aten.clamp.default(x, -WIDE, WIDE)
    square = aten.mul.Tensor(x, x)
    above, below = (reduce(lambda y, k: aten.add.Tensor(aten.mul.Tensor(square, y), k), ks) for ks in RATIONAL)
    return aten.div.Tensor(aten.mul.Tensor(x, above), below)


def _single(match: Any, *_: Any) -> bool:
    return all(node.meta["val"].dtype == torch.float32 for node in match.returning_nodes)


def _width(node: Any) -> int:
    return node.meta["val"].shape[-1]


def available() -> bool:
    """Whether there is a C++ compiler, which torch needs for it."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def _learn(
    held: int, chunks: int, take, pull, move,
    weights, mean, square, numbers, rows, valid, *rest,
) -> Tensor:  # fmt: skip
    """An optimizer step, in place on weights, mean and square; [loss, metrics, gradient's norm].

    Args:
        numbers: lr / (1 - beta1^t), sqrt(1 - beta2^t), and the objective's that vary.
        held: how many of `rest` are the policy's buffers; then the record's columns, each [N, 1, ...].
        take, pull, move: `_take`, `_pull` and `_move` with what they hold fixed, plain or compiled.
    """
    weight, *minibatch = take(rows, valid, *rest[held:])
    pulled = [
        pull(weights, numbers, *rest[:held], *some)
        for some in zip(*(x.chunk(chunks) for x in (weight, *minibatch)), strict=True)
    ]
    gradient, told = (parts[0] if chunks == 1 else torch.stack(parts).sum(dim=0) for parts in zip(*pulled, strict=True))
    return torch.cat([told, move(weights, mean, square, numbers, gradient)[None]])


def _take(record, prepare, rows, valid, *columns) -> list[Tensor]:
    """A minibatch, prepared: each step's weight, and the leaves of the record."""
    of = iter(columns)
    batch = map_tensors(lambda _: next(of)[rows], record)
    batch = Batch.of(batch, mask=batch.mask & valid[:, None])
    batch = batch if prepare is None else prepare(batch)
    return [per_step(batch.mask), *leaves(batch)]


def _pull(policy, buffers, record, objective, varying, names, weights, numbers, *rest) -> tuple[Tensor, Tensor]:
    """The gradient of the weighted loss of some rows, [P]; that loss and the weighted metrics."""
    held, weight, of = rest[: len(buffers)], rest[len(buffers)], iter(rest[len(buffers) + 1 :])
    batch = map_tensors(lambda _: next(of), record)
    leaf = weights.detach().requires_grad_()
    own = dict(policy.named_parameters())
    parts = [x.view_as(p) for x, p in zip(leaf.split([p.numel() for p in own.values()]), own.values(), strict=True)]
    tensors = dict(zip([*own, *buffers], [*parts, *held], strict=True))
    changing = [name for name in varying if name in objective.keywords]
    changed = dict(zip(changing, numbers[2:].to(leaf.dtype).unbind(), strict=True))
    loss, metrics = partial(objective, **changed)(lambda *args: functional_call(policy, tensors, args), batch)
    total = (loss * weight).sum()
    (gradient,) = torch.autograd.grad(total, [leaf])
    names[:] = [*metrics, "grad_norm"]
    means = (torch.stack(list(metrics.values())) * weight).sum(dim=(1, 2))
    return gradient, torch.cat([total.detach()[None], means])


def _move(limit, settings, weights, mean, square, numbers, gradient) -> Tensor:
    """One step of Adam (Kingma & Ba 2015, alg. 1), in place on weights, mean and square; the gradient's norm."""
    norm = gradient.norm()
    if limit is not None:
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    beta1, beta2, eps = settings
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
    step_size, spread = numbers[:2].to(weights.dtype)
    weights.sub_(step_size * mean / (square.sqrt() / spread + eps))
    return norm


def _filled(x: Tensor, size: int) -> Tensor:
    """x with zeros behind it: [N, ...] -> [size, ...]."""
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])


@torch.no_grad()
def _flat(tensors: list[Tensor]) -> Tensor:
    return _flatten_dense_tensors(tensors)
