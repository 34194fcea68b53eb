"""Bounds on what is measured: how they are written, what a multiplier comes to, what a broken one does."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from understudy.constraints import Constraint, LagrangianConstraints, adapt_multiplier, subtract_constraint_cost
from understudy.run import checkpoint
from understudy.run.config import RequestError


def bounds(*texts: str, rate: float = 0.5, rollbacks: int = 2) -> LagrangianConstraints:
    return LagrangianConstraints([Constraint.parse(text) for text in texts], rate=rate, max_rollbacks=rollbacks)


class Ground:
    """A model of one weight, its optimizer, and a list of what was told."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, 0.0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.told: list[dict] = []

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def tell(self, kind: str, **about) -> None:
        self.told.append({"kind": kind, **about})

    def iterate(self, found: LagrangianConstraints, learned: float | None = None, **values: float) -> dict[str, float]:
        """An iteration in which so much was measured, and the weight learned to be that."""
        found.begin(values, self.model, self.optimizer)
        if learned is not None:
            self.model.weight.grad = torch.ones_like(self.model.weight)
            self.optimizer.step()
            nn.init.constant_(self.model.weight, learned)
        return found.close({}, self.model, self.optimizer, self.tell)


@pytest.fixture
def ground() -> Ground:
    return Ground()


# how it is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("repetition<=0.1", ("repetition", True, 0.1, "hold")),
        (" cost <= -25 : stop ", ("cost", True, -25.0, "stop")),
        ("length>=1e1:rollback", ("length", False, 10.0, "rollback")),
        ("contains:a<=b<=0.5:warn", ("contains:a<=b", True, 0.5, "warn")),
        ("judge.py:score>=0", ("judge.py:score", False, 0.0, "hold")),
    ],
)
def test_a_constraint_is_a_name_a_bound_and_perhaps_a_response(text, expected):
    assert Constraint.parse(text) == Constraint(*expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("repetition", "NAME<=LIMIT"),
        ("repetition<0.1", "NAME<=LIMIT"),
        ("<=0.1", "NAME<=LIMIT"),
        ("repetition<=", "finite number"),
        ("repetition<=much", "'much' must be a finite number"),
        ("repetition<=nan", "finite number"),
        ("repetition<=inf:warn", "finite number"),
        ("repetition<=0.1:roolback", "did you mean 'rollback'"),
        ("repetition<=0.1:", "must be one of hold, warn, stop, rollback"),
    ],
)
def test_what_is_written_otherwise_is_refused_in_a_sentence(text, words):
    with pytest.raises(RequestError, match="constraint is") as refused:
        Constraint.parse(text)
    assert words in str(refused.value) and repr(text) in str(refused.value)


def test_text_and_constraint_are_one():
    assert str(Constraint.parse("cost<=25.0:stop")) == "cost<=25"
    assert str(Constraint.parse("length>=0.5")) == "length>=0.5"


# hold


def test_a_multiplier_follows_the_excess_and_never_falls_below_zero():
    # 0 + 0.5 * (3 - 1) = 1; 1 + 0.5 * (0.5 - 1) = 0.75; 0.75 + 0.5 * (-2 - 1) = -0.75, so 0
    found, multiplier = [], 0.0
    for value in (3.0, 0.5, -2.0):
        multiplier = adapt_multiplier(multiplier, value - 1.0, rate=0.5)
        found.append(multiplier)

    assert found == [1.0, 0.75, 0.0]


def test_a_cost_is_taken_off_at_the_multipliers_price():
    # 1 - 0.5 * 4 = -1; 2 - 0.5 * 0 = 2
    found = subtract_constraint_cost(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.0]]), multiplier=0.5)

    assert_close(found, torch.tensor([[-1.0, 2.0]]))


def test_what_is_charged_is_what_this_iteration_came_to(ground):
    held = bounds("cost<=1")
    held.begin({"cost": 3.0}, ground.model, ground.optimizer)

    # the multiplier is 0.5 * (3 - 1) = 1 before the first charge
    assert_close(
        held.subtract_constraint_costs(torch.tensor([5.0]), {"cost": torch.tensor([2.0])}), torch.tensor([3.0])
    )


def test_at_least_charges_for_too_little(ground):
    held = bounds("length>=10")
    ground.iterate(held, length=4.0)  # 0.5 * (10 - 4) = 3

    # a longer one loses less: 0 + 3 * 2 against 0 + 3 * 1
    found = held.subtract_constraint_costs(torch.zeros(2), {"length": torch.tensor([2.0, 1.0])})
    assert_close(found, torch.tensor([6.0, 3.0]))


def test_two_held_bounds_add_up_and_others_charge_nothing(ground):
    held = bounds("a<=0", "b<=0", "a<=1:warn", "b<=1:stop", "c<=0:rollback")
    ground.iterate(held, a=2.0, b=4.0)  # multipliers 1 and 2

    # 10 - 1 * 3 - 2 * 1
    assert_close(
        held.subtract_constraint_costs(torch.tensor([10.0]), {"a": torch.tensor([3.0]), "b": torch.tensor([1.0])}),
        torch.tensor([5.0]),
    )


def test_a_bound_that_holds_costs_nothing(ground):
    held = bounds("cost<=1")
    ground.iterate(held, cost=0.5)

    reward = torch.tensor([5.0])
    assert_close(held.subtract_constraint_costs(reward, {"cost": torch.tensor([100.0])}), reward)


def test_what_was_not_measured_changes_no_multiplier(ground):
    held = bounds("cost<=1")
    ground.iterate(held, cost=3.0)

    assert ground.iterate(held) == {}
    assert ground.iterate(held, cost=float("nan")) == {}
    assert held.multipliers == {"cost_at_most": 1.0}


def test_metrics_are_value_limit_and_multiplier(ground):
    both = bounds("cost<=1", "cost>=0.5:warn")

    assert ground.iterate(both, cost=3.0) == {
        "constraint_cost": 3.0,
        "constraint_cost_at_most": 1.0,
        "constraint_cost_at_most_multiplier": 1.0,
        "constraint_cost_at_least": 0.5,
    }


def test_two_bounds_of_one_name_and_sense_are_told_apart(ground):
    held = bounds("cost<=1", "cost<=2:stop")

    assert {"constraint_cost_at_most", "constraint_cost_at_most_2"} <= set(ground.iterate(held, cost=0.0))
    assert held.names == ["cost"]


# what is said


def test_a_bound_is_told_of_when_it_breaks_and_when_it_holds_again(ground):
    warned = bounds("cost<=1:warn")
    for value in (0.0, 1.0, 2.0, 3.0, 1.0, 0.0, 5.0):  # at the limit is inside
        ground.iterate(warned, cost=value)

    assert [(told["kind"], told["value"], told["broken"]) for told in ground.told] == [
        ("constraint", 2.0, True),
        ("constraint", 1.0, False),
        ("constraint", 5.0, True),
    ]
    assert ground.told[0]["text"] == "cost is 2: outside cost<=1"
    assert warned.stop_reason is None


# stop


def test_stop_says_why_and_nothing_else_does(ground):
    stopping = bounds("cost<=1:stop", "other<=0:warn")
    ground.iterate(stopping, cost=1.0, other=9.0)
    assert stopping.stop_reason is None

    ground.iterate(stopping, cost=1.5)
    assert stopping.stop_reason == "cost is 1.5: outside cost<=1"
    assert ground.told[-1]["kind"] == "stopped"


# roll back


def test_going_back_gives_the_weights_that_were_inside_and_half_the_rate(ground):
    back = bounds("cost<=1:rollback")
    ground.iterate(back, learned=1.0, cost=0.5)  # inside at weight 0
    ground.iterate(back, learned=2.0, cost=0.9)  # inside at weight 1
    ground.iterate(back, learned=3.0, cost=1.1)  # outside at weight 2

    assert ground.weight == 1.0
    assert (ground.rate, back.lr_scale, back.num_rollbacks) == (0.05, 0.5, 1)
    assert ground.told[-1]["kind"] == "rolled_back"


def test_the_optimizer_goes_back_too_and_may_do_so_twice(ground):
    back = bounds("cost<=1:rollback")
    ground.iterate(back, learned=1.0, cost=0.5)  # at weight 0 Adam had made no step
    for _ in range(2):
        ground.iterate(back, learned=2.0, cost=1.5)
        assert (ground.weight, len(ground.optimizer.state)) == (0.0, 0)
    assert ground.rate == 0.025


def test_what_the_optimizer_does_afterwards_does_not_reach_the_state_that_is_kept(ground):
    back = bounds("cost<=1:rollback", rollbacks=9)
    ground.iterate(back, learned=1.0, cost=0.5)
    ground.iterate(back, learned=2.0, cost=0.5)  # kept: Adam after one step
    moments = []
    for _ in range(2):
        ground.iterate(back, learned=7.0, cost=1.5)
        [state] = ground.optimizer.state.values()
        moments.append((state["step"].item(), state["exp_avg"].item()))
    assert moments[0] == moments[1] and moments[0][0] == 1.0


def test_a_run_that_was_never_inside_has_nowhere_to_go_back_to(ground):
    back = bounds("cost<=1:rollback")
    ground.iterate(back, learned=1.0, cost=2.0)

    assert (ground.weight, back.num_rollbacks, back.stop_reason) == (1.0, 0, None)
    assert [told["kind"] for told in ground.told] == ["constraint"]


def test_a_state_of_which_nothing_is_known_is_not_one_to_go_back_to(ground):
    back = bounds("cost<=1:rollback")
    ground.iterate(back, learned=1.0, cost=0.5)
    ground.iterate(back, learned=2.0)
    ground.iterate(back, learned=3.0, cost=1.5)

    assert ground.weight == 0.0


def test_a_run_that_has_gone_back_often_enough_stops_inside(ground):
    back = bounds("cost<=1:rollback", rollbacks=1)
    ground.iterate(back, learned=1.0, cost=0.5)
    ground.iterate(back, learned=2.0, cost=1.5)
    assert back.stop_reason is None

    ground.iterate(back, learned=2.0, cost=1.5)
    assert ground.weight == 0.0
    assert back.stop_reason == "cost is 1.5: outside cost<=1, after all 1 ways back that constraint_rollbacks allows"


def test_what_is_measured_after_the_update_counts_for_the_state_before_it(ground):
    back = bounds("kl<=1:rollback")
    for learned, kl in ((1.0, 0.5), (2.0, 1.5)):
        back.begin({}, ground.model, ground.optimizer)
        nn.init.constant_(ground.model.weight, learned)
        back.close({"kl": kl}, ground.model, ground.optimizer, ground.tell)

    assert ground.weight == 0.0


def test_nothing_is_copied_where_nothing_goes_back(ground):
    held = bounds("cost<=1", "cost<=1:warn", "cost<=9:stop")
    ground.iterate(held, learned=1.0, cost=0.5)

    assert held.last_feasible_state is None


# going on


def test_a_run_that_goes_on_knows_all_that_it_knew(ground, tmp_path):
    first, second = (bounds("cost<=1", "cost<=2:rollback", "cost<=9:stop") for _ in range(2))
    ground.iterate(first, learned=1.0, cost=0.0)
    ground.iterate(first, learned=2.0, cost=0.0)
    ground.iterate(first, learned=3.0, cost=3.0)
    checkpoint.save_state(tmp_path, first.state)
    second.restore(checkpoint.load_state(tmp_path))

    assert (second.multipliers, second.lr_scale, second.stop_reason) == ({"cost_at_most": 1.0}, 0.5, None)
    ground.told.clear()
    ground.iterate(second, learned=4.0, cost=10.0)  # it is known to be broken, and where to go back to
    assert ground.weight == 1.0
    assert [told["constraint"] for told in ground.told if told["kind"] == "constraint"] == ["cost<=9"]
    first.restore(second.state)
    assert first.stop_reason == "cost is 10: outside cost<=9"


def test_a_state_does_not_change_with_what_comes_after_it(ground):
    held = bounds("cost<=1")
    ground.iterate(held, cost=3.0)
    state = held.state
    ground.iterate(held, cost=5.0)

    assert (state["multipliers"], state["broken"]) == ({"cost_at_most": 1.0}, {"cost_at_most": True})
