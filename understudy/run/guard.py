"""What a run does when an update is not finite or leaves the trust region, or memory runs out: go on without it, or stop."""

from __future__ import annotations

import inspect
import shlex
import sys
import traceback
from typing import Any

import torch

from understudy.run.config import RequestError
from understudy.run.origin import user_error_location
from understudy.run.paths import short_path
from understudy.run.store import Run

MAX_CONSECUTIVE_SKIPS = 3
"""Updates left out one after another that end a run."""
RECOVERY_UPDATES = 10
"""Updates over which a learning rate that was halved is back where it was."""


class Guard:
    """Told of each update that was left out: notes it in events.jsonl, and ends the run at the third in a row.

    Which were the last is among what the stage keeps, so that a resumed run counts on.

    Args:
        training_run: of either world, with `run`, `iteration`, `recipe_state` and `cfg`.
    """

    def __init__(self, training_run: Any) -> None:
        self.training_run = training_run

    def __call__(self, error: ArithmeticError) -> None:
        """Note it.

        Args:
            error: a `FloatingPointError` of a loss or gradient, or the `UpdateRejected` of the trust region.

        Raises:
            FloatingPointError: it is the third in a row that is not finite.
        """
        run, iteration = self.training_run.run, self.training_run.iteration + 1
        if not isinstance(error, FloatingPointError):
            return self._reject(error, iteration)
        recent_skips = self.training_run.recipe_state["skipped"] = [
            *self.training_run.recipe_state.get("skipped", ()),
            iteration,
        ][-MAX_CONSECUTIVE_SKIPS:]
        run.event("update_skipped", iteration=iteration, reason=str(error))
        if recent_skips == [*range(iteration - MAX_CONSECUTIVE_SKIPS + 1, iteration + 1)]:
            raise FloatingPointError(
                f"{MAX_CONSECUTIVE_SKIPS} updates in a row were left out, the last because {error}; "
                f"{describe_last_checkpoint(run)}"
            ) from error
        if not self.training_run.cfg.quiet:
            print(f"understudy: update {iteration} is left out: {error}", file=sys.stderr)

    def _reject(self, error: ArithmeticError, iteration: int) -> None:
        """Lower the learning rate of the coming updates; the first rejection of a run is printed, each is an event."""
        recipe_state, run = self.training_run.recipe_state, self.training_run.run
        recipe_state["lr_scale"] = recipe_state.get("lr_scale", 1.0) / 2
        recipe_state["rejected"] = recipe_state.get("rejected", 0) + 1
        run.event("update_rejected", iteration=iteration, reason=str(error), lr_scale=recipe_state["lr_scale"])
        if recipe_state["rejected"] == 1 and not self.training_run.cfg.quiet:
            print(
                f"understudy: update {iteration} is undone: {error}; the learning rate is halved and grows back over "
                f"{RECOVERY_UPDATES} updates (further ones are counted in events.jsonl)",
                file=sys.stderr,
            )

    def accept(self) -> None:
        """After an update that stands: let a learning rate that was halved grow back."""
        recipe_state = self.training_run.recipe_state
        if recipe_state.get("lr_scale", 1.0) < 1.0:
            recipe_state["lr_scale"] = min(1.0, recipe_state["lr_scale"] * 2 ** (1 / RECOVERY_UPDATES))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or the machine: nothing is wrong with what was called."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory_error(error: BaseException, run: Run, fix: str) -> RequestError:
    """The refusal of a run that does not fit into memory.

    Args:
        fix: the fields that need less, with their values.
    """
    details = " ".join(str(error).split())[:120] or type(error).__name__
    return RequestError(f"memory ran out ({details}): {fix}; {describe_last_checkpoint(run)}")


class UserCodeError(Exception):
    """What an environment, a network or a function of the user's did that says nothing by itself, in a sentence."""


def was_left(error: BaseException) -> bool:
    """Whether a run's generator was closed, and not GeneratorExit raised by what an iteration calls."""
    if not isinstance(error, GeneratorExit) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def explain_failure(error: BaseException, run: Run, fix: str) -> BaseException:
    """What a run that an error has ended ends with: the error itself, or one that says more, with the error as its cause.

    Args:
        fix: the fields that need less memory, with their values.
    """
    raised = (
        error.__cause__ if isinstance(error.__cause__, StopIteration) else error
    )  # Python's own: "generator raised"
    if isinstance(raised, StopIteration | GeneratorExit):
        name = type(raised).__name__
        failure = UserCodeError(f"{name} was raised within an iteration: catch it there, or raise another error")
    elif ran_out_of_memory(error):
        failure = out_of_memory_error(error, run, fix)
    else:
        return error
    failure.__cause__ = error
    return failure


def describe_last_checkpoint(run: Run) -> str:
    """Which checkpoint of a run is the last good one, and how to go on from it."""
    names = run.list_checkpoints()
    if not names:
        return f"there is no checkpoint under '{short_path(run.path)}' yet: start again with another output_dir"
    checkpoint_path = run.path / "checkpoints" / names[-1]
    return (
        f"the last good checkpoint is '{short_path(checkpoint_path)}': `understudy resume {short_path(run.path)}` "
        "goes on from it"
    )


def note_failure(run: Run, error: BaseException) -> None:
    """Write down what ended a run, and add a note to the error: the user's line, the file with the traceback, the way on."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    run.event("failed", error=said, traceback=traceback.format_exc())
    place, text = user_error_location(error), str(error)
    parts = [f"in {place}"] if place and place not in text else []
    parts.append(f"the traceback is in '{short_path(run.path / 'events.jsonl')}'")
    error.add_note("; ".join([*parts, *([] if describe_last_checkpoint(run) in text else [resume_command(run)])]))


def resume_command(run: Run) -> str:
    """The command that goes on with a run that has ended early."""
    names, command = run.list_checkpoints(), f"`understudy resume {shlex.quote(str(short_path(run.path)))}`"
    return (
        f"{command} goes on from checkpoint {names[-1]}"
        if names
        else f"there is no checkpoint yet: {command} begins anew"
    )
