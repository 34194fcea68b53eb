"""The second step in sentences, keys of state and values: `third.py ROOT`; once only."""

import re
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])


def sub(files, *pairs):
    for file in files.split():
        path = ROOT / "understudy" / file
        text = path.read_text()
        for old, new in pairs:
            if old not in text:
                print("NOT THERE", file, repr(old))
            text = text.replace(old, new)
        path.write_text(text)


sub("cli/__init__.py", ("rollout, rows or max_new", "num_steps_per_env, completions_per_iteration or max_new_tokens"))
sub(
    "cli/help.py",
    ("shared memory memory_* rnn_*", "shared rnn_*"),
    ("unconditional held_out template chat_template", "unconditional held_out chat_template"),
    (
        '"rollout num_steps_per_env episodes exploration noise_hold rows completions_per_iteration max_new* fixed_length "\n'
        '        "temperature slots max_num_seqs group group_size resample dynamic_sampling_rounds keep_special_tokens "\n'
        '        "reply turns max_turns"',
        '"num_steps_per_env episodes exploration noise_hold completions_per_iteration max_new_tokens fixed_length "\n'
        '        "temperature max_num_seqs group_size dynamic_sampling_rounds keep_special_tokens reply max_turns"',
    ),
    (
        "steps total_tokens seed out output_dir preset device threads num_threads",
        "steps total_tokens seed output_dir preset device num_threads",
    ),
    ("keep_checkpoints evaluate* evaluation* samples", "keep_checkpoints evaluate* evaluation* log_samples"),
    ("model init init_*", "model init_*"),
)
sub(
    "control/ppo.py",
    ('f"minibatches is', 'f"num_minibatches is'),
    ("times rollout {", "times num_steps_per_env {"),
    ('else ["kl_coef", "adaptive', 'else ["kl_old_coef", "adaptive'),
    ('"epochs is 1"', '"num_epochs is 1"'),
    (
        'kl_coef = run.recipe_state.setdefault("kl_coef", cfg.kl_old_coef)',
        'kl_old_coef = run.recipe_state.setdefault("kl_old_coef", cfg.kl_old_coef)',
    ),
    ("kl_old_coef=kl_coef", "kl_old_coef=kl_old_coef"),
    ('run.recipe_state["kl_coef"]', 'run.recipe_state["kl_old_coef"]'),
)
sub(
    "control/config.py",
    ('"init is not set"', '"init_from is not set"'),
    ('"memory_size": "memory is', '"rnn_hidden_size": "rnn_type is'),
)
sub("control/policy.py", (", memory_size ", ", rnn_hidden_size "))
sub("control/reinforce.py", ('reasons["group_scale"]', 'reasons["scale_by_std"]'))
sub("control/initial_policy.py control/stage.py control/optimizer.py", ("init is {", "init_from is {"))
sub("control/optimizer.py", ("leave init_optimizer out", "leave init_optimizer out"))
sub("control/stage.py", ('policy_path(Path(cfg.init_from), "init")', 'policy_path(Path(cfg.init_from), "init_from")'))
sub(
    "language/config.py",
    ('"lora_alpha lora_targets"', '"lora_alpha lora_target_modules"'),
    ("give lora a rank", "give lora_rank a rank"),
    (" beside lora ", " beside lora_rank "),
    (" with lora 0:", " with lora_rank 0:"),
    ('"turns", "has', '"max_turns", "has'),
    ('"max_new",', '"max_new_tokens",'),
    ("give max_new instead", "give max_new_tokens instead"),
)
NO_EPOCHS = (
    '"epochs", "has no effect beside a number of steps: leave steps out"',
    '"num_epochs", "has no effect beside a number of tokens: leave total_tokens out"',
)
sub("language/dpo.py language/reward_model.py language/sft.py", NO_EPOCHS)
sub(
    "language/dpo.py", ('"smoothing", "has', '"label_smoothing", "has'), ("make form sigmoid", "make loss_type sigmoid")
)
GROUP = ('f"group is {', 'f"group_size is {'), ("and rows ({", "and completions_per_iteration ({")
sub("language/grpo.py language/reinforce.py", *GROUP)
sub("language/grpo.py language/ppo.py", ("raise epochs or minibatches", "raise num_epochs or num_minibatches"))
sub(
    "language/grpo.py",
    ("give max_new instead", "give max_new_tokens instead"),
    ("use scale", "use scale_by_std"),
    ("aggregate is {", "loss_aggregation is {"),
    ("use aggregate row", "use sequence_mean_token_mean"),
    ('!= "row"', '!= "sequence_mean_token_mean"'),
)
sub(
    "language/ppo.py",
    ('"standardize is', '"normalize_advantage is'),
    ('is_penalty, "kl_coef"', 'is_penalty, "kl_old_coef"'),
    ("on a kl_coef of 0, which stays 0: give kl_coef a", "on a kl_old_coef of 0, which stays 0: give kl_old_coef a"),
    ('recipe_state["kl_coef"]', 'recipe_state["kl_old_coef"]'),
    ('setdefault("kl_coef"', 'setdefault("kl_old_coef"'),
)
sub(
    "language/reinforce.py",
    ('is_leave_one_out, "group"', 'is_leave_one_out, "group_size"'),
    ('is_moving_mean, "moving"', 'is_moving_mean, "baseline_decay"'),
    ('recipe_state.get("moving"', 'recipe_state.get("baseline"'),
    ('recipe_state["moving"]', 'recipe_state["baseline"]'),
    ('if "moving" in recipe_state', 'if "baseline" in recipe_state'),
    ('"whitened"', '"standardize"'),
)
sub("language/reward_model.py", ("center is {", "center_coef is {"), ("leave center out", "leave center_coef out"))
sub("language/tokenizer.py", ("template is {", "chat_template is {"))
sub("language/lora.py", ("lora_targets is {", "lora_target_modules is {"))
sub("language/model.py", ('f"lora adapts', 'f"lora_rank adapts'), ("scale_by_std=scale", "scale=scale"))
sub("language/preflight.py", ("cut by max_new ", "cut by max_new_tokens "), ("mend it; rows", "fix it; rows"))
sub("language/reading.py", ("leave checkpointing out", "leave gradient_checkpointing out"))
sub("language/cast.py language/fitting.py", ('"max_new"', '"max_new_tokens"'))
sub(
    "language/stage.py",
    ('f", slots (now', 'f", max_num_seqs (now'),
    ('f"lower micro (now', 'f"lower micro_batch_size (now'),
    ("or set checkpointing", "or set gradient_checkpointing"),
)
sub("cli/language.py", ('dest="max_new"', 'dest="max_new_tokens"'), ("args.max_new,", "args.max_new_tokens,"))
sub("cli/show.py", ("keep some where samples is above 0", "keep some where log_samples is above 0"))
sub(
    "resuming.py",
    ('{"out": str(path)}', '{"output_dir": str(path)}'),
)
for old, new in {
    "threads": "num_threads",
    "rollout": "num_steps_per_env",
    "memory_size": "rnn_hidden_size",
    "rows": "completions_per_iteration",
    "slots": "max_num_seqs",
    "max_new": "max_new_tokens",
    "group": "group_size",
    "lora": "lora_rank",
}.items():
    sub(
        "run/foreign.py",
        (f'    "{old}": ', f'    "{new}": ') if old != "threads" else ('"num_threads"', '"num_threads"'),
    )
sub("run/guard.py run/store.py", ("start again with another out", "start again with another output_dir"))
sub("run/lineage.py", ('name != "out"', 'name != "output_dir"'))
sub("run/lock.py run/store.py cli/rehearse.py", ("out is '", "output_dir is '"))
sub("run/progress.py", ("recompute_advantages=True", "refresh=True"))
sub("study/compare.py", ('"seed", "out",', '"seed", "output_dir",'))
for path in (ROOT / "understudy").rglob("*.py"):
    text = path.read_text()
    text = re.sub(r'(["\'`])supervised\1', r"\1fault_tolerant\1", text)
    path.write_text(text)
