"""Evaluation, held constant: frozen scales, seeds never used in training, the unnormalised return, an env of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from gymnasium.wrappers import RecordVideo

from understudy.control import environment
from understudy.control.collect import Walker
from understudy.control.config import Config
from understudy.control.policy import Policy
from understudy.run.config import RequestError
from understudy.run.installation import install_hint
from understudy.run.seeds import derive, generator

SEED = 20_261_121  # of every evaluation, whatever the run's seed


def evaluate(
    policy: Policy, cfg: Config, *, episodes: int, sample: bool = False, seed: int = SEED, video: Path | None = None
) -> list[float]:
    """The undiscounted, unnormalised returns of whole episodes; the same seeds at every call.

    Args:
        sample: choose as in training, noise held as there; otherwise the distribution's mode.
        video: record the episodes there (needs the extra "video").
    """
    rows = 1 if video else min(episodes, 50)
    envs = environment.make(
        cfg.env,
        num_envs=rows,
        vectorization="sync",
        options=cfg.env_options | ({"render_mode": "rgb_array"} if video else {}),
        wrappers=cfg.wrappers,
    )
    if video is not None:
        try:
            envs.envs = [RecordVideo(envs.envs[0], str(video), episode_trigger=lambda n: n < episodes)]  # pyright: ignore
        except Exception as error:
            envs.close()
            raise RequestError(f"video cannot be recorded ({error}): {install_hint('video')}") from error
    try:
        with torch.no_grad():
            walker = Walker(
                envs,
                seed_of=lambda row, episode: derive(seed, "evaluate", row, episode),
                generator=generator(seed, "evaluate", cfg.device),
                hold=cfg.hold,
                device=cfg.device,
                sample=sample,
                exact=policy.exact,
            )
            returns = walker.play(policy, -(-episodes // rows))
    finally:
        envs.close()
    return [episode.episode_return for episode in sorted(returns, key=lambda e: (e.number, e.row))][:episodes]
