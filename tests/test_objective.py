"""Step 5: losses per step by hand, where their gradients are zero, and what they have in common at ratio 1."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.records import Table, flags, random_batch, record, row
from understudy.batch import Batch, LabelledText, PreferencePairs, TokenBatch
from understudy.distribution import Categorical, SquashedGaussian
from understudy.objective import (
    adapt_kl_old_coef,
    binary_label_loss,
    bradley_terry_loss,
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    critic_only,
    dpo_loss,
    grpo,
    gspo,
    huber_error,
    kl_exact,
    kl_k2,
    kl_k3,
    policy_gradient,
    ppo,
    ppo_penalty,
    scale_penalty,
    sft_loss,
    squared_error,
    with_pretraining,
)
from understudy.value import estimate_values


def log(*numbers: float):
    return row(*numbers).log()


class Fixed:
    """Says the same whatever it sees: probabilities 0.2 and 0.8, value 3."""

    needs_whole_rows = False

    def __call__(self, obs):
        return Categorical(log(0.2, 0.8).expand(*obs.shape, 2)), torch.full(obs.shape, 3.0)


def one_step(*, old_probability: float = 0.4, advantage: float = 2.0, target: float = 1.0, value: float = 3.0) -> Batch:
    """One step that took action 1, whose old probability was this."""
    old = Categorical(log(1 - old_probability, old_probability)[:, None])
    found = {"value": row(value), "advantage": row(advantage), "target": row(target), "old_distribution": old}
    taken = record(flags(1), action=torch.ones(1, 1).long(), behavior_logprob=log(old_probability))
    return Batch.of(taken, **found)


ENTROPY = -0.2 * log(0.2) - 0.8 * log(0.8)
KL = 0.6 * log(0.6 / 0.2) + 0.4 * log(0.4 / 0.8)


def test_the_policy_gradient_loss_by_hand():
    # -2 log 0.8 + 0.5 * (3 - 1)^2 / 2 - 0.1 H
    loss, _ = policy_gradient(Fixed(), one_step(), value_coef=0.5, entropy_coef=0.1, value_loss_fn=squared_error)
    assert_close(loss, -2 * log(0.8) + 1.0 - 0.1 * ENTROPY)


def test_the_policy_gradient_loss_uses_the_value_loss_it_is_given():
    # |3 - 1| - 1/2
    loss, _ = policy_gradient(Fixed(), one_step(), value_coef=2.0, entropy_coef=0.0, value_loss_fn=huber_error)
    assert_close(loss, -2 * log(0.8) + 2 * 1.5)


def test_without_a_critic_the_policy_gradient_asks_no_target():
    loss, metrics = policy_gradient(
        Fixed(), one_step(target=float("nan")), value_coef=0.0, entropy_coef=0.0, value_loss_fn=squared_error
    )
    assert_close(loss, -2 * log(0.8))
    assert_close(metrics["value_loss"], row(0))


def test_the_ppo_loss_by_hand():
    # ratio 0.8 / 0.4 = 2, clipped to 1.2: -1.2 * 2 + 0.5 * (3 - 1)^2 / 2 - 0.1 H
    loss, _ = ppo(Fixed(), one_step(), clip=0.2, value_coef=0.5, entropy_coef=0.1)
    assert_close(loss, row(-2.4 + 1.0) - 0.1 * ENTROPY)


def test_the_ppo_loss_clips_the_value_when_asked():
    # old value 1, V = 3 kept within 0.5: 1.5; target 3: the larger of 0 and (1.5 - 3)^2 / 2 = 1.125
    loss, _ = ppo(
        Fixed(),
        one_step(advantage=0.0, value=1.0, target=3.0),
        clip=0.2,
        value_coef=1.0,
        entropy_coef=0.0,
        value_clip=0.5,
    )
    assert_close(loss, row(1.125))


def test_the_penalty_loss_by_hand():
    # 3 KL(old, new) - 2 * 2 + 0.5 * (3 - 1)^2 / 2 - 0.1 H
    loss, _ = ppo_penalty(Fixed(), one_step(), kl_old_coef=3.0, value_coef=0.5, entropy_coef=0.1)
    assert_close(loss, 3 * KL - 4 + 1.0 - 0.1 * ENTROPY)


def test_the_penalty_loss_clips_the_value_when_asked():
    loss, _ = ppo_penalty(
        Fixed(),
        one_step(advantage=0.0, value=1.0, target=3.0),
        kl_old_coef=0.0,
        value_coef=1.0,
        entropy_coef=0.0,
        value_clip=0.5,
    )
    assert_close(loss, row(1.125))


def test_the_metrics_are_the_parts_of_the_loss():
    _, metrics = ppo(Fixed(), one_step(), clip=0.2, value_coef=0.5, entropy_coef=0.1)

    assert_close(metrics["loss"], row(-1.4) - 0.1 * ENTROPY)
    assert_close(metrics["policy_loss"], row(-2.4))
    assert_close(metrics["value_loss"], row(2.0))
    assert_close(metrics["entropy"], ENTROPY)
    assert_close(metrics["kl_old"], KL)
    assert_close(metrics["ratio"], row(2.0))


def test_an_entropy_that_is_estimated_is_reported_as_an_estimate():
    squashed = SquashedGaussian(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), half_width=torch.ones(1))
    batch = Batch.of(one_step(), old_distribution=squashed, action=torch.zeros(1, 1, 1))

    _, metrics = ppo(lambda obs: (squashed, torch.zeros(1, 1)), batch, clip=0.2, value_coef=0.5, entropy_coef=0.1)

    assert "entropy" not in metrics
    assert_close(metrics["entropy_estimate"], squashed.entropy())


@pytest.mark.parametrize(("old_probability", "clipped"), [(0.9, 0.0), (0.8, 0.0), (0.7, 0.0), (0.6, 1.0), (1.0, 0.0)])
def test_the_clip_fraction_counts_ratios_outside_the_clip(old_probability, clipped):
    # 0.8 over 0.9, 0.8, 0.7, 0.6, 1.0 is 0.89, 1, 1.14, 1.33, 0.8 (a hair inside for rounding)
    _, metrics = ppo(Fixed(), one_step(old_probability=old_probability), clip=0.2001, value_coef=0.0, entropy_coef=0.0)
    assert_close(metrics["clip_fraction"], row(clipped))


def test_a_ratio_of_one_is_never_outside_the_clip():
    _, metrics = ppo(Fixed(), one_step(old_probability=0.8), clip=0.0, value_coef=0.0, entropy_coef=0.0)
    assert_close(metrics["clip_fraction"], row(0.0))


def test_a_ratio_below_the_clip_is_counted():
    _, metrics = ppo(Fixed(), one_step(old_probability=0.99), clip=0.1, value_coef=0.0, entropy_coef=0.0)
    assert_close(metrics["clip_fraction"], row(1.0))


@pytest.mark.parametrize("name", ["ratio", "kl_old"])
def test_the_penalty_reports_its(name):
    _, metrics = ppo_penalty(Fixed(), one_step(), kl_old_coef=3.0, value_coef=0.0, entropy_coef=0.0)
    assert_close(metrics[name], {"ratio": row(2.0), "kl_old": KL}[name])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 1.0, -1.0),
        (1.5, 1.0, -1.3),  # good and already likelier: clipped to 1 + high
        (1.5, -1.0, 1.5),  # bad and likelier: not clipped
        (0.5, 1.0, -0.5),  # good and less likely: not clipped
        (0.5, -1.0, 0.8),  # bad and already less likely: clipped to 1 - low
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss):
    ours = clipped_surrogate(log(2 * ratio), log(2), row(advantage), low=0.2, high=0.3)
    assert_close(ours, row(loss))


@pytest.mark.parametrize(("ratio", "advantage", "slope"), [(1.5, 1, 0), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0)])
def test_the_surrogates_gradient_is_zero_where_clipped_and_only_there(ratio, advantage, slope):
    # unclipped: d(-ratio A) / d logprob = -ratio A
    logprob = log(ratio).requires_grad_()

    clipped_surrogate(logprob, row(0), row(advantage), low=0.2, high=0.2).backward()

    assert_close(logprob.grad, row(slope))


def test_half_the_squared_error():
    assert_close(squared_error(row(1, 5), row(4, 4)), row(4.5, 0.5))


def test_huber_is_square_within_one_and_straight_beyond():
    # 0.5 * 0.5^2; 1/2; 3 - 1/2
    assert_close(huber_error(row(0.5, -1, 3), row(0, 0, 0)), row(0.125, 0.5, 2.5))


@pytest.mark.parametrize(
    ("value", "target", "error"),
    [
        (2.0, 3.0, 1.125),  # kept at 1.5: (1.5 - 3)^2 / 2, larger than (2 - 3)^2 / 2
        (0.0, 3.0, 4.5),  # kept at 0.5, nearer: the unclipped (0 - 3)^2 / 2 counts
        (0.0, -1.0, 1.125),  # kept at 0.5: (0.5 + 1)^2 / 2
        (1.2, 3.0, 1.62),  # within the clip: (1.2 - 3)^2 / 2
    ],
)
def test_a_clipped_critic_error_is_the_larger_one(value, target, error):
    assert_close(clipped_value_loss(row(value), one_step(value=1.0, target=target), clip=0.5), row(error))


def test_without_a_clip_the_critic_error_is_half_the_squared_error():
    assert_close(clipped_value_loss(row(2.0), one_step(value=1.0, target=5.0), clip=0.0), row(4.5))


@pytest.mark.parametrize(("kl", "coef"), [(0.5, 1.0), (0.7, 2.0), (1.0, 2.0), (1.4, 2.0), (1.6, 4.0)])
def test_the_kl_coefficient_halves_below_and_doubles_above_its_target(kl, coef):
    # target 1: below 2/3, above 3/2
    assert adapt_kl_old_coef(2.0, kl, target=1.0) == coef


def test_the_kl_coefficient_scales_its_limits_with_the_target():
    # target 3: nothing between 2 and 4.5
    assert [adapt_kl_old_coef(2.0, kl, target=3.0) for kl in (1.9, 2.1, 4.4, 4.6)] == [1.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize("kl", [2.0, 4.5])
def test_the_kl_coefficient_stays_at_its_limits(kl):
    assert adapt_kl_old_coef(2.0, kl, target=3.0) == 2.0


OBJECTIVES = {
    "policy_gradient": partial(policy_gradient, value_coef=0.5, entropy_coef=0.1, value_loss_fn=squared_error),
    "ppo": partial(ppo, clip=0.2, value_coef=0.5, entropy_coef=0.1, value_clip=0.3),
    "ppo_penalty": partial(ppo_penalty, kl_old_coef=0.7, value_coef=0.5, entropy_coef=0.1),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def on_policy(table: Table) -> Batch:
    """A random record as if `table` had sampled it: every ratio is 1."""
    batch = random_batch(2, table)
    old, value = estimate_values(table, batch)
    return Batch.of(
        batch,
        old_distribution=old,
        value=value,
        behavior_logprob=torch.where(batch.mask, old.log_prob(batch.action), -1.0),
    )


@pytest.mark.parametrize("name", ["ppo", "ppo_penalty"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
    gradients = []
    for objective in (OBJECTIVES[name], OBJECTIVES["policy_gradient"]):
        table = Table()
        batch = on_policy(table)
        objective(table, batch)[0][batch.mask].sum().backward()
        gradients.append((table.logits.grad, table.values.grad))

    assert_close(gradients[0], gradients[1])


@EVERY
def test_no_gradient_reaches_the_actions_of_unchosen_columns(objective):
    table = Table()
    batch = random_batch(2, table)
    loss, _ = partial(objective, value_coef=0.0, entropy_coef=0.0)(
        table, Batch.of(batch, old_distribution=table(batch.obs)[0])
    )

    loss[~batch.mask].sum().backward()

    assert_close(table.logits.grad, torch.zeros_like(table.logits))


@EVERY
def test_the_loss_of_unchosen_columns_stays_finite_for_an_impossible_action(objective):
    class Sure:
        def __call__(self, obs):
            allowed = torch.tensor([True, False, False])
            return Categorical.of(torch.zeros(*obs.shape, 3), allowed), torch.zeros(obs.shape)

    batch = random_batch(2, Table())
    batch = Batch.of(batch, action=torch.where(batch.mask, 0, 2), old_distribution=Sure()(batch.obs)[0])

    loss, metrics = objective(Sure(), batch)

    assert loss.isfinite().all()
    assert all(x.isfinite().all() for x in metrics.values())


@EVERY
def test_no_metric_carries_a_gradient(objective):
    table = Table()
    _, metrics = objective(table, random_batch(2, table))

    assert not any(x.requires_grad for x in metrics.values())


@EVERY
def test_no_gradient_reaches_the_critic_through_the_advantage(objective):
    table = Table()
    batch = random_batch(2, table)
    batch = Batch.of(batch, advantage=batch.target - table(batch.obs)[1].detach())

    partial(objective, value_coef=0.0)(table, batch)[0].sum().backward()

    assert table.values.grad is None or not table.values.grad.any()


def test_a_warming_critic_moves_alone():
    # (3 - 1)^2 / 2
    table, batch = Table(), random_batch(0, Table())
    loss, metrics = critic_only(Fixed(), one_step())
    critic_only(table, batch)[0].sum().backward()

    assert_close(loss, row(2))
    assert metrics.keys() == {"value_loss"}
    assert table.logits.grad is None


def referred(probability: float) -> Batch:
    """The one step, whose reference gave its action this probability."""
    return Batch.of(one_step(), reference=log(probability))


def test_kl_charges_by_hand():
    # pi 0.8, reference 0.5, old 0.4: l = log 1.6; k2 = l^2 / 2; k3 = (0.8 / 0.4) * (1 / 1.6 - 1 + l)
    gap = log(1.6)
    assert_close(kl_k2(None, log(0.8), referred(0.5)), gap.square() / 2)
    assert_close(kl_k3(None, log(0.8), referred(0.5)), 2 * (1 / 1.6 - 1 + gap))


def test_a_charge_is_added_to_the_loss():
    bare, _ = ppo(Fixed(), referred(0.5), clip=0.2, value_coef=0.5, entropy_coef=0.0)
    loss, metrics = ppo(
        Fixed(), referred(0.5), clip=0.2, value_coef=0.5, entropy_coef=0.0, kl_penalty=scale_penalty(kl_k2, 0.3)
    )

    assert_close(loss, bare + 0.3 * log(1.6).square() / 2)
    assert_close(metrics["kl_penalty"], 0.3 * log(1.6).square() / 2)


# Expected gradients by enumeration over three actions: policy p, reference q, float64
LOGITS = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
REFERENCE = torch.tensor([-0.5, 0.9, 0.2], dtype=torch.float64).log_softmax(-1)


def expected_gradient(charge, sampler: torch.Tensor):
    """E over actions of the sampler of the charge's gradient at LOGITS."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    taken = record(torch.ones(3, 1).bool(), action=torch.arange(3)[:, None])
    old = sampler.log_softmax(-1)
    fields = dict.fromkeys(("value", "advantage", "target", "old_distribution"), torch.zeros(3, 1, dtype=torch.float64))
    batch = Batch.of(taken, behavior_logprob=old[:, None], reference=REFERENCE[:, None], **fields)
    (old.exp()[:, None] * charge(None, logp[:, None], batch)).sum().backward()
    return logits.grad


def kl_gradient(forward: bool = False):
    logits = LOGITS.clone().requires_grad_()
    p = Categorical(logits.log_softmax(-1))
    (Categorical(REFERENCE).kl(p) if forward else p.kl(Categorical(REFERENCE))).backward()
    return logits.grad


OTHER = torch.tensor([1.0, 0.1, -0.4], dtype=torch.float64)


def k1(distribution, logprob, batch):
    return logprob - batch.reference


def k3_without_its_ratio(distribution, logprob, batch):
    gap = logprob - batch.reference
    return (-gap).exp() - 1 + gap


def test_k2_on_policy_and_weighted_k3_anywhere_pull_along_the_reverse_kl():
    assert_close(expected_gradient(kl_k2, LOGITS), kl_gradient())
    assert_close(expected_gradient(kl_k3, LOGITS), kl_gradient())
    assert_close(expected_gradient(kl_k3, OTHER), kl_gradient())


def test_k1_as_a_loss_pulls_nowhere_and_bare_k3_along_the_forward_kl():
    assert_close(expected_gradient(k1, LOGITS), torch.zeros(3, dtype=torch.float64))
    assert_close(expected_gradient(k3_without_its_ratio, LOGITS), kl_gradient(forward=True))
    assert (kl_gradient(forward=True) - kl_gradient()).abs().max() > 0.1


def test_the_exact_kl_is_over_all_actions():
    p, q = log(0.2, 0.8), log(0.5, 0.5)
    charge = kl_exact(Categorical(p[:, None]), log(0.8), Batch.of(one_step(), reference=Categorical(q[:, None])))
    # 0.2 log(0.2 / 0.5) + 0.8 log(0.8 / 0.5)
    assert_close(charge, 0.2 * log(0.4) + 0.8 * log(1.6))


class Reader:
    """Reads text and always finds token 1 with probability 0.8, value 3."""

    needs_whole_rows = True

    def __call__(self, obs):
        return Categorical(log(0.2, 0.8).expand(*obs.mask.shape, 2)), torch.full(obs.mask.shape, 3.0)


WRITTEN = TokenBatch(torch.tensor([[0, 1, 0, 0]]), flags(1, 1, 0, 0))


def test_imitation_is_the_tokens_surprise():
    # after token 0 comes 1, after 1 comes 0
    assert_close(sft_loss(Reader(), WRITTEN)[0][:, :2], -log(0.8, 0.2))


def test_pretraining_text_is_charged_to_every_step_of_its_row():
    def nothing(policy, batch):
        return torch.zeros(batch.mask.shape), {}

    batch = Batch.of(one_step(), pretraining_text=WRITTEN)
    # 0.5 times the mean surprise of the two written tokens
    mean = -(log(0.8) + log(0.2)) / 2
    loss, metrics = with_pretraining(Reader(), batch, objective=nothing, coef=0.5)
    assert_close(loss, 0.5 * mean)
    assert_close(metrics["pretraining_loss"], mean)


class ById:
    """Scores a row by its first token's number."""

    def __call__(self, text):
        return text.ids[:, :1].float()


def texts(*first: int) -> TokenBatch:
    return TokenBatch(torch.tensor([[f] for f in first]), torch.ones(len(first), 1).bool())


def test_preferences_by_hand():
    # scores 3 and 1, margin 0.5: -log sigmoid(1.5) + 0.1 * 4^2; scores 0 and 2: wrong way round
    pairs = PreferencePairs(texts(3, 0), texts(1, 2), torch.tensor([[0.5], [0.0]]))
    loss, metrics = bradley_terry_loss(ById(), pairs, center_coef=0.1)

    expected = -torch.nn.functional.logsigmoid(torch.tensor([[1.5], [-2.0]])) + 0.1 * torch.tensor([[16.0], [4.0]])
    assert_close(loss, expected)
    assert_close(metrics["accuracy"], torch.tensor([[1.0], [0.0]]))


def test_labels_by_hand():
    # score 2 for a good row, 1 for a bad one: -log sigmoid(2), -log sigmoid(-1)
    loss, metrics = binary_label_loss(ById(), LabelledText(texts(2, 1), torch.tensor([[1.0], [0.0]])))

    assert_close(loss, -torch.nn.functional.logsigmoid(torch.tensor([[2.0], [-1.0]])))
    assert_close(metrics["accuracy"], torch.tensor([[1.0], [0.0]]))


def test_the_bounds_of_a_ratio_may_differ():
    # ratio 0.8 / 0.4 = 2: kept within 1.28 for advantage 2, -2.56; for advantage -2 not clipped, 4
    kept = partial(grpo, low=0.2, high=0.28, entropy_coef=0.0)
    assert_close(kept(Fixed(), one_step(advantage=2.0))[0], row(-2.56))
    assert_close(kept(Fixed(), one_step(advantage=-2.0))[0], row(4))
    assert_close(kept(Fixed(), one_step())[1]["clip_fraction"], row(1))


def test_a_clipped_weight_still_teaches():
    # weight min(2, 1.28), -1.28 * 2 * log 0.8
    assert_close(cispo(Fixed(), one_step(), low=0.2, high=0.28, entropy_coef=0.0)[0], -1.28 * 2 * log(0.8))


def test_no_gradient_goes_through_a_clipped_weight():
    # ratio p / 0.5 with p = sigmoid(0.3): the gradient in the logit of action 1 is -weight * A * (1 - p), weight = p / 0.5
    class Free:
        needs_whole_rows = False
        logit = torch.tensor(0.3, requires_grad=True)

        def __call__(self, obs):
            logits = torch.stack([torch.zeros(()), self.logit]).expand(*obs.shape, 2)
            return Categorical.of(logits), torch.zeros(obs.shape)

    policy, p = Free(), torch.tensor(0.3).sigmoid()
    cispo(policy, one_step(old_probability=0.5), low=0.9, high=0.9, entropy_coef=0.0)[0].sum().backward()

    assert_close(policy.logit.grad, -(p / 0.5) * 2.0 * (1 - p))


def test_a_rows_ratio_is_the_geometric_mean_of_its_steps():
    # two steps, ratios 0.8 / 0.4 = 2 and 0.8 / 0.2 = 4: sqrt(8) = 2.828; the row without a choice has ratio 1
    old = torch.tensor([[0.4, 0.2], [0.4, 0.2]]).log()
    mask = torch.tensor([[1, 1], [0, 0]]).bool()
    zeros = torch.zeros(2, 2)
    taken = record(mask, action=torch.ones(2, 2).long(), behavior_logprob=old)
    fields = {
        "value": zeros,
        "advantage": 2 + zeros,
        "target": zeros,
        "old_distribution": Categorical(log(0.5, 0.5).expand(2, 2, 2)),
    }
    batch = Batch.of(taken, **fields)

    loss, metrics = gspo(Fixed(), batch, low=0.2, high=9.0, entropy_coef=0.0)
    assert_close(metrics["ratio"], torch.tensor([[8**0.5] * 2, [1.0] * 2]))
    assert_close(loss[0], torch.tensor([-2 * 8**0.5] * 2))


class Twice:
    """Says any token 1 with probability 0.8; a row of two tokens."""

    needs_whole_rows = True

    def __call__(self, text):
        return Categorical(log(0.2, 0.8).expand(*text.mask.shape, 2)), None


def test_dpo_and_ipo_by_hand():
    # chosen: 1 then 1, log 0.64; rejected: 0 then 1, log 0.16; reference log 0.25 for both: h = log 4
    chosen = TokenBatch(torch.tensor([[0, 1, 1]]), flags(1, 1, 0))
    rejected = TokenBatch(torch.tensor([[0, 0, 1]]), flags(1, 1, 0))
    pairs = PreferencePairs(chosen, rejected, torch.zeros(1, 1), torch.tensor([[0.25, 0.25]]).log())
    h = torch.tensor([[4.0]]).log()
    sigmoid = torch.nn.functional.logsigmoid

    loss, metrics = dpo_loss(Twice(), pairs, beta=0.5, label_smoothing=0.0, loss_type="sigmoid")
    assert_close(loss, -sigmoid(0.5 * h))
    assert_close(metrics["margin"], 0.5 * h)
    smoothed, _ = dpo_loss(Twice(), pairs, beta=0.5, label_smoothing=0.1, loss_type="sigmoid")
    assert_close(smoothed, -0.9 * sigmoid(0.5 * h) - 0.1 * sigmoid(-0.5 * h))
    assert_close(dpo_loss(Twice(), pairs, beta=0.5, label_smoothing=0.0, loss_type="ipo")[0], (h - 1).square())


def test_an_entropy_bonus_pulls_towards_more_entropy():
    table, batch = Table(), random_batch(3, Table())

    def gradient(coef):
        table.zero_grad(set_to_none=True)
        policy_gradient(table, batch, value_coef=0.0, entropy_coef=coef, value_loss_fn=squared_error)[
            0
        ].sum().backward()
        return table.logits.grad.clone()

    bare, with_bonus = gradient(0.0), gradient(0.5)
    table.zero_grad(set_to_none=True)
    table(batch.obs)[0].entropy().sum().backward()
    assert_close(with_bonus, bare - 0.5 * table.logits.grad)


@pytest.mark.parametrize(("low", "high", "outside"), [(0.2, 0.9, 1), (0.2, 1.1, 0)])
def test_what_lies_outside_the_bounds_is_counted(low, high, outside):
    # ratio 2
    assert_close(grpo(Fixed(), one_step(), low=low, high=high, entropy_coef=0.0)[1]["clip_fraction"], row(outside))


@pytest.mark.parametrize(("low", "outside"), [(0.4, 1), (0.6, 0)])
def test_so_is_what_lies_below_them(low, outside):
    # ratio 0.8 / 1.6: not a probability, but half
    batch = Batch.of(one_step(), behavior_logprob=log(1.6))
    assert_close(grpo(Fixed(), batch, low=low, high=5.0, entropy_coef=0.0)[1]["clip_fraction"], row(outside))


def test_dpos_metrics_by_hand():
    # a first token that both sides share is not looked at; gains log(0.64 / 0.25) and log(0.16 / 0.5)
    chosen = TokenBatch(torch.tensor([[0, 1, 1, 1]]), flags(0, 1, 1, 0))
    rejected = TokenBatch(torch.tensor([[0, 1, 0, 1]]), flags(0, 1, 1, 0))
    pairs = PreferencePairs(chosen, rejected, torch.zeros(1, 1), torch.tensor([[0.25, 0.5]]).log())

    loss, metrics = dpo_loss(Twice(), pairs, beta=0.5, label_smoothing=0.0, loss_type="sigmoid")
    gains = torch.tensor([[0.64 / 0.25, 0.16 / 0.5]]).log()
    assert_close(metrics["chosen_logratio"], gains[:, :1])
    assert_close(metrics["rejected_gain"], gains[:, 1:])
    assert_close(metrics["margin"], 0.5 * (gains[:, :1] - gains[:, 1:]))
    assert_close(metrics["accuracy"], torch.ones(1, 1))
    assert_close(metrics["loss"], loss)
    turned = PreferencePairs(rejected, chosen, pairs.margin, pairs.reference.flip(1))
    assert_close(
        dpo_loss(Twice(), turned, beta=0.5, label_smoothing=0.0, loss_type="sigmoid")[1]["accuracy"], torch.zeros(1, 1)
    )


def test_a_tie_is_not_a_right_answer():
    assert (
        bradley_terry_loss(ById(), PreferencePairs(texts(2), texts(2), torch.zeros(1, 1)), center_coef=0.0)[1][
            "accuracy"
        ].item()
        == 0
    )
    assert binary_label_loss(ById(), LabelledText(texts(0), torch.ones(1, 1)))[1]["accuracy"].item() == 0
    same = PreferencePairs(WRITTEN, WRITTEN, torch.zeros(1, 1), torch.zeros(1, 2))
    assert dpo_loss(Reader(), same, beta=1.0, label_smoothing=0.0, loss_type="sigmoid")[1]["accuracy"].item() == 0


class Scale(torch.nn.Module):
    """A scorer with one weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, text):
        return self.weight * text.ids[:, :1].float()


class Writer(Scale):
    """A policy with one weight that reads text."""

    needs_whole_rows = True

    def forward(self, text):
        return Categorical.of(self.weight * log(0.2, 0.8).expand(*text.mask.shape, 2)), torch.zeros(text.mask.shape)


def test_metrics_carry_no_gradient():
    sides = PreferencePairs(WRITTEN, WRITTEN, torch.zeros(1, 1), torch.zeros(1, 2))
    mixed = Batch.of(one_step(), obs=TokenBatch(torch.zeros(1, 1).long(), flags(1)), pretraining_text=WRITTEN)
    plain = partial(grpo, low=0.2, high=0.2, entropy_coef=0.1)
    found = [
        sft_loss(Writer(), WRITTEN),
        bradley_terry_loss(Scale(), PreferencePairs(texts(3), texts(1), torch.zeros(1, 1)), center_coef=0.1),
        binary_label_loss(Scale(), LabelledText(texts(2), torch.ones(1, 1))),
        dpo_loss(Writer(), sides, beta=1.0, label_smoothing=0.0, loss_type="sigmoid"),
        with_pretraining(Writer(), mixed, objective=plain, coef=0.5),
    ]

    assert all(loss.requires_grad for loss, _ in found)
    assert [name for _, metrics in found for name, x in metrics.items() if x.requires_grad] == []
    assert {"ratio", "loss", "pretraining_loss"} <= found[-1][1].keys()


def test_a_reference_that_is_not_finite_where_nothing_was_chosen_harms_nothing():
    taken = record(flags(1, 0), action=torch.ones(1, 2).long(), behavior_logprob=log(0.4, 0.4))
    fields = dict.fromkeys(("value", "advantage", "target"), torch.zeros(1, 2))
    batch = Batch.of(taken, **fields, old_distribution=None, reference=torch.tensor([[-0.7, float("-inf")]]))

    for charge in (kl_k2, kl_k3):
        assert charge(None, log(0.8, 0.4), batch).isfinite().all()
