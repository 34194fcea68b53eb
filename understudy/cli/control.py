"""`understudy control RECIPE`, and `understudy evaluate RUN` of a control run."""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from understudy import load
from understudy.cli.flags import Parser, asks_for_help, parse_flags, parse_json_object, read_config_file, whole_number
from understudy.cli.help import show_help
from understudy.control.envs.make import check_env_or_wrapper
from understudy.control.evaluate import EVALUATION_SEED, evaluate
from understudy.control.own_network import named_network
from understudy.control.presets import settings
from understudy.run.config import RequestError, did_you_mean
from understudy.run.metrics import last_steps
from understudy.run.paths import absolute_path, short_path
from understudy.run.resume import read_run_config, rebuild_config
from understudy.run.store import process_seconds, read_config, run_of_best, write_json
from understudy.run.trust import require_trusted_code

RECIPES = {"ppo": "ppo", "actor-critic": "actor_critic", "reinforce": "reinforce"}


def train(argv: list[str]) -> int:
    if argv[0] not in RECIPES:
        raise RequestError(
            f"recipe is {argv[0]!r}: must be one of {', '.join(RECIPES)}{did_you_mean(argv[0], RECIPES)}"
        )
    as_json = "--json" in argv
    argv = [word for word in argv if word != "--json"]
    recipe = importlib.import_module(f"understudy.control.{RECIPES[argv[0]]}")
    config = _configure(recipe.Config, argv[1:], prog=f"understudy control {argv[0]}")
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            run = recipe.train(config)
    else:
        run = recipe.train(config)
    _print_summary(run, config, as_json)
    return 0


def _configure(config_class: Any, argv: list[str], *, prog: str) -> Any:
    """A recipe's config from flags over a config file over a preset over its defaults."""
    wants_help = asks_for_help(argv)
    fields, argv = read_config_file(config_class, [word for word in argv if word not in ("-h", "--help")])
    fields |= parse_flags(config_class, argv, prog=prog)
    env = fields.get("env")
    if wants_help:
        defaults = settings(config_class, env, fields.get("preset", "tuned")) if env else {}
        source = (
            f"those of preset {defaults['preset']} for {env}"
            if env
            else f"the recipe's own: see {prog} --env ID --help"
        )
        note = f"Defaults are {source}."
        show_help(
            config_class, defaults | fields, prog=prog, usage="--env ID", epilog=EPILOG.format(prog=prog), note=note
        )
    if not isinstance(env, str):
        raise RequestError("env is missing: name a Gymnasium id, as in --env CartPole-v1")
    defaults = settings(config_class, env, fields.get("preset", "tuned"))
    return config_class(**(defaults | fields | {"preset": defaults["preset"]}))


EPILOG = """\
your own environment:
  Any class with Gymnasium's interface, in a file of the current folder: --env my_env.py:MyEnv

action masks:
  An environment that forbids actions says which are allowed: 1 or true for an allowed action, 0 or false for a
  forbidden one, one entry for each action (MultiDiscrete: those of all dimensions after each other). It gives the
  mask as info["action_mask"] of every reset and step, or as the entry "action_mask" of a Dict observation.

example:
  {prog} --env CartPole-v1 --steps 1e5 --seed 1
"""


def _print_summary(run: Any, config: Any, as_json: bool) -> None:
    last_metrics = run.metrics[-1]
    mean = last_metrics["episode_return_mean"]
    if as_json:
        total = process_seconds()
        line = {
            "run": short_path(run.path),
            "steps": last_metrics["steps"],
            "seconds": total,
            "train_seconds": last_metrics["seconds"],
            "startup_seconds": run.startup_seconds,
            "episode_return_mean": mean,
            "solved_at": run.solved_at,
        }
        print(json.dumps(line | ({} if run.stop_reason is None else {"stopped": run.stop_reason})))
        return
    if run.solved_at is not None:
        print(f"Solved after {run.solved_at['steps']:,} steps, {run.solved_at['seconds']:.1f} s from process start.")
    if run.stop_reason is not None:
        print(f"Stopped by a constraint: {run.stop_reason}.")
    shown = "no episode finished" if mean is None else f"mean return of the last 100 episodes {mean:.1f}"
    print(
        f"{last_metrics['steps']:,} steps, {shown}. Policy: {short_path(run.path)}/policy  Curve: "
        f"{short_path(run.path)}/curve.png"
    )
    print(f"Next: understudy evaluate {short_path(run.path)}")


MEASURED_ON = ("env", "env_options", "wrappers", "evaluation_max_steps")
"""Fields of a config that say what an evaluation is of; evaluation.json holds them."""
POLICY_HELP = "the network of your own that the run was trained with, or what makes it; module:NAME, too"


def evaluate_run(argv: list[str]) -> int:
    parser = Parser(prog="understudy evaluate", description="Control runs: the final policy on seeds never trained on.")
    parser.add_argument("run", help="directory of a run, or RUN/best")
    parser.add_argument("--episodes", type=whole_number, default=100, help="episodes (default 100)")
    parser.add_argument("--sample", action="store_true", help="draw actions as in training, instead of the mode")
    parser.add_argument("--env", help="id of the environment, where the run's own is code outside Gymnasium's registry")
    parser.add_argument("--wrappers", nargs="*", help="wrappers, where the run's own name code")
    parser.add_argument(
        "--env-options", metavar="JSON", help="a JSON object, where the run's own may reach files or memory"
    )
    parser.add_argument("--policy", metavar="FILE.py:NAME", help=POLICY_HELP)
    parser.add_argument(
        "--num-evaluation-envs", type=whole_number, help="copies of the environment (default the run's)"
    )
    parser.add_argument("--evaluation-max-steps", type=whole_number, help="end an episode here (default the run's)")
    parser.add_argument("--device", help="torch device, where the run's own is not here (default: the run's)")
    parser.add_argument("--video", action="store_true", help="record one episode under RUN/video")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse(argv)

    if args.episodes < 1:
        raise RequestError(f"episodes is {args.episodes}: must be 1 or more")
    source = absolute_path(args.run)
    path = run_of_best(source)
    policy, config = load_run(source, args)
    evaluation = evaluate(policy, config, num_episodes=args.episodes, sample=args.sample)
    returns = evaluation.returns
    if args.video:
        evaluate(policy, config, num_episodes=1, video=path / "video")
    result = {
        "episodes": args.episodes,
        "sample": args.sample,
        "seed": EVALUATION_SEED,
        "return_mean": statistics.fmean(returns),
        "return_std": statistics.stdev(returns) if len(returns) > 1 else 0.0,
        "success_rate": evaluation.success_rate,
        "num_success_reports": evaluation.num_success_reports,
        "num_cut": evaluation.num_truncated,
        "after_steps": last_steps(path),
        **{name: getattr(config, name) for name in MEASURED_ON},
        "returns": returns,
    }
    if not args.sample:
        write_json(path / ("evaluation.json" if source == path else "evaluation-best.json"), result)
    action_mode = "sampled" if args.sample else "mode"
    text = (
        f"{args.episodes} episodes, {action_mode} actions: return {result['return_mean']:.2f} +- "
        f"{result['return_std']:.2f}"
    )
    text += "" if evaluation.success_rate is None else f", success rate {evaluation.success_rate:.2f}"
    if 0 < evaluation.num_success_reports < args.episodes:
        text += f" ({args.episodes - evaluation.num_success_reports} episodes say nothing of it and count as failures)"
    if evaluation.num_truncated:
        steps = f"{config.evaluation_max_steps:,}"
        print(
            f"understudy: {evaluation.num_truncated} episodes were ended at evaluation_max_steps, {steps}",
            file=sys.stderr,
        )
    print(json.dumps({"run": short_path(path), **result}) if args.json else text)
    return 0


def load_run(source: Path, args: Any) -> tuple[Any, Any]:
    """The final policy of a run, or its best, and its config; `args` may name env, wrappers, policy and so on anew."""
    path = run_of_best(source)
    _, name, fields = read_run_config(path)
    recipe = importlib.import_module(f"understudy.control.{RECIPES[name]}")
    overrides = {"env": args.env} if args.env else {}
    overrides |= {"wrappers": tuple(args.wrappers)} if args.wrappers is not None else {}
    overrides |= (
        {"env_options": parse_json_object("env_options", args.env_options)} if args.env_options is not None else {}
    )
    for code in require_trusted_code(path, fields, overridden=overrides):
        check_env_or_wrapper(code.field, code.name)
    if read_config(path).get("own_env") and not args.env:
        raise RequestError(
            f"run is '{path}', which was trained in an environment object: name what makes it with --env, as in "
            "--env my_env.py:MyEnv"
        )
    optional = {name: getattr(args, name, None) for name in ("device", "num_evaluation_envs", "evaluation_max_steps")}
    overrides |= {name: value for name, value in optional.items() if value is not None}
    config = rebuild_config(recipe.Config, fields | overrides)
    network = None if args.policy is None else named_network(args.policy)
    return load(source, policy=network), config
