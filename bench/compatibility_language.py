"""The architectures of tests/architectures.py, tiny and made on the spot: each is trained correctly, or refused.

    python bench/compatibility.py language

Each model is saved with every dropout rate of its config at 0.3 and with sampling settings of its own (min_p, a repetition
penalty, suppressed tokens). It is trained correctly if its log-probs are those of its own logits in evaluation mode, packed
too where packing is accepted, the first loss of supervised fine-tuning is what these logits give, its sampler has the
log-probs of its trainer, and a GRPO run passes preflight. Writes bench/results/compatibility_language.json and
docs/compatibility-language.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.architectures import ARCHITECTURES, make  # noqa: E402
from understudy.language import grpo, sft, toy_language  # noqa: E402
from understudy.language.data.records import pad_sequences  # noqa: E402
from understudy.language.model.forward import check_forward_consistency  # noqa: E402
from understudy.language.model.policy import Policy  # noqa: E402
from understudy.language.rollout.generate import build_trajectory, generate  # noqa: E402
from understudy.run.config import RequestError  # noqa: E402

RESULTS, PAGE = ROOT / "bench" / "results" / "compatibility_language.json", ROOT / "docs" / "compatibility-language.md"
CLOSE = 5e-5  # nats: float32, another order of sums
SETTINGS = {"min_p": 0.2, "repetition_penalty": 1.5, "suppress_tokens": [5, 6, 7], "do_sample": True}
ROWS = [torch.randint(3, 177, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (23, 9, 14, 5)]
LIMIT = 6  # tokens of a completion


def examine(name: str, home: Path) -> dict[str, Any]:
    """What happens to an architecture: its numbers where it is trained, the sentence where it is refused."""
    began, folder = time.perf_counter(), home / name
    found: dict[str, Any] = {"name": name, "kind": ARCHITECTURES[name].kind}
    _save(name, folder)
    try:
        policy = Policy.from_pretrained(folder)
        found |= {"class": type(policy.model).__name__, "attention": _attention(policy)}
        check_forward_consistency(policy, ROWS)
        truth = _true_log_probs(folder)
        found["log_prob_gap"] = _gap(policy, truth)
        found |= _packed(policy, truth) | _sampled(policy) | _trained(folder, home / "data", truth)
        found["outcome"] = "trained" if _correct(found) else "wrong"
    except RequestError as error:
        found |= {"outcome": "refused", "sentence": str(error).replace(str(folder), name)}
    except Exception as error:
        found |= {"outcome": "wrong", "sentence": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return found | {"seconds": round(time.perf_counter() - began, 2)}


def _save(name: str, folder: Path) -> None:
    """The model with dropout and sampling settings of its own, and a tokenizer."""
    model = make(name)
    for setting, value in SETTINGS.items():
        setattr(model.generation_config, setting, value)
    model.save_pretrained(folder)
    toy_language.make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = ARCHITECTURES[name].fields
    rates = {key: 0.3 for key, x in config.items() if isinstance(x, float) and "drop" in key and key not in own}
    (folder / "config.json").write_text(json.dumps(config | rates))


def _true_log_probs(folder: Path) -> list[torch.Tensor]:
    """log p of each next token by the model's own logits, row by row, in evaluation mode with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return [_next_tokens(model, row) for row in ROWS]


@torch.no_grad()
def _next_tokens(model: Any, row: list[int]) -> torch.Tensor:
    logp = model(torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(dim=-1)
    return logp[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@torch.no_grad()
def _gap(policy: Policy, truth: list[torch.Tensor]) -> float:
    """The largest distance of the policy's log-probs, padded rows together, from the truth."""
    text = pad_sequences(ROWS, [1] * len(ROWS))
    found = policy.train()(text)[0].log_prob(text.action)
    gaps = [found[i, : len(true)] - true for i, true in enumerate(truth)]
    return float(torch.cat(gaps).abs().max())


def _packed(policy: Policy, truth: list[torch.Tensor]) -> dict[str, Any]:
    policy.packing = True
    try:
        check_forward_consistency(policy, ROWS)
        return {"packing": "accepted", "packed_gap": _gap(policy, truth)}
    except RequestError:
        return {"packing": "refused"}
    finally:
        policy.packing = False


@torch.no_grad()
def _sampled(policy: Policy) -> dict[str, Any]:
    prompts = [row[:4] for row in ROWS]
    said = generate(policy, prompts, limit=LIMIT, stops=frozenset([2]), seeds=range(len(prompts)))
    record = build_trajectory(prompts, said)
    gap = (policy(record.obs)[0].log_prob(record.action) - record.behavior_logprob)[record.mask].abs().max()
    return {"sampler": "own cache" if policy.uses_own_kv_cache else "Hugging Face", "sampler_gap": float(gap)}


def _trained(folder: Path, data: Path, truth: list[torch.Tensor]) -> dict[str, Any]:
    """Runs of `sft` and `grpo`, and how far the first loss is from the mean of the truth."""
    common = {"model": str(folder), "quiet": True, "held_out": 0}
    out = folder.parent / "runs" / folder.name
    texts = data / "rows.jsonl"
    learned = sft.train(sft.Config(data=str(texts), output_dir=str(out / "sft"), batch_size=4, num_epochs=3, **common))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # for some architectures, of another class than was saved
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] + [2] for line in texts.read_text().splitlines()]
    expected = -torch.cat([_next_tokens(model, row) for row in rows]).mean()
    losses = [line["loss"] for line in learned.metrics]
    asked = {
        "data": str(data / "prompts.jsonl"),
        "output_dir": str(out / "grpo"),
        "reward": last_digits,
        "log_samples": 0,
    }
    sizes = {
        "completions_per_iteration": 8,
        "group_size": 4,
        "fixed_length": LIMIT,
        "total_tokens": 8 * LIMIT,
        "evaluate_rows": 4,
        "max_length": 16,
    }
    ruled = grpo.train(grpo.Config(**common, **asked, **sizes))
    return {
        "sft_loss_gap": abs(losses[0] - float(expected)),
        "sft_losses": [round(x, 3) for x in losses],
        "grpo_iterations": len(ruled.metrics),
    }


def _attention(policy: Policy) -> str:
    config = policy.model.config.get_text_config()
    return policy.model.config._attn_implementation if hasattr(config, "num_attention_heads") else "none"


def _correct(found: dict[str, Any]) -> bool:
    gaps = [found[name] for name in ("log_prob_gap", "packed_gap", "sampler_gap", "sft_loss_gap") if name in found]
    return max(gaps) <= CLOSE and found["sft_losses"][-1] < found["sft_losses"][0] and found["grpo_iterations"] == 1


def last_digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(ids) % 10) for ids in completion_ids]


def furnish(home: Path) -> None:
    """Texts and prompts of the made-up language."""
    (home / "data").mkdir(parents=True)
    toy_language.write_jsonl([{"text": text} for text in toy_language.sentences(4, 0)], home / "data" / "rows.jsonl")
    toy_language.write_jsonl(toy_language.prompts(8, 0), home / "data" / "prompts.jsonl")


def page(results: list[dict[str, Any]]) -> str:
    """The results as docs/compatibility-language.md."""
    counts = Counter(found["outcome"] for found in results)
    lines = [
        "# Language models of other architectures",
        "",
        "Written by `make compatibility`; the numbers are in `bench/results/compatibility_language.json`. "
        f"Of {len(results)} architectures of transformers {transformers.__version__}, {counts['trained']} are trained "
        f"correctly and {counts['refused']} are refused.",
        "",
        "Each is made tiny, with weights at random, every dropout rate of its config at 0.3, and sampling settings of its "
        f"own. Trained correctly means, to {CLOSE:g} nats: log-probs are those of the model's own logits in evaluation "
        "mode, also packed where packing is accepted; the first loss of `sft` is what these logits give, and it falls; the "
        "sampler's log-probs are the trainer's; `grpo` passes preflight. A model whose packed rows see each other runs "
        "without packing, and `--packing` is refused. *Own cache* is our generation in slots; other models are sampled row "
        "by row by Hugging Face's `generate`, which is slower.",
        "",
        "| architecture | kind | attention | log-probs off by | packing | sampler | sampler off by | outcome |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        row = [found.get("class", ""), found["kind"], found.get("attention", "")]
        gaps = [f"{found[name]:.0e}" if name in found else "" for name in ("log_prob_gap", "sampler_gap")]
        row += [gaps[0], found.get("packing", ""), found.get("sampler", ""), gaps[1]]
        lines.append(f"| `{found['name']}` | " + " | ".join([*row[1:], f"**{found['outcome']}**"]) + " |")
    refused = [found for found in results if "sentence" in found]
    lines += ["", "## What is refused, and how", ""]
    lines += [f"- `{found['name']}`: {found['sentence']}" for found in refused]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examine every architecture; 1 if one is neither trained correctly nor refused."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = []
    with tempfile.TemporaryDirectory() as home:
        furnish(Path(home))
        for name in ARCHITECTURES:
            results.append(examine(name, Path(home)))
            print(f"{name:20} {results[-1]['outcome']:8} {results[-1]['seconds']:6.2f} s", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    wrong = [found["name"] for found in results if found["outcome"] == "wrong"]
    print(f"{len(results)} architectures, wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))
