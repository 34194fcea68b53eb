"""What every control recipe walks on: environments, policy, optimizer, walker; and what it does around an iteration."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from understudy.batch import Trajectory
from understudy.constrain import Bounds, Constraint
from understudy.control import environment
from understudy.control.build import idle_in, notices
from understudy.control.collect import Episode, Walker
from understudy.control.config import Config
from understudy.control.costs import Costs
from understudy.control.evaluate import Stopped, evaluate
from understudy.control.initial_policy import initial_policy
from understudy.control.optimizer import adam, load_moments
from understudy.control.policy import WEIGHTS, Policy, load_weights, policy_path
from understudy.control.presets import refuse_idle
from understudy.control.sources import Env, Source
from understudy.control.standing import Trail, Way
from understudy.control.supervise import RestartsSpent, Supervised
from understudy.products import keep_freed
from understudy.run import lineage
from understudy.run.checkpoint import load_state, tensors_of
from understudy.run.config import RequestError, to_json
from understudy.run.guard import Guard, note_failure, out_of_memory, way_on
from understudy.run.installation import need_package
from understudy.run.interrupt import Interrupt, closed_at_exit
from understudy.run.metrics import combine
from understudy.run.paths import short
from understudy.run.picture import learning_curve
from understudy.run.progress import Progress
from understudy.run.seeds import derive, generator, restore_shared_generators, seed_shared_generators, shared_generators
from understudy.run.sinks import check_sinks, open_sinks
from understudy.run.store import Resume, Run, due, load_optimizer, process_seconds

Net = nn.Module | None
Begun = Resume | None
Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end
WINDOW = 100  # episodes in `episode_return_mean`


class Stage:
    """The open run of a recipe.

    Attributes:
        kept: numbers of the recipe's own that go on from iteration to iteration; a checkpoint holds them.
    """

    def __init__(
        self,
        cfg: Config,
        run: Run,
        walker: Walker,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        interrupt: Interrupt,
        source: Source,
        renew: Callable[[int], VectorEnv],
    ) -> None:
        self.cfg, self.run, self.walker, self.policy, self.optimizer = cfg, run, walker, policy, optimizer
        self.progress, self.interrupt, self.source = progress, interrupt, source
        self.way: Way = source.way(walker.envs)
        self.renew = renew if self.way == "renew" and source.object is None else None
        walker.trail = Trail(walker.rows) if self.way == "replay" else None
        self.shuffle = generator(cfg.seed, "shuffle")
        self.sinks = open_sinks(cfg.log, run.path, to_json(cfg))
        self.threshold = environment.threshold(walker.envs)
        found = [Constraint.parse(text) for text in cfg.constraint]
        self.bounds = Bounds(found, rate=cfg.constraint_rate, rollbacks=cfg.constraint_rollbacks) if found else None
        self.kept: dict[str, Any] = {}
        self.guard = Guard(self)
        self.iteration = self.episodes = self.saved = 0
        self.stopped = False
        self.window: deque[Episode] = deque(maxlen=WINDOW)
        self.unlogged: list[dict[str, float]] = []
        self.best = -math.inf
        self.pending: dict[str, Any] | None = None  # a line of metrics whose evaluation a signal ended
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
                group["lr"] = self.cfg.learning_rate * self.left * (self.bounds.pace if self.bounds else 1.0)
        return self.optimizer.param_groups[0]["lr"]

    def reward(self, traj: Trajectory) -> Tensor:
        """What a record's steps paid, [B, T]: scaled, less what held constraints charge at their new multipliers.

        Costs are scaled as rewards are, so multipliers are in units of the environment's reward.
        """
        if self.policy.reward_scale is not None:
            self.policy.reward_scale.begin(traj, self.walker.abandoned)
        paid = self.policy.reward(traj.reward)
        return paid if self.bounds is None else self._charged(paid, traj, self.bounds)

    def _charged(self, paid: Tensor, traj: Trajectory, bounds: Bounds) -> Tensor:
        """Rewards less what held constraints charge at the multipliers that follow from this record."""
        costs = self._costs()
        cost, sums = costs.record(traj, self.walker.chosen)
        self.kept["costs"] = costs.state
        means = {name: statistics.fmean(found) for name, found in sums.items() if found}
        bounds.begin(means, self.policy, self.optimizer)
        width = 1.0 if self.policy.reward_scale is None else self.policy.reward_scale.width
        return bounds.charge(paid, {name: x / width for name, x in cost.items()})

    def report(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: count its episodes, log and show it, evaluate and checkpoint when due. Yields its line."""
        self.iteration += 1
        self.policy.has_action_mask |= bool(self.walker.masked)
        self.unlogged.append(metrics)
        if self.walker.finished:
            self._count()
        if self.iteration % self.cfg.log_every == 0 or not self.on:
            yield self._close(self._line())
        if due(self.cfg.checkpoint_every, self.iteration, self.walker.steps - self.saved, self.cfg.steps):
            self.checkpoint()
        if self.interrupt.heard() and self.on:
            self._stop()

    def _stop(self) -> None:
        """Save what there is and end the run, as a signal has told."""
        self.finish(interrupted=True)
        self.interrupt.obey()

    def _count(self) -> None:
        """Take in the episodes that finished; solved, or told to stop, once the window is full and its mean high enough."""
        self.episodes += len(self.walker.finished)
        self.window.extend(self.walker.finished)
        self.walker.finished.clear()
        reached = statistics.fmean(e.episode_return for e in self.window) if len(self.window) == WINDOW else -math.inf
        if self.threshold is not None and self.run.solved_at is None and reached >= self.threshold:
            self.run.solved_at = {"steps": self.walker.steps, "seconds": process_seconds()}
            self.run.event("solved", threshold=self.threshold, **self.run.solved_at)
        self.stopped = self.cfg.stop_at_return is not None and reached >= self.cfg.stop_at_return
        if self.bounds is not None:
            self._settle(self.bounds)

    def note_faults(self) -> None:
        """Move the faults of supervised environments to events.jsonl."""
        envs = self.walker.envs.unwrapped
        while isinstance(envs, Supervised) and envs.faults:
            self.run.event("env_fault", **dataclasses.asdict(envs.faults.pop(0)))

    def _settle(self, bounds: Bounds) -> None:
        """Answer the bounds that this iteration's episodes broke."""
        self.unlogged[-1] |= bounds.close({}, self.policy, self.optimizer, self.tell)
        self.run.stopped, self.stopped = bounds.stopped, self.stopped or bounds.stopped is not None
        self.kept["bounds"] = bounds.state

    def _costs(self) -> Costs:
        envs: Any = self.walker.envs
        return envs

    def tell(self, kind: str, **about: Any) -> None:
        """An event, which is said too where it is not one of many."""
        self.run.event(kind, iteration=self.iteration, steps=self.walker.steps, **about)
        if about.get("response") != "hold":
            self.progress.say(about["text"])

    def _line(self) -> dict[str, Any]:
        """What the iterations since the last line came to."""
        seconds, steps = time.time() - self.train_started, self.walker.steps
        iterations, self.unlogged = self.unlogged, []
        line: dict[str, Any] = {"iteration": self.iteration, "steps": steps, "episodes": self.episodes}
        line["episode_return_mean"] = statistics.fmean(e.episode_return for e in self.window) if self.window else None
        line["episode_length_mean"] = statistics.fmean(e.length for e in self.window) if self.window else None
        line |= self._infos() if any(episode.info for episode in self.window) else {}
        line |= combine(iterations)
        left = max(0, self.cfg.steps - steps) * seconds / steps
        return line | {"seconds": seconds, "steps_per_second": steps / seconds, "seconds_left": left}

    def _infos(self) -> dict[str, float]:
        """Success rate, and means of the numbers of info that were asked for, over the same episodes."""
        found = {}
        for name in dict.fromkeys(name for episode in self.window for name in episode.info):
            numbers = [episode.info[name] for episode in self.window if name in episode.info]
            found["success_rate" if name == "success" else f"info_{name}"] = statistics.fmean(numbers)
        return found

    def _close(self, line: dict[str, Any]) -> dict[str, Any]:
        """Log and show a line, evaluated where that is due."""
        if self.walker.supervised:
            self.note_faults()
        if self.cfg.evaluate_every and self.iteration % self.cfg.evaluate_every < self.cfg.log_every:
            line |= self._evaluated(line)
        for sink in self.sinks:
            sink.log({name: value for name, value in line.items() if isinstance(value, float | int)}, self.walker.steps)
        self.run.log(line)
        self.progress.show(line, now=not self.on)
        return line

    def _evaluated(self, line: dict[str, Any]) -> dict[str, float]:
        """The policy's evaluation as metrics. A line whose evaluation a signal ends waits for the resume."""
        try:
            return self._evaluate()
        except Stopped:
            self.pending = line
            self._stop()
            raise

    def _evaluate(self) -> dict[str, float]:
        """The policy's evaluation as metrics; the best so far is kept under best/."""
        episodes, steps = self.cfg.evaluate_episodes, self.cfg.evaluation_max_steps
        how: dict[str, Any] = {"source": self.source, "stop": lambda: self.interrupt.signum is not None}
        found = evaluate(self.policy, self.cfg, episodes=episodes, **how)
        if found.num_cut and not self.kept.get("evaluation_cut"):
            self.kept["evaluation_cut"] = True
            text = f"{found.num_cut} of {episodes} evaluation episodes were ended at evaluation_max_steps, {steps:,}"
            self.tell("evaluation_cut", text=text)
        if found.return_mean > self.best:
            self.best = found.return_mean
            self.policy.save(self.run.path / "best")
        metrics = {"evaluation_return_mean": found.return_mean, "evaluation_return_best": self.best}
        rate = found.success_rate
        return metrics if rate is None else metrics | {"evaluation_success_rate": rate}

    def checkpoint(self) -> None:
        """Write everything that the coming iterations depend on under checkpoints/ITERATION, once."""
        name = f"{self.iteration:06d}"
        if name in self.run.checkpoints():
            return
        self.saved = self.walker.steps
        keep, state = self.cfg.keep_checkpoints, self._state()
        self.run.checkpoint(name, self.policy.save, self.optimizer, state, keep=keep)
        if self.renew is not None and self.on:
            self.walker.envs.close()
            self.walker.envs = self.renew(self.iteration)

    def _state(self) -> dict[str, Any]:
        scale = self.policy.reward_scale
        return {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "stopped": self.stopped,
            "best": self.best,
            "pending": self.pending,
            "solved_at": self.run.solved_at,
            "seconds": time.time() - self.train_started,
            "window": [tuple(episode) for episode in self.window],
            "unlogged": self.unlogged,
            "kept": self.kept,
            "shuffle": self.shuffle,
            "shared_generators": shared_generators(),
            "running_returns": None if scale is None else scale.running,
            "walker": self.walker.standing(self.way),
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: everything as it was when it was written."""
        found = load_state(path)
        load_weights(self.policy, tensors_of(path / WEIGHTS))
        load_optimizer(path, self.optimizer, found["optimizer"])
        state = found["run"]
        for name in ("iteration", "episodes", "stopped", "best", "unlogged", "kept"):
            setattr(self, name, state[name])
        self.run.solved_at = state["solved_at"]
        self.train_started = time.time() - state["seconds"]
        self.window.extend(Episode(*episode) for episode in state["window"])
        self.shuffle.set_state(state["shuffle"])
        if self.policy.reward_scale is not None:
            self.policy.reward_scale.running = state["running_returns"]
        if not self.walker.stand(state["walker"], self.policy):
            self.run.event("resume_inexact", iteration=self.iteration)
            self.run.changed.append("env")
            print(
                f"understudy: env {self.source.name!r} does not come back to where it stood (it is not decided by its seed "
                "and actions): open episodes begin anew, and this run is no longer the one that was interrupted",
                file=sys.stderr,
            )
        restore_shared_generators(state["shared_generators"])
        if self.renew is not None:  # last, as at the checkpoint: a constructor may draw from the shared generators
            self.walker.envs.close()
            self.walker.envs = self.renew(self.iteration)
        if self.bounds is not None and "costs" in self.kept:
            self._costs().restore(self.kept["costs"])
        if self.bounds is not None and "bounds" in self.kept:
            self.bounds.restore(self.kept["bounds"])
            self.run.stopped = self.bounds.stopped
        self.saved = self.walker.steps
        pending = state.get("pending")
        self.run.rewind(self.iteration - (pending is not None))
        if pending is not None:
            self._close(pending)

    def finish(self, *, interrupted: bool = False) -> None:
        """Save the final policy, the last checkpoint, the learning curve, and a video where one is asked for.

        Environments that are renewed at checkpoints allow none that an uninterrupted run has not.
        """
        if self.iteration and not (interrupted and self.way == "renew"):
            self.checkpoint()
        self.policy.save(self.run.path / "policy")
        title = f"{self.source.name}, seed {self.cfg.seed}"
        learning_curve(self.run.metrics, self.run.path / "curve.png", title=title, goal=self.threshold)
        if self.cfg.video and not interrupted:
            evaluate(self.policy, self.cfg, episodes=1, video=self.run.path / "video", source=self.source)
        self.run.settle()


@closed_at_exit
def open_stage(
    recipe: str,
    cfg: Config,
    env: Env,
    policy: nn.Module | None,
    *,
    evaluation_env: Env = None,
    group_size: int = 1,
    optimizer: Any = None,
    resume: Resume | None = None,
) -> Generator[Stage]:
    """Everything a recipe needs, from its config; saved and closed at the end, however that comes.

    Args:
        env: a user's own environment or vector env, or a function that makes copies, instead of the config's id.
        evaluation_env: a second environment for evaluation, or a function that makes copies.
        policy: a user's own `Policy` or network, `network(obs) -> distribution, value`.
        group_size: rows next to each other that share their episode seeds, so that they start from one state.
        optimizer: (policy, cfg) -> optimizer, where it is not one Adam over all parameters.
        resume: the run to go on with, instead of a new one.
    """
    refuse_idle(cfg, cfg.idle())
    torch.set_num_threads(cfg.threads)
    seed_shared_generators(cfg.seed)
    keep_freed()
    home = Path.cwd()  # an environment may change the working directory
    begun = None if resume is None else resume.checkpoint
    if cfg.init is not None and policy is not None and resume is None:
        raise RequestError(
            f"init is {cfg.init!r}, which has no effect beside a policy of your own: leave one of them out"
        )
    init = None if cfg.init is None else begun or home / policy_path(Path(cfg.init), "init")
    check_sinks(cfg.log)
    if cfg.video:
        need_package("moviepy", "video", "video is on")

    def seed_of(row: int, episode: int) -> int:
        return derive(cfg.seed, "episode", row // group_size, episode)

    def open_envs(*checkpoint: int) -> VectorEnv:
        envs = source.open(seed_of, *checkpoint)
        names = dict.fromkeys(Constraint.parse(text).name for text in cfg.constraint)
        return Costs(envs, list(names)) if names else envs

    source = Source(cfg, env, evaluation_env)
    source.check()
    envs = open_envs()
    walker = None
    try:
        source.check_evaluation(envs)
        policy = initial_policy(policy, cfg, envs, init).to(cfg.device).eval()
        refuse_idle(cfg, idle_in(policy))
        made = (optimizer or adam)(policy, cfg)
        came = [] if init is None else [lineage.link("init", init)]
        if init is not None and cfg.init_optimizer and begun is None:
            came.append(lineage.link("init_optimizer", load_moments(made, cfg, init)))
        origin = lineage.describe(f"control {recipe}", to_json(cfg), came)
        if resume is None:
            description: dict[str, Any] = {"recipe": f"control {recipe}", "config": to_json(cfg)}
            description |= {"own_env": env is not None, "own_policy": policy.made_of is None}
            description |= {"reproducible": source.is_seeded}
            name = re.sub(r"[^\w.-]+", "-", source.name.rpartition(":")[2])
            run = Run.create(cfg.out, f"{recipe}-{name}-s{cfg.seed}", description, origin, home)
        else:
            run = resume.run
            run.changed += lineage.go_on(run.path, origin | {"links": []})  # it has taken what it needs of `init`
        walker = Walker(
            envs,
            seed_of=seed_of,
            generator=generator(cfg.seed, "sample", cfg.device),
            hold=cfg.hold,
            device=cfg.device,
            log_info=cfg.log_info,
            exact=policy.exact,
        )
        title = f"{recipe} {source.name} seed {cfg.seed} -> {short(run.path)}"
        with (
            Progress(title, cfg.steps, quiet=cfg.quiet) as progress,
            Interrupt(quiet=cfg.quiet) as interrupt,
            closing(run),
        ):
            stage = Stage(cfg, run, walker, policy, made, progress, interrupt, source, open_envs)
            said = [*source.notices(stage.way), *notices(policy, source.seen)]
            for text in said if resume is None else ():
                stage.tell("notice", text=text)
            if resume is not None:
                resume.restore(stage)
            try:
                yield stage
            except (KeyboardInterrupt, SystemExit) as error:
                error.add_note(way_on(run))
                raise  # what could be saved is saved: an iteration that is not whole is not
            except GeneratorExit:
                stage.finish(interrupted=True)
                raise
            except RestartsSpent as error:
                stage.note_faults()
                walker.forget()
                stage.finish(interrupted=True)
                note_failure(run, error)
                raise
            except torch.OutOfMemoryError as error:
                refusal = out_of_memory(error, run, f"lower num_envs (now {cfg.num_envs}) or the network's sizes")
                note_failure(run, refusal)
                raise refusal from error
            except BaseException as error:
                note_failure(run, error)
                raise
            else:
                stage.finish()
            finally:
                stage.note_faults()
                for sink in stage.sinks:
                    sink.close()
    finally:
        (envs if walker is None else walker.envs).close()
        source.close()


def drain(iterations: Iterations) -> Run:
    """Run a recipe's iterations to their end; the run they made."""
    while True:
        try:
            next(iterations)
        except StopIteration as stop:
            return stop.value
