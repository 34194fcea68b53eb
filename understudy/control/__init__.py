"""Gymnasium's world: agents in environments. One recipe a file, each a config and the five steps in one loop."""

from understudy.control import actor_critic, ppo, reinforce
from understudy.control.presets import preset

__all__ = ["actor_critic", "ppo", "preset", "reinforce"]
