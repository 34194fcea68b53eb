"""What every control recipe walks on: environments, policy, optimizer, walker; and what it does around an iteration."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import nn

from understudy.control import environment
from understudy.control.collect import Episode, Walker
from understudy.control.config import Config, Network
from understudy.control.evaluate import evaluate
from understudy.control.policy import Policy, policy_path
from understudy.control.preflight import check_env
from understudy.control.supervise import START_SECONDS, RestartsSpent, Supervised, apart
from understudy.run.config import RequestError, to_json
from understudy.run.picture import learning_curve
from understudy.run.progress import Progress
from understudy.run.seeds import derive, generator
from understudy.run.sinks import open_sinks
from understudy.run.store import Run, process_seconds

Env = gymnasium.Env | VectorEnv | None
Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end
WINDOW = 100  # episodes in `episode_return_mean`


class Stage:
    """The open run of a recipe."""

    def __init__(
        self,
        cfg: Config,
        run: Run,
        walker: Walker,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        shuffle: torch.Generator,
        progress: Progress,
        sinks: list[Any],
        threshold: float | None,
    ) -> None:
        self.cfg, self.run, self.walker, self.policy, self.optimizer = cfg, run, walker, policy, optimizer
        self.shuffle, self.progress, self.sinks, self.threshold = shuffle, progress, sinks, threshold
        self.iteration = self.episodes = 0
        self.stopped = False
        self.window: deque[Episode] = deque(maxlen=WINDOW)
        self.unlogged: list[dict[str, float]] = []
        supervised = isinstance(walker.envs.unwrapped, Supervised)
        self.extras = bool(sinks or cfg.evaluate_every or cfg.checkpoint_every or supervised)
        self.best = -math.inf
        self.train_started = time.time()
        run.startup_seconds = process_seconds()

    @property
    def on(self) -> bool:
        """Whether another iteration is due."""
        return not self.stopped and self.walker.steps < self.cfg.steps

    @property
    def left(self) -> float:
        """The share of the run's steps still to come, from 1 down to 0: what linear schedules follow."""
        return max(0.0, 1 - self.walker.steps / self.cfg.steps)

    def schedule(self) -> float:
        """The learning rate of the coming iteration; a linear one is set here, a constant one stays as it is."""
        if self.cfg.learning_rate_schedule == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = self.cfg.learning_rate * self.left
        return self.optimizer.param_groups[0]["lr"]

    def report(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: count its episodes, log and show it, evaluate and checkpoint when due. Yields its line."""
        self.iteration += 1
        self.unlogged.append(metrics)
        if self.walker.finished:
            self._count()
        if self.iteration % self.cfg.log_every == 0 or not self.on:
            line = self._line()
            if self.extras:
                self._extra(line)
            self.run.log(line)
            self.progress.show(line, now=not self.on)
            yield line

    def _count(self) -> None:
        """Take in the episodes that finished; solved, or told to stop, once the window is full and its mean high enough."""
        self.episodes += len(self.walker.finished)
        self.window.extend(self.walker.finished)
        self.walker.finished.clear()
        reached = self._mean_return() if len(self.window) == WINDOW else -math.inf
        if self.threshold is not None and self.run.solved_at is None and reached >= self.threshold:
            self.run.solved_at = {"steps": self.walker.steps, "seconds": process_seconds()}
            self.run.event("solved", threshold=self.threshold, **self.run.solved_at)
        self.stopped = self.cfg.stop_at_return is not None and reached >= self.cfg.stop_at_return

    def note_faults(self) -> None:
        """Move the faults of supervised environments to events.jsonl."""
        envs = self.walker.envs.unwrapped
        while isinstance(envs, Supervised) and envs.faults:
            self.run.event("env_fault", **dataclasses.asdict(envs.faults.pop(0)))

    def _mean_return(self) -> float:
        return statistics.fmean(episode.episode_return for episode in self.window)

    def _line(self) -> dict[str, Any]:
        """What the iterations since the last line came to."""
        seconds, steps = time.time() - self.train_started, self.walker.steps
        iterations, self.unlogged = self.unlogged, []
        line: dict[str, Any] = {"iteration": self.iteration, "steps": steps, "episodes": self.episodes}
        line["episode_return_mean"] = self._mean_return() if self.window else None
        line["episode_length_mean"] = statistics.fmean(e.length for e in self.window) if self.window else None
        names = dict.fromkeys(name for metrics in iterations for name in metrics)  # one that only resets has few
        line |= {name: statistics.fmean(m[name] for m in iterations if name in m) for name in names}
        left = max(0, self.cfg.steps - steps) * seconds / steps
        return line | {"seconds": seconds, "steps_per_second": steps / seconds, "seconds_left": left}

    def _extra(self, line: dict[str, Any]) -> None:
        """What only some configs ask for: evaluation, other sinks, checkpoints."""
        self.note_faults()
        if self.cfg.evaluate_every and self.iteration % self.cfg.evaluate_every < self.cfg.log_every:
            mean = statistics.fmean(evaluate(self.policy, self.cfg, episodes=self.cfg.evaluate_episodes))
            if mean > self.best:
                self.best = mean
                self.policy.save(self.run.path / "best")
            line |= {"evaluation_return_mean": mean, "evaluation_return_best": self.best}
        for sink in self.sinks:
            sink.log({name: value for name, value in line.items() if isinstance(value, float | int)}, self.walker.steps)
        if self.cfg.checkpoint_every and self.iteration % self.cfg.checkpoint_every < self.cfg.log_every:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write policy, optimizer and counters under checkpoints/ITERATION, once."""
        name = f"{self.iteration:06d}"
        if not (self.run.path / "checkpoints" / name).exists():
            state = {"iteration": self.iteration, "steps": self.walker.steps, "solved_at": self.run.solved_at}
            self.run.checkpoint(name, self.policy, self.optimizer, state)

    def finish(self) -> None:
        """Save the final policy, the last checkpoint, the learning curve, and a video where one is asked for."""
        if self.iteration:
            self.checkpoint()
        self.policy.save(self.run.path / "policy")
        title = f"{self.cfg.env}, seed {self.cfg.seed}"
        learning_curve(self.run.metrics, self.run.path / "curve.png", title=title, goal=self.threshold)
        if self.cfg.video:
            evaluate(self.policy, self.cfg, episodes=1, video=self.run.path / "video")


@contextmanager
def open_stage(
    recipe: str,
    cfg: Config,
    env: Env,
    policy: nn.Module | None,
    *,
    group_size: int = 1,
    optimizer: Any = None,
) -> Generator[Stage]:
    """Everything a recipe needs, from its config; saved and closed at the end, however that comes.

    Args:
        env: a user's own environment or vector env, instead of the config's id.
        policy: a user's own `Policy` or network, `network(obs) -> distribution, value`.
        group_size: rows next to each other that share their episode seeds, so that they start from one state.
        optimizer: (policy, cfg) -> optimizer, where it is not one Adam over all parameters.
    """
    torch.set_num_threads(cfg.threads)

    def seed_of(row: int, episode: int) -> int:
        return derive(cfg.seed, "episode", row // group_size, episode)

    if env is None:
        if cfg.vectorization == "supervised":
            single, seed = environment.single(cfg.env, cfg.env_options, cfg.wrappers), derive(cfg.seed, "preflight")
            patience = START_SECONDS + 4 * cfg.step_timeout  # a reset and three steps
            apart(lambda: check_env(cfg.env, single(), seed=seed), f"env {cfg.env!r}", seconds=patience)
        if cfg.vectorization in ("sync", "async"):
            check_env(
                cfg.env,
                environment.single(cfg.env, cfg.env_options, cfg.wrappers)(),
                seed=derive(cfg.seed, "preflight"),
            )
        envs = environment.make(
            cfg.env,
            num_envs=cfg.num_envs,
            vectorization=cfg.vectorization,
            step_timeout=cfg.step_timeout,
            options=cfg.env_options,
            wrappers=cfg.wrappers,
            seed=derive(cfg.seed, "envpool"),
        )
    else:
        envs = environment.adopt(env, seed_of)
    try:
        policy = cast(policy, cfg, envs).to(cfg.device)
        made = (optimizer or adam)(policy, cfg)
        description = {"recipe": f"control {recipe}", "own_env": env is not None, "config": to_json(cfg)}
        run = Run.create(cfg.out, f"{recipe}-{cfg.env.rpartition(':')[2]}-s{cfg.seed}", description)
        walker = Walker(
            envs,
            seed_of=seed_of,
            generator=generator(cfg.seed, "sample", cfg.device),
            hold=cfg.hold,
            device=cfg.device,
        )
        shuffle = generator(cfg.seed, "shuffle")
        sinks = open_sinks(cfg.log, run.path, description["config"])
        title = f"{recipe} {cfg.env} seed {cfg.seed} -> {run.path}"
        with Progress(title, cfg.steps, quiet=cfg.quiet) as progress:
            stage = Stage(cfg, run, walker, policy, made, shuffle, progress, sinks, environment.threshold(envs))
            try:
                yield stage
            except (KeyboardInterrupt, GeneratorExit):
                stage.finish()
                raise
            except RestartsSpent as error:
                stage.note_faults()
                run.event("failed", error=str(error), traceback=traceback.format_exc())
                stage.finish()
                raise
            except BaseException as error:
                said = f"{type(error).__name__}: {environment.first_sentence(error)}"
                run.event("failed", error=said, traceback=traceback.format_exc())
                raise
            else:
                stage.finish()
            finally:
                stage.note_faults()
                for sink in sinks:
                    sink.close()
    finally:
        envs.close()


def cast(policy: nn.Module | None, cfg: Config, envs: VectorEnv) -> Policy:
    """The policy of a run: a user's own, or that of `init`, or a fresh one. The spaces must be the environment's."""
    spaces = envs.single_observation_space, envs.single_action_space
    if cfg.exploration != "independent" and not isinstance(spaces[1], gymnasium.spaces.Box):
        raise RequestError(
            f"exploration is {cfg.exploration!r}, but action_space is {spaces[1]}: only noise of a Box can be held; "
            "choose exploration 'independent'"
        )
    scales = {"scale_obs": cfg.normalize_obs, "scale_reward": cfg.gamma if cfg.normalize_reward else None}
    if policy is not None:
        own = policy if isinstance(policy, Policy) else Policy(policy, *spaces, squash=cfg.squash, **scales)
        return _as_asked(own, cfg, "policy is your own")
    if cfg.init is None:
        return Policy.build(*spaces, cfg, seed=derive(cfg.seed, "weights"), **scales)
    loaded = Policy.load(policy_path(Path(cfg.init), "init"))
    if (loaded.observation_space, loaded.action_space) != spaces:
        raise RequestError(
            f"init is {cfg.init!r}, a policy for {loaded.observation_space} and {loaded.action_space}, but env has "
            f"{spaces[0]} and {spaces[1]}: choose a policy of the same spaces"
        )
    return _as_asked(loaded, cfg, f"init is {cfg.init!r}")


def _as_asked(policy: Policy, cfg: Config, whose: str) -> Policy:
    """The policy, unless the config asks for another one: a field that is not at its default must say what is there.

    How long noise is held is the walker's, for any policy; only gSDE is part of the network.
    """
    has = (policy.made_of or {}) | {"squash": policy.squash}
    has |= {"normalize_obs": policy.obs_scale is not None, "normalize_reward": policy.reward_scale is not None}
    theirs = {*Network.__dataclass_fields__, *has} - {"noise_hold"}
    if "gsde" not in (cfg.exploration, has.get("exploration")):
        theirs.remove("exploration")
    for field in dataclasses.fields(cfg):
        asked = getattr(cfg, field.name)
        if field.name in theirs and asked not in (field.default, has.get(field.name)):
            there = f"which has {has[field.name]!r}" if field.name in has else "which takes none from the config"
            raise RequestError(f"{field.name} is {asked!r}, but {whose}, {there}: leave it at {field.default!r}")
    return policy


def adam(policy: Policy, cfg: Config) -> torch.optim.Optimizer:
    """One Adam over all parameters."""
    fused = torch.device(cfg.device).type in ("cpu", "cuda")
    return torch.optim.Adam(policy.parameters(), lr=cfg.learning_rate, eps=cfg.adam_eps, fused=fused)


def drain(iterations: Iterations) -> Run:
    """Run a recipe's iterations to their end; the run they made."""
    while True:
        try:
            next(iterations)
        except StopIteration as stop:
            return stop.value
