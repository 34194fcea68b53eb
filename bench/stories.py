"""PPO with a critic on real pretrained weights: a model of children's stories learns to sound positive: `make stories`.

256 openings, sampled once from the model itself; a reward model on one half of SST-2; gold, which is never trained on, on
the other half (bench/gold_words.py). Each seed is a PPO run; its policy and the model it began as continue the 64 held-out
openings eight times each, with the same seeds. Results are saved as they come under bench/results/stories/; what is found
there is not run again. All of them together write docs/stories.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gold_words
import torch
import transformers

from understudy.language import ppo, reward_model, training
from understudy.language.data.records import Tokenizer, make_prompts
from understudy.language.evaluate import sample_evaluation_rollout
from understudy.language.model.policy import Policy, Reference
from understudy.language.model.reward_model import load_reward_model
from understudy.language.rewards.reward_sum import distinct_n
from understudy.language.rollout.generate import generate
from understudy.language.rollout.sampler import Rollout, Sampler
from understudy.reduce import fraction_interval, mean_interval
from understudy.run.seeds import derive_seed

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "shared" / "data" / "stories260K"
RESULTS = HERE / "results" / "stories"
RUNS = HERE.parent / "runs" / "stories"
PAGE = HERE.parent / "docs" / "stories.md"
SEEDS = list(range(201, 221))
STOP = ("<s>",)  # its stories end with BOS; the </s> of its config it never says

OPENINGS, HELD_OUT, OPENINGS_SEED = 256, 64, 0
ROWS, DISTINCT_ROWS, TOKENS, SHOWN, SHIFTED = 512, 256, 40, 20, 16
PIECES, PIECE_WORDS = 8, (4, 14)
REWARD_MODEL = {
    "seed": 100,  # of one reward model, which all seeds share
    "learning_rate": 2e-3,
    "warmup": 0.05,
    "num_epochs": 1,
    "batch_size": 64,
}
PPO = {
    "total_tokens": 40 * 128 * TOKENS,
    "completions_per_iteration": 128,
    "max_new_tokens": TOKENS,
    "truncation": "terminal",
    "learning_rate": 5e-4,
    "num_epochs": 1,
    "num_minibatches": 2,
    "critic": "separate",
    "critic_learning_rate": 1e-3,
    "value_coef": 0.5,
    "value_clip": 0.0,
    "lam": 0.98,
    "kl_reference": "exact",
    "kl_reference_coef": 0.35,
    "max_num_seqs": 128,
}
TRIED = """\
Found while settings were sought, on the base's completions of the held-out openings and on PPO seeds 100 and 101. Gold was
looked at for all of it, so it chose among settings; it never entered a reward.

| reward model, seed 100 | accuracy, dev | correlation with gold on the base's completions |
|---|---|---|
| whole reviews, 2 epochs, learning rate 1e-3, 32 rows | 0.695 | 0.09 |
| whole reviews, 4 epochs, learning rate 1e-3, 32 rows | 0.716 | 0.14 |
| whole reviews, 3 epochs, learning rate 2e-3, 32 rows, weight decay 0.3 | 0.688 | 0.23 |
| whole reviews, 2 epochs, learning rate 3e-3, 32 rows | 0.653 | 0.17 |
| whole reviews, 2 epochs, learning rate 2e-3, 16 rows | 0.634 | 0.26 |
| stretches, as above | 0.680 | 0.26 |

Accuracy on reviews does not say what a reward model is worth on stories. Naive Bayes was the first gold; logistic
regressions on the two halves agree better with each other on the base's completions (correlation 0.55 against 0.38) at the
same accuracy.

| PPO: critic, steps, learning rate, KL | seed | what came of it; distinct-4 and NLL relative to the base's |
|---|---|---|
| shared, 4 minibatches twice, 1e-3, KL paid, target 9 | 100 | iteration 9: KL 21, distinct-4 0.58; stopped |
| the same with 3e-4, target 8 | 100 | iteration 9: KL 8, distinct-4 0.71; stopped |
| separate, 4 minibatches twice, 3e-4, KL paid, 0.15 | 100 | iteration 13: KL 5.6, distinct-4 0.84, score 0.40; stopped |
| separate, 2 minibatches once, 5e-4, KL exact in the loss, 0.3 | 100 | gold +0.250, KL 6.0, distinct-4 0.864, NLL 1.057 |
| the same with 0.4 | 101 | gold +0.197, KL 3.8, distinct-4 0.921, NLL 1.032 |

A policy that takes many large steps pays for its reward with more KL and with diversity: few steps on fresh rows, and a KL
whose gradient has no noise, keep the samples apart. The coefficient was put between the last two."""
WANTED = "gold +0.15 or more, KL 12 nats or less, distinct-4 0.85 or more, NLL 0.75 to 1.25"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    sampled = once("openings", write_openings)
    judged = once("reward-model", learn_to_judge)
    found = [once(f"seed-{seed}", lambda seed=seed: run(seed)) for seed in args.seeds]
    text = page(sampled, judged, found)
    print(text)
    if args.seeds == SEEDS:
        PAGE.write_text(text, encoding="utf-8")


def once(name: str, make: Any) -> dict[str, Any]:
    """A result as it was saved, or made now and saved."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        began = time.time()
        found = make() | {"wall_seconds": time.time() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def write_openings() -> dict[str, Any]:
    """Different openings of 8 to 16 tokens after BOS, as the model samples them, as text that reads as the same tokens."""
    policy, tokenizer = Policy.from_pretrained(MODEL), Tokenizer.load(MODEL, stop=STOP)
    rows, bos = 4 * OPENINGS, tokenizer.encode_prompt("")
    lengths = torch.randint(8, 17, (rows,), generator=torch.Generator().manual_seed(OPENINGS_SEED)).tolist()
    seeds = [derive_seed(OPENINGS_SEED, "opening", row) for row in range(rows)]
    said = generate(policy, [bos] * rows, limit=16, stops=tokenizer.stops, seeds=seeds)
    found: dict[str, None] = {}
    skipped = {"equal": 0, "ended": 0, "other tokens": 0}
    for completion, length in zip(said, lengths, strict=True):
        ids = completion.ids[:length]
        text = tokenizer.decode(ids)
        if len(ids) < length or ids[-1] in tokenizer.stops:
            skipped["ended"] += 1
        elif tokenizer.encode_prompt(text) != [*bos, *ids]:
            skipped["other tokens"] += 1
        elif text in found:
            skipped["equal"] += 1
        else:
            found[text] = None
        if len(found) == OPENINGS:
            break
    return {"seed": OPENINGS_SEED, "skipped": skipped, "openings": list(found)}


def data() -> Path:
    """The openings as the recipe reads them."""
    path = RUNS / "openings.jsonl"
    rows = json.loads((RESULTS / "openings.json").read_text(encoding="utf-8"))["openings"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows), encoding="utf-8")
    return path


def judge_path() -> Path:
    """The reward model's directory; trained where it is not there yet."""
    path = RUNS / "reward-model"
    if not (path / "reward_model" / "config.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        reviews, _ = gold_words.halves()
        source = RUNS / "reviews.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in pieces(reviews)), encoding="utf-8")
        reward_model.train(
            reward_model.Config(model=str(MODEL), data=str(source), output_dir=str(path), quiet=True, **REWARD_MODEL)
        )
    return path


def pieces(reviews: list[gold_words.Review]) -> list[dict[str, Any]]:
    """Stretches of each review's words under the review's label: completions are short and begin in mid-sentence."""
    source, found = random.Random(0), []
    for label, text in reviews:
        words = text.split()
        for _ in range(PIECES):
            length = min(len(words), source.randint(*PIECE_WORDS))
            start = source.randint(0, len(words) - length)
            found.append({"text": " ".join(words[start : start + length]), "label": label})
    return found


def learn_to_judge() -> dict[str, Any]:
    """The reward model and gold, on reviews that neither has seen."""
    model = load_reward_model(str(judge_path() / "reward_model"))
    found: dict[str, Any] = {"settings": REWARD_MODEL}
    for name in ("dev", "test"):
        reviews = gold_words.load(name)
        raw = model.score([model.tokenizer.encode_prompt(text) for _, text in reviews]) * model.scale + model.mean
        label = torch.tensor([label == 1 for label, _ in reviews])
        gold = torch.tensor([gold_words.logit(text) > 0 for _, text in reviews])
        found[name] = {
            "rows": len(reviews),
            "reward_model": fraction_interval(((raw > 0) == label).float()),
            "gold": fraction_interval((gold == label).float()),
        }
    return found


def run(seed: int, *, out: Path | None = None, **changes: Any) -> dict[str, Any]:
    """One PPO run and what came of it."""
    out = out or RUNS / f"seed-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    began = time.time()
    settings = {**PPO, **changes}
    cfg = ppo.Config(
        model=str(MODEL),
        data=str(data()),
        reward=(str(judge_path()),),
        gold=(f"{HERE / 'gold_words.py'}:positive",),
        stop=STOP,
        held_out=HELD_OUT,
        seed=seed,
        output_dir=str(out),
        quiet=True,
        **settings,
    )
    done = ppo.train(cfg)
    undone = sum(line.get("updates_skipped", 0) for line in done.metrics)
    found = {"seed": seed, "seconds": time.time() - began, "settings": settings, "updates_undone": undone}
    return found | examine(Path(done.path))


@torch.no_grad()
def examine(path: Path) -> dict[str, Any]:
    """The final policy beside the model it began as: held-out openings, the same seeds."""
    policy, base = Policy.from_pretrained(path / "policy"), Policy.from_pretrained(MODEL)
    sampler, scorer = (
        held_out(),
        load_reward_model(str(judge_path() / "reward_model")).make_reward_term(Tokenizer.load(MODEL, stop=STOP)),
    )
    which = [i % len(sampler) for i in range(ROWS)]
    found: dict[str, Any] = {"held_out": len(sampler)}
    said = {
        name: sample_evaluation_rollout(model, sampler, which) for name, model in (("policy", policy), ("base", base))
    }
    for name, told in said.items():
        likely = torch.tensor(gold_words.positive([str(text) for text in told.scoring_input.completions]))
        found[name] = {
            "gold": fraction_interval((likely > 0.5).float()),
            "score": mean_interval(scorer(told.scoring_input)),
            "distinct_4": distinct_n([completion.ids for completion in told.completions[:DISTINCT_ROWS]], 4),
            "nll": surprise(base, told),
            "length": sum(len(completion.ids) for completion in told.completions) / ROWS,
            "stopped": sum(completion.stopped for completion in told.completions) / ROWS,
        }
    text = said["policy"].trajectory.obs
    found["kl"] = mean_interval(policy(text)[0].kl(Reference(base)(text)).sum(dim=1))
    found["words"] = shifted(*(said[name].scoring_input.completions for name in ("base", "policy")))
    pairs = zip(*(said[name].scoring_input.completions for name in ("base", "policy")), strict=True)
    openings = [prompt.text for prompt in said["base"].prompts]
    found["samples"] = [[o, b, p] for o, (b, p) in zip(openings, pairs, strict=True)][:SHOWN]
    return found | judgement(found)


def shifted(base: Sequence[Any], policy: Sequence[Any]) -> dict[str, int]:
    """By how many completions more (or less) the policy says a word than the base does; the largest changes."""
    change = Counter(word for text in policy for word in gold_words.words(text))
    change.subtract(word for text in base for word in gold_words.words(text))
    ordered = change.most_common()
    return dict(ordered[:SHIFTED] + ordered[-SHIFTED:])


def judgement(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that are asked for, and whether they are reached."""
    policy, base = found["policy"], found["base"]
    rise, nll = policy["gold"][0] - base["gold"][0], policy["nll"] / base["nll"]
    distinct = policy["distinct_4"] / base["distinct_4"]
    reached = rise >= 0.15 and found["kl"][0] <= 12 and distinct >= 0.85 and 0.75 <= nll <= 1.25
    return {"rise": rise, "distinct_ratio": distinct, "nll_ratio": nll, "reached": reached}


def held_out() -> Sampler:
    """The openings that the recipe keeps from training, in the order of the file."""
    tokenizer = Tokenizer.load(MODEL, stop=STOP)
    rows = [json.loads(line) for line in data().read_text(encoding="utf-8").splitlines()]
    found = make_prompts(rows, tokenizer, max_length=64)
    _, kept = training.hold_out([prompt.ids for prompt in found], HELD_OUT)
    return Sampler([found[i] for i in kept], tokenizer, limit=TOKENS, has_fixed_length=False, seed=0, max_num_seqs=128)


@torch.no_grad()
def surprise(base: Policy, told: Rollout) -> float:
    """Mean -log p in nats a token of what was said, under the model that training began from."""
    record = told.trajectory
    return -float(base(record.obs)[0].log_prob(record.action)[record.mask].mean())


def page(sampled: dict[str, Any], judged: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """docs/stories.md."""
    skipped = ", ".join(f"{count} {name}" for name, count in sampled["skipped"].items())
    lines = [
        "# PPO on a pretrained story model",
        "",
        "`make stories` (`python bench/stories.py`) writes this page; data from `../shared/data`. "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, CPU, "
        "1 thread; seconds are of the clock, beside other work on the same two cores; some runs were paused meanwhile.",
        "",
        "stories260K, a Llama of 260,032 parameters, continues openings that it sampled itself; PPO with a critic and KL to "
        "the reference teaches it to sound positive to a reward model. Gold is never trained on and shares no weights with "
        "the policy: a word-level classifier, which reads the completion without its opening.",
        "",
        f"- **Openings**: {OPENINGS} different ones of 8 to 16 tokens after BOS, seed {sampled['seed']}; {HELD_OUT} of them "
        f"held out. Left out: {skipped} (already there; ended early; read as other tokens when given as text).",
        "- **Reward model**: the story model's trunk on half of SST-2's training reviews, each cut into "
        f"{PIECES} stretches of {PIECE_WORDS[0]} to {PIECE_WORDS[1]} words ({named(judged['settings'])}); "
        "all seeds share it. Accuracy on whole reviews: "
        f"{interval(judged['dev']['reward_model'])} on dev ({judged['dev']['rows']}), "
        f"{interval(judged['test']['reward_model'])} on test ({judged['test']['rows']}). It scores opening and completion "
        "together.",
        "- **Gold**: logistic regression over words and pairs of words on the other half. Accuracy: "
        f"{interval(judged['dev']['gold'])} on dev, {interval(judged['test']['gold'])} on test. A completion is positive "
        "where it is likelier positive than not.",
        f"- **PPO**: {named(found[0]['settings'])}; the rest as the config has it. Settings were found on seeds from 100 "
        "on. Preflight is on.",
        f"- **Measured** on the final policy: {ROWS} completions of up to {TOKENS} tokens, {ROWS // HELD_OUT} of each "
        "held-out opening, and as many of the base's with the same seeds. KL is exact over the vocabulary, summed over a "
        f"completion. Distinct-4 over the first {DISTINCT_ROWS} completions, and NLL a token under the base, are relative "
        "to the base's own. Intervals: 95 %.",
        "",
        f"Wanted in at least 19 of 20 seeds: {WANTED}. Here: {sum(f['reached'] for f in found)} of {len(found)}. The KL "
        f"trust region undid {sum(int(f['updates_undone']) for f in found)} updates in "
        f"{sum(bool(f['updates_undone']) for f in found)} seeds.",
        "",
        "| seed | gold, base | gold, policy | rise | reward, base | reward, policy | KL | distinct-4 | NLL | length | ended "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(f) for f in found),
        "",
        "## What it learned to say",
        "",
        f"Completions of {ROWS} that have a word, policy less base, mean over seeds, largest changes: {moved(found)}. "
        "Words of praise in film reviews (fun, family), and small words in which their praise and blame differ (with and in "
        "against would, was and to), rather than happier plots: that is what a reward model from film reviews knows of "
        "stories, and gold, from other film reviews, cannot tell the two apart.",
        "",
        "## What was tried",
        "",
        TRIED,
        "",
        f"## {SHOWN} samples, not selected",
        "",
        f"The first {SHOWN} held-out openings, once each; the base beside the policy of seed {found[0]['seed']}.",
        "",
        "| opening | base | policy |",
        "|---|---|---|",
        *(f"| {' | '.join(cell(text) for text in sample)} |" for sample in found[0]["samples"]),
    ]
    return "\n".join(lines) + "\n"


def moved(found: list[dict[str, Any]]) -> str:
    """The words whose use changed in every seed, by how much."""
    everywhere = set.intersection(*(set(f["words"]) for f in found))
    mean = {word: sum(f["words"][word] for f in found) / len(found) for word in everywhere}
    return ", ".join(f"{word} {mean[word]:+.0f}" for word in sorted(mean, key=lambda word: -mean[word]))


def row(f: dict[str, Any]) -> str:
    base, policy = f["base"], f["policy"]
    cells = [
        f"{f['seed']}",
        f"{base['gold'][0]:.3f}",
        interval(policy["gold"]),
        f"**{f['rise']:+.3f}**",
        f"{base['score'][0]:.2f}",
        f"{policy['score'][0]:.2f}",
        f"{f['kl'][0]:.2f}",
        f"{f['distinct_ratio']:.3f}",
        f"{f['nll_ratio']:.3f}",
        f"{policy['length']:.1f}",
        f"{policy['stopped']:.3f}",
        f"{f['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def interval(found: list[float]) -> str:
    mean, low, high = found
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def cell(text: str) -> str:
    """Text inside a table: no line ends, no bars."""
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    main()
