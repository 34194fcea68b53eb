"""The token world: language models under a reward. One recipe a file, each a config and its steps in one loop."""

from understudy.language import dpo, grpo, ppo, reinforce, reward_model, sft
from understudy.language.model.policy import Policy
from understudy.language.model.reward_model import RewardModel

__all__ = ["Policy", "RewardModel", "dpo", "grpo", "ppo", "reinforce", "reward_model", "sft"]
