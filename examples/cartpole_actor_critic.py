"""The textbook actor-critic on CartPole: two heads on one net, whole episodes, Huber value loss, running reward to 475.

The same method as in many tutorials, through the library's rooms: each of the five steps is one line. Run it with
`python examples/cartpole_actor_critic.py`.
"""

from functools import partial

import torch

from understudy.advantage import reward_to_go
from understudy.batch import Batch
from understudy.control.config import NetworkConfig
from understudy.control.envs import make as environment
from understudy.control.policy import Policy
from understudy.control.rollout import RolloutCollector
from understudy.objective import huber_error, policy_gradient
from understudy.reduce import standardize
from understudy.run.seeds import derive_seed, make_generator
from understudy.update import update
from understudy.value import estimate_values

SEED, GOAL = 1, 475.0
NET = NetworkConfig(hidden=(128,), activation="relu", shared=True, orthogonal=False)

torch.set_num_threads(1)
envs = environment.make("CartPole-v1", num_envs=1)
policy = Policy.build(envs.single_observation_space, envs.single_action_space, NET, seed=SEED)
optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
walker = RolloutCollector(
    envs, seed_of=lambda row, n: derive_seed(SEED, "episode", row, n), generator=make_generator(SEED, "sample")
)
objective = partial(policy_gradient, value_coef=1.0, entropy_coef=0.0, value_loss_fn=huber_error)
running, episode = 10.0, 0

while running < GOAL and episode < 3000:
    traj = walker.collect_episodes(policy, 1)  # 1 sample: one whole episode
    paid = traj.reward  # 2 score: the environment pays
    old, value = estimate_values(policy, traj)  # 3 value
    to_go = standardize(reward_to_go(paid, traj.terminated, traj.truncated, traj.mask, gamma=0.99), traj.mask)
    advantage = (to_go - value) * traj.mask  # 4 advantage
    batch = Batch.of(traj, value=value, advantage=advantage, target=to_go, old_distribution=old)
    update(  # 5 update
        policy,
        optimizer,
        batch,
        objective,
        num_epochs=1,
        num_minibatches=1,
        max_grad_norm=None,
        generator=make_generator(SEED, "shuffle"),
    )
    episode += 1
    running = 0.05 * walker.finished_episodes[-1].episode_return + 0.95 * running
    if episode % 50 == 0:
        print(f"episode {episode}: running reward {running:.1f}", flush=True)

print(f"running reward {running:.1f} after {episode} episodes and {walker.num_steps} steps")
envs.close()
raise SystemExit(running < GOAL)
