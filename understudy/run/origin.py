"""Where a user's own code raised an error, and what a file of it defines; nothing is imported to find out.

Standard library only: the workers of functions load this file alone.
"""

from __future__ import annotations

import ast
import os
import traceback
from pathlib import Path

_NOT_USER_CODE = (str(Path(__file__).parents[1]) + os.sep, str(Path(os.__file__).parent) + os.sep, "<frozen ")


def user_error_location(error: BaseException | None) -> str:
    """The innermost line of an error, or of its cause, that is the user's, as "my_env.py, line 12".

    Not of Python, of an installed package, or of this one; "" where there is none.
    """
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_code(frame.filename)]
        if frames:
            return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        error = error.__cause__
    return ""


def listed(file: str, kind: type[ast.ClassDef | ast.FunctionDef]) -> str:
    """The names of a kind, `ast.ClassDef` or `ast.FunctionDef`, that a file defines, as "; it has A, B"; "" for none."""
    try:
        body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""
    names = [node.name for node in body if isinstance(node, kind) and not node.name.startswith("_")]
    return f"; it has {', '.join(names[:8])}" if names else ""


def _is_user_code(file: str) -> bool:
    return not file.startswith(_NOT_USER_CODE) and not {"site-packages", "dist-packages"} & {*Path(file).parts}
