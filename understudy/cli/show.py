"""`understudy show RUN`: completions token by token, or an episode step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from understudy.cli.control import POLICY_HELP, load_run
from understudy.cli.flags import Parser, whole_number
from understudy.control.replay import Step, replay
from understudy.run.checkpoint import CorruptFileError, require_regular_file
from understudy.run.config import RequestError
from understudy.run.redact import printable
from understudy.run.resume import read_run_config
from understudy.run.store import run_of_best

MAX_SAMPLE_BYTES = 64 * 2**20  # bytes of a file of samples
COLUMN_ORDER = ("logprob", "value", "advantage", "reward", "kl_reference", "entropy")  # of columns; others follow
SHORT_HEADINGS = {"kl_reference": "KL"}  # headings
MAX_NUMBERS = 6  # of an observation that are shown


def show(argv: list[str]) -> int:
    """Print what a run sampled, or what its policy does."""
    parser = Parser(
        prog="understudy show",
        description="Language runs: completions of training, token by token, from RUN/samples. "
        "Control runs: an evaluation episode of the final policy, step by step.",
    )
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object on each line, instead of tables")
    language = parser.add_argument_group("language: without these, the newest iteration")
    language.add_argument("--best", type=whole_number, metavar="N", help="the N completions of the highest score")
    language.add_argument("--worst", type=whole_number, metavar="N", help="the N completions of the lowest score")
    language.add_argument(
        "--row", type=whole_number, metavar="ROW", help="the completion of this number, as samples name it"
    )
    language.add_argument("--iteration", type=whole_number, metavar="I", help="of this iteration alone")
    control = parser.add_argument_group("control")
    control.add_argument("--episode", type=whole_number, metavar="N", help="number of the episode (default 0)")
    control.add_argument("--steps", type=whole_number, metavar="N", help="steps at most (default 200)")
    control.add_argument("--sample", action="store_true", help="draw actions as in training, instead of the mode")
    control.add_argument(
        "--env", help="id of the environment, where the run's own is code outside Gymnasium's registry"
    )
    control.add_argument("--wrappers", nargs="*", help="wrappers, where the run's own name code")
    control.add_argument("--env-options", metavar="JSON", help="a JSON object, in place of the run's own")
    control.add_argument("--policy", metavar="FILE.py:NAME", help=POLICY_HELP)
    control.add_argument("--device", help="torch device, where the run's own is not here")
    args = parser.parse(argv)
    path = Path(args.run)
    world, recipe, _ = read_run_config(run_of_best(path))
    inapplicable = (
        ("best", "worst", "row", "iteration")
        if world == "control"
        else ("episode", "steps", "env", "wrappers", "policy", "device")
    )
    for name in inapplicable:
        if getattr(args, name) is not None:
            raise RequestError(f"{name} is {getattr(args, name)}: this is a {world} run, which has no use for it")
    if world == "control":
        return _show_episode(path, args)
    return _show_samples(run_of_best(path), recipe, args)


def _show_episode(path: Path, args: Any) -> int:
    policy, config = load_run(path, args)
    number, max_steps = args.episode or 0, 200 if args.steps is None else args.steps
    if number < 0 or not 1 <= max_steps <= 1_000_000:
        raise RequestError(f"episode is {number} and steps is {max_steps}: must be 0 or more, and 1 to 1,000,000")
    steps = replay(policy, config, episode=number, num_steps=max_steps, sample=args.sample)
    if args.json:
        for step in steps:
            print(json.dumps(step._asdict()))
        return 0
    for line in _align_columns(
        [("step", "reward", "value", "action", "observation"), *map(_format_step, range(len(steps)), steps)]
    ):
        print(line)
    end = steps[-1].end_reason or f"goes on after {max_steps} steps"
    print(f"Episode {number}: {len(steps)} steps, return {sum(step.reward for step in steps):.2f}, {end}.")
    return 0


def _format_step(number: int, step: Step) -> tuple[str, ...]:
    observation = "  ".join(
        ("" if name == "obs" else f"{name} ") + _format_numbers(value) for name, value in step.obs.items()
    )
    return str(number), f"{step.reward:.3f}", f"{step.value:.3f}", _format_numbers(step.action), observation


def _format_numbers(value: Any) -> str:
    flat = list(_flatten(value))
    text = " ".join(f"{x:.3g}" for x in flat[:MAX_NUMBERS])
    return text + (f" ... ({len(flat)} numbers)" if len(flat) > MAX_NUMBERS else "")


def _flatten(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _flatten(item)
    else:
        yield float(value)


def _show_samples(path: Path, recipe: str, args: Any) -> int:
    files = sorted((path / "samples").glob("[0-9]*.jsonl"))
    if not files:
        raise RequestError(
            f"run is '{path}', which has no samples of training ({recipe}): ppo, grpo and reinforce keep some where "
            "log_samples is above 0; `understudy generate` samples anew"
        )
    if args.iteration is not None:
        files = [file for file in files if int(file.stem) == args.iteration]
        if not files:
            raise RequestError(f"iteration is {args.iteration}: no samples of it are under '{path / 'samples'}'")
    is_selective = (args.best, args.worst, args.row) != (None, None, None)
    selected = list(_select_samples(_read_samples(files if is_selective else files[-1:]), args))
    if not selected:
        raise RequestError(
            f"row is {args.row}: no completion of it is among the samples; leave --row out to see others"
        )
    for iteration, sample in selected:
        if args.json:
            print(json.dumps({"iteration": iteration} | sample))
        else:
            print("\n".join(_format_sample(iteration, sample)) + "\n")
    return 0


def _select_samples(samples: Iterator[tuple[int, dict[str, Any]]], args: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """Those asked for: by row, or the best and the worst by score; all where nothing is asked for."""
    candidates = [item for item in samples if args.row is None or item[1].get("row") == args.row]
    if args.best is None and args.worst is None:
        return candidates
    for name in ("best", "worst"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise RequestError(f"{name} is {count}: must be 1 or more")
    scored = sorted(
        (item for item in candidates if _is_number(item[1].get("score"))), key=lambda item: -item[1]["score"]
    )
    best = scored[: args.best or 0]
    worst = scored[max(len(best), len(scored) - (args.worst or 0)) :]
    return [*best, *worst]


def _read_samples(files: list[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every sample of files that may be anybody's, with its iteration."""
    for file in files:
        try:
            require_regular_file(file)
            if file.stat().st_size > MAX_SAMPLE_BYTES:
                raise CorruptFileError(f"'{file}' has more than {MAX_SAMPLE_BYTES / 2**20:g} MiB: not read")
            for line in file.read_text(encoding="utf-8").splitlines():
                sample = json.loads(line)
                if not isinstance(sample, dict) or not isinstance(sample.get("tokens"), list):
                    raise CorruptFileError(f"'{file}' has a line that is no sample")
                yield int(file.stem), sample
        except (OSError, ValueError, RecursionError) as error:
            problem = (
                str(error)
                if isinstance(error, CorruptFileError)
                else f"'{file}' cannot be read ({type(error).__name__})"
            )
            raise RequestError(
                f"samples of the run are damaged: {problem}; remove the file, or name another --iteration"
            ) from error


def _format_sample(iteration: int, sample: dict[str, Any]) -> Iterator[str]:
    """A completion as lines: where it is from, its prompt, its scores, and a table with a line for each token."""
    numbers = {name: x for name, x in sample.items() if _is_number(x) and name not in ("row", "version")}
    terms = {
        f"{name} {part}": x
        for name, x in sample.items()
        if isinstance(x, dict)
        for part, x in x.items()
        if _is_number(x)
    }
    yield printable(f"Iteration {iteration}, row {sample.get('row')}, " + ("ended" if sample.get("stopped") else "cut"))
    yield f"prompt      {_format_text(sample.get('prompt'))}"
    yield f"completion  {_format_text(sample.get('completion'))}"
    if numbers or terms:
        yield printable("  ".join(f"{name} {x:.4g}" for name, x in {**numbers, **terms}.items()))
    tokens = sample["tokens"]
    names = [
        name for name, x in sample.items() if isinstance(x, list) and len(x) == len(tokens) and all(map(_is_number, x))
    ]
    names = [name for name in (*COLUMN_ORDER, *names) if name in names and name not in ("completion_ids", "prompt_ids")]
    names = list(dict.fromkeys(names))
    chosen = sample.get("chosen")
    rows = [
        (
            *(f"{round(sample[name][t], 4) + 0.0:.4f}" for name in names),
            _format_text(token) + ("" if _is_chosen(chosen, t) else "  (not the policy's)"),
        )
        for t, token in enumerate(tokens)
    ]
    yield from _align_columns([(*(printable(SHORT_HEADINGS.get(name, name)) for name in names), "token"), *rows])


def _is_chosen(chosen: Any, t: int) -> bool:
    return not isinstance(chosen, list) or t >= len(chosen) or bool(chosen[t])


def _format_text(value: Any) -> str:
    """Text, or a chat, on one line, with what would steer a terminal written out."""
    return printable(json.dumps(value, ensure_ascii=False))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _align_columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows of a table as lines; every column but the last is as wide as its widest cell, aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
