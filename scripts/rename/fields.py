"""Config fields, flags and metrics: definitions go through the engine, keys and keywords follow the rules here."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

BOTH = {
    "epochs": "num_epochs",
    "minibatches": "num_minibatches",
    "threads": "num_threads",
    "out": "output_dir",
    "kl_coef": "kl_old_coef",
    "standardize": "normalize_advantage",
}
CONTROL = BOTH | {
    "memory": "rnn_type",
    "memory_size": "rnn_hidden_size",
    "rollout": "num_steps_per_env",
    "adapt_learning_rate": "desired_kl",
    "refresh": "recompute_advantages",
    "init": "init_from",
    "group_scale": "scale_by_std",
}
LANGUAGE = BOTH | {
    "steps": "total_tokens",
    "checkpointing": "gradient_checkpointing",
    "micro": "micro_batch_size",
    "rows": "completions_per_iteration",
    "max_new": "max_new_tokens",
    "slots": "max_num_seqs",
    "minibatch_rows": "batch_size",
    "lora": "lora_rank",
    "lora_targets": "lora_target_modules",
    "template": "chat_template",
    "turns": "max_turns",
    "samples": "log_samples",
    "group": "group_size",
    "scale": "scale_by_std",
    "aggregate": "loss_aggregation",
    "resample": "dynamic_sampling_rounds",
    "moving": "baseline_decay",
    "center": "center_coef",
    "form": "loss_type",
    "smoothing": "label_smoothing",
}
METRICS = {
    "value_error": "value_loss",
    "groups_equal": "groups_without_signal",
    "weight_effective": "effective_sample_fraction",
    "weight_mean": "importance_weight_mean",
    "score_missing": "score_missing_fraction",
    "chosen_gain": "chosen_logratio",
}
CONTROL_ONLY = {
    "env",
    "num_envs",
    "rollout",
    "memory",
    "memory_size",
    "normalize_obs",
    "normalize_reward",
    "hidden",
    "activation",
    "vectorization",
    "env_options",
    "wrappers",
    "evaluate_episodes",
    "stop_at_return",
    "noise_hold",
    "exploration",
    "squash",
    "adapt_learning_rate",
    "refresh",
    "reshuffle",
    "compile",
    "clip_schedule",
    "log_std",
    "shared",
    "orthogonal",
    "step_timeout",
    "exact_resume",
    "group_scale",
    "value_loss",
    "clip_grad_apart",
    "evaluation_max_steps",
}
LANGUAGE_ONLY = {
    "model",
    "data",
    "max_new",
    "slots",
    "reward",
    "gold",
    "held_out",
    "lora",
    "lora_targets",
    "template",
    "micro",
    "minibatch_rows",
    "kl_reference",
    "kl_reference_coef",
    "kl_reference_target",
    "reply",
    "turns",
    "temperature",
    "truncation",
    "fixed_length",
    "pretraining",
    "evaluate_rows",
    "critic",
    "critic_learning_rate",
    "packing",
    "aggregate",
    "resample",
    "moving",
    "center",
    "smoothing",
    "off_policy",
    "train_layers",
    "dtype",
    "columns",
    "stop",
    "too_long",
    "max_length",
    "constraint_rollbacks",
    "trust_region_kl",
    "whiten_rewards",
    "missing_score",
    "unconditional",
    "critic_warmup",
    "best_by",
}
STRONG = (
    CONTROL_ONLY
    | LANGUAGE_ONLY
    | {
        "learning_rate",
        "minibatches",
        "entropy_coef",
        "value_coef",
        "quiet",
        "learning_rate_schedule",
        "checkpoint_every",
        "evaluate_every",
        "max_grad_norm",
        "kl_coef",
        "adaptive_kl_target",
        "target_kl",
        "value_clip",
        "adam_eps",
        "keep_checkpoints",
        "log_every",
        "warmup",
    }
)
CALLEES = re.compile(r"(^|_)(Config|preset|settings?|config|replace|cfg)$|Config$|_config$")


def world_of(tree: ast.Module, path: Path) -> str:
    text = ast.unparse(tree)
    c = len(re.findall(r"understudy\.control|import control|control\.", text))
    m = len(re.findall(r"understudy\.language|import language|language\.", text))
    return "control" if c > 2 * m else "language" if m > 2 * c else "?"


def keys_of(path: Path):
    """(line, col, old, new, why) of dictionary keys and keywords that are config fields."""
    text = path.read_text()
    tree = ast.parse(text)
    default = world_of(tree, path)
    text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            items = [(k.value, k) for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]
            callee = ""
        elif isinstance(node, ast.Call):
            f = node.func
            callee = f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
            items = [(k.arg, k) for k in node.keywords if k.arg]
        else:
            continue
        names = {n for n, _ in items}
        hits = names & (CONTROL.keys() | LANGUAGE.keys())
        if not hits:
            continue
        strong = names & STRONG or CALLEES.search(callee)
        w = (
            "control"
            if names & CONTROL_ONLY and not names & LANGUAGE_ONLY
            else "language"
            if names & LANGUAGE_ONLY and not names & CONTROL_ONLY
            else default
        )
        for n, k in items:
            if n not in hits:
                continue
            table = {"control": CONTROL, "language": LANGUAGE}.get(w, {})
            new = table.get(n)
            yield k.lineno, k.col_offset, n, new, w, bool(strong), isinstance(node, ast.Dict), callee


if __name__ == "__main__":
    root = Path(sys.argv[1])
    count = Counter()
    weak = defaultdict(list)
    for d in ("understudy", "tests", "bench", "examples"):
        for p in sorted((root / d).rglob("*.py")):
            for line, _col, old, new, w, strong, _is_dict, callee in keys_of(p):
                count[(strong, w, new is not None)] += 1
                if not (strong and new):
                    weak[p.relative_to(root)].append((line, old, new, w, callee))
    print(count)
    for p, some in weak.items():
        print(p, some[:12])
