"""What the recipes of the control world have in common: the fields of their configs. Defaults live in configs only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from understudy.constraints import Constraint
from understudy.run.config import (
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RequestError,
    Seconds,
    Size,
    Threads,
    UnitInterval,
    check_fields,
)
from understudy.run.device import check_device


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What an actor-critic is made of, and how it explores; saved with the policy."""

    hidden: tuple[PositiveInt, ...] = (64, 64)
    """Width of each hidden layer."""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """Nonlinearity of hidden layers."""
    shared: bool = False
    """One trunk for actor and critic, instead of a network each."""
    rnn_type: Literal["none", "gru", "lstm"] = "none"
    """Recurrent layer after the hidden ones."""
    rnn_hidden_size: PositiveInt = 64
    """Width of the recurrent layer."""
    orthogonal: bool = True
    """Orthogonal initial weights (gains sqrt 2, actor 0.01, critic 1), instead of torch's."""
    squash: Literal["auto", "clip", "scale", "tanh"] = "auto"
    """How a Box action gets to its bounds: clip, scale (-1 to 1 becomes them) or tanh; auto: scale where they are far."""
    log_std: float = 0.0
    """Initial log standard deviation of Box actions: in units of the action, or of half its range where squash scales."""
    scalar_std: bool = False
    """Learn the standard deviation of Box actions itself, at least 1e-6, instead of its logarithm (rsl_rl)."""
    exploration: Literal["independent", "held", "gsde"] = "independent"
    """Noise of Box actions: fresh each step, held for noise_hold steps, or a held function of features (gSDE)."""
    noise_hold: PositiveInt = 4
    """Steps that held noise and gSDE keep their noise."""


@dataclass(frozen=True, kw_only=True)
class Config(NetworkConfig):
    """Fields of every control recipe."""

    env: str = ""
    """Gymnasium id, module:id, entry point module:Class or FILE.py:Class; beside an environment object, its name."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, as JSON."""
    wrappers: tuple[str, ...] = ()
    """Wrappers, innermost first, each 'Name key=value ...'; Name from gymnasium.wrappers or module:Class."""
    vectorization: Literal["sync", "async", "fault_tolerant", "native", "envpool"] = "sync"
    """How copies run: in turn, a process each, the same and restarted on faults, the id's own vector env, or EnvPool."""
    step_timeout: Seconds = 60.0
    """Seconds that a step or a reset of a supervised environment may take before it is restarted."""
    out_of_space: Literal["refuse", "accept", "clip"] = "refuse"
    """An observation beyond the bounds of its space: refuse the environment, accept it, or clip to the bounds."""
    exact_resume: bool = True
    """Make environments that remember across episodes anew at checkpoints, so that resume is exact; off keeps them."""
    num_envs: Size = 8
    """Copies of the environment, one row of the record each."""
    steps: PositiveInt = 100_000
    """Chosen steps in all, over all copies; the run ends at the first iteration boundary at or after it."""
    seed: NonNegativeInt = 0
    """Seed of everything: weights, choices, shuffling, episodes."""
    output_dir: str | None = None
    """Directory of the run; runs/NAME-N by default."""
    init_from: str | None = None
    """Run or policy directory to start from, instead of fresh weights."""
    init_optimizer: bool = False
    """Start with the moments and step counts of the optimizer of the run in init, too; not with its learning rate."""
    preset: str = "none"
    """Where defaults come from: tuned (this env's own; the command line's default), none, cleanrl, sb3, rsl_rl."""
    device: str = "cpu"
    """Torch device of policy and update."""
    num_threads: Threads = 1
    """Torch threads; tiny tensors are fastest with one."""

    gamma: UnitInterval = 0.99
    """Discount per step."""
    normalize_obs: bool = False
    """Scale float observations by their running mean and deviation, kept in the policy."""
    normalize_reward: bool = False
    """Scale rewards by the running deviation of the discounted return, kept in the policy."""
    learning_rate: LearningRate = 3e-4
    """Adam's step size at the start."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """How it goes on: constant, or linear to 0 over the run's steps."""
    adam_eps: PositiveFloat = 1e-5
    """Adam's epsilon."""
    max_grad_norm: PositiveFloat = 0.5
    """Bound on the gradient's norm."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the value loss, which is half the squared error."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, per nat."""

    log_every: PositiveInt = 1
    """Iterations a line of metrics sums up."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics also go."""
    checkpoint_every: NonNegativeInt = 0
    """Iterations between checkpoints; 0 for five over the run. A run can go on from each to the bit."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints stay."""
    evaluate_every: NonNegativeInt = 0
    """Iterations between evaluations, own env and generators, best policy kept under best/; 0 for none."""
    evaluate_episodes: PositiveInt = 20
    """Episodes an evaluation takes."""
    num_evaluation_envs: Size = 4
    """Copies of the environment that an evaluation makes; results do not depend on it."""
    evaluation_max_steps: PositiveInt = 27_000
    """Steps after which an episode of an evaluation is ended (Atari's 108,000 frames)."""
    log_info: tuple[str, ...] = ()
    """Numbers in info at an episode's last step, logged as info_KEY: their mean over the last 100 episodes."""
    constraint: tuple[str, ...] = ()
    """Bounds on an episode's mean sum of a number in info: cost<=25, then :hold (default), :warn, :stop or :rollback."""
    constraint_rate: PositiveFloat = 0.1
    """How fast a held bound's multiplier follows: added an iteration for every unit that the mean is outside."""
    constraint_rollbacks: NonNegativeInt = 3
    """How often a run may go back to its last state inside a bound, the learning rate halved, before it stops."""
    stop_at_return: float | None = None
    """End as soon as the mean return of the last 100 episodes, as wrappers pay it, reaches this."""
    video: bool = False
    """Record one episode of the final policy under RUN/video."""
    quiet: bool = False
    """Show no progress."""

    @property
    def noise_interval(self) -> int:
        """Steps that a draw of noise lasts."""
        return 1 if self.exploration == "independent" else self.noise_hold

    def __post_init__(self) -> None:
        check_fields(self)
        check_device(self.device)
        for text in self.constraint:
            Constraint.parse(text)
        if self.squash == "tanh" and self.exploration == "gsde":
            raise RequestError(
                "exploration is 'gsde' and squash is 'tanh': choose squash 'clip', or exploration 'held'"
            )

    def fields_without_effect(self) -> dict[str, str]:
        """The fields without effect in this combination, and why."""
        constraints = [Constraint.parse(text).response for text in self.constraint]
        reasons = {
            "init_optimizer": "init_from is not set" if self.init_from is None else "",
            "activation": "hidden is ()" if not self.hidden else "",
            "rnn_hidden_size": "rnn_type is 'none'" if self.rnn_type == "none" else "",
            "noise_hold": "exploration is 'independent'" if self.exploration == "independent" else "",
            "step_timeout": f"vectorization is {self.vectorization!r}"
            if self.vectorization != "fault_tolerant"
            else "",
            "evaluate_episodes": "evaluate_every is 0" if not self.evaluate_every else "",
            "constraint_rate": "no constraint is held" if "hold" not in constraints else "",
            "constraint_rollbacks": "no constraint rolls back" if "rollback" not in constraints else "",
        }
        return {name: reason for name, reason in reasons.items() if reason}
