"""`understudy resume RUN`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from understudy import resume
from understudy.cli.flags import Parser, parse_json_object, whole_number
from understudy.run.config import RequestError
from understudy.run.paths import short_path
from understudy.run.resume import OPTIMIZER_FLAG_HINT, ROLLOUTS, START_FLAG, read_run_config
from understudy.run.store import process_seconds


def resume_run(argv: list[str]) -> int:
    """Go on with a run where it stopped; `--steps` extends it."""
    parser = Parser(prog="understudy resume", description="Go on with a run where it stopped, to the bit.")
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--steps", type=whole_number, help="a new total, for a run that is to go on further")
    parser.add_argument(
        "--device", help="torch device, where the run's own is not here; only on its own is resume exact"
    )
    parser.add_argument("--checkpoint", help="name of one under RUN/checkpoints, and no other (default: the newest)")
    parser.add_argument("--env", help="id of the environment, where the run's own is code outside Gymnasium's registry")
    parser.add_argument("--wrappers", nargs="+", help="wrappers, where the run's own name code")
    parser.add_argument(
        "--env-options", metavar="JSON", help="a JSON object, where the run's own may reach files or memory"
    )
    parser.add_argument(
        "--policy", metavar="FILE.py:NAME", help="the network of your own that it began with, or what makes it"
    )
    parser.add_argument("--reward", nargs="+", help="specs, where the run's own name code (file.py:function)")
    parser.add_argument("--gold", nargs="+", help="specs measured besides, where the run's own name code")
    parser.add_argument("--reply", help="who speaks between turns, where the run's own names code")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with its models, where the run did"
    )
    parser.add_argument(
        "--fail-if-worse", action="store_true", help="exit code 1 where a language run ended worse than it began"
    )
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parse_args(parser, argv)
    overrides: dict[str, Any] = {"env": args.env} if args.env else {}
    overrides |= {name: tuple(x) for name in ("wrappers", "reward", "gold") if (x := getattr(args, name))}
    overrides |= (
        {"env_options": parse_json_object("env_options", args.env_options)} if args.env_options is not None else {}
    )
    overrides |= {name: x for name in ("reply", "device", "policy") if (x := getattr(args, name))}
    overrides |= {"trust_remote_code": True} if args.trust_remote_code else {}
    world, recipe, _ = read_run_config(Path(args.run))
    if args.fail_if_worse and (world != "language" or recipe not in ROLLOUTS):
        raise RequestError(
            f"fail_if_worse is given to a run of {world} {recipe}: only language {', '.join(ROLLOUTS)} end better or "
            "worse; leave it out"
        )
    run = resume(args.run, checkpoint=args.checkpoint, steps=args.steps, **overrides)
    if not len(run.metrics):
        raise RequestError(
            f"run is '{args.run}', which has no metrics left to tell what it came to: evaluate it instead"
        )
    last_metrics, code = run.metrics[-1], int(args.fail_if_worse and run.ended_worse is not None)
    if last_metrics["iteration"] <= run.began:
        print(
            "understudy: the run was finished: nothing was left to do; --steps M extends it, and other "
            "settings take a new "
            f"run with {START_FLAG[world]} {args.run}",
            file=sys.stderr,
        )
    if args.json:
        shown = ("episode_return_mean", "score_mean", "loss")
        line = {"run": short_path(run.path), "steps": last_metrics["steps"], "seconds": process_seconds()}
        line |= {"train_seconds": last_metrics["seconds"], "startup_seconds": run.startup_seconds}
        line |= {} if run.stop_reason is None else {"stopped": run.stop_reason}
        line |= {} if run.ended_worse is None else {"ended_worse": run.ended_worse}
        print(
            json.dumps(
                line
                | {name: last_metrics[name] for name in shown if name in last_metrics}
                | {"solved_at": run.solved_at}
            )
        )
    else:
        if run.stop_reason is not None:
            print(f"Stopped by a constraint: {run.stop_reason}.")
        if run.ended_worse is not None:
            print(f"Warning: {run.ended_worse}.")
        print(
            f"{last_metrics['steps']:,} steps. Run: {short_path(run.path)}  Next: understudy evaluate {short_path(run.path)}"
        )
    return code


def parse_args(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The values of the command line.

    Raises:
        RequestError: a flag is none, or one of the run's settings, which a resumed run keeps.
    """
    args, unknown = parser.parse_known_args(argv)
    if not unknown:
        return args
    flag = unknown[0].split("=")[0]
    world, recipe, fields = read_run_config(Path(args.run))
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    if flag.startswith("--") and name in fields:
        raise RequestError(
            f"{flag} cannot change when a run goes on: `understudy {world} {recipe} {START_FLAG[world]} "
            f"{args.run} {flag} ...` "
            f"starts a new run from its policy{OPTIMIZER_FLAG_HINT[world]}"
        )
    return parser.parse(argv)
