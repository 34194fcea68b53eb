"""Where a run's environments come from: an id, a function or an object; opened for training and for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import RecordVideo

from understudy.control.config import Config
from understudy.control.envs import make as environment
from understudy.control.envs.checks import Preflight, check_env, check_statistics
from understudy.control.envs.fault_tolerant import START_SECONDS, run_in_fork
from understudy.control.envs.make import EnvFunction, env_name, one_line_message
from understudy.control.envs.masks import with_mask
from understudy.control.envs.spaces import spaces_match
from understudy.control.envs.state import RestoreMethod, choose_restore_method, has_reproducible_resets, obeys_seed
from understudy.control.envs.vector_checks import check_envs
from understudy.control.envs.wrappers import ClippedObservation, EvaluationWrapper, RewardAccumulator, UnseededReset
from understudy.control.fast.vector_env import FastSyncVectorEnv
from understudy.run.config import RequestError
from understudy.run.installation import install_hint
from understudy.run.seeds import derive_seed, preserve_shared_generators

EnvLike = gymnasium.Env | VectorEnv | EnvFunction | None
"""A user's own environment or vector env; or a function that makes one environment, which is called for every copy."""
SINGLE_ENV_VECTORIZATIONS = ("sync", "async", "fault_tolerant")
"""Vectorizations whose copies are single environments."""
COPY_FIELDS = ("env_options", "wrappers", "vectorization", "step_timeout", "out_of_space")
"""Fields that say how copies are made, and have no effect on an object that is there."""


def resolve_env_fields(cfg: Any, env: EnvLike) -> Any:
    """The config with the `num_envs` of an environment object.

    Raises:
        RequestError: there is no environment; a field has no effect beside an object.
    """
    if env is None:
        if not cfg.env:
            raise RequestError(
                "env is missing: name a Gymnasium id, as in --env CartPole-v1, or pass train(..., env=...)"
            )
        if cfg.out_of_space != "refuse" and cfg.vectorization not in SINGLE_ENV_VECTORIZATIONS:
            raise RequestError(
                f"out_of_space is {cfg.out_of_space!r}, but vectorization is {cfg.vectorization!r}, whose observations are "
                "never compared with their space: leave it at 'refuse', or choose one of "
                f"{', '.join(SINGLE_ENV_VECTORIZATIONS)}"
            )
        return cfg
    if not isinstance(env, gymnasium.Env | VectorEnv):
        return cfg
    defaults = {field.name: field for field in dataclasses.fields(cfg)}
    allowed = "out_of_space" if not isinstance(env, VectorEnv) else ""
    for name in COPY_FIELDS:
        default = defaults[name].default_factory() if name == "env_options" else defaults[name].default  # pyright: ignore
        if name != allowed and getattr(cfg, name) != default:
            raise RequestError(
                f"{name} is {getattr(cfg, name)!r}, which has no effect on an environment object: leave it at {default!r}, "
                "or pass a function that makes the environment as env"
            )
    num_envs = env.num_envs if isinstance(env, VectorEnv) else 1
    if cfg.num_envs not in (num_envs, defaults["num_envs"].default):
        raise RequestError(
            f"num_envs is {cfg.num_envs}, but env is an object of {num_envs}: leave it out, or pass a function "
            "that makes the "
            "environment as env"
        )
    return dataclasses.replace(cfg, num_envs=num_envs)


class EnvSource:
    """What environments of a run are made of, and what preflight has seen in one.

    Args:
        env: a user's own, instead of the config's id.
        evaluation_env: a second one for evaluation: an environment, or a function that makes one.

    Raises:
        RequestError: the config asks for evaluation, and there is nothing to evaluate in.
    """

    def __init__(self, cfg: Config, env: EnvLike = None, evaluation_env: EnvLike = None) -> None:
        self.cfg, self.evaluation_env = cfg, evaluation_env
        self.env_object = env if isinstance(env, gymnasium.Env | VectorEnv) else None
        self.env: Any = cfg.env if env is None else env
        self.name = cfg.env or env_name(self.env)
        self.preflight = self.evaluation_seen = Preflight("", True, "")
        self.has_reproducible_resets = (
            True  # what an object or a supervised environment remembers shows on resuming, by a digest
        )
        self.is_seeded = True  # so far as is known: a fresh environment's episodes are those of its seed
        self.seed = derive_seed(cfg.seed, "preflight")
        if isinstance(evaluation_env, VectorEnv):
            raise RequestError(
                "evaluation_env is a vector env: pass a single environment, or a function that makes one"
            )
        requested_field = next((f for f in ("evaluate_every", "video") if getattr(cfg, f)), None)
        if requested_field is not None and self.env_object is not None and evaluation_env is None:
            raise RequestError(
                f"{requested_field} is {getattr(cfg, requested_field)!r}, but env is an object, which is in use "
                "for training: pass a second "
                "one, or a function that makes one, as evaluation_env"
            )

    def check(self) -> None:
        """Preflight, before there is a run.

        Raises:
            RequestError: what is wrong with the environment.
        """
        if self.env_object is not None:
            self._check_object(self.env_object)
        elif self.cfg.vectorization == "fault_tolerant":
            timeout_seconds = START_SECONDS + 4 * self.cfg.step_timeout  # a reset and three steps
            self.preflight = run_in_fork(self._check_single, f"env {self.name!r}", seconds=timeout_seconds)
        elif self.cfg.vectorization in SINGLE_ENV_VECTORIZATIONS:
            self.preflight = self._check_single()
            self.has_reproducible_resets = self.preflight.takes_seed and has_reproducible_resets(
                self._make_factory()(), self.seed
            )
            self.is_seeded = self.has_reproducible_resets or (
                self.preflight.takes_seed and obeys_seed(self._make_factory(), self.seed)
            )
        self.is_seeded = self.is_seeded and self.preflight.takes_seed
        self.has_reproducible_resets = self.has_reproducible_resets and self.preflight.takes_seed

    def open(self, seed_of: Callable[[int, int], int], *checkpoint: int) -> VectorEnv:
        """The environments to train in; another time, after a checkpoint, new ones with another seed.

        Raises:
            RequestError: they cannot be made, or preflight has found what is wrong with a vector env.
        """
        if self.env_object is None:
            if self.cfg.vectorization == "native" and not checkpoint:
                self.preflight = check_envs(self.name, self._make_envs(), seed=self.seed)
            return self._make_envs(*checkpoint)
        envs = environment.as_vector_env(self.env_object, seed_of, self._outer_wrappers())
        # of a SyncVectorEnv one copy was checked; an EnvPool, which is both, takes no seed but the one it was made with
        if type(self.env_object) is not SyncVectorEnv and not isinstance(self.env_object, gymnasium.Env):
            self.preflight = check_envs(self.name, envs, seed=self.seed, keep=True)
        return envs

    def _make_envs(self, *checkpoint: int) -> VectorEnv:
        cfg = self.cfg
        return environment.make(
            self.env,
            num_envs=cfg.num_envs,
            vectorization=cfg.vectorization,
            step_timeout=cfg.step_timeout,
            check_bounds=cfg.out_of_space == "refuse",
            options=cfg.env_options,
            wrappers=cfg.wrappers,
            outer_wrappers=self._outer_wrappers() if cfg.vectorization in SINGLE_ENV_VECTORIZATIONS else (),
            seed=derive_seed(cfg.seed, "envpool", *checkpoint),
        )

    def check_evaluation(self, envs: VectorEnv) -> None:
        """Preflight of what evaluation, and a video at the end, will open beside the environments of training.

        Args:
            envs: these, which are open.

        Raises:
            RequestError: it cannot be opened now; or what is wrong with evaluation_env.
        """
        cfg = self.cfg
        if not (cfg.evaluate_every or cfg.video):
            return
        training_envs = environment.single_envs(envs)
        with preserve_shared_generators(), TemporaryDirectory() as folder:
            if self.evaluation_env is not None:
                self.evaluation_seen = self._check_evaluation_env(self.evaluation_env, envs)
            if cfg.evaluate_every:
                num_envs = min(cfg.evaluate_episodes, cfg.num_evaluation_envs)
                self._try_evaluation("evaluate_every", training_envs, num_envs)
            if cfg.video:
                self._try_evaluation("video", training_envs, 1, Path(folder) / "video")

    def _check_evaluation_env(self, given: Any, envs: VectorEnv) -> Preflight:
        name, own = env_name(given), isinstance(given, gymnasium.Env)
        env = with_mask(given) if own else environment.make_factory(given)()
        self._refuse_training_env(env, environment.single_envs(envs))
        sees, acts, wanted = env.observation_space, env.action_space, envs.single_observation_space
        seen = check_env(name, env, seed=self.seed, out_of_space=self.cfg.out_of_space, keep_open=own)
        if not spaces_match(sees, wanted) or acts != envs.single_action_space:
            raise RequestError(
                f"evaluation_env is {name!r}, which has {sees} and {acts}, but env has {wanted} and "
                f"{envs.single_action_space}: choose one of the same spaces"
            )
        return seen

    def _refuse_training_env(self, env: gymnasium.Env, training_envs: list[gymnasium.Env]) -> None:
        """Refuse to evaluate in an environment that is in the midst of an episode of training."""
        if any(env.unwrapped is other for other in training_envs):
            field, given = ("env", self.env) if self.evaluation_env is None else ("evaluation_env", self.evaluation_env)
            raise RequestError(
                f"{field} is {env_name(given)!r}, which gives evaluation the very object that training steps: pass a second "
                "environment, or a function that makes a new one at each call, as evaluation_env"
            )

    def _try_evaluation(
        self, field: str, training_envs: list[gymnasium.Env], num_envs: int, video: Path | None = None
    ) -> None:
        try:
            evaluation_envs, _ = self.open_evaluation(num_envs, video)
        except RequestError as error:
            default = type(self.cfg).__dataclass_fields__[field].default
            raise RequestError(
                f"{field} is {getattr(self.cfg, field)!r}, but beside the environments of training {error}; where training "
                f"has the only one, set {field} to {default!r} and evaluate the finished run"
            ) from error
        try:
            for env in environment.single_envs(evaluation_envs):
                self._refuse_training_env(env, training_envs)
            self.refuse_shared_evaluation_copies(evaluation_envs)
        finally:
            self.close_evaluation(evaluation_envs)

    def refuse_shared_evaluation_copies(self, envs: VectorEnv) -> None:
        """Refuse copies for evaluation that are one object."""
        field, env = ("env", self.env) if self.evaluation_env is None else ("evaluation_env", self.evaluation_env)
        environment.refuse_shared_copies(env_name(env), envs, field)

    def open_evaluation(
        self, num_envs: int, video: Path | None = None, num_episodes: int = 1
    ) -> tuple[FastSyncVectorEnv, list[EvaluationWrapper]]:
        """Environments to evaluate in: `num_envs` copies, or the one object that was given; and each without the rest.

        Args:
            video: record this many `num_episodes` of a single copy there.

        Raises:
            RequestError: they cannot be made, or cannot be recorded.
        """
        user_env: Any = self.evaluation_env
        if isinstance(user_env, gymnasium.Env):
            factories: list[Callable[[], gymnasium.Env]] = [
                partial(
                    _wrap_for_evaluation,
                    user_env,
                    self._outer_wrappers(self.evaluation_seen),
                    self.cfg.evaluation_max_steps,
                )
            ]
        else:
            factories = [self._make_factory(user_env, for_evaluation=True, for_video=video is not None)] * num_envs
        envs: list[Any] = []
        try:
            for factory in factories:
                envs.append(factory())
            recorded_envs = [self._record_video(env, video, num_episodes) if video else env for env in envs]
        except RequestError as error:
            close_envs(envs, user_env)
            hint = ": where only one can be open at a time, set num_evaluation_envs to 1" if num_envs > 1 else ""
            raise RequestError(f"evaluation cannot begin, because {error}{hint}") from error
        env_functions = [partial(_return_env, env) for env in recorded_envs]
        return FastSyncVectorEnv(env_functions, copy=False, autoreset_mode=AutoresetMode.DISABLED), envs

    def close_evaluation(self, envs: FastSyncVectorEnv) -> None:
        """Close what `open_evaluation` opened, but leave a user's object open for the next time."""
        close_envs(envs.envs, self.evaluation_env)

    def close(self) -> None:
        """Close the user's evaluation environment, when the run is over."""
        if isinstance(self.evaluation_env, gymnasium.Env):
            self.evaluation_env.close()

    def restore_method(self, envs: VectorEnv) -> RestoreMethod:
        """How the environments come back on resuming."""
        method = choose_restore_method(envs, resets_are_reproducible=self.has_reproducible_resets)
        if method == "renew" and not (self.cfg.exact_resume and self.is_seeded):
            return "restart"
        return method

    def warnings(self, method: RestoreMethod) -> Iterator[str]:
        """What a user should know of the environments before the first step, a sentence each."""
        if not self.preflight.takes_seed:
            yield f"env {self.name!r} cannot be seeded: this run cannot be reproduced, and resume begins new episodes"
        elif not self.is_seeded:
            yield (
                f"env {self.name!r} takes a seed and is not decided by it: this run cannot be reproduced, and resume is not "
                "exact"
            )
        elif method == "renew":
            interval = self.cfg.checkpoint_every
            frequency = f"every {interval} iterations" if interval else "five times over the run"
            consequence = "it is made anew" if self.env_object is None else "its open episodes end"
            yield (
                f"env {self.name!r} remembers something across episodes: so that resume is "
                f"exact, {consequence} at each checkpoint, {frequency}; set exact_resume to false "
                "(--no-exact-resume) to keep it"
            )
        if self.preflight.violation:
            treatment = "clipped to it" if self.cfg.out_of_space == "clip" else "accepted"
            yield (
                f"env {self.name!r} breaks its own observation_space ({self.preflight.violation}): what it gives is "
                f"{treatment}"
            )

    def _check_single(self) -> Preflight:
        env = environment.make_factory(self.env, self.cfg.env_options, self.cfg.wrappers)()
        return check_env(self.name, env, seed=self.seed, out_of_space=self.cfg.out_of_space)

    def _check_object(self, env: gymnasium.Env | VectorEnv) -> None:
        check_statistics(self.name, env)
        single_env: Any = env.unwrapped.envs[0] if isinstance(env.unwrapped, SyncVectorEnv) else env
        if isinstance(single_env, environment.SeededResets):  # it was in a run before
            single_env = single_env.env
        if not isinstance(single_env, VectorEnv):
            out_of_space = self.cfg.out_of_space if single_env is env else "accept"
            self.preflight = check_env(
                self.name, with_mask(single_env), seed=self.seed, out_of_space=out_of_space, keep_open=True
            )

    def _outer_wrappers(self, seen: Preflight | None = None) -> tuple[Callable[[gymnasium.Env], gymnasium.Env], ...]:
        wrappers = () if (seen or self.preflight).takes_seed else (UnseededReset,)
        return (*wrappers, ClippedObservation) if self.cfg.out_of_space == "clip" else wrappers

    def _make_factory(
        self, env_function: EnvFunction | None = None, *, for_evaluation: bool = False, for_video: bool = False
    ) -> environment.EnvFactory:
        cfg = self.cfg
        options = cfg.env_options | ({"render_mode": "rgb_array"} if for_video else {})
        max_steps = cfg.evaluation_max_steps if for_evaluation else None
        if env_function is not None:
            outer = self._outer_wrappers(self.evaluation_seen)
            return environment.make_factory(
                env_function,
                {"render_mode": "rgb_array"} if for_video else {},
                outer_wrappers=outer,
                evaluation_max_steps=max_steps,
            )
        return environment.make_factory(
            self.env, options, cfg.wrappers, outer_wrappers=self._outer_wrappers(), evaluation_max_steps=max_steps
        )

    def _record_video(self, env: gymnasium.Env, video: Path, num_episodes: int) -> gymnasium.Env:
        try:
            return RecordVideo(env, str(video), episode_trigger=lambda n: n < num_episodes)
        except Exception as error:
            raise RequestError(
                f"video cannot be recorded ({one_line_message(error)}): {install_hint('video')}"
            ) from error


def close_envs(envs: Any, user_env: Any) -> None:
    """Close environments, but not one that is, or is around, the one to be kept."""
    for env in envs:
        if not isinstance(user_env, gymnasium.Env) or env.unwrapped is not user_env.unwrapped:
            env.close()


def _wrap_for_evaluation(
    env: gymnasium.Env, outer: Sequence[Callable[[gymnasium.Env], gymnasium.Env]], max_steps: int
) -> EvaluationWrapper:
    accumulator = RewardAccumulator(env)
    made = with_mask(accumulator)
    for wrap in outer:
        made = wrap(made)
    return EvaluationWrapper(made, accumulator, max_steps)


def _return_env(env: gymnasium.Env) -> gymnasium.Env:
    return env
