"""What a run does when an update is not finite or leaves the trust region, or memory runs out: go on without it, or stop."""

from __future__ import annotations

import shlex
import sys
import traceback
from typing import Any

import torch

from understudy.run.config import RequestError
from understudy.run.origin import origin
from understudy.run.paths import short
from understudy.run.store import Run

IN_A_ROW = 3
"""Updates left out one after another that end a run."""
GROWS_BACK = 10
"""Updates over which a learning rate that was halved is back where it was."""


class Guard:
    """Told of each update that was left out: notes it in events.jsonl, and ends the run at the third in a row.

    Which were the last is among what the stage keeps, so that a resumed run counts on.

    Args:
        stage: of either world, with `run`, `iteration`, `kept` and `cfg`.
    """

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def __call__(self, error: ArithmeticError) -> None:
        """Note it.

        Args:
            error: a `FloatingPointError` of a loss or gradient, or the `UpdateRejected` of the trust region.

        Raises:
            FloatingPointError: it is the third in a row that is not finite.
        """
        run, number = self.stage.run, self.stage.iteration + 1
        if not isinstance(error, FloatingPointError):
            return self._reject(error, number)
        last = self.stage.kept["skipped"] = [*self.stage.kept.get("skipped", ()), number][-IN_A_ROW:]
        run.event("update_skipped", iteration=number, reason=str(error))
        if last == [*range(number - IN_A_ROW + 1, number + 1)]:
            raise FloatingPointError(
                f"{IN_A_ROW} updates in a row were left out, the last because {error}; {whole(run)}"
            ) from error
        if not self.stage.cfg.quiet:
            print(f"understudy: update {number} is left out: {error}", file=sys.stderr)

    def _reject(self, error: ArithmeticError, number: int) -> None:
        """Lower the learning rate of the coming updates; the first rejection of a run is printed, each is an event."""
        kept, run = self.stage.kept, self.stage.run
        kept["lr_scale"] = kept.get("lr_scale", 1.0) / 2
        kept["rejected"] = kept.get("rejected", 0) + 1
        run.event("update_rejected", iteration=number, reason=str(error), lr_scale=kept["lr_scale"])
        if kept["rejected"] == 1 and not self.stage.cfg.quiet:
            print(
                f"understudy: update {number} is undone: {error}; the learning rate is halved and grows back over "
                f"{GROWS_BACK} updates (further ones are counted in events.jsonl)",
                file=sys.stderr,
            )

    def accept(self) -> None:
        """After an update that stands: let a learning rate that was halved grow back."""
        kept = self.stage.kept
        if kept.get("lr_scale", 1.0) < 1.0:
            kept["lr_scale"] = min(1.0, kept["lr_scale"] * 2 ** (1 / GROWS_BACK))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or the machine: nothing is wrong with what was called."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, run: Run, mend: str) -> RequestError:
    """The refusal of a run that does not fit into memory.

    Args:
        mend: the fields that need less, with their values.
    """
    return RequestError(f"memory ran out ({' '.join(str(error).split())[:120]}): {mend}; {whole(run)}")


def whole(run: Run) -> str:
    """Which checkpoint of a run is the last good one, and how to go on from it."""
    names = run.checkpoints()
    if not names:
        return f"there is no checkpoint under '{short(run.path)}' yet: start again with another out"
    last = run.path / "checkpoints" / names[-1]
    return f"the last good checkpoint is '{short(last)}': `understudy resume {short(run.path)}` goes on from it"


def note_failure(run: Run, error: BaseException) -> None:
    """Write down what ended a run, and add a note to the error: the user's line, the file with the traceback, the way on."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    run.event("failed", error=said, traceback=traceback.format_exc())
    place, text = origin(error), str(error)
    parts = [f"in {place}"] if place and place not in text else []
    parts.append(f"the traceback is in '{short(run.path / 'events.jsonl')}'")
    error.add_note("; ".join([*parts, *([] if whole(run) in text else [way_on(run)])]))


def way_on(run: Run) -> str:
    """The command that goes on with a run that has ended early."""
    names, command = run.checkpoints(), f"`understudy resume {shlex.quote(str(short(run.path)))}`"
    return (
        f"{command} goes on from checkpoint {names[-1]}"
        if names
        else f"there is no checkpoint yet: {command} begins anew"
    )
