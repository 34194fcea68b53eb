"""Step 2, score: a function of the user's, a reward or a reply, in a process of its own, under a time limit.

Both ends are here, for the process runs this very file: the standard library alone, so that it starts in a moment.
A message is a mark, the number of the request, its length and then JSON, over the process's standard input and output.
Answers are checked: a function that finds the pipe and writes to it spoils its own answer, and nothing else.

A function that remembers something between its calls may say it and be told it, so that a run that was interrupted goes on
to the same bytes: `get_state()` and `set_state(state)` beside it in its file, or its own where it is an object. The state is
plain JSON. It is asked for at every checkpoint, and put back before the first batch of a resumed run. A process that is
started again, because it was late or ended, gets the state that was last asked for or put back; without one it begins anew.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

IMPORT_SECONDS = 60.0
"""How long the import of a user's file may take."""
HEAD = struct.Struct("<4sQQ")
MARK = b"\x93und"
LARGEST_ANSWER = 64 * 2**20
"""Bytes of an answer, or of a state."""
LONGEST_ERROR = 2000
"""Characters of what a function says of its failure."""
_loop: Any = None  # runs the coroutines of a process, in a thread of its own, so that clients live from batch to batch


class Fault(Exception):
    """Why rows have no score: `kind` is a key of `Judge.failures`, `message` says it to a person."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class Unreadable(Exception):
    """What came is no message of ours."""


class InProcess:
    """A Python function that is asked where it is, like a `Worker` without a time limit.

    Args:
        says: "scores", which come back as floats, or "replies", as they are.
        module: where its file defines `get_state` and `set_state`, if it is of a file.

    Attributes:
        wants: `needs`, the names it must be given; `takes`, those it can be given, None for any; `has_state`, whether it can
            say what it remembers.
    """

    def __init__(self, function: Callable[..., Any], *, says: str = "scores", module: Any = None) -> None:
        self._function, self._answer = function, answer if says == "scores" else reply
        self._state: Any = next(filter(_has_state, (function, getattr(function, "__self__", None), module)), None)
        self.wants: dict[str, Any] = wants(function) | {"has_state": self._state is not None}

    def ask(self, given: dict[str, list[Any]], share: float = 1.0) -> list[Any]:
        """What the function says to `given`; raises `Fault`."""
        return _spoken(lambda: self._answer(self._function, given))

    def get_state(self) -> Any:
        """What the function remembers, as plain JSON; raises `Fault` where it is none."""
        return _spoken(lambda: _as_json(self._state.get_state()))

    def set_state(self, state: Any) -> None:
        """Let the function remember what `get_state` gave; raises `Fault`."""
        _spoken(lambda: self._state.set_state(state))

    def close(self) -> None:
        """Nothing is open."""


class Worker:
    """`function` of `file`, asked in a process that is ended when it is late and started again when it is next asked."""

    def __init__(self, file: str, function: str, *, timeout: float, says: str = "scores") -> None:
        """Import the function; `Fault` says why that is impossible.

        Args:
            timeout: seconds a batch may take.  says: "scores", which come back as floats, or "replies", as they are.
        """
        self.timeout, self._says, self._number = timeout, says, 0
        self._command = [sys.executable, __file__, str(Path(file).resolve()), function, str(os.getpid()), says]
        self._process: subprocess.Popen[bytes] | None = None
        self._states: list[Any] = []  # the last one that it gave or was given
        self.wants: dict[str, Any] = self._start()

    def ask(self, given: dict[str, list[Any]], share: float = 1.0) -> list[Any]:
        """What the function says to `given`, within `share` of the time limit.

        What is not plain data arrives as its `tolist()`, else as text; tuples arrive as lists. Raises `Fault`.
        """
        return self._asked("ask", given, self._says, share)

    def get_state(self) -> Any:
        """What the function remembers, as plain JSON; raises `Fault` where it is none."""
        self._states = [self._asked("get_state", None, "state")]
        return self._states[0]

    def set_state(self, state: Any) -> None:
        """Let the function remember what `get_state` gave; raises `Fault`."""
        self._states = [state]
        self._asked("set_state", state, "state")

    def close(self) -> None:
        """End the process and what it started."""
        if self._process:
            self._kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what a dead process has not read cannot be flushed
                    pipe.close()  # type: ignore[union-attr]  # both are pipes
            self._process = None

    def _start(self) -> dict[str, Any]:
        self.close()
        # a session of its own: it is ended with what it started, and Ctrl-C is for the run to handle
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            wanted = self._exchange(None, IMPORT_SECONDS, "wants")
            for state in self._states:
                self._exchange({"set_state": state}, self.timeout, "state")
            return wanted
        except Fault:
            self.close()
            raise

    def _asked(self, what: str, given: Any, kind: str, share: float = 1.0) -> Any:
        """The answer to a request, of a process that is started again where it has ended."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._exchange({what: given}, self.timeout * share, kind)

    def _exchange(self, request: Any, limit: float, kind: str) -> Any:
        """Send a request, if there is one, and read the answer; a timer ends the process when `limit` is over."""
        process, late = self._process, threading.Event()
        assert process and process.stdin and process.stdout

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        reply, unreadable = None, ""
        self._number = 0 if request is None else self._number + 1
        try:
            if request is not None:
                write(process.stdin, request, self._number)
            if (message := read(process.stdout, most=LARGEST_ANSWER)) is not None:
                reply = _checked(message, self._number, kind)
        except OSError:
            pass  # it ended while being written to
        except Unreadable as error:
            unreadable = str(error)
        except BaseException:
            self.close()  # an answer nobody waits for must not be taken for the next one
            raise
        finally:
            timer.cancel()
            timer.join()
        if late.is_set() or reply is None:
            self.close()
        if unreadable:
            raise Fault("garbled", f"its process wrote what is no answer ({unreadable}); it is started again")
        if reply is None:
            if late.is_set():
                raise Fault("timeout", f"no answer within {limit:.3g} s")
            raise Fault("raised", f"its process ended with exit code {process.returncode}")
        if "error" in reply:
            raise Fault("raised", reply["error"])
        return reply["answer"]

    def _kill(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def wants(function: Callable[..., Any]) -> dict[str, Any]:
    """`needs`: the names a function must be given; `takes`: those it can be given, None for any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {"needs": [], "takes": None}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {
        "needs": [p.name for p in named if p.default is p.empty],
        "takes": None if any_name else [p.name for p in named],
    }


def answer(function: Callable[..., Any], given: dict[str, list[Any]]) -> list[float | None]:
    """What a function says, as floats: booleans, NumPy scalars and one-element tensors are numbers, text is none."""
    found = _said(function, given)
    if isinstance(
        found, str | bytes | dict | set | frozenset
    ):  # they can be iterated over, and mean no scores in a row
        raise TypeError(f"the scores are a {type(found).__name__}: must be a list with a number or None a row")
    return [None if score is None else _number(score) for score in found]


def reply(function: Callable[..., Any], given: dict[str, list[Any]]) -> list[Any]:
    """What a function says, as it says it."""
    return list(_said(function, given))


def _has_state(owner: Any) -> bool:
    return callable(getattr(owner, "get_state", None)) and callable(getattr(owner, "set_state", None))


def _as_json(state: Any) -> Any:
    """A state as JSON gives it back.

    Raises:
        TypeError: that is something else.  ValueError: it is too large.
    """
    text = json.dumps(state)
    if len(text) > LARGEST_ANSWER - 1024:  # less what is written around it
        raise ValueError(f"get_state gave {len(text)} bytes: must be at most {LARGEST_ANSWER - 1024}")
    if (plain := json.loads(text)) != state:
        raise TypeError("get_state gave what JSON does not give back (tuples, keys that are no text, nan)")
    return plain


def _spoken(call: Callable[[], Any]) -> Any:
    """What a call of the user's gives; `Fault` where it raises."""
    try:
        return call()
    except Exception as error:
        raise Fault("raised", describe(error)) from error


def _said(function: Callable[..., Any], given: dict[str, list[Any]]) -> Any:
    """What a function says; a coroutine is waited for."""
    global _loop
    found = function(**given)
    if not inspect.isawaitable(found):
        return found
    asyncio = importlib.import_module("asyncio")  # few functions need it, and a worker is to start in a moment

    async def awaited() -> Any:
        return await found

    if _loop is None:
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(awaited(), _loop)
    try:
        return future.result()
    finally:
        future.cancel()  # of somebody who interrupts; one that is done does not mind


def describe(error: BaseException) -> str:
    """An exception in one line, with the place it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    what = " ".join("".join(traceback.format_exception_only(error)).split())[:LONGEST_ERROR]
    place = _module("understudy_origin", str(Path(__file__).parents[1] / "run/origin.py")).origin(error)
    return f"{what} ({place})" if place else what


def write(pipe: IO[bytes], message: Any, number: int) -> None:
    text = json.dumps(message, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)).encode()
    pipe.write(HEAD.pack(MARK, number, len(text)) + text)
    pipe.flush()


def read(pipe: IO[bytes], *, most: int | None = None) -> tuple[int, Any] | None:
    """The next message and its number; None where the other end is gone.

    Raises:
        Unreadable: it is none, or longer than `most` bytes.
    """
    head = pipe.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    mark, number, size = HEAD.unpack(head)
    if mark != MARK:
        raise Unreadable(f"it begins with {head[:8]!r}")
    if most is not None and size > most:
        raise Unreadable(f"it has {size} bytes, more than {most}")
    text = pipe.read(size)
    if len(text) < size:
        return None
    try:
        return number, json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable(f"it holds {text[:20]!r}") from None


def _checked(message: tuple[int, Any], number: int, kind: str) -> dict[str, Any]:
    """A worker's message, if it is the answer to this request: {"error": text} or {"answer": what was asked for}."""
    told, reply = message
    if told != number:
        raise Unreadable(f"it answers request {told}, not {number}")
    if not isinstance(reply, dict) or len(reply) != 1:
        raise Unreadable("it is no object with an answer or an error")
    if isinstance(error := reply.get("error"), str):
        return {"error": error[:LONGEST_ERROR]}
    found = reply.get("answer")
    good = {
        "wants": lambda: (
            isinstance(found, dict)
            and _are_names(found.get("needs"))
            and _are_names(found.get("takes") or [])
            and isinstance(found.get("has_state"), bool)
        ),
        "state": lambda: True,
        "scores": lambda: isinstance(found, list) and all(x is None or type(x) is float for x in found),
        "replies": lambda: isinstance(found, list),
    }
    if not good[kind]():
        raise Unreadable(f"it has no {kind}")
    return reply


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def serve(file: str, name: str, parent: str, says: str) -> None:
    """The other end: import the function, say what it wants, and answer until nobody asks."""
    children = _module("understudy_children", str(Path(__file__).parents[1] / "run/children.py"))
    children.end_with_parent(int(parent))
    children.end_group_with_this()
    own = os.getpid()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to standard error
    sys.argv, sys.path[0] = [file], str(Path(file).parent)

    def say(message: dict[str, Any], number: int) -> None:
        if os.getpid() != own:  # a child that the function forked, and that came back from it: its parent answers
            os._exit(0)
        write(replies, message, number)

    try:
        function = _load(file, name, says)
        say({"answer": function.wants}, 0)
    except BaseException as error:  # SystemExit too
        return say({"error": describe(error)}, 0)
    while (request := read(requests)) is not None:
        number, asked = request
        [(what, given)] = asked.items()
        try:
            found = {"answer": function.get_state() if what == "get_state" else getattr(function, what)(given)}
        except BaseException as error:
            found = {"error": error.message if isinstance(error, Fault) else describe(error)}
        say(found, number)


def _load(file: str, name: str, says: str) -> InProcess:
    module = _module("understudy_reward", file)
    if not callable(function := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise LookupError(f"it has no function {name!r}, only {', '.join(known) or 'none at all'}")
    return InProcess(function, says=says, module=module)


def _module(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _number(score: Any) -> float:
    if isinstance(score, str | bytes):
        raise TypeError(f"a score is the text {score!r}: must be a number or None")
    return float(score)


if __name__ == "__main__":
    serve(*sys.argv[1:])
