"""Step 5: how many steps, over what, with which gradient; and what stops it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.records import Table, random_batch, row, seeded
from understudy.batch import Batch
from understudy.reduce import per_row
from understudy.update import update


class Line(nn.Module):
    """One number, `w`: the gradient of w * advantage is the advantage."""

    def __init__(self, memory: bool = False):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.needs_whole_rows = memory


def linear(policy, batch):
    """Loss w * advantage; and who was there."""
    return policy.w * batch.advantage, {"advantage": batch.advantage, "ones": torch.ones_like(batch.advantage)}


def record_of(*advantage: float, rows: int = 1) -> Batch:
    """Chosen steps with these advantages, in so many rows."""
    batch = random_batch(0, Table(), rows=rows)
    chosen = torch.tensor(advantage, dtype=torch.float64).reshape(rows, -1)
    blank = torch.zeros_like(chosen)
    fields = {"obs": blank.long(), "action": blank.long(), "behavior_logprob": blank, "reward": blank, "value": blank}
    fields |= {"mask": blank == 0, "terminated": blank != 0, "truncated": blank != 0}
    return Batch.of(batch, **fields, advantage=chosen, target=blank, old_distribution=None, reference=None)


def learn(record, objective=linear, policy=None, *, epochs=1, minibatches=1, max_grad_norm=None, **options):
    """The policy and the metrics after an update by plain gradient descent with step size 1."""
    policy = Line() if policy is None else policy
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    options = {"generator": seeded()} | options
    fixed = {"num_epochs": epochs, "num_minibatches": minibatches, "max_grad_norm": max_grad_norm}
    return policy, update(policy, optimizer, record, objective, **fixed, **options)


def watched(seen: list):
    """`linear`, writing down every batch that it is shown."""

    def objective(policy, batch):
        seen.append(batch)
        return linear(policy, batch)

    return objective


def sizes(seen: list) -> list[int]:
    return [len(batch) for batch in seen]


def test_a_step_goes_down_the_weighted_mean_of_the_loss():
    # gradient (1 + 2 + 6) / 3
    policy, metrics = learn(record_of(1, 2, 6))

    assert policy.w.item() == pytest.approx(-3)
    assert metrics == pytest.approx({"advantage": 3, "ones": 1, "grad_norm": 3, "optimizer_steps": 1, "epochs": 1})


def test_every_epoch_sees_every_step_once():
    seen: list[Batch] = []
    learn(record_of(*range(7)), watched(seen), epochs=2, minibatches=3)

    for epoch in (seen[:3], seen[3:]):
        assert sorted(torch.cat([batch.advantage for batch in epoch]).flatten().tolist()) == list(range(7))


def test_minibatches_differ_in_size_by_at_most_one():
    seen: list[Batch] = []
    learn(record_of(*range(7)), watched(seen), minibatches=3)

    assert sorted(sizes(seen)) == [2, 2, 3]


def test_there_are_no_more_minibatches_than_steps():
    seen: list[Batch] = []
    _, metrics = learn(record_of(1, 2), watched(seen), minibatches=5)

    assert sizes(seen) == [1, 1]
    assert metrics["optimizer_steps"] == 2


def test_a_micro_batch_has_at_most_so_many_rows():
    seen: list[Batch] = []
    _, metrics = learn(record_of(*range(7)), watched(seen), micro_batch_size=3)

    assert sizes(seen) == [3, 3, 1]
    assert metrics["optimizer_steps"] == 1


def test_every_epoch_is_shuffled_anew():
    seen: list[Batch] = []
    learn(record_of(*range(20)), watched(seen), epochs=2)

    assert not seen[0].advantage.equal(seen[1].advantage)
    assert seen[0].advantage.flatten().tolist() != list(range(20))


def test_without_reshuffling_one_order_serves_every_epoch():
    seen: list[Batch] = []
    learn(record_of(*range(20)), watched(seen), epochs=2, reshuffle=False)

    assert seen[0].advantage.equal(seen[1].advantage)
    assert seen[0].advantage.flatten().tolist() != list(range(20))


def test_without_reshuffling_one_order_serves_all_epochs():
    seen: list[Batch] = []
    learn(record_of(*range(20)), watched(seen), epochs=3, reshuffle=False)

    assert seen[0].advantage.flatten().tolist() != list(range(20))
    assert seen[0].advantage.equal(seen[1].advantage)
    assert seen[0].advantage.equal(seen[2].advantage)


@pytest.mark.parametrize("same", [True, False])
def test_the_generator_alone_decides_the_order(same):
    orders = []
    for seed in (1, 1 if same else 2):
        seen: list[Batch] = []
        learn(record_of(*range(20)), watched(seen), generator=seeded(seed))
        orders.append(seen[0].advantage)

    assert orders[0].equal(orders[1]) is same


def test_a_policy_without_memory_learns_from_chosen_steps_alone():
    seen: list[Batch] = []
    batch = random_batch(1, Table())
    learn(batch, watched(seen))

    assert seen[0].mask.shape == (int(batch.mask.sum()), 1)


def test_a_policy_with_memory_learns_from_whole_rows():
    seen: list[Batch] = []
    batch = random_batch(1, Table())
    learn(batch, watched(seen), Line(memory=True), minibatches=2)

    assert [b.mask.shape for b in seen] == [(3, batch.mask.shape[1])] * 2


def test_the_weights_are_those_asked_for():
    # rows (1, 3) and (8, masked): per row, 1/4, 1/4, 1/2
    record = record_of(1, 3, 8, 100, rows=2)
    record = Batch.of(record, mask=torch.tensor([[True, True], [True, False]]))

    policy, _ = learn(record, policy=Line(memory=True), loss_weights=per_row)

    assert policy.w.item() == pytest.approx(-(0.25 + 0.75 + 4))


def test_the_weights_are_built_before_micro_batches_are_cut():
    # rows of 2, 1 steps: each of the three weighs 1/3, although a row is a micro-batch
    record = Batch.of(record_of(1, 3, 8, 100, rows=2), mask=torch.tensor([[True, True], [True, False]]))

    policy, metrics = learn(record, policy=Line(memory=True), micro_batch_size=1)

    assert policy.w.item() == pytest.approx(-4)
    assert metrics["advantage"] == pytest.approx(4)


@pytest.mark.parametrize("memory", [True, False])
def test_a_record_without_a_chosen_step_makes_no_step(memory):
    record = record_of(1, 2, rows=2)
    record = Batch.of(record, mask=torch.zeros_like(record.mask))

    policy, metrics = learn(record, policy=Line(memory), epochs=2, minibatches=2)

    assert policy.w.item() == 0
    assert metrics == {"optimizer_steps": 0, "epochs": 2}


def test_a_minibatch_without_a_chosen_step_makes_no_step_and_no_metric():
    # of two rows in two minibatches, only one has a step: gradient 5, once
    record = Batch.of(record_of(5, 100, rows=2), mask=torch.tensor([[True], [False]]))

    policy, metrics = learn(record, policy=Line(memory=True), minibatches=2)

    assert policy.w.item() == -5
    assert metrics == {"advantage": 5, "ones": 1, "grad_norm": 5, "optimizer_steps": 1, "epochs": 1}


def test_without_epochs_nothing_is_learnt():
    policy, metrics = learn(record_of(1), epochs=0)

    assert policy.w.item() == 0
    assert metrics == {"optimizer_steps": 0, "epochs": 0}


def test_metrics_are_the_mean_over_the_minibatches_of_the_last_epoch():
    # the second epoch's advantages are doubled: means 2 * (1 + 3) / 2
    double = lambda record: Batch.of(record, advantage=2 * record.advantage)  # noqa: E731
    _, metrics = learn(record_of(1, 3), epochs=2, minibatches=2, recompute=double)

    assert metrics["advantage"] == pytest.approx(4)
    assert metrics["grad_norm"] == pytest.approx(4)
    assert (metrics["optimizer_steps"], metrics["epochs"]) == (4, 2)


def test_the_record_is_made_anew_before_every_epoch_but_the_first():
    # gradients 1, 1 + 10, 1 + 20
    policy, _ = learn(
        record_of(1), epochs=3, recompute=lambda record: Batch.of(record, advantage=record.advantage + 10)
    )

    assert policy.w.item() == -(1 + 11 + 21)


def test_a_minibatch_is_prepared_whole():
    # each minibatch's mean is taken out before it is cut: nothing is left to learn
    seen: list[Batch] = []

    def centre(batch):
        return Batch.of(batch, advantage=batch.advantage - batch.advantage.mean())

    policy, metrics = learn(
        record_of(*range(8)), watched(seen), minibatches=2, micro_batch_size=1, transform_minibatch=centre
    )

    assert len(seen) == 8
    assert policy.w.item() == pytest.approx(0)
    assert metrics["advantage"] == pytest.approx(0)


def test_steering_stops_before_the_step_it_sees():
    # first minibatch: w = -1; the second is seen and not taken
    shown = []

    def steer(metrics):
        shown.append(metrics)
        return len(shown) == 2

    policy, metrics = learn(record_of(1, 1), epochs=3, minibatches=2, on_minibatch=steer)

    assert policy.w.item() == -1
    assert shown[0] == {"advantage": 1.0, "ones": 1.0}
    assert metrics == {"advantage": 1, "ones": 1, "grad_norm": 1, "optimizer_steps": 1, "epochs": 1}


def test_steering_reports_the_mean_over_the_steps_taken():
    # the third minibatch is seen and not taken: two steps of advantage 4
    seen = []
    _, metrics = learn(record_of(4, 4, 4), minibatches=3, on_minibatch=lambda metrics: seen.append(1) or len(seen) == 3)

    assert metrics == {"advantage": 4, "ones": 1, "grad_norm": 4, "optimizer_steps": 2, "epochs": 1}


def test_steering_at_the_first_minibatch_still_reports_what_it_saw():
    policy, metrics = learn(record_of(4), on_minibatch=lambda metrics: True)

    assert policy.w.item() == 0
    assert metrics == {"advantage": 4, "ones": 1, "optimizer_steps": 0, "epochs": 1}


def test_steering_in_a_later_epoch_reports_that_epoch():
    seen = []
    _, metrics = learn(record_of(4), epochs=5, on_minibatch=lambda metrics: seen.append(1) or len(seen) == 3)

    assert (metrics["optimizer_steps"], metrics["epochs"]) == (2, 3)


def test_who_steers_to_go_on_changes_nothing():
    policy, metrics = learn(record_of(4), epochs=2, on_minibatch=lambda metrics: False)

    assert policy.w.item() == -8
    assert metrics["optimizer_steps"] == 2


def test_the_gradient_is_clipped_to_its_norm_and_reported_before():
    # 10 is scaled to 2 (up to torch's 1e-6 in the denominator)
    policy, metrics = learn(record_of(10), max_grad_norm=2.0)

    assert policy.w.item() == pytest.approx(-2, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(10)


class Two(nn.Module):
    """Two numbers with gradients 3 and 4 times the advantage."""

    needs_whole_rows = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))


def three_four(policy, batch):
    return (3 * policy.a + 4 * policy.b) * batch.advantage.float(), {}


def two_steps(*groups, max_grad_norm):
    policy = Two()
    own = [{"params": [getattr(policy, name)], **bound} for name, bound in groups]
    optimizer = torch.optim.SGD(own, lr=1.0)
    fixed = {"num_epochs": 1, "num_minibatches": 1, "generator": seeded()}
    metrics = update(policy, optimizer, record_of(1), three_four, max_grad_norm=max_grad_norm, **fixed)
    return torch.stack([policy.a, policy.b])[None].detach(), metrics


def test_groups_without_a_bound_of_their_own_are_clipped_jointly():
    # norm 5 to 1
    moved, metrics = two_steps(("a", {}), ("b", {}), max_grad_norm=1.0)

    assert_close(moved, row(-0.6, -0.8))
    assert metrics["grad_norm"] == pytest.approx(5)


def test_a_group_with_a_bound_of_its_own_is_clipped_apart():
    # a: 3 to 0.5; b: 4 to 1; the norm of them all is 5
    moved, metrics = two_steps(("a", {"max_grad_norm": 0.5}), ("b", {}), max_grad_norm=1.0)

    assert_close(moved, row(-0.5, -1))
    assert metrics["grad_norm"] == pytest.approx(5)


def test_bounds_apart_need_no_joint_one():
    moved, _ = two_steps(("a", {"max_grad_norm": 0.5}), ("b", {"max_grad_norm": 2.0}), max_grad_norm=None)

    assert_close(moved, row(-0.5, -2))


def test_without_a_bound_nothing_is_clipped():
    moved, metrics = two_steps(("a", {}), ("b", {}), max_grad_norm=None)

    assert_close(moved, row(-3, -4))
    assert metrics["grad_norm"] == pytest.approx(5)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(bound):
    # the slope of a root at 0
    policy = Line()
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is inf: lower learning_rate"):
        learn(record_of(1), lambda policy, batch: (policy.w.sqrt() * batch.advantage, {}), policy, max_grad_norm=bound)

    assert policy.w.item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_though_its_gradient_is(bad):
    policy = Line()
    with pytest.raises(FloatingPointError, match=rf"the loss is {bad}: look at rewards"):
        learn(record_of(1), lambda policy, batch: (policy.w * batch.advantage + bad, {}), policy)

    assert policy.w.item() == 0


def test_gradients_left_over_from_before_are_not_learnt_from():
    policy = Line()
    policy.w.grad = torch.tensor(100.0, dtype=torch.float64)

    assert learn(record_of(1), policy=policy)[0].w.item() == -1
