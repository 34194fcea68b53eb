"""Step 5: a compiled optimizer step is the plain one."""

import copy
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import pytest
import torch
from gymnasium import spaces
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from tests.records import seeded
from understudy.batch import Batch, Trajectory, map_tensors
from understudy.control.config import NetworkConfig
from understudy.control.policy import Policy
from understudy.control.ppo import standardize_advantages
from understudy.distribution import Categorical
from understudy.fast import compiled_update as compiled_module
from understudy.fast.compiled_update import MAX_NARROW_SIZE, CompiledUpdate
from understudy.fast.linear import Tanh, _linear_op
from understudy.objective import ppo, ppo_penalty
from understudy.update import update

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

BOX = spaces.Box(-float("inf"), float("inf"), (3,))
CLIP = partial(ppo, clip=0.2, value_coef=0.5, entropy_coef=0.01, value_clip=0.2)
PENALTY = partial(ppo_penalty, kl_old_coef=0.7, value_coef=0.5, entropy_coef=0.0)


def policy_for(action: gymnasium.Space, **made_of) -> Policy:
    return Policy.build(BOX, action, NetworkConfig(hidden=(8,), **made_of), seed=3, scale_obs=True).double()


def record_for(policy: Policy, *, steps: int, seed: int = 0) -> Batch:
    """Chosen steps of this policy, their advantages and targets drawn; one in five columns is masked."""
    draw = seeded(seed)
    obs = torch.randn(2, steps, 3, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        found, value = policy(obs)
        action = found.sample(draw)
        logprob = found.log_prob(action) + 0.3 * torch.randn(2, steps, generator=draw, dtype=torch.float64)
    mask = torch.rand(2, steps, generator=draw) > 0.2
    blank = torch.zeros(2, steps, dtype=torch.float64)
    record = Trajectory(obs, action, logprob, mask, blank, blank > 0, blank > 0)
    advantage, target = (torch.randn(2, steps, generator=draw, dtype=torch.float64) for _ in "ab")
    old = map_tensors(torch.Tensor.detach, found)
    return Batch.of(record, value=value, advantage=advantage, target=target, old_distribution=old)


def learn(policy, objectives, records, *, compiled=None, learning_rate=1e-2, **options):
    """Two updates or more of a copy of the policy; its weights, its optimizer's state and the metrics of the last."""
    learner = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(learner.parameters(), lr=learning_rate, eps=1e-5)
    step = update if compiled is None else compiled.update
    draw, fixed = (
        seeded(1),
        {"num_epochs": 2, "num_minibatches": 3, "max_grad_norm": 0.5, "transform_minibatch": standardize_advantages}
        | options,
    )
    for objective, record in zip(objectives, records, strict=True):
        metrics = step(learner, optimizer, record, objective, generator=draw, **fixed)
    return dict(learner.named_parameters()), optimizer.state_dict()["state"], metrics


@pytest.fixture(scope="module")
def compiled() -> CompiledUpdate:
    """For one choice of three, and CLIP: compiled once for all tests here."""
    return CompiledUpdate(20, varying=("clip",))


def test_weights_moments_and_metrics_are_those_of_plain_updates(compiled):
    policy = policy_for(spaces.Discrete(3))
    records = [record_for(policy, steps=20, seed=0), record_for(policy, steps=14, seed=1)]  # and a smaller one

    plain = learn(policy, [CLIP] * 2, records)

    assert_close(learn(policy, [CLIP] * 2, records, compiled=compiled), plain, rtol=1e-9, atol=1e-11)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain[0].values(), policy.parameters(), strict=True))


def test_a_minibatch_in_chunks_is_one_minibatch(monkeypatch):
    monkeypatch.setattr(compiled_module, "CHUNK_ROWS", 5)  # of 40 steps in 3 minibatches: 14 rows in 3 chunks of 5
    policy = policy_for(spaces.Box(-1, 1, (2,)), squash="tanh")
    records = [record_for(policy, steps=20)]

    fast = learn(policy, [CLIP], records, compiled=CompiledUpdate(20, varying=("clip",)))

    assert_close(fast, learn(policy, [CLIP], records), rtol=1e-9, atol=1e-11)


def test_numbers_are_learned_from_alike_by_the_kl_penalty():
    policy = policy_for(spaces.Box(-1, 1, (2,)), squash="clip")
    records = [record_for(policy, steps=20)]

    fast = learn(policy, [PENALTY], records, compiled=CompiledUpdate(20, varying=("clip", "kl_coef")))

    assert_close(fast, learn(policy, [PENALTY], records), rtol=1e-9, atol=1e-11)


def test_a_number_that_varies_takes_effect_without_another_compilation(compiled):
    policy = policy_for(spaces.Discrete(3))
    record = record_for(policy, steps=20)
    objectives = [CLIP, partial(CLIP, clip=0.01)]

    fast = learn(policy, objectives, [record] * 2, compiled=compiled)

    assert len(compiled.compiled_steps) == 1
    assert_close(fast, learn(policy, objectives, [record] * 2), rtol=1e-9, atol=1e-11)
    assert fast[2]["clip_fraction"] != learn(policy, [CLIP] * 2, [record] * 2)[2]["clip_fraction"]


def test_what_is_not_finite_leaves_policy_and_optimizer_as_they_were(compiled):
    policy = policy_for(spaces.Discrete(3))
    good = record_for(policy, steps=20)
    bad = replace(good, target=good.target.index_fill(1, torch.tensor([3]), float("inf")))
    said = []

    once = learn(policy, [CLIP], [good], compiled=compiled)
    then = learn(policy, [CLIP] * 2, [good, bad], compiled=compiled, on_nonfinite=said.append)

    assert "the loss is" in str(said[0])
    assert then[2] == {"updates_skipped": 1.0, "optimizer_steps": 0.0, "epochs": 0.0}
    assert_close(then[:2], once[:2], rtol=0, atol=0)


def test_large_products_in_single_precision_are_those_of_plain_updates():
    policy = Policy.build(BOX, spaces.Discrete(3), NetworkConfig(hidden=(64, 64)), seed=3).double()
    records = [record_for(policy, steps=512)]  # minibatches of 342: 64 x 64 of it are more than 2^20 multiplications
    single = copy.deepcopy(policy).float()
    halved = [map_tensors(lambda x: x.float() if x.is_floating_point() else x, record) for record in records]
    slow = {"num_epochs": 1, "learning_rate": 1e-3}

    fast = learn(single, [CLIP], halved, compiled=CompiledUpdate(512, varying=("clip",)), **slow)

    for (name, mine), theirs in zip(fast[0].items(), learn(policy, [CLIP], records, **slow)[0].values(), strict=True):
        assert_close(mine.double(), theirs, rtol=0, atol=2e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("width", range(1, MAX_NARROW_SIZE + 2))
def test_narrow_products_are_sums_and_stay_what_they_are(width):
    def products(tall, wide, bias, other):
        gradients = torch.mm(tall.t(), other), torch.mm(other.t(), tall)
        return torch.mm(tall, wide.t()), torch.addmm(bias, tall, wide.t()), *gradients

    sizes = (300, width), (7, width), (7,), (300, 9)
    given = [torch.randn(size, generator=seeded(i)) for i, size in enumerate(sizes)]
    traced = make_fx(products, tracing_mode="fake")(*given)

    arranged = compiled_module._optimize_graph(traced)

    for mine, theirs in zip(arranged(*given), products(*given), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    calls = [node.target for node in arranged.graph.nodes]
    assert sum(calls.count(x) for x in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)) == 4 * (
        width > MAX_NARROW_SIZE
    )


def test_the_gradient_of_a_chosen_log_prob_is_told_by_comparing():
    def gradient(logp, action, weight):
        def loss(logp):
            return (Categorical(logp).log_prob(action) * weight).sum()

        return torch.func.grad(loss)(logp)

    logp, action = torch.randn(6, 1, 3, generator=seeded(1)), torch.tensor([2, 0, 1, 1, 0, 2])[:, None]
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, -1.0])[:, None]
    traced = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(logp, action, weight)

    arranged = compiled_module._optimize_graph(traced)

    assert torch.equal(arranged(logp, action, weight), gradient(logp, action, weight))
    assert torch.ops.aten.scatter_add.default not in [node.target for node in arranged.graph.nodes]


def test_products_are_turned_and_laid_out_and_stay_what_they_are():
    def gradients(grad, narrow, wide):  # as of two layers' weights
        return torch.mm(grad.t(), narrow), torch.mm(narrow.t(), grad), _linear_op(grad.t(), wide.t())

    given = [torch.randn(300, width, generator=seeded(width)) for width in (64, 6, 65)]
    traced = make_fx(gradients, tracing_mode="fake")(*given)
    before = [node.target for node in traced.graph.nodes]

    arranged = compiled_module._optimize_graph(traced)

    for mine, theirs in zip(arranged(*given), gradients(*given), strict=True):
        assert mine.is_contiguous()
        assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    clones = [node for node in arranged.graph.nodes if node.target is torch.ops.aten.clone.default]
    turned, laid_out = (node.args[0] for node in clones)
    assert before.count(torch.ops.aten.clone.default) == 0
    assert turned.args[0].target is torch.ops.aten.mm.default  # grad' narrow alone, as (narrow' grad)'
    assert turned.args[0].args[0].args[0].name.startswith("narrow")
    assert laid_out.args[0].name.startswith("grad")  # grad' of the large product


def test_a_turned_factor_is_read_as_it_lies():
    def gradient(grad, x):
        return _linear_op(grad.t().clone(memory_format=torch.contiguous_format), x.t())

    given = [torch.randn(2048, 64, generator=seeded(i)) for i in range(2)]
    with torch._inductor.config.patch(force_disable_caches=True):
        found, code = run_and_get_code(compiled_module._compile(gradient), *given)

    assert_close(found, gradient(*given))
    assert "".join(code).count("transpose_mxn") == 1  # the gradient's
    assert "_linear_pointwise(" in "".join(code)  # else the compiler goes through Python for it


def test_tanh_of_single_precision_is_a_quotient():
    wide, near = torch.linspace(-20, 20, 400_001), torch.logspace(-30, 0, 10_001)
    x = torch.cat([wide, near, -near, torch.tensor([torch.inf, -torch.inf, torch.nan])])

    found, gradient = compiled_module._compile(_tanh_and_gradient)(x)

    exact = x.double().tanh()
    assert_close(found.double(), exact, rtol=4e-7, atol=0, equal_nan=True)
    assert_close(gradient.double(), 1 - exact.square(), rtol=0, atol=8e-7, equal_nan=True)
    left = [node.target for node in compiled_module._optimize_graph(_traced_tanh(x)).graph.nodes]
    assert torch.ops.aten.sigmoid.default not in left
    assert torch.ops.aten.sigmoid.default in [node.target for node in _traced_tanh(x).graph.nodes]


def test_of_double_precision_tanh_stays_exact():
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)

    found, _ = compiled_module._optimize_graph(_traced_tanh(x))(x)

    assert_close(found, x.tanh(), rtol=0, atol=1e-15)


def test_what_is_no_tanh_stays():
    traced = make_fx(lambda x: (torch.rsub(x.sigmoid(), -1, alpha=-3), torch.rsub(x, -1, alpha=-2)))(x := torch.ones(2))

    assert_close(compiled_module._optimize_graph(traced)(x), (3 * x.sigmoid() - 1, 2 * x - 1))


def _tanh_and_gradient(x):
    leaf = x.detach().requires_grad_()
    found = Tanh()(leaf)
    return found.detach(), torch.autograd.grad(found.sum(), [leaf])[0]


def _traced_tanh(x):
    with torch.enable_grad():
        return make_fx(_tanh_and_gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def test_compiled_forms_of_another_version_are_not_taken(monkeypatch):
    tags = []

    def compile_graph(graph, given, options):
        tags.append(torch.compiler.config.cache_key_tag)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile_graph)
    for source in (b"one", b"other"):
        monkeypatch.setattr(Path, "read_bytes", lambda _, source=source: source)
        compiled_module._compile(lambda x: x + 1)(torch.ones(2))

    assert len(set(tags)) == 2
    assert torch.compiler.config.cache_key_tag not in tags
