"""Large linear layers by oneDNN: the numbers and gradients of torch's own; memory that is used again."""

import ctypes
import resource

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from understudy.control import ppo, training
from understudy.fast import linear as fast_linear
from understudy.fast.linear import Tanh, keep_freed_memory, linear, round_up_rows

CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of up to 2,048 products of numbers about 1, in another order


def at_random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64)
    return found.to(dtype).requires_grad_()


@pytest.mark.parametrize("outputs", [64, 160], ids=["narrower", "wider"])
@pytest.mark.parametrize("shape", [(2048, 96), (4, 512, 96)], ids=["matrix", "rows of rows"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_large_product_has_the_numbers_and_gradients_of_torchs(shape, outputs, biased):
    given = [at_random(*shape), at_random(outputs, 96), *([at_random(outputs)] if biased else [])]
    exact = [x.detach().double().requires_grad_() for x in given]
    ours, theirs = linear(*given), functional.linear(*exact)
    pull = at_random(*ours.shape).detach()

    assert (
        fast_linear._is_suited_to_onednn(given[0], given[1], 2048 * 96 * outputs)
        is torch.backends.mkldnn.is_available()
    )
    assert_close(ours.double(), theirs, **CLOSE)
    with torch.no_grad():
        assert torch.equal(linear(*given), ours)
    found = torch.autograd.grad(ours, given, pull)
    wanted = torch.autograd.grad(theirs, exact, pull.double())
    for here, there in zip(found, wanted, strict=True):
        assert_close(here.double(), there, rtol=1e-5, atol=1e-3)  # sums of 2,048


def test_a_gradient_that_is_one_number_everywhere_goes_through():
    x, weight = at_random(2048, 96), at_random(64, 96)

    assert_close(
        torch.autograd.grad(linear(x, weight).sum(), weight)[0], x.sum(dim=0).expand(64, 96), rtol=1e-5, atol=1e-3
    )


def test_small_products_and_those_in_double_precision_are_torchs_own():
    for x, weight in [
        (at_random(8, 96), at_random(64, 96)),
        [at_random(*s, dtype=torch.float64) for s in ((2048, 96), (64, 96))],
    ]:
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_numbers_of_rows_are_rounded_up_by_a_sixteenth_at_most():
    assert [round_up_rows(n) for n in (0, 1, 16, 250, 256, 257, 2500)] == [0, 16, 16, 256, 256, 272, 2560]
    many = range(1024, 2048)
    assert len({round_up_rows(n) for n in many}) == 17  # 2048 among them
    assert all(n <= round_up_rows(n) < n * 17 / 16 for n in many)


def test_tanh_by_a_sigmoid_is_tanh():
    x = torch.linspace(-12, 12, 1001)

    assert_close(Tanh()(x), x.tanh(), rtol=0, atol=3e-7)  # 2 sigmoid - 1 is rounded at 1, wherever tanh is near 0
    leaf = torch.linspace(-3, 3, 61, requires_grad=True)
    (mine,), (theirs,) = (torch.autograd.grad(f(leaf).sum(), leaf) for f in (Tanh(), torch.tanh))
    assert_close(mine, theirs, rtol=0, atol=6e-7)


def test_a_run_of_control_keeps_the_memory_that_it_frees(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: asked.append(True))

    ppo.train(
        ppo.Config(
            env="CartPole-v1", num_envs=2, num_steps_per_env=8, steps=16, output_dir=str(tmp_path / "run"), quiet=True
        )
    )

    assert asked == [True]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's")
def test_memory_that_tensors_free_is_not_asked_of_the_system_again():
    keep_freed_memory()

    def asked() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(2):
            _ = [torch.ones(7 * 2**20) for _ in range(4)]  # 28 MiB each: one alone glibc learns to keep
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    rounds = [asked() for _ in range(10)]  # in a used heap it takes some until there are eight places of that size

    assert min(rounds) < 7 * 2**20 * 4 / 4096  # fewer pages than one of the eight has
