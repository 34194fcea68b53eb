"""The language bench: medians and ratios by hand, and the page that stored results make."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    """bench/language.py, which is a script beside its own helpers."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("language")
    sys.path.remove(str(BENCH))


def told(seconds, *, tokens=100, warmup=1, end_to_end=10.0, peak=0.0):
    """What one process has to tell. `peak` in MiB, of which 30 are imports and 20 the models."""
    return {
        "warmup": warmup,
        "seconds": seconds,
        "tokens": [tokens] * len(seconds),
        "end_to_end": end_to_end,
        "peak_bytes": peak * 2**20,
        "imports_bytes": 30 * 2**20,
        "model_bytes": 20 * 2**20,
        "load": 0.5,
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    }


def measured(ours, peer, **more):
    about = {"device": "cpu", "processor": "a processor", "python": "3.11", "date": "2026-01-01", "warmup": 1}
    return {**about, "ours": ours, "peer": peer, "skipped": "", **more}


def test_a_process_is_worth_the_median_of_its_iterations_after_the_warm_up(bench):
    # 100 tokens in 9 s do not count; 100/1, 100/2, 100/4 have the median 50
    assert bench.rate(told([9.0, 1.0, 2.0, 4.0])) == 50
    assert bench.seconds(told([9.0, 1.0, 2.0, 4.0])) == 2


def test_tokens_a_second_do_not_hang_on_how_long_completions_happen_to_be(bench):
    assert bench.rate(told([1.0, 2.0], tokens=100)) == bench.rate(told([1.0, 4.0], tokens=200))


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians(bench):
    ours = [told([0.0, s], warmup=1) for s in (1.0, 2.0, 4.0)]  # 100, 50, 25 tokens/s
    peer = [told([0.0, s], warmup=1) for s in (5.0, 4.0, 20.0)]  # 20, 25, 5

    # 100/20 = 5, 50/25 = 2, 25/5 = 5: median 5; the medians, 50 and 20, would give 2.5
    assert bench.ratio(measured(ours, peer), bench.rate) == pytest.approx(5)


def test_memory_is_what_lies_above_imports_and_models(bench):
    assert bench.memory(told([1.0], peak=150)) == 100  # 150 - 30 - 20


def test_a_read_row_costs_two_operations_a_weight_and_attention_over_what_is_behind(bench):
    work = importlib.import_module("language_work")

    # a layer's weights: q 128*128, k and v 128*64 each, o 128*128, three of 128*352: 184,320
    # rows of 1 and 3 tokens: 4 tokens; behind them 1 and 1+2+3 columns; 4 layers of 2*184320*4 + 4*128*7
    assert work.trunk_flops([1, 3]) == 4 * (2 * 184_320 * 4 + 4 * 128 * 7)


def test_an_epoch_of_a_separate_critic_reads_two_trunks_three_times(bench):
    work = importlib.import_module("language_work")
    trunk, head = work.trunk_flops([5]), 2 * 128 * 512 * 3
    given = {"vocabulary": 512, "epochs": 4}

    # trunks: sampler, reference, reward, V: 4, and 4 * 3 an epoch's trunk; heads: sampler, reference, 4 * 3
    assert work.ppo_flops([5], 3, critic="shared", **given) == 16 * trunk + 14 * head
    assert work.ppo_flops([5], 3, critic="separate", **given) == 28 * trunk + 14 * head


def test_the_page_is_made_from_what_is_stored_and_the_rest_of_it_stays(bench, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(
        "# Performance\n\n<!-- control -->\nCartPole\n<!-- /control -->\n\n"
        "<!-- language -->\nyesterday\n<!-- /language -->\n"
    )
    pairs = [told([9.0, 0.5], end_to_end=4.0, peak=150)], [told([9.0, 1.5], end_to_end=12.0, peak=450)]
    (tmp_path / "language-grpo-32k.json").write_text(json.dumps(measured(*pairs)))
    (tmp_path / "language-grpo-512.json").write_text(json.dumps(measured([], [], skipped="TRL 1.16 is not here")))
    (tmp_path / "language-ppo-shared.json").write_text(json.dumps(measured(pairs[0], [])))  # broken off

    bench.write_page(tmp_path, page, tmp_path / "performance-language.png")
    text = page.read_text()

    assert text.startswith("# Performance\n\n<!-- control -->\nCartPole\n<!-- /control -->\n\n<!-- language -->\n")
    assert "yesterday" not in text
    # 200 against 67 tokens/s: 3 times; 12 s / 4 s: 3 times; (150 - 50) / (450 - 50) MiB: a quarter
    assert "| 200 | 67 | 0.500 | 1.500 | **3.00** | 2.5 / 5 | 4.0 / 12.0 | 3.00 | 1 |" in text
    assert "| GRPO, vocabulary 32k | TRL 1.16 | 100 | 400 | **0.25** | 0.5 / 0.25 |" in text
    assert "TRL 1.16 is not here" in text
    assert "shared trunk |" not in text


def test_a_page_that_is_not_there_yet_is_begun(bench, tmp_path):
    (tmp_path / "language-grpo-512.json").write_text(json.dumps(measured([told([1.0, 1.0])], [told([1.0, 2.0])])))
    bench.write_page(tmp_path, tmp_path / "performance.md", tmp_path / "performance-language.png")

    text = (tmp_path / "performance.md").read_text()
    assert text.startswith("# Performance\n\n<!-- language -->")
    assert text.endswith("<!-- /language -->\n")


def test_the_share_of_a_gpu_is_told_without_the_processors_second_library(bench):
    rates = {"flops_per_second": [1.0, 8e9], "flops_per_second_onednn": []}
    found = {"share-shared": measured([told([1.0, 2.0])], [told([1.0, 1.0]) | rates])}

    *_, line = bench.share_table(found)
    share = bench.flops_share(found["share-shared"]["ours"][0], 8e9, bench.ROWS["share-shared"])

    assert f"| 8.0 | **{share:.0%}** | - | - |" in line
    found["share-shared"]["peer"][0]["flops_per_second_onednn"] = [1.0, 16e9]
    assert f"| 8.0 | **{share:.0%}** | 16.0 | **{share / 2:.0%}** |" in bench.share_table(found)[-1]


def test_curves_are_drawn_from_two_points_on(bench, tmp_path):
    one = measured([told([1.0, 1.0], peak=60)], [told([1.0, 2.0], peak=70)])
    picture = tmp_path / "performance-language.png"

    assert not bench.draw({"length-64": one}, picture)
    assert bench.draw({"length-64": one, "length-128": one}, picture)
    assert picture.stat().st_size > 0


def test_sides_take_turns_so_that_neither_is_always_first(bench, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "missing", lambda row: "")
    monkeypatch.setattr(bench, "job_of", lambda row, side, device: {"side": side})
    monkeypatch.setattr(bench, "run", lambda python, script, job: order.append(job["side"]) or told([1.0, 1.0]))

    bench.measure("grpo-512", bench.ROWS["grpo-512"], 3, "cpu")

    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert len(json.loads((tmp_path / "language-grpo-512.json").read_text())["peer"]) == 3
