"""The worked example of RLHF: a score of +6 at the end, a KL that costs 4 on the way, and what the critic said at step 3."""

import pytest
import torch
from torch.testing import assert_close

from tests.records import flags, record, row
from understudy.advantage import gae
from understudy.reward import kl_reward, reward_at_last_step
from understudy.value import next_value

STEPS = 5
MASK = flags(0, 1, 1, 1, 1, 1, 0)  # one token of prompt, five choices, the last token
TERMINATED = flags(0, 0, 0, 0, 0, 1, 0)


def advantage(log_ratio: torch.Tensor, v3: float) -> torch.Tensor:
    """A at the five choices, gamma = lam = 1, for KL coefficient 1 and V(s_3) as given."""
    reward = kl_reward(log_ratio, torch.zeros(1, 7), MASK, coef=1.0) + reward_at_last_step(torch.tensor([6.0]), MASK)
    value = row(9, 0.3, -0.7, v3, 5, 2, 9)  # the others do not matter for A_3
    trajectory = record(MASK, terminated=TERMINATED)
    ends = TERMINATED, trajectory.truncated, MASK
    return gae(reward, value, next_value(value, trajectory), *ends, gamma=1.0, lam=1.0)[:, 1:6]


@pytest.mark.parametrize(("v3", "expected"), [(1.2, 0.8), (3.5, -1.5)])
def test_step_3_is_judged_by_what_is_still_to_come(v3, expected):
    # KL of 1, 1 and 2 at steps 3, 4 and 5: still to come -4 + 6 = 2. 2 - 1.2 = 0.8; 2 - 3.5 = -1.5
    A = advantage(row(0, 0, 0, 1, 1, 2, 0), v3)

    assert_close(A[0, 2], torch.tensor(expected))


def test_what_the_kl_cost_before_step_3_is_not_step_3s_doing():
    # 0.8 at each of the five: in all -4 + 6 = 2 again, but from step 3 on -2.4 + 6 = 3.6. 3.6 - 1.2 = 2.4
    A = advantage(row(0, 0.8, 0.8, 0.8, 0.8, 0.8, 0), 1.2)

    assert_close(A[0, 2], torch.tensor(2.4))
    assert_close(A[0, 0], torch.tensor(2.0 - 0.3))  # the first step answers for all of it
