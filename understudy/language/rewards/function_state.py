"""What functions of the user's remember between their calls: saved with checkpoints, and put back when a run goes on.

Which functions say it, and how, is described in `worker`.
"""

from __future__ import annotations

import sys
from typing import Any

from understudy.language.rewards.worker import FunctionFault
from understudy.run.config import RequestError


def unsaved_state_warnings(cast: Any) -> list[str]:
    """What resume does not bring back, a sentence; none where every function says what it remembers."""
    specs = dict.fromkeys(str(one.spec) for one in cast.functions.values() if not one.asked.parameters["has_state"])
    what = "what a function remembers between its calls is saved only where it has get_state and set_state"
    return [f"resume is exact only if {', '.join(specs)} remembers nothing: {what}"] if specs else []


def get_states(cast: Any) -> dict[str, Any]:
    """What functions remember, by their names, as plain JSON.

    Raises:
        RequestError: one that has `get_state` gives no such thing.
    """
    found = {}
    for name, function in cast.functions.items():
        if function.asked.parameters["has_state"]:
            try:
                found[name] = function.asked.get_state()
            except FunctionFault as fault:
                raise RequestError(
                    f"{name.split()[0]} is '{function.spec}', whose state cannot be saved ({fault.message}): let get_state "
                    "give plain JSON, or take it out"
                ) from fault
    return found


def set_states(cast: Any, states: dict[str, Any]) -> None:
    """Let functions remember what `get_states` gave.

    Raises:
        RequestError: one does not take its state.
    """
    for name, state in states.items():
        function = cast.functions[name]
        try:
            function.asked.set_state(state)
        except FunctionFault as fault:
            raise RequestError(
                f"{name.split()[0]} is '{function.spec}', whose set_state does not take what its get_state gave "
                f"({fault.message}): mend it"
            ) from fault


def save(cast: Any) -> dict[str, Any]:
    """The states for a checkpoint. Where one cannot be had there are none, which is said, and the run goes on."""
    try:
        return get_states(cast)
    except RequestError as error:
        cast.run.run.event("state_not_saved", iteration=cast.run.iteration, text=str(error))
        print(f"understudy: {error}; the run goes on, and a checkpoint is without it", file=sys.stderr)
        return {}


def restore(cast: Any, states: dict[str, Any]) -> None:
    """Put back the states of the checkpoint that a run goes on from; say which functions begin anew."""
    having = {name for name, function in cast.functions.items() if function.asked.parameters["has_state"]}
    set_states(cast, {name: state for name, state in states.items() if name in having})
    if missing := sorted(having ^ states.keys()):
        cast.run.run.expected.clear()
        cast.run.run.event("resume_inexact", iteration=cast.run.iteration, functions=missing)
        print(
            f"understudy: the checkpoint and the code do not both have a state of {', '.join(missing)}: it begins anew, and "
            "this run is no longer the one that was interrupted",
            file=sys.stderr,
        )
