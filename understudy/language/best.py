"""The best policy of a run so far, by what its evaluations measure, in RUN/best: a policy's directory like any other."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

from understudy.language.stage import Stage
from understudy.run.store import write_json

FOLDER = "best"


def keep_best(run: Stage, found: dict[str, Any], by: str) -> None:
    """Save the policy where its evaluation is the best yet; a checkpoint holds how good that was.

    The directory is written aside and put in place whole: a run that is killed in here evaluates again when it goes on, and
    writes the same.

    Args:
        found: the evaluation.  by: which of its numbers counts, the higher the better.

    Raises:
        OSError: the disk refuses.
    """
    if not found[by] > run.kept.get("best", -math.inf):  # nan is no better
        return
    folder = run.run.path / FOLDER
    aside, old = folder.with_name(f"{FOLDER}.part"), folder.with_name(f"{FOLDER}.old")
    for left_over in (aside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    run.model.save(aside)
    write_json(aside / "best.json", {"iteration": run.iteration + 1, "steps": run.steps, by: found[by]})
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
    run.kept["best"] = found[by]
