"""`understudy language RECIPE`, `understudy generate`, and `understudy evaluate RUN` of a language run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from understudy import load
from understudy.cli.flags import Parser, asks_for_help, parse_flags, read_config_file, unescaped, whole_number
from understudy.cli.help import show_help
from understudy.language import dpo, reward_model, sft
from understudy.language.data.records import Tokenizer
from understudy.language.model.policy import Policy, model_dir, module_digest
from understudy.language.model.reward_model import RewardModel
from understudy.language.provenance import collect_links
from understudy.language.rlhf import RLHFModels, close_workers
from understudy.run.config import RequestError, did_you_mean
from understudy.run.lineage import read_lineage, require_same_files
from understudy.run.metrics import last_steps
from understudy.run.paths import short_path
from understudy.run.redact import printable
from understudy.run.resume import ROLLOUTS, read_run_config, rebuild_config
from understudy.run.store import process_seconds, run_of_best, write_json
from understudy.run.trust import require_trusted_code

RECIPES = {
    "sft": "sft",
    "reward-model": "reward_model",
    "reinforce": "reinforce",
    "ppo": "ppo",
    "grpo": "grpo",
    "dpo": "dpo",
}
REQUIRED_FIELDS = {  # a field without a default: its value in usage, and the fix
    "model": "DIR:name a directory, run or hub id, as in --model DIR",
    "data": "FILE:name a file, as in --data prompts.jsonl",
    "reward": "SPEC:name a reward model's directory, file.py:function or a builtin, as in --reward DIR",
}
PROMPTS = """\
data, a row each completion starts from:
  prompt        text, or a list of messages {"role": ..., "content": ...}; a reward function is given all other columns
"""
COLUMNS = {
    "sft": """\
data, one of these layouts:
  prompt, completion   both text, or both lists of messages {"role": ..., "content": ...}
  messages             a chat, learned from its last assistant message
  text                 plain text, all of it learned
""",
    "reward-model": """\
data, one of these layouts:
  chosen, rejected     with or without prompt; optionally margin, a number
  text, label          a text, and 1 or 0
""",
    "dpo": """\
data:
  chosen, rejected     with or without prompt; each text or a list of messages {"role": ..., "content": ...}
""",
    **dict.fromkeys(ROLLOUTS, PROMPTS),
}
REWARDS = """
--reward takes one SPEC or several, whose scores are added; SPEC*0.5 gives one a weight:
  DIR                  a reward model that `language reward-model` saved, or its run
  file.py:function     def function(prompts, completions, **columns) -> list of floats; None where a row has no score;
                       get_state() and set_state(state) beside it save what it remembers, for an exact resume
  length, length:40    tokens of the completion; minus the relative distance to 40
  contains:TEXT        1 where the completion has the text in it, else 0
  regex:PATTERN        1 where the pattern is found in the completion, else 0
  exact:COLUMN         1 where the completion is the column's text (answer by default)
  number:COLUMN        1 where the completion's last number is the column's (answer by default)
  repetition           the share of its 4-grams that the completion has had before

besides the fields:
  --fail-if-worse      exit code 1 where the run ended worse than it began, which it always says
  --json               the last line of standard output is one JSON object
"""
EXAMPLES = {
    "sft": "--model DIR --data demonstrations.jsonl --out runs/sft",
    "reward-model": "--model runs/sft --data pairs.jsonl --out runs/rm",
    "ppo": "--model runs/sft --data prompts.jsonl --reward runs/rm --out runs/ppo",
    "grpo": "--model runs/sft --data questions.jsonl --columns prompt=question --reward number --out runs/grpo",
    "reinforce": "--model runs/sft --data prompts.jsonl --reward score.py:polite --out runs/reinforce",
    "dpo": "--model runs/sft --data pairs.jsonl --out runs/dpo",
}


def train(argv: list[str]) -> int:
    """`understudy language RECIPE ...`."""
    if argv[0] not in RECIPES:
        raise RequestError(
            f"recipe is {argv[0]!r}: must be one of {', '.join(RECIPES)}{did_you_mean(argv[0], RECIPES)}"
        )
    as_json, fail_if_worse = "--json" in argv, "--fail-if-worse" in argv
    argv = [word for word in argv if word not in ("--json", "--fail-if-worse")]
    if fail_if_worse and argv[0] not in ROLLOUTS:
        raise RequestError(
            f"fail_if_worse is given to {argv[0]}: only {', '.join(ROLLOUTS)} end better or worse; leave it out"
        )
    recipe = importlib.import_module(f"understudy.language.{RECIPES[argv[0]]}")
    config = _configure(recipe.Config, argv[1:], prog=f"understudy language {argv[0]}")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        run = recipe.train(config)
    last_metrics, exit_code = run.metrics[-1], int(fail_if_worse and run.ended_worse is not None)
    if as_json:
        line = {"run": short_path(run.path), "steps": last_metrics["steps"], "seconds": process_seconds()}
        line |= {"train_seconds": last_metrics["seconds"], "startup_seconds": run.startup_seconds}
        line |= {} if run.stop_reason is None else {"stopped": run.stop_reason}
        line |= {} if run.ended_worse is None else {"ended_worse": run.ended_worse}
        print(
            json.dumps(
                line | {name: last_metrics[name] for name in last_metrics if name == "score_mean" or name == "loss"}
            )
        )
        return exit_code
    if run.stop_reason is not None:
        print(f"Stopped by a constraint: {run.stop_reason}.")
    shown = [f"{name} {last_metrics[name]:.4g}" for name in SUMMARY_METRICS if name in last_metrics]
    print(f"{last_metrics['steps']:,} tokens, {', '.join(shown)}. Run: {short_path(run.path)}")
    if run.ended_worse is not None:
        print(f"Warning: {run.ended_worse}.")
    print(f"Next: understudy evaluate {short_path(run.path)}")
    return exit_code


SUMMARY_METRICS = (
    "score_mean",
    "gold_mean",
    "kl_reference",
    "loss",
    "evaluation_loss",
    "evaluation_accuracy",
    "evaluation_score",
    "evaluation_gold",
    "evaluation_win_rate",
)


def _configure(config_class: Any, argv: list[str], *, prog: str) -> Any:
    """A recipe's config from flags over a config file over its defaults."""
    wants_help = asks_for_help(argv)
    fields, argv = read_config_file(config_class, [word for word in argv if word not in ("-h", "--help")])
    flags = parse_flags(config_class, argv, prog=prog)
    fields |= flags | ({"stop": tuple(map(unescaped, flags["stop"]))} if "stop" in flags else {})
    required = [field.name for field in dataclasses.fields(config_class) if field.default is dataclasses.MISSING]
    if wants_help:
        usage = " ".join(f"--{name} {REQUIRED_FIELDS[name].partition(':')[0]}" for name in required)
        recipe = prog.split()[-1]
        epilog = (
            COLUMNS[recipe] + (REWARDS if "reward" in required else "") + f"\nexample:\n  {prog} {EXAMPLES[recipe]}\n"
        )
        show_help(config_class, fields, prog=prog, usage=usage, epilog=epilog)
    for name in required:
        if name not in fields:
            raise RequestError(f"{name} is missing: {REQUIRED_FIELDS[name].partition(':')[2]}")
    return config_class(**fields)


STOP_HELP = r"texts or token ids that end it; \n, \t and \\ stand for a line's end, a tab and \ (default: the model's)"


def generate(argv: list[str]) -> int:
    """`understudy generate RUN|DIR --prompt TEXT | --chat`."""
    parser = Parser(prog="understudy generate", description="Let a language policy go on from a prompt, or talk to it.")
    parser.add_argument("source", metavar="RUN|DIR", help="run, policy directory or hub id")
    parser.add_argument("--prompt", help="text to go on from; '' begins at BOS")
    parser.add_argument("--chat", action="store_true", help="talk: a line of standard input is a turn")
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number,
        default=64,
        help="tokens a completion may have, within the model's context (default 64)",
    )
    parser.add_argument("--count", type=whole_number, default=1, help="completions of the prompt (default 1)")
    parser.add_argument("--temperature", type=float, help="of sampling (default: the policy's own)")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of sampling")
    parser.add_argument("--stop", nargs="+", default=[], help=STOP_HELP)
    parser.add_argument("--seed", type=whole_number, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse(argv)
    if args.chat == (args.prompt is not None):
        raise RequestError("prompt is missing: give --prompt TEXT, or --chat, and not both")
    source = model_dir(args.source, "policy")
    policy = load(source) if (Path(source) / "understudy.json").is_file() else Policy.from_pretrained(source)
    try:
        policy.tokenizer = Tokenizer.load(source, stop=tuple(map(unescaped, args.stop)))
    except RequestError:
        if args.stop:
            raise
        policy.tokenizer = Tokenizer.load(source, has_fixed_length=True)  # it names no stop
    for warning in policy.warnings:
        print(f"understudy: {printable(warning)}", file=sys.stderr)

    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "greedy": args.greedy}
    if args.chat:
        return _chat(lambda turns, seed: policy.generate([turns], seed=seed, **options)[0][0], args.seed)
    [texts] = policy.generate([args.prompt], num_completions=args.count, seed=args.seed, **options)
    print(json.dumps({"prompt": args.prompt, "completions": texts}) if args.json else "\n".join(map(printable, texts)))
    return 0


def _chat(generate_reply: Any, seed: int) -> int:
    """Turn by turn, until standard input ends."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> " if sys.stdin.isatty() else "")})
        except EOFError:
            return 0
        reply = generate_reply(messages, seed + len(messages))
        messages.append({"role": "assistant", "content": reply})
        print(printable(reply), flush=True)


def evaluate_run(argv: list[str]) -> int:
    """`understudy evaluate RUN` of a language run: held-out rows, fixed seeds."""
    parser = Parser(
        prog="understudy evaluate",
        description="Language runs: the policy or reward model on rows it did not learn from.",
    )
    parser.add_argument("run", help="directory of a run, or RUN/best")
    parser.add_argument("--rows", type=whole_number, help="completions to sample (default 256)")
    parser.add_argument("--evaluation-data", help="a file to evaluate on, instead of the rows that the run held out")
    parser.add_argument("--reward", nargs="+", help="specs, where the run's own name code (file.py:function)")
    parser.add_argument("--gold", nargs="+", help="specs measured besides; the run's own by default")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with its models, where the run did"
    )
    parser.add_argument("--reply", help="who speaks between turns (file.py:function), where the run had somebody")
    parser.add_argument("--device", help="torch device, where the run's own is not here (default: the run's)")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse(argv)
    source = Path(args.run)
    path = run_of_best(source)
    _, recipe, fields = read_run_config(path)
    config_class = importlib.import_module(f"understudy.language.{RECIPES[recipe]}").Config
    overrides: dict[str, Any] = {
        name: tuple(x) for name in ("reward", "gold") if (x := getattr(args, name)) is not None
    }
    overrides |= {name: x for name in ("reply", "evaluation_data", "device") if (x := getattr(args, name)) is not None}
    overrides |= {"trust_remote_code": True} if args.trust_remote_code else {}
    require_trusted_code(path, fields, overridden=overrides)
    unused = [name for name in overrides if name not in config_class.__dataclass_fields__]
    if unused or (args.rows is not None and recipe in ("sft", "reward-model", "dpo")):
        raise RequestError(
            f"{(*unused, 'rows')[0]} has no effect on a run of {recipe}, which samples nothing: leave it out"
        )
    cfg = rebuild_config(config_class, fields | overrides)
    measured = {"data", "evaluation_data", "reward", "gold", "reply"} - overrides.keys()
    require_same_files(
        path, collect_links(cfg, recipe), measured - ({"data"} if "evaluation_data" in overrides else set())
    )
    rows = 256 if args.rows is None else args.rows
    if not 1 <= rows <= 1_000_000:
        raise RequestError(f"rows is {rows}: must be between 1 and 1,000,000")
    if recipe == "sft":
        results = _held_out_loss(path, cfg)
    elif recipe == "reward-model":
        results = _held_out_accuracy(path, cfg)
    elif recipe == "dpo":
        results = _held_out_pairs(path, cfg)
    else:
        results = _held_out_completions(path, source, cfg, rows)
    results["after_steps"] = last_steps(path)
    write_json(path / ("evaluation.json" if source == path else "evaluation-best.json"), results)
    samples = results.pop("samples", [])
    if args.json:
        print(json.dumps({"run": str(path), **results, "samples": samples}))
        return 0
    for sample in samples[:3]:
        print(f"{sample['prompt']!r}\n  policy:    {sample['completion']!r}\n  reference: {sample['reference']!r}")
    print(f"{results['rows']} rows" + (f" of {results['prompts']} different prompts" if "prompts" in results else ""))
    for name, x in results.items():
        if isinstance(x, float) and not name.endswith(("_low", "_high")):
            low, high = results.get(f"{name}_low", math.nan), results.get(f"{name}_high", math.nan)
            print(f"{name:22} {x:9.4f}" + ("" if math.isnan(low) else f"   [{low:.4f}, {high:.4f}]"))
    return 0


def _held_out_loss(path: Path, cfg: sft.Config) -> dict[str, Any]:
    cfg = dataclasses.replace(cfg, model=str(path))
    policy = sft.load_policy(cfg)
    _, held_out_rows = sft.load_examples(policy, cfg)
    return {"rows": len(_require_held_out(held_out_rows, cfg)), "loss": sft.mean_loss(policy, held_out_rows)}


def _held_out_accuracy(path: Path, cfg: reward_model.Config) -> dict[str, Any]:
    trust = cfg.trust_remote_code
    model = RewardModel.from_pretrained(
        path / "reward_model", stop=cfg.stop, chat_template=cfg.chat_template, trust_remote_code=trust
    )
    _, held_out_rows = reward_model.load_training_rows(model, cfg)
    return reward_model.evaluate_reward_model(model, _require_held_out(held_out_rows, cfg))


def _held_out_pairs(path: Path, cfg: dpo.Config) -> dict[str, Any]:
    """The policy as it ended against the reference it left, on pairs it did not learn from."""
    policy = sft.load_policy(dataclasses.replace(cfg, model=str(path)))
    reference = sft.load_policy(dataclasses.replace(cfg, model=cfg.reference or cfg.model))
    _require_same_reference(module_digest(reference.model), path, cfg)
    _, held_out_rows = dpo.load_preferences(policy, cfg)
    return dpo.evaluate_preferences(
        policy,
        _require_held_out(held_out_rows, cfg),
        dpo.compute_pair_logprobs(reference, held_out_rows),
        dpo.make_objective(cfg),
    )


def _require_same_reference(reference_digest: str, path: Path, cfg: Any) -> None:
    """Refuse a reference that is not the one whose digest the run wrote down."""
    recorded_digest = read_lineage(path).get("reference")
    if reference_digest != recorded_digest:
        raise RequestError(
            f"reference is '{cfg.reference or cfg.model}', whose weights are not those of the run "
            f"({str(recorded_digest)[:12]}...): "
            "put back the model that the run started from"
        )


def _require_held_out(rows: list[Any], cfg: Any) -> list[Any]:
    if not rows:
        raise RequestError(
            f"held_out is {cfg.held_out}: no row of '{cfg.data}' was kept for evaluation; "
            "that takes at least 8 different rows"
        )
    return rows


def _held_out_completions(path: Path, policy: Path, cfg: Any, rows: int) -> dict[str, Any]:
    """A policy of a run beside the reference it was held to, whose digest must be the one the run wrote down."""
    fields = {"model": str(policy), "reference": cfg.reference or cfg.model, "reference_mode": None, "constraint": ()}
    fields |= {"lora_rank": 0, "train_layers": 0}  # nothing learns
    models = RLHFModels(dataclasses.replace(cfg, **fields, **({"critic": "shared"} if hasattr(cfg, "critic") else {})))
    try:
        _require_same_reference(models.reference.digest, path, cfg)
        return models.compute_evaluation(rows)
    finally:
        close_workers(models)
