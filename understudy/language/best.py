"""The best policy of a run so far, by what its evaluations measure, in RUN/best: a policy's directory like any other."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

from understudy.language.training import TrainingRun
from understudy.run.store import write_json

FOLDER = "best"


def save_if_best(run: TrainingRun, evaluation: dict[str, Any], metric: str) -> None:
    """Save the policy where its evaluation is the best yet; a checkpoint holds how good that was.

    The directory is written aside and put in place whole: a run that is killed in here evaluates again when it goes on, and
    writes the same.

    Args:
        evaluation: the evaluation.  by: which of its numbers counts, the higher the better.

    Raises:
        OSError: the disk refuses.
    """
    if not evaluation[metric] > run.recipe_state.get("best", -math.inf):  # nan is no better
        return
    folder = run.run.path / FOLDER
    temporary, previous = folder.with_name(f"{FOLDER}.part"), folder.with_name(f"{FOLDER}.old")
    for left_over in (temporary, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    run.model.save(temporary)
    write_json(
        temporary / "best.json", {"iteration": run.iteration + 1, "steps": run.steps, metric: evaluation[metric]}
    )
    if folder.exists():
        os.replace(folder, previous)
    os.replace(temporary, folder)
    shutil.rmtree(previous, ignore_errors=True)
    run.recipe_state["best"] = evaluation[metric]
