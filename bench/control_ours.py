"""Understudy's side of bench/control.py: one PPO run through the public API, a line of JSON an iteration."""

from __future__ import annotations

import json
import sys
from typing import Any

from understudy.control import ppo
from understudy.control.presets import preset


def main(job: dict[str, Any]) -> None:
    """job: `steps`, `seed`, `device`, `threads`, `out`, and `fields`, a config's."""
    given = {"threads": job["threads"]} | job["fields"]
    common = {"steps": job["steps"], "seed": job["seed"], "device": job["device"], "out": job["out"], "quiet": True}
    for line in ppo.iterate(preset(ppo.Config, **(given | common))):
        window = min(line["episodes"], 100)
        print(json.dumps({"steps": line["steps"], "window": window, "mean": line["episode_return_mean"]}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
