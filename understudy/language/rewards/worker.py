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

IMPORT_TIMEOUT_SECONDS = 60.0
"""How long the import of a user's file may take."""
HEADER = struct.Struct("<4sQQ")
MAGIC = b"\x93und"
MAX_ANSWER_BYTES = 64 * 2**20
"""Bytes of an answer, or of a state."""
MAX_ERROR_CHARACTERS = 2000
"""Characters of what a function says of its failure."""
_event_loop: Any = (
    None  # runs the coroutines of a process, in a thread of its own, so that clients live from batch to batch
)


class FunctionFault(Exception):
    """Why rows have no score: `kind` is a key of `Judge.failures`, `message` says it to a person."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class InvalidMessageError(Exception):
    """What came is no message of ours."""


def _copy_plain(value: Any) -> Any:
    """Lists and dicts anew, whatever else they hold as it is."""
    if isinstance(value, list):
        return [_copy_plain(x) if isinstance(x, list | dict) else x for x in value]
    if isinstance(value, dict):
        return {name: _copy_plain(x) for name, x in value.items()}
    return value


class InProcess:
    """A Python function that is asked where it is, like a `Worker` without a time limit.

    Args:
        says: "scores", which come back as floats, or "replies", as they are.
        module: where its file defines `get_state` and `set_state`, if it is of a file.

    Attributes:
        parameters: `needs`, the names it must be given; `takes`, those it can be given, None for any; `has_state`,
            whether it can say what it remembers.
    """

    def __init__(self, function: Callable[..., Any], *, output_kind: str = "scores", module: Any = None) -> None:
        self._function, self._answer = (
            function,
            call_reward_function if output_kind == "scores" else call_reply_function,
        )
        self._state: Any = next(filter(_has_state, (function, getattr(function, "__self__", None), module)), None)
        self.parameters: dict[str, Any] = describe_parameters(function) | {"has_state": self._state is not None}

    def call(self, columns: dict[str, list[Any]], timeout_fraction: float = 1.0) -> list[Any]:
        """What the function says to `columns`; raises `FunctionFault`."""
        own = {name: _copy_plain(column) for name, column in columns.items()}  # what it changes is its own
        return _call_user_code(lambda: self._answer(self._function, own))

    def get_state(self) -> Any:
        """What the function remembers, as plain JSON; raises `FunctionFault` where it is none."""
        return _call_user_code(lambda: _as_json(self._state.get_state()))

    def set_state(self, state: Any) -> None:
        """Let the function remember what `get_state` gave; raises `FunctionFault`."""
        _call_user_code(lambda: self._state.set_state(state))

    def close(self) -> None:
        """Nothing is open."""


class Worker:
    """`function` of `file`, asked in a process that is ended when it is late and started again when it is next asked."""

    def __init__(self, file: str, function: str, *, timeout: float, output_kind: str = "scores") -> None:
        """Import the function; `Fault` says why that is impossible.

        Args:
            timeout: seconds a batch may take.  says: "scores", which come back as floats, or "replies", as they are.
        """
        self.timeout, self._output_kind, self._request_number = timeout, output_kind, 0
        self._command = [sys.executable, __file__, str(Path(file).resolve()), function, str(os.getpid()), output_kind]
        self._process: subprocess.Popen[bytes] | None = None
        self._states: list[Any] = []  # the last one that it gave or was given
        self.parameters: dict[str, Any] = self._start()

    def call(self, columns: dict[str, list[Any]], timeout_fraction: float = 1.0) -> list[Any]:
        """What the function says to `columns`, within `timeout_fraction` of the time limit.

        What is not plain data arrives as its `tolist()`, else as text; tuples arrive as lists. Raises `Fault`.
        """
        return self._request("call", columns, self._output_kind, timeout_fraction)

    def get_state(self) -> Any:
        """What the function remembers, as plain JSON; raises `FunctionFault` where it is none."""
        self._states = [self._request("get_state", None, "state")]
        return self._states[0]

    def set_state(self, state: Any) -> None:
        """Let the function remember what `get_state` gave; raises `FunctionFault`."""
        self._states = [state]
        self._request("set_state", state, "state")

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
            wanted = self._exchange(None, IMPORT_TIMEOUT_SECONDS, "wants")
            for state in self._states:
                self._exchange({"set_state": state}, self.timeout, "state")
            return wanted
        except FunctionFault:
            self.close()
            raise

    def _request(self, request: str, content: Any, kind: str, timeout_fraction: float = 1.0) -> Any:
        """The answer to a request, of a process that is started again where it has ended."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._exchange({request: content}, self.timeout * timeout_fraction, kind)

    def _exchange(self, request: Any, timeout: float, kind: str) -> Any:
        """Send a request, if there is one, and read the answer; a timer ends the process when `timeout` is over."""
        process, has_timed_out = self._process, threading.Event()
        assert process and process.stdin and process.stdout

        def end_process() -> None:
            has_timed_out.set()
            self._kill()

        timer = threading.Timer(timeout, end_process)
        timer.daemon = True
        timer.start()
        response, invalid_message = None, ""
        self._request_number = 0 if request is None else self._request_number + 1
        try:
            if request is not None:
                write_message(process.stdin, request, self._request_number)
            if (message := read_message(process.stdout, max_bytes=MAX_ANSWER_BYTES)) is not None:
                response = _validate_response(message, self._request_number, kind)
        except OSError:
            pass  # it ended while being written to
        except InvalidMessageError as error:
            invalid_message = str(error)
        except BaseException:
            self.close()  # an answer nobody waits for must not be taken for the next one
            raise
        finally:
            timer.cancel()
            timer.join()
        if has_timed_out.is_set() or response is None:
            self.close()
        if invalid_message:
            raise FunctionFault(
                "garbled", f"its process wrote what is no answer ({invalid_message}); it is started again"
            )
        if response is None:
            if has_timed_out.is_set():
                raise FunctionFault("timeout", f"no answer within {timeout:.3g} s")
            raise FunctionFault("raised", f"its process ended with exit code {process.returncode}")
        if "error" in response:
            raise FunctionFault("raised", response["error"])
        return response["answer"]

    def _kill(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def describe_parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """`needs`: the names a function must be given; `takes`: those it can be given, None for any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {"needs": [], "takes": None}
    named_parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    accepts_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {
        "needs": [p.name for p in named_parameters if p.default is p.empty],
        "takes": None if accepts_any_name else [p.name for p in named_parameters],
    }


def call_reward_function(function: Callable[..., Any], columns: dict[str, list[Any]]) -> list[float | None]:
    """What a function says, as floats: booleans, NumPy scalars and one-element tensors are numbers, text is none."""
    scores = _call_function(function, columns)
    if isinstance(
        scores, str | bytes | dict | set | frozenset
    ):  # they can be iterated over, and mean no scores in a row
        raise TypeError(f"the scores are a {type(scores).__name__}: must be a list with a number or None a row")
    return [None if score is None else _to_float(score) for score in scores]


def call_reply_function(function: Callable[..., Any], columns: dict[str, list[Any]]) -> list[Any]:
    """What a function says, as it says it."""
    return list(_call_function(function, columns))


def _has_state(owner: Any) -> bool:
    return callable(getattr(owner, "get_state", None)) and callable(getattr(owner, "set_state", None))


def _as_json(state: Any) -> Any:
    """A state as JSON gives it back.

    Raises:
        TypeError: that is something else.  ValueError: it is too large.
    """
    text = json.dumps(state)
    if len(text) > MAX_ANSWER_BYTES - 1024:  # less what is written around it
        raise ValueError(f"get_state gave {len(text)} bytes: must be at most {MAX_ANSWER_BYTES - 1024}")
    if (plain := json.loads(text)) != state:
        raise TypeError("get_state gave what JSON does not give back (tuples, keys that are no text, nan)")
    return plain


def _call_user_code(call: Callable[[], Any]) -> Any:
    """What a call of the user's gives; `Fault` where it raises."""
    try:
        return call()
    except Exception as error:
        raise FunctionFault("raised", describe_error(error)) from error


def _call_function(function: Callable[..., Any], columns: dict[str, list[Any]]) -> Any:
    """What a function says; a coroutine is waited for."""
    global _event_loop
    result = function(**columns)
    if not inspect.isawaitable(result):
        return result
    asyncio = importlib.import_module("asyncio")  # few functions need it, and a worker is to start in a moment

    async def awaited() -> Any:
        return await result

    if _event_loop is None:
        _event_loop = asyncio.new_event_loop()
        threading.Thread(target=_event_loop.run_forever, daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(awaited(), _event_loop)
    try:
        return future.result()
    finally:
        future.cancel()  # of somebody who interrupts; one that is done does not mind


def describe_error(error: BaseException) -> str:
    """An exception in one line, with the place it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    description = " ".join("".join(traceback.format_exception_only(error)).split())[:MAX_ERROR_CHARACTERS]
    place = _import_file("understudy_origin", str(Path(__file__).parents[2] / "run/origin.py")).user_error_location(
        error
    )
    return f"{description} ({place})" if place else description


def write_message(pipe: IO[bytes], message: Any, number: int) -> None:
    payload = json.dumps(message, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)).encode()
    pipe.write(HEADER.pack(MAGIC, number, len(payload)) + payload)
    pipe.flush()


def read_message(pipe: IO[bytes], *, max_bytes: int | None = None) -> tuple[int, Any] | None:
    """The next message and its number; None where the other end is gone.

    Raises:
        Unreadable: it is none, or longer than `max_bytes` bytes.
    """
    header = pipe.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    magic, number, size = HEADER.unpack(header)
    if magic != MAGIC:
        raise InvalidMessageError(f"it begins with {header[:8]!r}")
    if max_bytes is not None and size > max_bytes:
        raise InvalidMessageError(f"it has {size} bytes, more than {max_bytes}")
    payload = pipe.read(size)
    if len(payload) < size:
        return None
    try:
        return number, json.loads(payload)
    except (ValueError, RecursionError):
        raise InvalidMessageError(f"it holds {payload[:20]!r}") from None


def _validate_response(message: tuple[int, Any], number: int, kind: str) -> dict[str, Any]:
    """A worker's message, if it is the answer to this request: {"error": text} or {"answer": what was asked for}."""
    response_number, response = message
    if response_number != number:
        raise InvalidMessageError(f"it answers request {response_number}, not {number}")
    if not isinstance(response, dict) or len(response) != 1:
        raise InvalidMessageError("it is no object with an answer or an error")
    if isinstance(error := response.get("error"), str):
        return {"error": error[:MAX_ERROR_CHARACTERS]}
    content = response.get("answer")
    validators = {
        "wants": lambda: (
            isinstance(content, dict)
            and _is_name_list(content.get("needs"))
            and _is_name_list(content.get("takes") or [])
            and isinstance(content.get("has_state"), bool)
        ),
        "state": lambda: True,
        "scores": lambda: isinstance(content, list) and all(x is None or type(x) is float for x in content),
        "replies": lambda: isinstance(content, list),
    }
    if not validators[kind]():
        raise InvalidMessageError(f"it has no {kind}")
    return response


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def serve(file: str, name: str, parent: str, output_kind: str) -> None:
    """The other end: import the function, say what it wants, and answer until nobody asks."""
    children = _import_file("understudy_children", str(Path(__file__).parents[2] / "run/children.py"))
    children.end_with_parent(int(parent))
    children.end_group_with_process()
    worker_pid = os.getpid()
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to standard error
    sys.argv, sys.path[0] = [file], str(Path(file).parent)

    def send(message: dict[str, Any], number: int) -> None:
        if (
            os.getpid() != worker_pid
        ):  # a child that the function forked, and that came back from it: its parent answers
            os._exit(0)
        write_message(responses, message, number)

    try:
        function = _load_function(file, name, output_kind)
        send({"answer": function.parameters}, 0)
    except BaseException as error:  # SystemExit too
        return send({"error": describe_error(error)}, 0)
    while (request := read_message(requests)) is not None:
        number, asked = request
        [(what, columns)] = asked.items()
        try:
            response = {"answer": function.get_state() if what == "get_state" else getattr(function, what)(columns)}
        except BaseException as error:
            response = {"error": error.message if isinstance(error, FunctionFault) else describe_error(error)}
        send(response, number)


def _load_function(file: str, name: str, output_kind: str) -> InProcess:
    module = _import_file("understudy_reward", file)
    if not callable(function := getattr(module, name, None)):
        function_names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise LookupError(f"it has no function {name!r}, only {', '.join(function_names) or 'none at all'}")
    return InProcess(function, output_kind=output_kind, module=module)


def _import_file(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _to_float(score: Any) -> float:
    if isinstance(score, str | bytes):
        raise TypeError(f"a score is the text {score!r}: must be a number or None")
    return float(score)


if __name__ == "__main__":
    serve(*sys.argv[1:])
