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

from understudy.batch import Batch, Trajectory, map_tensors, tensor_leaves
from understudy.reduce import per_step
from understudy.update import GRAD_NORM_FIX, LOSS_FIX, minibatch_slices, require_finite, undo_update

MOMENTS = ("exp_avg", "exp_avg_sq")
aten = torch.ops.aten
CONTIGUOUS = {"memory_format": torch.contiguous_format}
COMPILE_OPTIONS: dict[str, Any] = {
    "compile_threads": 1,  # in this process: workers would stay beside the run, and keep it from ending at once
    "cpp_wrapper": True,  # calls in C++ too
    "cpp.enable_floating_point_contract_flag": "fast",  # a x + b in one
}
MAX_NARROW_SIZE = 4
"""Up to how long a side of a product is summed over in the operations around it, instead of in a library's call."""
TANH_SATURATION = 8.5
TANH_COEFFICIENTS = (
    (1.42692196e-08, 2.12510369e-05, 0.00353402636, 0.134132465, 0.999999988),
    (8.14511956e-07, 0.000334886402, 0.0260227494, 0.467465692, 1.0),
)
"""tanh(x) / x for |x| up to `WIDE`, where float32's tanh is 1, as a quotient of polynomials in x^2, highest powers first.
Relative error 1.2e-8 (least squares, weighted anew until it is the same everywhere); worked out in float32, 4e-7."""
CHUNK_ROWS = 4096
"""Rows whose gradient is made at once; of a larger minibatch it is summed up chunk by chunk, so that what is kept for the
backward pass stays in the processor's cache, and no memory is asked of the system for it."""


class CompiledUpdate:
    """`update` in compiled code, for records of at most `max_steps_per_row` chosen steps a row.

    During an update the weights that learn are its own. They are written back at the end, unless something was not finite:
    then policy and optimizer are what they were before it. Equal to the plain steps to rounding; on one machine, with one
    number of threads, always the same.

    Args:
        varying: keywords of the objective whose numbers may change from update to update.
    """

    def __init__(self, max_steps_per_row: int, *, varying: tuple[str, ...]) -> None:
        self.max_steps_per_row, self.varying = max_steps_per_row, varying
        self.compiled_steps: dict[Any, tuple[Callable[..., Tensor], list[str]]] = {}

    def update(
        self,
        policy: Any,
        optimizer: torch.optim.Optimizer,
        batch: Trajectory,
        objective: Any,
        *,
        num_epochs: int,
        num_minibatches: int,
        max_grad_norm: float | None,
        recompute: None = None,
        transform_minibatch: Callable[[Any], Batch] | None = None,
        on_minibatch: None = None,
        reshuffle: bool = True,
        on_nonfinite: Callable[[FloatingPointError], None] | None = None,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """As `understudy.update.update`: a policy without memory, one group of Adam's, an objective that is a `partial`."""
        samples, order = batch.flatten_steps(), None  # pyright: ignore[reportAttributeAccessIssue]
        self._begin(
            policy, optimizer, objective, transform_minibatch, max_grad_norm, num_steps=num_epochs * num_minibatches
        )
        max_samples = self.max_steps_per_row * len(batch)
        self.num_chunks = math.ceil(max_samples / num_minibatches / CHUNK_ROWS)
        self.minibatch_size = self.num_chunks * math.ceil(max_samples / num_minibatches / self.num_chunks)
        # always as long, whatever was masked
        self.samples = (
            samples if len(samples) == max_samples else map_tensors(partial(_pad_with_zeros, size=max_samples), samples)
        )
        slices = minibatch_slices(len(samples), num_minibatches)
        valid = {size: torch.arange(self.minibatch_size) < size for size in {part.stop - part.start for part in slices}}
        self.updated_tensors = [self.weights, *self.moments]
        self.fixed_tensors = [*self.buffers.values(), *tensor_leaves(self.samples)]
        key = self.objective.func, *((k, v) for k, v in self.objective.keywords.items() if k not in self.varying)
        if key not in self.compiled_steps:
            self.compiled_steps[key] = self._compile_step()
        self.run_step, self.metric_names = self.compiled_steps[key]
        try:
            for _ in range(num_epochs if len(samples) else 0):
                if reshuffle or order is None:
                    order = torch.randperm(len(samples), generator=generator)
                    order = _pad_with_zeros(
                        order, len(samples) + self.minibatch_size
                    )  # what a minibatch has too many of is not valid
                for part in slices:
                    self._step(order[part.start : part.start + self.minibatch_size], valid[part.stop - part.start])
            outputs = self._finish()
        except FloatingPointError as error:
            return undo_update(error, on_nonfinite, policy, optimizer, None)
        last_means = outputs[-min(num_minibatches, len(samples)) :, 1:].mean(dim=0).tolist() if len(outputs) else []
        means: dict[str, float] = dict(zip(self.metric_names, last_means, strict=True)) if last_means else {}
        return means | {"optimizer_steps": len(outputs), "epochs": num_epochs}

    def _begin(
        self,
        policy,
        optimizer: Any,
        objective: Any,
        transform_minibatch: Any,
        max_grad_norm: float | None,
        *,
        num_steps: int,
    ) -> None:
        """Weights and moments become flat vectors; what Adam needs to know of each step is said beforehand."""
        (group,) = optimizer.param_groups
        self.policy, self.optimizer, self.parameters = policy, optimizer, group["params"]
        self.objective, self.transform_minibatch, self.max_grad_norm = objective, transform_minibatch, max_grad_norm
        state = [optimizer.state[p] for p in self.parameters]
        self.weights = _flatten(self.parameters)
        self.moments = [
            _flatten([x[name] for x in state]) if state[0] else torch.zeros_like(self.weights) for name in MOMENTS
        ]
        self.num_previous_steps = float(state[0]["step"]) if state[0] else 0.0
        varying_values = [objective.keywords[name] for name in self.varying if name in objective.keywords]
        (beta1, beta2), step_counts = (
            group["betas"],
            range(int(self.num_previous_steps) + 1, int(self.num_previous_steps) + num_steps + 1),
        )
        step_scalars = [(group["lr"] / (1 - beta1**t), math.sqrt(1 - beta2**t), *varying_values) for t in step_counts]
        self.step_scalars = torch.tensor(step_scalars, dtype=torch.float64).unbind()
        self.adam_settings = beta1, beta2, group["eps"]
        self.buffers = dict(policy.named_buffers())
        self.step_outputs: list[Tensor] = []

    def _step(self, rows: Tensor, valid: Tensor) -> None:
        """An optimizer step on those rows of the record that are valid."""
        step_scalars = self.step_scalars[len(self.step_outputs)]
        self.step_outputs.append(self.run_step(*self.updated_tensors, step_scalars, rows, valid, *self.fixed_tensors))

    def _finish(self) -> Tensor:
        """The policy and its optimizer take over what was learned. Of each step: [loss, metrics, norm].

        Raises:
            FloatingPointError: a loss or gradient was not finite; nothing was written.
        """
        if not self.step_outputs:
            return torch.zeros(0)
        outputs = torch.stack(self.step_outputs)
        if not math.isfinite(outputs.sum()):
            for loss, *_, norm in outputs:
                require_finite("loss", loss, LOSS_FIX)
                require_finite("gradient's norm", norm, GRAD_NORM_FIX)
        state, num_steps = self.optimizer.state, torch.tensor(self.num_previous_steps + len(outputs))
        for parameter in self.parameters:
            if not state[parameter]:
                state[parameter] |= {name: torch.zeros_like(parameter) for name in MOMENTS}
            state[parameter]["step"] = num_steps.clone()
        tensor_lists = [self.parameters, *([state[p][name] for p in self.parameters] for name in MOMENTS)]
        with torch.no_grad():
            for tensors, flat in zip(tensor_lists, (self.weights, *self.moments), strict=True):
                torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))  # pyright: ignore[reportPrivateImportUsage]
        return outputs

    def _compile_step(self) -> tuple[Callable[..., Tensor], list[str]]:
        """The step as one compiled function, or as three where it is made in chunks; the names of what it says."""
        metric_names: list[str] = []
        take_minibatch = partial(_take_minibatch, self.samples, self.transform_minibatch)
        compute_gradient = partial(
            _compute_gradient, self.policy, list(self.buffers), self.samples, self.objective, self.varying, metric_names
        )
        adam_step = partial(_adam_step, self.max_grad_norm, self.adam_settings)
        step = partial(_optimizer_step, len(self.buffers), self.num_chunks)
        if self.num_chunks == 1:
            return _compile(partial(step, take_minibatch, compute_gradient, adam_step)), metric_names
        return partial(step, _compile(take_minibatch), _compile(compute_gradient), _compile(adam_step)), metric_names


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Tensors as compiled code, from its first call on."""
    cached: list[Any] = []

    @torch.no_grad()
    def run(*tensors: Tensor) -> Any:
        if not cached:
            from torch._inductor import compile as compile_graph  # seconds, and only here
            from torch.fx.experimental.proxy_tensor import make_fx

            _lower_linear()
            with torch.enable_grad():
                graph = _optimize_graph(make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors))
            settings: Any = torch.compiler.config
            # else what another version of this file made of the same graph would be found again
            with settings.patch(cache_key_tag=f"understudy {crc32(Path(__file__).read_bytes())}"):
                cached.append(compile_graph(graph, [*tensors], options=COMPILE_OPTIONS))
        return cached[0](*tensors)

    return run


@cache
def _lower_linear() -> None:
    """Have the compiler call oneDNN for `understudy::product` directly: by itself it would go through Python for it."""
    from torch._inductor import ir, lowering, mkldnn_ir

    class OneDnnLinear(mkldnn_ir.LinearUnary):
        """b' of a' b stays turned, and is not laid out for it: oneDNN reads it as it lies, and sooner."""

        @classmethod
        def require_contiguous(cls, x: Any) -> Any:
            is_transposed = list(x.get_stride()) == [1, x.get_size()[0]]
            return x if is_transposed else super().require_contiguous(x)

    def lower_linear(x: Any, weight: Any, bias: Any) -> Any:
        return ir.TensorBox.create(OneDnnLinear.create(x, weight, bias, "none", [], ""))

    lowering.register_lowering(torch.ops.understudy.product.default, type_promotion_kind=None)(lower_linear)


def _optimize_graph(graph_module: Any) -> Any:
    """The same graph in operations that the compiler and torch's libraries are quick in; equal to rounding."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        _rewrite_scatter_add(graph, node)
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _rewrite_narrow_matmul(graph, node)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        _transpose_matmul(graph, node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.understudy.product.default):
        _make_contiguous(graph, node)
    replace_pattern_with_filters(graph_module, _tanh_by_sigmoid, _tanh_by_rational, [_is_float32])
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _rewrite_scatter_add(graph: Any, node: Any) -> None:
    """What one place of each row is given, by comparing places: nothing is left to be called."""
    zeros, _, index, source = node.args
    if _width(index) == 1:
        with graph.inserting_before(node):
            matches = graph.call_function(
                aten.eq.Tensor, (index, graph.call_function(aten.arange.default, (_width(zeros),)))
            )
            node.replace_all_uses_with(graph.call_function(aten.where.self, (matches, source, zeros)))


def _rewrite_narrow_matmul(graph: Any, node: Any) -> None:
    """A product with a side of at most `NARROW`, as a sum: it becomes part of what comes before and after it."""
    from torch._inductor.inductor_prims import force_stride_order

    *total, left, right = node.args
    rows, columns = left.meta["val"].shape[0], _width(right)

    def take_slice(x: Any, dim: int, k: int) -> Any:
        return graph.call_function(aten.slice.Tensor, (x, dim, k, k + 1))

    with graph.inserting_before(node):
        if _width(left) <= MAX_NARROW_SIZE:  # the sum of columns times rows
            right = graph.call_function(force_stride_order, (right, [columns, 1]))
            for k in range(_width(left)):
                term = graph.call_function(aten.mul.Tensor, (take_slice(left, 1, k), take_slice(right, 0, k)))
                total = [graph.call_function(aten.add.Tensor, (*total, term)) if total else term]
            node.replace_all_uses_with(*total)
        elif (
            left.target is aten.t.default and min(rows, columns) <= MAX_NARROW_SIZE
        ):  # a' b, a column or a row at a time
            dim, narrow, wide = (0, left.args[0], right) if rows <= columns else (1, right, left.args[0])
            sums = [
                graph.call_function(aten.mul.Tensor, (take_slice(narrow, 1, k), wide))
                for k in range(min(rows, columns))
            ]
            sums = [graph.call_function(aten.sum.dim_IntList, (x, [0])) for x in sums]
            sums = [graph.call_function(aten.unsqueeze.default, (x, dim)) for x in sums]
            node.replace_all_uses_with(graph.call_function(aten.cat.default, (sums, dim)))


def _transpose_matmul(graph: Any, node: Any) -> None:
    """a' b of MKL with the wider factor on the right: as (b' a)'."""
    left, right = node.args
    if left.target is aten.t.default and _width(right) < _width(left.args[0]):
        with graph.inserting_before(node):
            transposed = graph.call_function(aten.t.default, (right,))
            product = graph.call_function(aten.mm.default, (transposed, left.args[0]))
            transposed = graph.call_function(aten.t.default, (product,))
            node.replace_all_uses_with(graph.call_function(aten.clone.default, (transposed,), CONTIGUOUS))


def _make_contiguous(graph: Any, node: Any) -> None:
    """a' b of oneDNN with a' laid out, where that can be part of what makes it; the operation itself would copy it."""
    if node.args[0].target is aten.t.default:
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(aten.clone.default, (node.args[0],), CONTIGUOUS))


def _tanh_by_sigmoid(x: Any) -> Any:
    """tanh as `understudy.fast.linear.Tanh` has it."""
    return aten.rsub.Scalar(aten.sigmoid.default(aten.mul.Tensor(x, 2)), -1, -2)


def _tanh_by_rational(x: Any) -> Any:
    """tanh of float32 as a quotient, which takes a third of the time of an exponential."""
    x = aten.clamp.default(x, -TANH_SATURATION, TANH_SATURATION)
    square = aten.mul.Tensor(x, x)
    numerator, denominator = (
        reduce(lambda y, k: aten.add.Tensor(aten.mul.Tensor(square, y), k), coefficients)
        for coefficients in TANH_COEFFICIENTS
    )
    return aten.div.Tensor(aten.mul.Tensor(x, numerator), denominator)


def _is_float32(match: Any, *_: Any) -> bool:
    return all(node.meta["val"].dtype == torch.float32 for node in match.returning_nodes)


def _width(node: Any) -> int:
    return node.meta["val"].shape[-1]


def is_compiler_available() -> bool:
    """Whether there is a C++ compiler, which torch needs for it."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def _optimizer_step(
    num_buffers: int, num_chunks: int, take_minibatch, compute_gradient, adam_step,
    weights, exp_avg, exp_avg_sq, step_scalars, rows, valid, *rest,
) -> Tensor:  # fmt: skip
    """An optimizer step, in place on weights, mean and square; [loss, metrics, gradient's norm].

    Args:
        step_scalars: lr / (1 - beta1^t), sqrt(1 - beta2^t), and the objective's that vary.
        num_buffers: how many of `rest` are the policy's buffers; then the record's columns, each [N, 1, ...].
        take_minibatch, compute_gradient, adam_step: `_take_minibatch`, `_compute_gradient` and `_adam_step` with what
            they hold fixed, plain or compiled.
    """
    weight, *minibatch = take_minibatch(rows, valid, *rest[num_buffers:])
    chunk_results = [
        compute_gradient(weights, step_scalars, *rest[:num_buffers], *chunk)
        for chunk in zip(*(x.chunk(num_chunks) for x in (weight, *minibatch)), strict=True)
    ]
    gradient, metrics = (
        parts[0] if num_chunks == 1 else torch.stack(parts).sum(dim=0) for parts in zip(*chunk_results, strict=True)
    )
    return torch.cat([metrics, adam_step(weights, exp_avg, exp_avg_sq, step_scalars, gradient)[None]])


def _take_minibatch(template, transform_minibatch, rows, valid, *columns) -> list[Tensor]:
    """A minibatch, prepared: each step's weight, and the leaves of the record."""
    column_iterator = iter(columns)
    batch = map_tensors(lambda _: next(column_iterator)[rows], template)
    batch = Batch.of(batch, mask=batch.mask & valid[:, None])
    batch = batch if transform_minibatch is None else transform_minibatch(batch)
    return [per_step(batch.mask), *tensor_leaves(batch)]


def _compute_gradient(
    policy, buffers, template, objective, varying, metric_names, weights, step_scalars, *rest
) -> tuple[Tensor, Tensor]:
    """The gradient of the weighted loss of some rows, [P]; that loss and the weighted metrics."""
    buffer_tensors, weight, column_iterator = rest[: len(buffers)], rest[len(buffers)], iter(rest[len(buffers) + 1 :])
    batch = map_tensors(lambda _: next(column_iterator), template)
    leaf = weights.detach().requires_grad_()
    parameters = dict(policy.named_parameters())
    parts = [
        x.view_as(p)
        for x, p in zip(leaf.split([p.numel() for p in parameters.values()]), parameters.values(), strict=True)
    ]
    tensors = dict(zip([*parameters, *buffers], [*parts, *buffer_tensors], strict=True))
    varying_names = [name for name in varying if name in objective.keywords]
    varying_values = dict(zip(varying_names, step_scalars[2:].to(leaf.dtype).unbind(), strict=True))
    loss, metrics = partial(objective, **varying_values)(lambda *args: functional_call(policy, tensors, args), batch)
    total = (loss * weight).sum()
    (gradient,) = torch.autograd.grad(total, [leaf])
    metric_names[:] = [*metrics, "grad_norm"]
    means = (torch.stack(list(metrics.values())) * weight).sum(dim=(1, 2))
    return gradient, torch.cat([total.detach()[None], means])


def _adam_step(max_grad_norm, adam_settings, weights, exp_avg, exp_avg_sq, step_scalars, gradient) -> Tensor:
    """One step of Adam (Kingma & Ba 2015, alg. 1), in place on weights, mean and square; the gradient's norm."""
    norm = gradient.norm()
    if max_grad_norm is not None:
        gradient = gradient * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    beta1, beta2, eps = adam_settings
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
    step_size, bias_correction2_sqrt = step_scalars[:2].to(weights.dtype)
    weights.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / bias_correction2_sqrt + eps))
    return norm


def _pad_with_zeros(x: Tensor, size: int) -> Tensor:
    """x with zeros behind it: [N, ...] -> [size, ...]."""
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])


@torch.no_grad()
def _flatten(tensors: list[Tensor]) -> Tensor:
    return _flatten_dense_tensors(tensors)
