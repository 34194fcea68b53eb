"""A run's directory: config.json, metrics.jsonl, events.jsonl, checkpoints, policy. JSON and safetensors, no pickle."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from understudy.run import checkpoint, lock, metrics
from understudy.run.config import RequestError, is_deep
from understudy.run.paths import absolute_path, short_path
from understudy.run.redact import printable, redact
from understudy.run.spikes import find_spikes

_IMPORT_TIME = time.monotonic()
SCHEMA = 2
"""Of config.json, policy.json, understudy.json and lineage.json. Those of 1 and before had other names of fields."""
MAX_METADATA_BYTES = 8 * 2**20  # bytes of such a file
RUN_FILES = (metrics.FILE, "events.jsonl", "evaluation.json")
RUN_FOLDERS = ("adapter", "best", "checkpoints", "policy", "reward_model", "samples", "video")  # what we write into
SHOWN = ("episode_return_mean", "score_mean", "loss")  # metrics that a run's repr names
SPIKE_CHECK_INTERVAL = 1000  # lines, at the latest, in which spikes are looked for
MAX_FAILED_CHECKPOINTS = 3  # checkpoints in a row that the disk may refuse before the run ends


class Run:
    """One run on disk, and what it has come to so far.

    Attributes:
        path: its directory, absolute.  metrics: a sequence of one dict an iteration, as in metrics.jsonl.
        solved_at: {"steps", "seconds"} of the first time the last-100 mean reached the env's threshold; or None, as in a run
            with a wrapper that may change rewards: the threshold is one of the environment's own.
        startup_seconds: from process start to the first step.
        stop_reason: why it ended before its steps were done, where a constraint ended it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = metrics.Metrics(path)
        self.solved_at: dict[str, float] | None = None
        self.startup_seconds = 0.0
        self.stop_reason: str | None = None
        self.pending_checkpoint: tuple[str, Future[None]] | None = None  # the checkpoint that is on its way to the disk
        self.num_failed_checkpoints = 0  # checkpoints in a row that could not be written
        self.num_checked_lines = 0  # lines of metrics in which spikes were looked for
        self.ended_worse: str | None = None  # why the run ended worse than it began, where it did
        self.began = 0  # the iteration that it goes on from
        self.has_reported_write_failure = False  # metrics or events that could not be written: said once
        self.changed: list[str] = []  # what is not as it was before the interruption, so that metrics are not compared
        self.expected: dict[int, dict[str, Any]] = {}  # lines from before the interruption, by their iterations
        self.lock_handle = lock.acquire(path)

    def __repr__(self) -> str:
        last = self.metrics[-1] if len(self.metrics) else {}
        parts = [recipe_of(self.path) or "no recipe", f"{last.get('steps', 0):,} steps"]
        parts += [f"{name} {x:.4g}" for name in SHOWN if (x := last.get(name)) is not None]
        return f"<Run '{short_path(self.path)}': {', '.join(parts)}>"

    @classmethod
    def create(
        cls,
        output_dir: str | None,
        name: str,
        config: dict[str, Any],
        lineage: dict[str, Any] | None = None,
        base_dir: Path | None = None,
        files: dict[str, Callable[[Path], None]] | None = None,
    ) -> Run:
        """Make the directory and write lineage.json and config.json. An existing run is never written over.

        config.json comes last and makes the directory a run: killed before that, it is none, and may be used again. Where
        the disk refuses one of them, nothing that was made here stays.

        Args:
            output_dir: None for the next free number under runs/.
            base_dir: what a relative `output_dir` is relative to, by default the working directory.
            files: what else the run begins with: each file's name, and what writes it.

        Raises:
            RequestError: `output_dir` holds a run already, or parts of one, or is open elsewhere, or cannot be made.
        """
        path = absolute_path((base_dir or Path.cwd()) / (output_dir or "runs"))
        made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]  # innermost first
        try:
            if not output_dir:
                path = _create_free_directory(path, name)
                made.insert(0, path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
        except OSError as error:
            _remove_folders(made)
            raise RequestError(
                f"output_dir is '{short_path(path)}', which cannot be made ({error.strerror}): choose another"
            ) from error
        written: list[str] = []
        try:
            refuse_used_directory(path)
            for file, write in (files or {}).items():
                written.append(file)
                write(path / file)
            for file, data in (("lineage.json", lineage), ("config.json", {"schema": SCHEMA} | config)):
                if data is not None:
                    written.append(file)
                    write_json(path / file, data)
        except BaseException as error:
            run.close()
            if isinstance(error, OSError):
                for file in [*written, *(["lock"] if path in made else [])]:
                    with suppress(OSError):
                        (path / file).unlink(missing_ok=True)
                _remove_folders(made)
                raise RequestError(
                    f"output_dir is '{short_path(path)}', which cannot be written to ({error.strerror}): choose another"
                ) from error
            raise
        return run

    @classmethod
    def reopen(cls, path: Path, name: str | None = None) -> tuple[Run, Path | None]:
        """A run to go on with, and its newest whole checkpoint; or None where it has none and begins anew.

        Damaged checkpoints move to checkpoints/quarantine and are named in events.jsonl.

        Args:
            name: this checkpoint and no other.

        Raises:
            RequestError: another process has the run open; the checkpoint named is missing or damaged; all are damaged.
        """
        path = absolute_path(path)
        read_config(path)
        run = cls(path)
        folder = path / "checkpoints"
        try:
            if name is not None:
                checkpoint_path = _find_named(folder, name)
            else:
                checkpoint_path, errors = checkpoint.find_newest(folder)
                for reason in errors:
                    run.event("checkpoint_damaged", reason=reason)
                    print(f"understudy: {reason}; it is in {folder / 'quarantine'}", file=sys.stderr)
                if errors and checkpoint_path is None:
                    raise RequestError(
                        f"run is '{path}', whose checkpoints are all damaged ({errors[0]}): they are in "
                        f"'{folder / 'quarantine'}'; start again with another output_dir"
                    )
        except RequestError:
            run.close()
            raise
        return run, checkpoint_path

    def rewind(self, iteration: int) -> None:
        """Drop the metrics of iterations after this one: they come again, and are compared with what they were.

        Damaged lines are noted, the file is copied.
        """
        self.metrics, damaged, copy, dropped = metrics.drop_metrics_after(self.path, iteration)
        self.began = iteration
        self.expected = {} if self.changed else {line["iteration"]: line for line in dropped}
        self.num_checked_lines = len(self.metrics)
        if damaged:
            self.event("metrics_damaged", lines=damaged[:1000], count=len(damaged), copy=str(copy))
            print(
                f"understudy: {len(damaged)} lines of '{self.path / metrics.FILE}' cannot be read (the first is number "
                f"{damaged[0]}) and are left out; the file as it was is '{copy}'",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Let another process have the run, when its last checkpoint is whole."""
        with suppress(OSError):  # said and noted; `settle` raises it to a run that can still fail
            self.wait_for_checkpoint()
        if self.lock_handle is not None:
            lock.release(self.lock_handle)
            self.lock_handle = None

    def log(self, line: dict[str, Any]) -> None:
        """Append an iteration to metrics.jsonl; on disk when this returns, but for the system's own cache."""
        self.metrics.append(line)
        self._append_line(metrics.FILE, line)
        if self.expected or len(self.metrics) - self.num_checked_lines >= SPIKE_CHECK_INTERVAL:
            self._check_line(line)

    def event(self, kind: str, **fields: Any) -> None:
        """Append a finding or happening to events.jsonl."""
        self._append_line("events.jsonl", sanitize({"kind": kind, "time": time.time(), **fields}))

    def checkpoint(
        self, name: str, save: Callable[[Path], None], optimizer: torch.optim.Optimizer, state: Any, *, keep: int
    ) -> None:
        """Write model, optimizer and state under checkpoints/NAME, whole or not at all; the newest `keep` stay.

        The files are written when this returns; they are synced and get their name in a thread of their own, until
        `settle`. Spikes since the last one are noted in events.jsonl. Parameters that are not finite are not written down. A
        disk that refuses is said and noted, and the run goes on; after three refusals in a row it ends.

        Args:
            save: writes the model into the directory it is given.
        """

        def save_all(partial_dir: Path) -> None:
            save(partial_dir)
            tensors, rest = _flatten_optimizer(optimizer)
            save_file(tensors, partial_dir / "optimizer.safetensors")
            checkpoint.save_state(partial_dir, {"run": state, "optimizer": rest})

        self.wait_for_checkpoint()
        self._log_spikes()
        if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
            self.event("checkpoint_refused", name=name, error="a parameter is not finite")
            return
        try:
            partial_dir = checkpoint.write_partial(self.path / "checkpoints", name, save_all)
        except OSError as error:
            self._log_failed_checkpoint(name, error)
        else:
            self.pending_checkpoint = name, _run_in_thread(lambda: checkpoint.finalize(partial_dir, name, keep=keep))

    def list_checkpoints(self) -> list[str]:
        """The names of the checkpoints that are whole, oldest first."""
        self.wait_for_checkpoint()
        return checkpoint.list_checkpoints(self.path / "checkpoints")

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that was written last is whole on the disk, if the disk takes it."""
        if self.pending_checkpoint is None:
            return
        (name, future), self.pending_checkpoint = self.pending_checkpoint, None
        try:
            future.result()
            self.num_failed_checkpoints = 0
        except (OSError, checkpoint.CorruptFileError) as error:
            self._log_failed_checkpoint(name, error)

    def _check_line(self, line: dict[str, Any]) -> None:
        """Look for spikes up to this line, and for what is other in it than it was before an interruption."""
        self._log_spikes()
        before = self.expected.pop(line["iteration"], None)
        if before is not None and (found := metrics.differences(before, sanitize(line))):
            self._report_difference(line, found)

    def _report_difference(self, line: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
        """Say that an iteration came to other numbers than before the interruption; once is enough."""
        self.expected.clear()
        self.event("resume_differs", iteration=line["iteration"], metrics=found)
        name, values = next(iter(found.items()))
        was, now = (str(values[when])[:40] for when in ("before", "now"))
        text = (
            f"iteration {line['iteration']} does not come to what it was before the interruption ({name[:40]} was {was}, "
            f"now {now}): it depends on something that the checkpoint does not hold, such as what an environment or a "
            "reward function remembers, a time limit, or another processor; this run is no longer the one that was "
            "interrupted"
        )
        print(f"understudy: {printable(text)}", file=sys.stderr)

    def _log_spikes(self) -> None:
        """Note the spikes in the lines since the last time."""
        for spike in find_spikes(self.metrics, first_line=self.num_checked_lines):
            self.event("spike", **spike)
        self.num_checked_lines = len(self.metrics)

    def _log_failed_checkpoint(self, name: str, error: Exception) -> None:
        """Note a checkpoint that the disk did not take; end the run at the third in a row."""
        self.num_failed_checkpoints += 1
        self.event("checkpoint_refused", name=name, error=str(error))
        print(f"understudy: checkpoint {name} could not be written ({error}); the run goes on", file=sys.stderr)
        if self.num_failed_checkpoints >= MAX_FAILED_CHECKPOINTS:
            raise OSError(
                f"{MAX_FAILED_CHECKPOINTS} checkpoints in a row could not be written under "
                f"'{short_path(self.path)}' ({error}): "
                f"free the disk, then `understudy resume {short_path(self.path)}`"
            ) from error

    def _append_line(self, name: str, line: dict[str, Any]) -> None:
        finite_line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        try:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(finite_line) + "\n")
        except OSError as error:
            self._report_write_failure(name, error)

    def _report_write_failure(self, name: str, error: OSError) -> None:
        """Say once that a line could not be written."""
        if not self.has_reported_write_failure:
            print(f"understudy: {self.path / name} cannot be written ({error}); the run goes on", file=sys.stderr)
        self.has_reported_write_failure = True


class ResumePoint:
    """A run to go on with: what a recipe's stage is put back from.

    Args:
        run: as `Run.reopen` gave it.  checkpoint: where to go on; None to begin anew.
        event_fields: what events.jsonl says of it.
        accepted: called once every check has passed and the stage is put back: only then does config.json change.
    """

    def __init__(
        self, run: Run, checkpoint: Path | None, event_fields: dict[str, Any], accepted: Callable[[], None]
    ) -> None:
        self.run, self.checkpoint, self.event_fields, self.accepted = run, checkpoint, event_fields, accepted

    def restore(self, training_run: Any) -> None:
        """Put a fresh stage where the checkpoint was written, or leave it at the beginning."""
        if self.checkpoint is None:
            self.run.rewind(0)
        else:
            try:
                training_run.restore(self.checkpoint)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                if isinstance(error, RequestError):
                    raise
                raise RequestError(
                    f"checkpoint is '{self.checkpoint}', which does not fit the run's config "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:100]}): name another with --checkpoint"
                ) from error
            if newer := checkpoint.set_aside_newer(self.checkpoint):
                away = self.checkpoint.parent / "quarantine"
                self.run.event("checkpoints_set_aside", names=newer, goes_on_from=self.checkpoint.name)
                print(
                    f"understudy: the run goes on from checkpoint {self.checkpoint.name}; the newer {', '.join(newer)} are "
                    f"in '{away}'",
                    file=sys.stderr,
                )
            checkpoint.remove_old(
                self.checkpoint.parent, keep=training_run.cfg.keep_checkpoints
            )  # what a kill left undone
        self.accepted()
        changed = {"not_compared": self.run.changed} if self.run.changed else {}
        self.run.event("resumed", iteration=training_run.iteration, **self.event_fields, **changed)


def is_checkpoint_due(interval: int, iteration: int, steps_since_last: int, total_steps: int) -> bool:
    """Whether this iteration, `steps_since_last` steps after what was saved last, is one to save.

    >>> due = is_checkpoint_due(3, 6, steps_since_last=1, total_steps=1000)
    >>> due, *(is_checkpoint_due(0, 6, steps_since_last=n, total_steps=1000) for n in (199, 200))
    (True, False, True)
    """
    return iteration % interval == 0 if interval else steps_since_last * 5 >= total_steps


def process_seconds() -> float:
    """Since this process started, imports and all (from /proc where there is one; else since this module was imported)."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.monotonic() - _IMPORT_TIME


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json, which may be anybody's.

    Raises:
        RequestError: there is none, it is not one, or the run has links, pipes or devices where we write.
    """
    document = read_versioned_json(run / "config.json", f"run is '{run}', which holds no readable config.json")
    try:
        checkpoint.require_regular_files(run, RUN_FOLDERS)
    except checkpoint.CorruptFileError as error:
        raise RequestError(f"run is '{run}', and {error}: a run's directory holds plain files only") from error
    return document


def run_of_best(path: Path) -> Path:
    """The run that a path belongs to: RUN itself, or RUN of RUN/best."""
    holds_policy = any((path / name).is_file() for name in ("understudy.json", "policy.json"))
    return path.parent if path.name == "best" and holds_policy and (path.parent / "config.json").is_file() else path


def recipe_of(path: Path) -> str | None:
    """The recipe of the run in a directory, as "control ppo"; None where it holds no run."""
    try:
        about = checkpoint.read_json(path / "config.json", max_bytes=MAX_METADATA_BYTES)
    except checkpoint.CorruptFileError:
        return None
    recipe = about.get("recipe") if isinstance(about, dict) else None
    return recipe[:60] if isinstance(recipe, str) else None


def holds_no_policy(path: Path) -> str:
    """What a directory without a policy holds instead, and what to do, as the end of a sentence that names it."""
    recipe = recipe_of(path)
    if recipe is None or (path / "policy").exists():
        return "which holds no policy: give the directory of a run, or its policy/"
    if recipe == "language reward-model":
        return (
            "a run of `language reward-model`, which holds a reward model and no policy: it is for --reward, and in Python "
            f"language.RewardModel.from_pretrained({str(path / 'reward_model')!r})"
        )
    return (
        f"a run of `{recipe}` that has not saved its policy: finish it with `understudy resume "
        f"{short_path(absolute_path(path))}`"
    )


def read_versioned_json(path: Path, error_prefix: str) -> dict[str, Any]:
    """One of our JSON files with a version of its form, which may be anybody's.

    Args:
        error_prefix: how the sentence begins that refuses it.

    Raises:
        RequestError: it is missing, is no JSON object, or has another schema than this version reads.
    """
    try:
        document = checkpoint.read_json(path, max_bytes=MAX_METADATA_BYTES)
    except checkpoint.CorruptFileError as error:
        raise RequestError(f"{error_prefix} ({error}): give the directory of a run") from error
    if is_deep(document):
        raise RequestError(f"{error_prefix} ('{path}' is nested too deeply): give the directory of a run")
    if not isinstance(document, dict):
        raise RequestError(f"{error_prefix} ('{path}' is no JSON object): give the directory of a run")
    if "schema" not in document:
        raise RequestError(
            f"{error_prefix}: it has no schema, so it is none of this version: give the directory of a run"
        )
    schema = document["schema"]
    if schema != SCHEMA:
        is_newer = isinstance(schema, int) and schema > SCHEMA
        fix = "use a newer version" if is_newer else "use the version that wrote it, or make it anew"
        raise RequestError(f"{error_prefix}: it has schema {schema!r}, this version reads {SCHEMA}; {fix}")
    return document


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, rest: dict[str, Any]) -> None:
    """Put back what `Run.checkpoint` wrote of an optimizer."""
    optimizer.load_state_dict({"state": read_optimizer_state(path), "param_groups": rest["param_groups"]})


def read_optimizer_state(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """What `Run.checkpoint` wrote of an optimizer's state: by parameter, in their order, and by name."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in checkpoint.load_tensors(path / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state


def write_json(path: Path, data: Any) -> None:
    """Write aside, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(
        missing_ok=True
    )  # of a process that was killed in here; never written through, should it be a link
    try:
        temporary.write_text(json.dumps(sanitize(data), indent=2) + "\n")
        checkpoint.sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sanitize(data: Any) -> Any:
    """The same with what JSON cannot hold mended: a float that is not finite is null, a path is its text.

    Secrets are taken out: everything that a run writes of itself goes through here.
    """
    if isinstance(data, dict):
        return {redact(str(key)): sanitize(value) for key, value in data.items()}
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, list | tuple):
        return [sanitize(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return redact(str(data)) if isinstance(data, Path) else data


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": x.contiguous() for i, entry in state["state"].items() for key, x in entry.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _run_in_thread(work: Callable[[], None]) -> Future[None]:
    """Begin work in a thread of its own, or do it at once where the interpreter is ending and starts none."""
    thread = ThreadPoolExecutor(1)
    try:
        return thread.submit(work)
    except RuntimeError:
        future: Future[None] = Future()
        try:
            future.set_result(work())
        except (OSError, checkpoint.CorruptFileError) as error:
            future.set_exception(error)
        return future
    finally:
        thread.shutdown(wait=False)


def _find_named(folder: Path, name: str) -> Path:
    """The checkpoint that a user names, and no other."""
    known = checkpoint.list_checkpoints(folder)
    if name not in known:
        raise RequestError(
            f"checkpoint is {name!r}: must be one of {', '.join(known) or 'none'}, the names in '{folder}'"
        )
    try:
        checkpoint.verify(folder / name)
    except checkpoint.CorruptFileError as error:
        raise RequestError(f"checkpoint is {name!r}, which is damaged ({error}): name another, or none") from error
    return folder / name


def refuse_used_directory(path: Path) -> None:
    """Refuse a directory for a new run that holds a run, or what is left of one: its checkpoints would be gone on with.

    Raises:
        RequestError: with the names of what is there.
    """
    if (path / "config.json").exists():
        raise RequestError(
            f"output_dir is '{short_path(path)}', which holds a run already: choose another directory, or remove that one; "
            f"`understudy resume {short_path(path)}` goes on with it"
        )
    leftovers = [name for name in RUN_FOLDERS if (path / name).is_dir() and any((path / name).iterdir())]
    leftovers += [name for name in RUN_FILES if os.path.lexists(path / name) and not (path / name).is_dir()]
    if leftovers:
        raise RequestError(
            f"output_dir is '{short_path(path)}', which holds {', '.join(leftovers)} of an earlier run: choose another "
            "directory, or remove them"
        )


def _remove_folders(folders: list[Path]) -> None:
    """Remove folders, innermost first, as far as nothing is in them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _create_free_directory(parent: Path, name: str) -> Path:
    """parent/name-1, or the next number that is free; made, so that no other run takes it."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (parent / f"{name}-{number}").mkdir()
            return parent / f"{name}-{number}"
        except FileExistsError:
            number += 1
