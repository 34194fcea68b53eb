"""PureJaxRL for bench/control.py: a checkout's ppo.py as it is, compiled, then run; a line of JSON after each.

Its wrappers.py also imports Brax and Navix, whose environments its ppo.py has no use for: empty modules stand in for them.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import jax


def main(job: dict[str, Any]) -> None:
    """job: `checkout`, `config` (ppo.py's own), `steps`, `seed`."""
    for name in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"):
        sys.modules[name] = ModuleType(name)
    vars(sys.modules["brax"])["envs"] = sys.modules["brax.envs"]
    vars(sys.modules["brax.envs.wrappers.training"]).update(EpisodeWrapper=None, AutoResetWrapper=None)
    sys.path.insert(0, f"{job['checkout']}/purejaxrl")
    import ppo  # pyright: ignore[reportMissingImports]

    config = job["config"] | {"TOTAL_TIMESTEPS": job["steps"]}
    key = jax.random.PRNGKey(job["seed"])
    train = jax.jit(ppo.make_train(config)).lower(key).compile()
    print(json.dumps({"steps": 0}), flush=True)
    metrics = jax.block_until_ready(train(key))["metrics"]
    print(json.dumps({"steps": metrics["returned_episode"].size}), flush=True)
    ended = metrics["returned_episode"].reshape(-1)
    last = metrics["returned_episode_returns"].reshape(-1)[ended][-100:]  # by time, then by environment
    print(json.dumps({"last_return": float(last.mean())}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
