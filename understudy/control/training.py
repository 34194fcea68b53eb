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
from understudy.constraints import Constraint, LagrangianConstraints
from understudy.control.build import env_fields_without_effect, policy_warnings
from understudy.control.config import Config
from understudy.control.envs import make as environment
from understudy.control.envs.costs import CostRecorder
from understudy.control.envs.fault_tolerant import FaultTolerantVectorEnv, RestartsExhaustedError
from understudy.control.envs.parallel import describe_dead_worker
from understudy.control.envs.sources import EnvLike, EnvSource
from understudy.control.envs.state import ActionLog, RestoreMethod
from understudy.control.evaluate import EvaluationInterrupted, evaluate
from understudy.control.fast.optimizer import adam, load_moments
from understudy.control.initial_policy import make_initial_policy
from understudy.control.policy import WEIGHTS, Policy, load_weights, policy_path
from understudy.control.presets import refuse_fields_without_effect
from understudy.control.rollout import Episode, RolloutCollector
from understudy.fast.linear import keep_freed_memory
from understudy.run import lineage
from understudy.run.checkpoint import load_state, load_tensors
from understudy.run.config import RequestError, to_dict
from understudy.run.guard import Guard, UserCodeError, explain_failure, note_failure, resume_command, was_left
from understudy.run.installation import require_package
from understudy.run.interrupt import InterruptHandler, close_at_exit
from understudy.run.metrics import combine
from understudy.run.paths import short_path
from understudy.run.plots import plot_learning_curve
from understudy.run.progress import Progress
from understudy.run.seeds import (
    derive_seed,
    make_generator,
    restore_shared_generators,
    seed_shared_generators,
    shared_generator_states,
)
from understudy.run.store import ResumePoint, Run, is_checkpoint_due, load_optimizer, process_seconds
from understudy.run.trackers import check_trackers, open_trackers

OptionalModule = nn.Module | None
OptionalResumePoint = ResumePoint | None
Iterations = Generator[dict[str, Any], None, Run]  # a line of metrics each; the run in the end
STATS_WINDOW_SIZE = 100  # episodes in `episode_return_mean`


class TrainingRun:
    """The open run of a recipe.

    Attributes:
        recipe_state: numbers of the recipe's own that go on from iteration to iteration; a checkpoint holds them.
    """

    def __init__(
        self,
        cfg: Config,
        run: Run,
        collector: RolloutCollector,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        interrupt: InterruptHandler,
        source: EnvSource,
        recreate_envs: Callable[[int], VectorEnv],
    ) -> None:
        self.cfg, self.run, self.collector, self.policy, self.optimizer = cfg, run, collector, policy, optimizer
        self.progress, self.interrupt, self.source = progress, interrupt, source
        self.restore_method: RestoreMethod = source.restore_method(collector.envs)
        self.recreate_envs = recreate_envs if self.restore_method == "renew" and source.env_object is None else None
        collector.action_log = ActionLog(collector.num_envs) if self.restore_method == "replay" else None
        self.shuffle_generator = make_generator(cfg.seed, "shuffle")
        self.trackers = open_trackers(cfg.log, run.path, to_dict(cfg))
        self.reward_threshold = environment.reward_threshold(collector.envs)
        constraints = [Constraint.parse(text) for text in cfg.constraint]
        self.constraints = (
            LagrangianConstraints(constraints, rate=cfg.constraint_rate, max_rollbacks=cfg.constraint_rollbacks)
            if constraints
            else None
        )
        self.recipe_state: dict[str, Any] = {}
        self.guard = Guard(self)
        self.iteration = self.num_episodes = self.num_steps_at_checkpoint = 0
        self.is_stopped = False
        self.recent_episodes: deque[Episode] = deque(maxlen=STATS_WINDOW_SIZE)
        self.unlogged_metrics: list[dict[str, float]] = []
        self.best_return = -math.inf
        self.pending_metrics: dict[str, Any] | None = None  # a line of metrics whose evaluation a signal ended
        self.train_started = time.time()
        run.startup_seconds = process_seconds()

    @property
    def is_active(self) -> bool:
        """Whether another iteration is due."""
        return not self.is_stopped and self.collector.num_steps < self.cfg.steps

    @property
    def progress_remaining(self) -> float:
        """The share of the run's steps still to come, from 1 down to 0: what linear schedules follow."""
        return max(0.0, 1 - self.collector.num_steps / self.cfg.steps)

    def update_learning_rate(self) -> float:
        """The learning rate of the coming iteration; a linear one is set here, a constant one stays as it is."""
        if self.cfg.learning_rate_schedule == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.cfg.learning_rate
                    * self.progress_remaining
                    * (self.constraints.lr_scale if self.constraints else 1.0)
                )
        return self.optimizer.param_groups[0]["lr"]

    def compute_rewards(self, trajectory: Trajectory) -> Tensor:
        """What a record's steps paid, [B, T]: scaled, less what held constraints charge at their new multipliers.

        Costs are scaled as rewards are, so multipliers are in units of the environment's reward.
        """
        if self.policy.reward_scale is not None:
            self.policy.reward_scale.prepare(trajectory, self.collector.abandoned_rows)
        rewards = self.policy.normalize_reward(trajectory.reward)
        return (
            rewards
            if self.constraints is None
            else self._subtract_constraint_costs(rewards, trajectory, self.constraints)
        )

    def _subtract_constraint_costs(
        self, rewards: Tensor, trajectory: Trajectory, constraints: LagrangianConstraints
    ) -> Tensor:
        """Rewards less what held constraints charge at the multipliers that follow from this record."""
        recorder = self._cost_recorder()
        cost, episode_costs = recorder.collect_costs(trajectory, self.collector.masks)
        self.recipe_state["costs"] = recorder.state
        means = {name: statistics.fmean(values) for name, values in episode_costs.items() if values}
        constraints.begin(means, self.policy, self.optimizer)
        std = 1.0 if self.policy.reward_scale is None else self.policy.reward_scale.std
        return constraints.subtract_constraint_costs(rewards, {name: x / std for name, x in cost.items()})

    def finish_iteration(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Close an iteration: count its episodes, log and show it, evaluate and checkpoint when due. Yields its line."""
        self.iteration += 1
        self.policy.has_action_mask |= bool(self.collector.has_action_mask)
        self.unlogged_metrics.append(metrics)
        if self.collector.finished_episodes:
            self._count_episodes()
        if self.iteration % self.cfg.log_every == 0 or not self.is_active:
            yield self._log_metrics(self._aggregate_metrics())
        if is_checkpoint_due(
            self.cfg.checkpoint_every,
            self.iteration,
            self.collector.num_steps - self.num_steps_at_checkpoint,
            self.cfg.steps,
        ):
            self.checkpoint()
        if self.interrupt.poll_signal() and self.is_active:
            self._stop_on_signal()

    def _stop_on_signal(self) -> None:
        """Save what there is and end the run, as a signal has told."""
        self.finish(interrupted=True)
        self.interrupt.exit_by_signal()

    def _count_episodes(self) -> None:
        """Take in the episodes that finished; solved, or told to stop, once the window is full and its mean high enough."""
        self.num_episodes += len(self.collector.finished_episodes)
        self.recent_episodes.extend(self.collector.finished_episodes)
        self.collector.finished_episodes.clear()
        return_mean = (
            statistics.fmean(e.episode_return for e in self.recent_episodes)
            if len(self.recent_episodes) == STATS_WINDOW_SIZE
            else -math.inf
        )
        if self.reward_threshold is not None and self.run.solved_at is None and return_mean >= self.reward_threshold:
            self.run.solved_at = {"steps": self.collector.num_steps, "seconds": process_seconds()}
            self.run.event("solved", threshold=self.reward_threshold, **self.run.solved_at)
        self.is_stopped = self.cfg.stop_at_return is not None and return_mean >= self.cfg.stop_at_return
        if self.constraints is not None:
            self._close_constraints(self.constraints)

    def log_env_faults(self) -> None:
        """Move the faults of supervised environments to events.jsonl."""
        envs = self.collector.envs.unwrapped
        while isinstance(envs, FaultTolerantVectorEnv) and envs.faults:
            self.run.event("env_fault", **dataclasses.asdict(envs.faults.pop(0)))

    def _close_constraints(self, constraints: LagrangianConstraints) -> None:
        """Answer the bounds that this iteration's episodes broke."""
        self.unlogged_metrics[-1] |= constraints.close({}, self.policy, self.optimizer, self.log_event)
        self.run.stop_reason, self.is_stopped = (
            constraints.stop_reason,
            self.is_stopped or constraints.stop_reason is not None,
        )
        self.recipe_state["bounds"] = constraints.state

    def _cost_recorder(self) -> CostRecorder:
        envs: Any = self.collector.envs
        return envs

    def log_event(self, kind: str, **fields: Any) -> None:
        """An event, which is said too where it is not one of many."""
        self.run.event(kind, iteration=self.iteration, steps=self.collector.num_steps, **fields)
        if fields.get("response") != "hold":
            self.progress.print_message(fields["text"])

    def _aggregate_metrics(self) -> dict[str, Any]:
        """What the iterations since the last line came to."""
        seconds, steps = time.time() - self.train_started, self.collector.num_steps
        iterations, self.unlogged_metrics = self.unlogged_metrics, []
        line: dict[str, Any] = {"iteration": self.iteration, "steps": steps, "episodes": self.num_episodes}
        line["episode_return_mean"] = (
            statistics.fmean(e.episode_return for e in self.recent_episodes) if self.recent_episodes else None
        )
        line["episode_length_mean"] = (
            statistics.fmean(e.length for e in self.recent_episodes) if self.recent_episodes else None
        )
        line |= self._info_means() if any(episode.info for episode in self.recent_episodes) else {}
        line |= combine(iterations)
        seconds_left = max(0, self.cfg.steps - steps) * seconds / steps
        return line | {"seconds": seconds, "steps_per_second": steps / seconds, "seconds_left": seconds_left}

    def _info_means(self) -> dict[str, float]:
        """Success rate, and means of the numbers of info that were asked for, over the same episodes."""
        means = {}
        for name in dict.fromkeys(name for episode in self.recent_episodes for name in episode.info):
            values = [episode.info[name] for episode in self.recent_episodes if name in episode.info]
            if name == "success":
                means["success_rate"] = sum(values) / len(self.recent_episodes)
                self._warn_of_unknown_success(len(self.recent_episodes) - len(values))
            else:
                means[f"info_{name}"] = statistics.fmean(values)
        return means

    def _warn_of_unknown_success(self, num_unknown: int) -> None:
        if num_unknown and not self.recipe_state.get("success_unknown"):
            self.recipe_state["success_unknown"] = True
            text = f"the info of {num_unknown} of the last {len(self.recent_episodes)} episodes says nothing of success"
            self.log_event("success_unknown", text=f"{text}: they count as failures")

    def _log_metrics(self, line: dict[str, Any]) -> dict[str, Any]:
        """Log and show a line, evaluated where that is due."""
        if self.collector.is_fault_tolerant:
            self.log_env_faults()
        if self.cfg.evaluate_every and self.iteration % self.cfg.evaluate_every < self.cfg.log_every:
            line |= self._evaluate_or_stop(line)
        for tracker in self.trackers:
            tracker.log(
                {name: value for name, value in line.items() if isinstance(value, float | int)},
                self.collector.num_steps,
            )
        self.run.log(line)
        self.progress.show(line, force=not self.is_active)
        return line

    def _evaluate_or_stop(self, line: dict[str, Any]) -> dict[str, float]:
        """The policy's evaluation as metrics. A line whose evaluation a signal ends waits for the resume."""
        try:
            return self._evaluate()
        except EvaluationInterrupted:
            self.pending_metrics = line
            self._stop_on_signal()
            raise

    def _evaluate(self) -> dict[str, float]:
        """The policy's evaluation as metrics; the best so far is kept under best/."""
        episodes, steps = self.cfg.evaluate_episodes, self.cfg.evaluation_max_steps
        options: dict[str, Any] = {"source": self.source, "should_stop": lambda: self.interrupt.signum is not None}
        evaluation = evaluate(self.policy, self.cfg, num_episodes=episodes, **options)
        if evaluation.num_truncated and not self.recipe_state.get("evaluation_cut"):
            self.recipe_state["evaluation_cut"] = True
            text = (
                f"{evaluation.num_truncated} of {episodes} evaluation episodes were ended at evaluation_max_steps, "
                f"{steps:,}"
            )
            self.log_event("evaluation_cut", text=text)
        if evaluation.return_mean > self.best_return:
            self.best_return = evaluation.return_mean
            self.policy.save(self.run.path / "best")
        metrics = {"evaluation_return_mean": evaluation.return_mean, "evaluation_return_best": self.best_return}
        success_rate = evaluation.success_rate
        return metrics if success_rate is None else metrics | {"evaluation_success_rate": success_rate}

    def checkpoint(self) -> None:
        """Write everything that the coming iterations depend on under checkpoints/ITERATION, once."""
        name = f"{self.iteration:06d}"
        if name in self.run.list_checkpoints():
            return
        self.num_steps_at_checkpoint = self.collector.num_steps
        keep, state = self.cfg.keep_checkpoints, self._state()
        self.run.checkpoint(name, self.policy.save, self.optimizer, state, keep=keep)
        if self.recreate_envs is not None and self.is_active:
            self.collector.envs.close()
            self.collector.envs = self.recreate_envs(self.iteration)

    def _state(self) -> dict[str, Any]:
        normalizer = self.policy.reward_scale
        return {
            "iteration": self.iteration,
            "num_episodes": self.num_episodes,
            "is_stopped": self.is_stopped,
            "best_return": self.best_return,
            "pending": self.pending_metrics,
            "solved_at": self.run.solved_at,
            "seconds": time.time() - self.train_started,
            "window": [tuple(episode) for episode in self.recent_episodes],
            "unlogged_metrics": self.unlogged_metrics,
            "recipe_state": self.recipe_state,
            "shuffle": self.shuffle_generator,
            "shared_generators": shared_generator_states(),
            "running_returns": None if normalizer is None else normalizer.running_returns,
            "walker": self.collector.state(self.restore_method),
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: everything as it was when it was written."""
        saved = load_state(path)
        load_weights(self.policy, load_tensors(path / WEIGHTS))
        load_optimizer(path, self.optimizer, saved["optimizer"])
        state = saved["run"]
        for name in ("iteration", "num_episodes", "is_stopped", "best_return", "unlogged_metrics", "recipe_state"):
            setattr(self, name, state[name])
        self.run.solved_at = state["solved_at"]
        self.train_started = time.time() - state["seconds"]
        self.recent_episodes.extend(Episode(*episode) for episode in state["window"])
        self.shuffle_generator.set_state(state["shuffle"])
        if self.policy.reward_scale is not None:
            self.policy.reward_scale.running_returns = state["running_returns"]
        if not self.collector.load_state(state["walker"], self.policy):
            self.run.event("resume_inexact", iteration=self.iteration)
            self.run.changed.append("env")
            print(
                f"understudy: env {self.source.name!r} does not come back to where it stood (it is not decided by its seed "
                "and actions): open episodes begin anew, and this run is no longer the one that was interrupted",
                file=sys.stderr,
            )
        restore_shared_generators(state["shared_generators"])
        if (
            self.recreate_envs is not None
        ):  # last, as at the checkpoint: a constructor may draw from the shared generators
            self.collector.envs.close()
            self.collector.envs = self.recreate_envs(self.iteration)
        if self.constraints is not None and "costs" in self.recipe_state:
            self._cost_recorder().load_state(self.recipe_state["costs"])
        if self.constraints is not None and "bounds" in self.recipe_state:
            self.constraints.restore(self.recipe_state["bounds"])
            self.run.stop_reason = self.constraints.stop_reason
        self.num_steps_at_checkpoint = self.collector.num_steps
        pending = state.get("pending")
        self.run.rewind(self.iteration - (pending is not None))
        if pending is not None:
            self._log_metrics(pending)

    def finish(self, *, interrupted: bool = False) -> None:
        """Save the final policy, the last checkpoint, the learning curve, and a video where one is asked for.

        Environments that are renewed at checkpoints allow none that an uninterrupted run has not.
        """
        if self.iteration and not (interrupted and self.restore_method == "renew"):
            self.checkpoint()
        self.policy.save(self.run.path / "policy")
        title = f"{self.source.name}, seed {self.cfg.seed}"
        plot_learning_curve(self.run.metrics, self.run.path / "curve.png", title=title, threshold=self.reward_threshold)
        if self.cfg.video and not interrupted:
            evaluate(self.policy, self.cfg, num_episodes=1, video=self.run.path / "video", source=self.source)
        self.run.wait_for_checkpoint()


@close_at_exit
def open_run(
    recipe: str,
    cfg: Config,
    env: EnvLike,
    policy: nn.Module | None,
    *,
    evaluation_env: EnvLike = None,
    group_size: int = 1,
    optimizer: Any = None,
    resume: ResumePoint | None = None,
) -> Generator[TrainingRun]:
    """Everything a recipe needs, from its config; saved and closed at the end, however that comes.

    Args:
        env: a user's own environment or vector env, or a function that makes copies, instead of the config's id.
        evaluation_env: a second environment for evaluation, or a function that makes copies.
        policy: a user's own `Policy` or network, `network(obs) -> distribution, value`.
        group_size: rows next to each other that share their episode seeds, so that they start from one state.
        optimizer: (policy, cfg) -> optimizer, where it is not one Adam over all parameters.
        resume: the run to go on with, instead of a new one.
    """
    refuse_fields_without_effect(cfg, cfg.fields_without_effect())
    torch.set_num_threads(cfg.num_threads)
    seed_shared_generators(cfg.seed)
    keep_freed_memory()
    base_dir = Path.cwd()  # an environment may change the working directory
    checkpoint = None if resume is None else resume.checkpoint
    if cfg.init_from is not None and policy is not None and resume is None:
        raise RequestError(
            f"init_from is {cfg.init_from!r}, which has no effect beside a policy of your own: leave one of them out"
        )
    init = None if cfg.init_from is None else checkpoint or base_dir / policy_path(Path(cfg.init_from), "init_from")
    check_trackers(cfg.log)
    if cfg.video:
        require_package("moviepy", "video", "video is on")

    def seed_of(row: int, episode: int) -> int:
        return derive_seed(cfg.seed, "episode", row // group_size, episode)

    def open_envs(*checkpoint: int) -> VectorEnv:
        envs = source.open(seed_of, *checkpoint)
        names = dict.fromkeys(Constraint.parse(text).name for text in cfg.constraint)
        return CostRecorder(envs, list(names)) if names else envs

    source = EnvSource(cfg, env, evaluation_env)
    source.check()
    envs = open_envs()
    collector = None
    try:
        source.check_evaluation(envs)
        policy = make_initial_policy(policy, cfg, envs, init).to(cfg.device).eval()
        refuse_fields_without_effect(cfg, env_fields_without_effect(policy))
        policy_optimizer = (optimizer or adam)(policy, cfg)
        links = [] if init is None else [lineage.make_link("init", init)]
        if init is not None and cfg.init_optimizer and checkpoint is None:
            links.append(lineage.make_link("init_optimizer", load_moments(policy_optimizer, cfg, init)))
        origin = lineage.make_lineage(f"control {recipe}", to_dict(cfg), links)
        if resume is None:
            description: dict[str, Any] = {"recipe": f"control {recipe}", "config": to_dict(cfg)}
            description |= {"own_env": env is not None, "own_policy": policy.network_config is None}
            description |= {"reproducible": source.is_seeded}
            name = re.sub(r"[^\w.-]+", "-", source.name.rpartition(":")[2])
            run = Run.create(cfg.output_dir, f"{recipe}-{name}-s{cfg.seed}", description, origin, base_dir)
        else:
            run = resume.run
            run.changed += lineage.resume_lineage(
                run.path, origin | {"links": []}
            )  # it has taken what it needs of `init`
        collector = RolloutCollector(
            envs,
            seed_of=seed_of,
            generator=make_generator(cfg.seed, "sample", cfg.device),
            noise_interval=cfg.noise_interval,
            device=cfg.device,
            log_info=cfg.log_info,
            keep_float64=policy.keeps_float64,
        )
        title = f"{recipe} {source.name} seed {cfg.seed} -> {short_path(run.path)}"
        with (
            Progress(title, cfg.steps, quiet=cfg.quiet) as progress,
            InterruptHandler(quiet=cfg.quiet) as interrupt,
            closing(run),
        ):
            training_run = TrainingRun(
                cfg, run, collector, policy, policy_optimizer, progress, interrupt, source, open_envs
            )
            messages = [*source.warnings(training_run.restore_method), *policy_warnings(policy, source.preflight)]
            for text in messages if resume is None else ():
                training_run.log_event("notice", text=text)
            if resume is not None:
                resume.restore(training_run)
            try:
                yield training_run
            except (KeyboardInterrupt, SystemExit) as error:
                error.add_note(resume_command(run))
                raise  # what could be saved is saved: an iteration that is not whole is not
            except RestartsExhaustedError as error:
                training_run.log_env_faults()
                collector.abandon_episodes()
                training_run.finish(interrupted=True)
                note_failure(run, error)
                raise
            except BaseException as error:
                if was_left(error):
                    training_run.finish(interrupted=True)
                    raise
                failure = explain_failure(error, run, f"lower num_envs (now {cfg.num_envs}) or the network's sizes")
                if isinstance(error, EOFError | ConnectionError) and (text := describe_dead_worker(collector.envs)):
                    failure = UserCodeError(f"env {source.name!r}: {text}")
                    failure.__cause__ = error
                note_failure(run, failure)
                if failure is error:
                    raise
                raise failure from error
            else:
                training_run.finish()
            finally:
                training_run.log_env_faults()
                for tracker in training_run.trackers:
                    tracker.close()
    finally:
        for opened in (envs if collector is None else collector.envs, source):
            try:
                opened.close()
            except Exception as error:  # all is saved; and what has ended the run is not to be hidden by this
                print(
                    f"understudy: env {source.name!r} raises {type(error).__name__} when it is closed: "
                    f"{environment.one_line_message(error)}",
                    file=sys.stderr,
                )


def run_to_end(iterations: Iterations) -> Run:
    """Run a recipe's iterations to their end; the run they made."""
    while True:
        try:
            next(iterations)
        except StopIteration as stop:
            return stop.value
