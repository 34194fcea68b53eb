"""What every objective has in common: the gradient does not depend on how the same steps are laid out or cut."""

import inspect
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.records import Table, random_batch, seeded
from understudy import objective as room
from understudy.batch import Batch, map_tensors
from understudy.objective import (
    cispo,
    critic_only,
    grpo,
    gspo,
    kl_exact,
    kl_k2,
    kl_k3,
    policy_gradient,
    ppo,
    ppo_penalty,
    scale_penalty,
    squared_error,
)
from understudy.reduce import importance_weight, per_budget, per_row, per_step
from understudy.update import update

OBJECTIVES = {
    "policy_gradient": partial(policy_gradient, value_coef=0.5, entropy_coef=0.1, value_loss_fn=squared_error),
    "ppo": partial(ppo, clip=0.2, value_coef=0.5, entropy_coef=0.1, value_clip=0.3),
    "ppo_penalty": partial(ppo_penalty, kl_old_coef=0.7, value_coef=0.5, entropy_coef=0.1, value_clip=0.3),
    "critic_only": partial(critic_only, value_clip=0.3),
    "grpo": partial(grpo, low=0.2, high=0.28, entropy_coef=0.1),
    "cispo": partial(cispo, low=0.2, high=0.28, entropy_coef=0.1),
}
OF_TEXT = {"sft_loss", "with_pretraining", "dpo_loss"}  # tests/test_objective.py, tests/test_language_policy.py
OF_ROWS = {"gspo": partial(gspo, low=0.2, high=0.28, entropy_coef=0.1)}  # a ratio a row: below
for charge in (kl_k2, kl_k3):
    OBJECTIVES[f"ppo + {charge.__name__}"] = partial(OBJECTIVES["ppo"], kl_penalty=scale_penalty(charge, 0.3))
OBJECTIVES["ppo + kl_exact"] = partial(
    OBJECTIVES["ppo"],
    kl_penalty=lambda *given: 0.3 * kl_exact(*given[:2], Batch.of(given[2], reference=given[2].old_distribution)),
)


def off_policy(policy, batch: Batch, *, how: str, ratio: str, objective: str):
    """An objective on steps that another policy chose: the reference stands for it, and bounds are met by some."""
    bounds = {"mode": how, "ratio": ratio, "low": 0.7, "high": 1.2}
    weight = importance_weight(batch.behavior_logprob, batch.reference, batch.mask, **bounds)
    return OBJECTIVES[objective](policy, Batch.of(batch, advantage=weight * batch.advantage))


for how, name in (("truncate", "ppo"), ("mask", "grpo")):
    OBJECTIVES[f"{name} + {how}"] = partial(off_policy, how=how, ratio="step", objective=name)
    for ratio in ("row", "row_mean"):
        OF_ROWS[f"{name} + {how} {ratio}"] = partial(off_policy, how=how, ratio=ratio, objective=name)
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
WEIGHTS = {"per_step": per_step, "per_row": per_row, "per_budget": partial(per_budget, budget=7)}
EVERY_WEIGHT = pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)


def test_every_objective_of_the_room_is_in_this_table():
    functions = inspect.getmembers(room, inspect.isfunction)
    public = {name for name, f in functions if not name.startswith("_") and "policy" in inspect.signature(f).parameters}
    assert public - {"policy_forward"} - OF_TEXT - OF_ROWS.keys() == {name for name in OBJECTIVES if "+" not in name}


def gradient(objective, batch: Batch, weight: torch.Tensor):
    table = Table()
    (objective(table, batch)[0] * weight).sum().backward()
    return tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in (table.logits, table.values))


@EVERY_WEIGHT
@EVERY
def test_padding_columns_change_no_gradient(objective, weigh):
    batch = random_batch(1, Table())
    padded = map_tensors(lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], dim=1), batch)

    assert_close(gradient(objective, padded, weigh(padded.mask)), gradient(objective, batch, weigh(batch.mask)))


@EVERY
def test_what_stands_in_unchosen_columns_changes_no_gradient(objective):
    batch = random_batch(1, Table())
    junk = {
        name: torch.where(batch.mask, getattr(batch, name), 50.0)
        for name in ("advantage", "target", "value", "behavior_logprob")
    }
    junk |= {"action": torch.where(batch.mask, batch.action, 2), "obs": torch.where(batch.mask, batch.obs, 4)}

    weight = per_step(batch.mask)
    assert_close(gradient(objective, Batch.of(batch, **junk), weight), gradient(objective, batch, weight))


@EVERY_WEIGHT
@EVERY
def test_the_order_of_rows_changes_no_gradient(objective, weigh):
    batch = random_batch(1, Table())
    moved = batch[torch.randperm(len(batch), generator=seeded())]

    assert_close(gradient(objective, moved, weigh(moved.mask)), gradient(objective, batch, weigh(batch.mask)))


@EVERY_WEIGHT
@EVERY
def test_the_gradients_of_rows_apart_add_up(objective, weigh):
    batch = random_batch(1, Table())
    weight = weigh(batch.mask)

    first = gradient(objective, batch[:2], weight[:2])
    second = gradient(objective, batch[2:], weight[2:])
    assert_close(tuple(a + b for a, b in zip(first, second, strict=True)), gradient(objective, batch, weight))


@EVERY
def test_episodes_in_a_row_have_the_gradient_of_episodes_apart(objective):
    batch = random_batch(1, Table())
    apart = [map_tensors(lambda x, b=b, t=t: x[b : b + 1, t : t + 1], batch) for b, t in batch.mask.nonzero().tolist()]
    weight = torch.full((1, 1), 1 / len(apart))

    sums = [gradient(objective, piece, weight) for piece in apart]
    total = tuple(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    assert_close(total, gradient(objective, batch, per_step(batch.mask)))


def learnt(objective, *, micro=None, memory=True, weigh=per_step, order=0):
    """Parameters and metrics after two epochs of two minibatches."""
    table = Table(memory=memory)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    metrics = update(
        table,
        optimizer,
        random_batch(1, table),
        objective,
        num_epochs=2,
        num_minibatches=2,
        max_grad_norm=0.5,
        micro_batch_size=micro,
        loss_weights=weigh,
        generator=seeded(order),
    )
    return dict(table.state_dict()), metrics


@EVERY_WEIGHT
@EVERY
@pytest.mark.parametrize("micro", [1, 2, 100])
def test_any_cut_into_micro_batches_learns_the_same(objective, weigh, micro):
    assert_close(learnt(objective, micro=micro, weigh=weigh), learnt(objective, weigh=weigh))


@EVERY
@pytest.mark.parametrize("micro", [1, 3])
def test_any_cut_of_steps_apart_learns_the_same(objective, micro):
    assert_close(learnt(objective, micro=micro, memory=False), learnt(objective, memory=False))


@EVERY
def test_steps_apart_have_the_gradient_of_whole_rows(objective):
    batch = random_batch(1, Table())
    steps = batch.flatten_steps()

    assert_close(gradient(objective, steps, per_step(steps.mask)), gradient(objective, batch, per_step(batch.mask)))


@EVERY
def test_equal_seeds_learn_equal_parameters(objective):
    assert_close(learnt(objective, order=3), learnt(objective, order=3), rtol=0, atol=0)


@pytest.mark.parametrize("objective", OF_ROWS.values(), ids=OF_ROWS)
def test_a_rows_ratio_depends_on_no_padding_no_order_and_no_cut(objective):
    batch = random_batch(1, Table())
    whole = gradient(objective, batch, per_row(batch.mask))

    padded = map_tensors(lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], dim=1), batch)
    assert_close(gradient(objective, padded, per_row(padded.mask)), whole)
    moved = batch[torch.randperm(len(batch), generator=seeded())]
    assert_close(gradient(objective, moved, per_row(moved.mask)), whole)
    weight = per_row(batch.mask)
    pieces = [gradient(objective, batch[rows], weight[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, None))]
    assert_close(tuple(sum(parts) for parts in zip(*pieces, strict=True)), whole)
    assert_close(learnt(objective, micro=1, weigh=per_row), learnt(objective, weigh=per_row))
