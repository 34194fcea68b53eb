"""Where in a user's own code an error came from. Standard library only: the workers of functions load this file alone."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

_NOT_THE_USERS = (str(Path(__file__).parents[1]) + os.sep, str(Path(os.__file__).parent) + os.sep, "<frozen ")


def origin(error: BaseException | None) -> str:
    """The innermost line of an error, or of its cause, that is the user's, as "my_env.py, line 12".

    Not of Python, of an installed package, or of this one; "" where there is none.
    """
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        if frames:
            return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        error = error.__cause__
    return ""


def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_THE_USERS) and not {"site-packages", "dist-packages"} & {*Path(file).parts}
