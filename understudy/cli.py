"""The command line. Imports are lazy: help and refusals must not wait for torch."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

HELP = """\
usage: understudy VERB ...

One policy-gradient library for agents in environments and language models under a reward.

  understudy control ppo          --env ID   proximal policy optimisation: clip or KL penalty
  understudy control actor-critic --env ID   online one-step, or n steps of many copies (A2C)
  understudy control reinforce    --env ID   whole episodes, with or without a baseline

  understudy evaluate RUN                    fixed seeds, frozen scales, unnormalised return
  understudy compare RUN RUN ...             interquartile mean, interval, probability of improvement

Add --help to a verb for its flags. Start here:  understudy control ppo --env CartPole-v1
"""
RECIPES = {"ppo": "ppo", "actor-critic": "actor_critic", "reinforce": "reinforce"}


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit code: 0 done, 1 failed, 2 the request was wrong, 130 stopped by SIGINT after saving."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    from understudy.run.config import RequestError, nearest

    verbs = {"control": _control, "evaluate": _evaluate, "compare": _compare}
    try:
        if argv[0] not in verbs:
            raise RequestError(f"verb is {argv[0]!r}: must be one of {', '.join(verbs)}{nearest(argv[0], verbs)}")
        return verbs[argv[0]](argv[1:])
    except RequestError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("understudy: stopped; what was learned is saved", file=sys.stderr)
        return 130
    except Exception as error:  # said in a sentence; the traceback is in the run's events.jsonl
        print(f"understudy: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _control(argv: list[str]) -> int:
    import importlib

    from understudy.run.config import RequestError, nearest

    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] not in RECIPES:
        raise RequestError(f"recipe is {argv[0]!r}: must be one of {', '.join(RECIPES)}{nearest(argv[0], RECIPES)}")
    as_json = "--json" in argv
    argv = [word for word in argv if word != "--json"]
    recipe = importlib.import_module(f"understudy.control.{RECIPES[argv[0]]}")
    config = _parse(recipe.Config, argv[1:], prog=f"understudy control {argv[0]}")
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            run = recipe.train(config)
    else:
        run = recipe.train(config)
    _summary(run, config, as_json)
    return 0


def _parse(kind: Any, argv: list[str], *, prog: str) -> Any:
    """A recipe's config from flags over a config file over a preset over its defaults."""
    import dataclasses

    import tyro
    import yaml

    from understudy.control.presets import fields_of, settings
    from understudy.run.config import RequestError, nearest

    file, argv = _take(argv, "config")
    given: dict[str, Any] = {}
    if file is not None:
        try:
            given = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise RequestError(
                f"config is {file!r}, which cannot be read as YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(given, dict):
            raise RequestError(f"config is {file!r}, which holds a {type(given).__name__}: must map fields to values")
        given = fields_of(kind, given, f"config {file!r}")
    asked = any(word in ("-h", "--help") for word in argv)
    env = _take(argv, "env")[0] or given.get("env") or ("CartPole-v1" if asked else None)
    if env is None:
        raise RequestError("env is missing: name a Gymnasium id, as in --env CartPole-v1")
    name = _take(argv, "preset")[0] or given.get("preset", "tuned")
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--help"}
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in flags:
            raise RequestError(f"{flag} is not a flag of `{prog}`{nearest(flag, flags)}")
    defaults = settings(kind, env, name)
    argv = _take(argv, "preset")[1]
    start = kind(**(defaults | given | {"env": env, "preset": defaults["preset"]}))

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if getattr(info.type, "__origin__", None) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, default=start, prog=prog, registry=registry)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise RequestError(_sentence(said.getvalue())) from None


def _take(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of --NAME in a command line, and the command line without it."""
    for at, word in enumerate(argv):
        if word == f"--{name}" and at + 1 < len(argv):
            return argv[at + 1], argv[:at] + argv[at + 2 :]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1], argv[:at] + argv[at + 1 :]
    return None, argv


def _sentence(text: str) -> str:
    """What tyro's box says, without the box: what stands between its title and its next rule, on one line."""
    lines = [line.strip(" │╭╮╰╯") for line in text.splitlines()][1:]
    lines = ["" if not line.strip("-─") else line for line in lines]
    body = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines))
    return " ".join(" ".join(body).split()).rstrip(".")


def _summary(run: Any, config: Any, as_json: bool) -> None:
    from understudy.run.store import process_seconds

    last = run.metrics[-1]
    mean = last["episode_return_mean"]
    if as_json:
        total = process_seconds()
        line = {
            "run": str(run.path),
            "steps": last["steps"],
            "seconds": total,
            "train_seconds": last["seconds"],
            "startup_seconds": run.startup_seconds,
            "episode_return_mean": mean,
            "solved_at": run.solved_at,
        }
        print(json.dumps(line))
        return
    if run.solved_at is not None:
        print(f"Solved after {run.solved_at['steps']:,} steps, {run.solved_at['seconds']:.1f} s from process start.")
    shown = "no episode finished" if mean is None else f"mean return of the last 100 episodes {mean:.1f}"
    print(f"{last['steps']:,} steps, {shown}. Policy: {run.path}/policy  Curve: {run.path}/curve.png")
    print(f"Next: understudy evaluate {run.path}")


def _evaluate(argv: list[str]) -> int:
    parser = _Parser(prog="understudy evaluate", description="Evaluate a run's final policy on seeds never trained on.")
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--episodes", type=int, default=100, help="episodes (default 100)")
    parser.add_argument("--sample", action="store_true", help="draw actions as in training, instead of the mode")
    parser.add_argument("--env", help="id of the environment, where the run's own is code outside Gymnasium's registry")
    parser.add_argument("--video", action="store_true", help="record one episode under RUN/video")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse_args(argv)

    import importlib
    import statistics

    from understudy import load
    from understudy.control.evaluate import SEED, evaluate
    from understudy.control.presets import fields_of
    from understudy.run.config import RequestError
    from understudy.run.store import read_config, write_json

    if args.episodes < 1:
        raise RequestError(f"episodes is {args.episodes}: must be 1 or more")
    path = Path(args.run)
    about = read_config(path)
    recipe = importlib.import_module(f"understudy.control.{RECIPES[about['recipe'].split()[-1]]}")
    fields = fields_of(recipe.Config, about["config"], "config.json")
    if args.env is None and (":" in fields["env"] or any(":" in w.split()[0] for w in fields["wrappers"])):
        raise RequestError(f"run '{path}' names code of its own ({fields['env']}): name it yourself with --env")
    config = recipe.Config(**(fields | ({"env": args.env} if args.env else {})))
    policy = load(path)
    returns = evaluate(policy, config, episodes=args.episodes, sample=args.sample)
    if args.video:
        evaluate(policy, config, episodes=1, video=path / "video")
    result = {
        "episodes": args.episodes,
        "sample": args.sample,
        "seed": SEED,
        "return_mean": statistics.fmean(returns),
        "return_std": statistics.stdev(returns) if len(returns) > 1 else 0.0,
        "returns": returns,
    }
    if not args.sample:
        write_json(path / "evaluation.json", result)
    how = "sampled" if args.sample else "mode"
    text = f"{args.episodes} episodes, {how} actions: return {result['return_mean']:.2f} +- {result['return_std']:.2f}"
    print(json.dumps({"run": str(path), **result}) if args.json else text)
    return 0


def _compare(argv: list[str]) -> int:
    parser = _Parser(prog="understudy compare", description="Runs that differ in their seed only form a group.")
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse_args(argv)

    from understudy.study.compare import groups, table

    found = groups([Path(run) for run in args.runs])
    print(json.dumps(found) if args.json else table(found))
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse whose refusals are sentences like everybody's."""

    def error(self, message: str) -> Any:
        from understudy.run.config import RequestError

        raise RequestError(f"{message} (`{self.prog} --help` lists what there is)")
