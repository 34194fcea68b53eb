"""The kill test on peers: `make resume-peers`. SB3 2.9.2 and TRL 1.16.0 in environments of their own, ours beside them.

Each library trains a small run without interruption; trains the same run, is killed with SIGKILL after its checkpoint, and
goes on in the way its documentation gives; the two final policies are compared byte by byte. Settings are its defaults but
for sizes, and for what makes its own run repeatable: a seed, one thread. That it repeats itself is checked first: a library
that does not would be shown differing for another reason. Writes bench/results/resume_peers.json and docs/resume-peers.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PEERS = {  # name -> the Python that has it, how it goes on
    "Understudy": (ROOT / ".venv/bin/python", "`understudy resume RUN`"),
    "Stable-Baselines3": (
        ROOT / ".venv-oracles/bin/python",
        "`CheckpointCallback`; `PPO.load(newest, env)`, then `learn(what is left, reset_num_timesteps=False)`",
    ),
    "TRL": (
        ROOT / ".venv-oracles-trl-1.16.0/bin/python",
        "`save_steps`; `GRPOTrainer.train(resume_from_checkpoint=True)`",
    ),
}
PEERS["TRL, samples reused"] = PEERS["TRL"]
TOTAL, SAVED, KILLED = 2048, 1024, 1536  # control: steps in all, at the checkpoint, when it is killed
UPDATES, SAVED_AT, KILLED_AT = 8, 4, 6  # language: optimizer steps


def digest(tensors: dict[str, Any]) -> str:
    """sha256 over names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def understudy(out: Path, job: str) -> str:
    """Ours: PPO on CartPole with the same sizes."""
    from safetensors.torch import load_file

    import understudy
    from understudy.control import ppo

    if job == "resume":
        run = understudy.resume(out)
    else:
        config = ppo.Config(
            env="CartPole-v1", num_envs=2, num_steps_per_env=64, steps=TOTAL, checkpoint_every=SAVED // 128, seed=1,
            output_dir=str(out), quiet=True,
        )  # fmt: skip
        iterations = ppo.iterate(config)
        while True:
            try:
                line = next(iterations)
            except StopIteration as stop:
                run = stop.value
                break
            if job == "killed" and line["steps"] >= KILLED:
                die()
    return digest(load_file(run.path / "policy" / "policy.safetensors"))


def stable_baselines3(out: Path, job: str) -> str:
    import gymnasium
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)

    class Killed(BaseCallback):
        def _on_step(self) -> bool:
            if job == "killed" and self.num_timesteps >= KILLED:
                die()
            return True

    envs = make_vec_env(lambda: gymnasium.make("CartPole-v1"), n_envs=2, seed=1)
    if job == "resume":
        newest = max(out.glob("ppo_*_steps.zip"), key=lambda path: int(path.stem.split("_")[1]))
        model = PPO.load(newest, env=envs)
        model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
    else:
        model = PPO("MlpPolicy", envs, n_steps=64, seed=1)
        saving = CheckpointCallback(save_freq=SAVED // 2, save_path=str(out), name_prefix="ppo")
        model.learn(TOTAL, callback=CallbackList([saving, Killed()]))
    return digest(model.policy.state_dict())


def trl(out: Path, job: str, **reuse: int) -> str:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    set_seed(1)
    names = ("<pad>", "<s>", "</s>", *"abcdefghijklmnopqrst")
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(names), eos_token_id=2, pad_token_id=0, bos_token_id=1, **sizes)
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.split().count("a")) for text in completions]

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if job == "killed" and state.global_step >= KILLED_AT:
                die()

    letters = [chr(ord("a") + i) for i in range(20)]
    data = Dataset.from_list([{"prompt": f"{a} {b}"} for a in letters for b in letters])
    config = GRPOConfig(
        output_dir=str(out), max_steps=UPDATES, save_steps=SAVED_AT, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, seed=1, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-3,
        **reuse,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Killed()],
    )
    before = digest(dict(model.state_dict()))
    trainer.train(resume_from_checkpoint=True if job == "resume" else None)
    after = digest(dict(model.state_dict()))
    assert before != after, "nothing was learned: the comparison would say nothing"
    return after


JOBS = {
    "Understudy": understudy,
    "Stable-Baselines3": stable_baselines3,
    "TRL": trl,
    "TRL, samples reused": partial(
        trl, num_iterations=2, steps_per_generation=3
    ),  # six steps: the checkpoint is within
}


def ask(peer: str, out: Path, job: str) -> str:
    """One job in the peer's own environment; the digest of its final policy, or nothing where it was killed."""
    python, _ = PEERS[peer]
    done = subprocess.run(
        [str(python), __file__, "--peer", peer, "--out", str(out), "--job", job],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{peer}, {job}: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        print(JOBS[args.peer](args.out, args.job))
        return
    rows = []
    for peer, (python, how) in PEERS.items():
        if not python.exists():
            rows.append({"peer": peer, "skipped": f"{python} is missing: `make oracles oracles-trl` makes it"})
            continue
        packages = {"Understudy": "understudy-rl", "Stable-Baselines3": "stable-baselines3"}
        package = packages.get(peer, "trl")
        version = f"from importlib.metadata import version; print(version({package!r}), version('torch'))"
        versions = subprocess.run(
            [str(python), "-c", version], capture_output=True, text=True, check=True
        ).stdout.split()
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            whole, again = ask(peer, home / "whole", "whole"), ask(peer, home / "again", "whole")
            if ask(peer, home / "run", "killed"):
                raise RuntimeError(f"{peer} was not killed")
            resumed = ask(peer, home / "run", "resume")
        found = {"peer": peer, "version": versions[0], "torch": versions[1], "how": how}
        rows.append(
            found | {"repeats": whole == again, "same_bytes": whole == resumed, "digests": [whole, again, resumed]}
        )
        print(rows[-1], file=sys.stderr)
    results = ROOT / "bench" / "results" / "resume_peers.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(rows, indent=2) + "\n")
    (ROOT / "docs" / "resume-peers.md").write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Killed and resumed: ours and peers",
        "",
        "`make resume-peers` (`python bench/resume_peers.py`): the same small run without interruption, and killed with "
        "SIGKILL after a checkpoint and gone on with as its documentation says; one thread, CPU, float32, one seed. "
        f"Control: PPO on CartPole-v1, 2 copies, {TOTAL} steps, checkpoint at {SAVED}, killed at {KILLED}. TRL: GRPO on a "
        "one-layer Llama, "
        f"{UPDATES} optimizer steps, checkpoint at {SAVED_AT}, killed after {KILLED_AT}; once with fresh samples at every "
        "step, once with samples that serve six steps (num_iterations 2, steps_per_generation 3). Ours checkpoints between "
        "iterations only, so that no samples are ever half used. Ours for language: "
        "[reliability.md](reliability.md).",
        "",
        "| library | versions | how it goes on | repeats itself | resumed = never interrupted |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['peer']} | - | - | - | {row['skipped']} |")
            continue
        says = {True: "yes, every byte", False: "no"}
        lines.append(
            f"| {row['peer']} | {row['version']}, torch {row['torch']} | {row['how']} | {says[row['repeats']]} | "
            f"{says[row['same_bytes']]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
