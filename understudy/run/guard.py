"""What a run does when an update is not finite, or memory runs out: go on without it, or stop and say how to go on."""

from __future__ import annotations

import sys
from typing import Any

from understudy.run.config import RequestError
from understudy.run.store import Run

IN_A_ROW = 3
"""Updates left out one after another that end a run."""


class Guard:
    """Told of each update that was left out: notes it in events.jsonl, and ends the run at the third in a row.

    Which were the last is among what the stage keeps, so that a resumed run counts on.

    Args:
        stage: of either world, with `run`, `iteration`, `kept` and `cfg`.
    """

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def __call__(self, error: FloatingPointError) -> None:
        """Note it.

        Raises:
            FloatingPointError: it is the third in a row.
        """
        run, number = self.stage.run, self.stage.iteration + 1
        last = self.stage.kept["skipped"] = [*self.stage.kept.get("skipped", ()), number][-IN_A_ROW:]
        run.event("update_skipped", iteration=number, reason=str(error))
        if last == [*range(number - IN_A_ROW + 1, number + 1)]:
            raise FloatingPointError(
                f"{IN_A_ROW} updates in a row were left out, the last because {error}; {whole(run)}"
            ) from error
        if not self.stage.cfg.quiet:
            print(f"understudy: update {number} is left out: {error}", file=sys.stderr)


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
        return f"there is no checkpoint under '{run.path}' yet: start again with another out"
    last = run.path / "checkpoints" / names[-1]
    return f"the last good checkpoint is '{last}': `understudy resume {run.path}` goes on from it"
