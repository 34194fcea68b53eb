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

from understudy.control import environment
from understudy.control.config import Config
from understudy.control.environment import Function, first_sentence, named
from understudy.control.masks import with_mask
from understudy.control.preflight import Preflight, check_env, check_statistics
from understudy.control.rows import Rows
from understudy.control.spaces import read_alike
from understudy.control.standing import Way, forgets, obeys_seed, way_of
from understudy.control.supervise import START_SECONDS, apart
from understudy.control.vector_preflight import check_envs
from understudy.control.wrappers import ClippedObservation, Evaluated, RewardSum, Unseeded
from understudy.run.config import RequestError
from understudy.run.installation import install_hint
from understudy.run.seeds import derive, shared_generators_kept

Env = gymnasium.Env | VectorEnv | Function | None
"""A user's own environment or vector env; or a function that makes one environment, which is called for every copy."""
CHECKED = ("sync", "async", "supervised")
"""Vectorizations whose copies are single environments."""
OF_COPIES = ("env_options", "wrappers", "vectorization", "step_timeout", "out_of_space")
"""Fields that say how copies are made, and have no effect on an object that is there."""


def resolve(cfg: Any, env: Env) -> Any:
    """The config with the `num_envs` of an environment object.

    Raises:
        RequestError: there is no environment; a field has no effect beside an object.
    """
    if env is None:
        if not cfg.env:
            raise RequestError(
                "env is missing: name a Gymnasium id, as in --env CartPole-v1, or pass train(..., env=...)"
            )
        if cfg.out_of_space != "refuse" and cfg.vectorization not in CHECKED:
            raise RequestError(
                f"out_of_space is {cfg.out_of_space!r}, but vectorization is {cfg.vectorization!r}, whose observations are "
                f"never compared with their space: leave it at 'refuse', or choose one of {', '.join(CHECKED)}"
            )
        return cfg
    if not isinstance(env, gymnasium.Env | VectorEnv):
        return cfg
    defaults = {field.name: field for field in dataclasses.fields(cfg)}
    allowed = "out_of_space" if not isinstance(env, VectorEnv) else ""
    for name in OF_COPIES:
        default = defaults[name].default_factory() if name == "env_options" else defaults[name].default  # pyright: ignore
        if name != allowed and getattr(cfg, name) != default:
            raise RequestError(
                f"{name} is {getattr(cfg, name)!r}, which has no effect on an environment object: leave it at {default!r}, "
                "or pass a function that makes the environment as env"
            )
    rows = env.num_envs if isinstance(env, VectorEnv) else 1
    if cfg.num_envs not in (rows, defaults["num_envs"].default):
        raise RequestError(
            f"num_envs is {cfg.num_envs}, but env is an object of {rows}: leave it out, or pass a function that makes the "
            "environment as env"
        )
    return dataclasses.replace(cfg, num_envs=rows)


class Source:
    """What environments of a run are made of, and what preflight has seen in one.

    Args:
        env: a user's own, instead of the config's id.
        evaluation_env: a second one for evaluation: an environment, or a function that makes one.

    Raises:
        RequestError: the config asks for evaluation, and there is nothing to evaluate in.
    """

    def __init__(self, cfg: Config, env: Env = None, evaluation_env: Env = None) -> None:
        self.cfg, self.evaluation_env = cfg, evaluation_env
        self.object = env if isinstance(env, gymnasium.Env | VectorEnv) else None
        self.origin: Any = cfg.env if env is None else env
        self.name = cfg.env or named(self.origin)
        self.seen = self.evaluation_seen = Preflight("", True, "")
        self.forgets = True  # what an object or a supervised environment remembers shows on resuming, by a digest
        self.is_seeded = True  # so far as is known: a fresh environment's episodes are those of its seed
        self.seed = derive(cfg.seed, "preflight")
        if isinstance(evaluation_env, VectorEnv):
            raise RequestError(
                "evaluation_env is a vector env: pass a single environment, or a function that makes one"
            )
        asked = next((f for f in ("evaluate_every", "video") if getattr(cfg, f)), None)
        if asked is not None and self.object is not None and evaluation_env is None:
            raise RequestError(
                f"{asked} is {getattr(cfg, asked)!r}, but env is an object, which is in use for training: pass a second "
                "one, or a function that makes one, as evaluation_env"
            )

    def check(self) -> None:
        """Preflight, before there is a run.

        Raises:
            RequestError: what is wrong with the environment.
        """
        if self.object is not None:
            self._check_object(self.object)
        elif self.cfg.vectorization == "supervised":
            patience = START_SECONDS + 4 * self.cfg.step_timeout  # a reset and three steps
            self.seen = apart(self._checked, f"env {self.name!r}", seconds=patience)
        elif self.cfg.vectorization in CHECKED:
            self.seen = self._checked()
            self.forgets = self.seen.takes_seed and forgets(self._maker()(), self.seed)
            self.is_seeded = self.forgets or (self.seen.takes_seed and obeys_seed(self._maker(), self.seed))
        self.is_seeded = self.is_seeded and self.seen.takes_seed
        self.forgets = self.forgets and self.seen.takes_seed

    def open(self, seed_of: Callable[[int, int], int], *checkpoint: int) -> VectorEnv:
        """The environments to train in; another time, after a checkpoint, new ones with another seed.

        Raises:
            RequestError: they cannot be made, or preflight has found what is wrong with a vector env.
        """
        if self.object is None:
            if self.cfg.vectorization == "native" and not checkpoint:
                self.seen = check_envs(self.name, self._opened(), seed=self.seed)
            return self._opened(*checkpoint)
        envs = environment.adopt(self.object, seed_of, self._outer())
        # of a SyncVectorEnv one copy was checked; an EnvPool, which is both, takes no seed but the one it was made with
        if type(self.object) is not SyncVectorEnv and not isinstance(self.object, gymnasium.Env):
            self.seen = check_envs(self.name, envs, seed=self.seed, keep=True)
        return envs

    def _opened(self, *checkpoint: int) -> VectorEnv:
        cfg = self.cfg
        return environment.make(
            self.origin,
            num_envs=cfg.num_envs,
            vectorization=cfg.vectorization,
            step_timeout=cfg.step_timeout,
            bounds=cfg.out_of_space == "refuse",
            options=cfg.env_options,
            wrappers=cfg.wrappers,
            outer=self._outer() if cfg.vectorization in CHECKED else (),
            seed=derive(cfg.seed, "envpool", *checkpoint),
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
        with shared_generators_kept(), TemporaryDirectory() as folder:
            if self.evaluation_env is not None:
                self.evaluation_seen = self._check_evaluation_env(self.evaluation_env, envs)
            if cfg.evaluate_every:
                self._try_evaluation("evaluate_every", min(cfg.evaluate_episodes, cfg.num_evaluation_envs))
            if cfg.video:
                self._try_evaluation("video", 1, Path(folder) / "video")

    def _check_evaluation_env(self, given: Any, envs: VectorEnv) -> Preflight:
        name, own = named(given), isinstance(given, gymnasium.Env)
        env = with_mask(given) if own else environment.single(given)()
        sees, acts, wanted = env.observation_space, env.action_space, envs.single_observation_space
        seen = check_env(name, env, seed=self.seed, out_of_space=self.cfg.out_of_space, keep=own)
        if not read_alike(sees, wanted) or acts != envs.single_action_space:
            raise RequestError(
                f"evaluation_env is {name!r}, which has {sees} and {acts}, but env has {wanted} and "
                f"{envs.single_action_space}: choose one of the same spaces"
            )
        return seen

    def _try_evaluation(self, field: str, num_envs: int, video: Path | None = None) -> None:
        try:
            self.close_evaluation(self.open_evaluation(num_envs, video)[0])
        except RequestError as error:
            default = type(self.cfg).__dataclass_fields__[field].default
            raise RequestError(
                f"{field} is {getattr(self.cfg, field)!r}, but beside the environments of training {error}; where training "
                f"has the only one, set {field} to {default!r} and evaluate the finished run"
            ) from error

    def open_evaluation(
        self, num_envs: int, video: Path | None = None, episodes: int = 1
    ) -> tuple[Rows, list[Evaluated]]:
        """Environments to evaluate in: `num_envs` copies, or the one object that was given; and each without the rest.

        Args:
            video: record this many `episodes` of a single copy there.

        Raises:
            RequestError: they cannot be made, or cannot be recorded.
        """
        given: Any = self.evaluation_env
        if isinstance(given, gymnasium.Env):
            makers: list[Callable[[], gymnasium.Env]] = [
                partial(_evaluated, given, self._outer(self.evaluation_seen), self.cfg.evaluation_max_steps)
            ]
        else:
            makers = [self._maker(given, evaluated=True, video=video is not None)] * num_envs
        made: list[Any] = []
        try:
            for make in makers:
                made.append(make())
            recorded = [self._recorded(env, video, episodes) if video else env for env in made]
        except RequestError as error:
            close(made, given)
            more = ": where only one can be open at a time, set num_evaluation_envs to 1" if num_envs > 1 else ""
            raise RequestError(f"evaluation cannot begin, because {error}{more}") from error
        functions = [partial(_same, env) for env in recorded]
        return Rows(functions, copy=False, autoreset_mode=AutoresetMode.DISABLED), made

    def close_evaluation(self, envs: Rows) -> None:
        """Close what `open_evaluation` opened, but leave a user's object open for the next time."""
        close(envs.envs, self.evaluation_env)

    def close(self) -> None:
        """Close the user's evaluation environment, when the run is over."""
        if isinstance(self.evaluation_env, gymnasium.Env):
            self.evaluation_env.close()

    def way(self, envs: VectorEnv) -> Way:
        """How the environments come back on resuming."""
        way = way_of(envs, forgets=self.forgets)
        if way == "renew" and not (self.cfg.exact_resume and self.is_seeded):
            return "restart"
        return way

    def notices(self, way: Way) -> Iterator[str]:
        """What a user should know of the environments before the first step, a sentence each."""
        if not self.seen.takes_seed:
            yield f"env {self.name!r} cannot be seeded: this run cannot be reproduced, and resume begins new episodes"
        elif not self.is_seeded:
            yield (
                f"env {self.name!r} takes a seed and is not decided by it: this run cannot be reproduced, and resume is not "
                "exact"
            )
        elif way == "renew":
            every = self.cfg.checkpoint_every
            often = f"every {every} iterations" if every else "five times over the run"
            what = "it is made anew" if self.object is None else "its open episodes end"
            yield (
                f"env {self.name!r} remembers something across episodes: so that resume is "
                f"exact, {what} at each checkpoint, {often}; set exact_resume to false (--no-exact-resume) to keep it"
            )
        if self.seen.outside:
            how = "clipped to it" if self.cfg.out_of_space == "clip" else "accepted"
            yield f"env {self.name!r} breaks its own observation_space ({self.seen.outside}): what it gives is {how}"

    def _checked(self) -> Preflight:
        made = environment.single(self.origin, self.cfg.env_options, self.cfg.wrappers)()
        return check_env(self.name, made, seed=self.seed, out_of_space=self.cfg.out_of_space)

    def _check_object(self, env: gymnasium.Env | VectorEnv) -> None:
        check_statistics(self.name, env)
        first: Any = env.unwrapped.envs[0] if isinstance(env.unwrapped, SyncVectorEnv) else env
        if isinstance(first, environment.SeededResets):  # it was in a run before
            first = first.env
        if not isinstance(first, VectorEnv):
            out_of_space = self.cfg.out_of_space if first is env else "accept"
            self.seen = check_env(self.name, with_mask(first), seed=self.seed, out_of_space=out_of_space, keep=True)

    def _outer(self, seen: Preflight | None = None) -> tuple[Callable[[gymnasium.Env], gymnasium.Env], ...]:
        seeds = () if (seen or self.seen).takes_seed else (Unseeded,)
        return (*seeds, ClippedObservation) if self.cfg.out_of_space == "clip" else seeds

    def _maker(
        self, function: Function | None = None, *, evaluated: bool = False, video: bool = False
    ) -> environment.Maker:
        cfg = self.cfg
        options = cfg.env_options | ({"render_mode": "rgb_array"} if video else {})
        steps = cfg.evaluation_max_steps if evaluated else None
        if function is not None:
            outer = self._outer(self.evaluation_seen)
            return environment.single(
                function, {"render_mode": "rgb_array"} if video else {}, outer=outer, evaluated=steps
            )
        return environment.single(self.origin, options, cfg.wrappers, outer=self._outer(), evaluated=steps)

    def _recorded(self, env: gymnasium.Env, video: Path, episodes: int) -> gymnasium.Env:
        try:
            return RecordVideo(env, str(video), episode_trigger=lambda n: n < episodes)
        except Exception as error:
            raise RequestError(
                f"video cannot be recorded ({first_sentence(error)}): {install_hint('video')}"
            ) from error


def close(envs: Any, kept: Any) -> None:
    """Close environments, but not one that is, or is around, the one to be kept."""
    for env in envs:
        if not isinstance(kept, gymnasium.Env) or env.unwrapped is not kept.unwrapped:
            env.close()


def _evaluated(
    env: gymnasium.Env, outer: Sequence[Callable[[gymnasium.Env], gymnasium.Env]], max_steps: int
) -> Evaluated:
    own = RewardSum(env)
    made = with_mask(own)
    for wrap in outer:
        made = wrap(made)
    return Evaluated(made, own, max_steps)


def _same(env: gymnasium.Env) -> gymnasium.Env:
    return env
