"""The control bench: rates, medians and ratios by hand, and the page that stored results make."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from understudy.control import ppo
from understudy.control.presets import preset
from understudy.fast.compiled_update import is_compiler_available

BENCH = Path(__file__).parents[1] / "bench"
OURS, PEER = "Understudy", "Stable-Baselines3"


def script(name):
    """A file of bench/, which is a script beside its own helpers."""
    sys.path.insert(0, str(BENCH))
    found = importlib.import_module(name)
    sys.path.remove(str(BENCH))
    return found


@pytest.fixture(scope="module")
def page():
    return script("control_page")


def run(peer, repeat, speed, *, seconds=10.0, solved=None, last=100.0):
    """One process: a steady speed, 1,000 steps in `seconds` from start to end, two marks."""
    return {
        "peer": peer,
        "repeat": repeat,
        "seed": repeat + 1,
        "steps": 1000,
        "seconds": seconds,
        "steps_per_second": speed,
        "solved_seconds": solved,
        "peak_mib": 300.0,
        "load": 0.5,
        "marks": [[500, 5.0, 40, last / 2], [1000, seconds, 100, last]],
    }


def row(*runs, **more):
    about = {"place": 0, "title": "A title", "note": "A note.", "warmup": 2, "until": None, "envs": None}
    about |= {"learning": True, "asked": {PEER: (5, 10)}, "threads": 1, "device": "cpu", "processor": "a processor"}
    about |= {
        "cores": 2,
        "command": "python bench/control.py --completions-per-iteration it",
        "versions": {OURS: "torch 1"},
        "skipped": {},
    }
    return about | {"runs": list(runs)} | more


def test_the_steady_rate_begins_where_the_warm_up_ends(page):
    marks = [[100, 9.0], [200, 10.0], [300, 10.5], [600, 12.0]]

    # from the end of the second iteration: (600 - 200) / (12 - 10)
    assert page.rate(marks, 2) == 200.0


def test_a_ratio_is_the_median_of_repeats_and_not_the_ratio_of_medians(page):
    found = row(
        *(run(OURS, i, speed) for i, speed in enumerate((100, 400, 900))),
        *(run(PEER, i, speed) for i, speed in enumerate((50, 40, 300))),
    )

    # 100 / 50 = 2, 400 / 40 = 10, 900 / 300 = 3; the medians alone would give 400 / 50 = 8
    assert page.ratios(found, PEER, page.steady) == [2.0, 10.0, 3.0]
    assert page.median_ratio(found, PEER, page.steady) == 3.0


def test_only_repeats_that_both_have_make_a_ratio(page):
    found = row(run(OURS, 0, 100), run(OURS, 1, 100), run(PEER, 1, 50))

    assert page.ratios(found, PEER, page.steady) == [2.0]


def test_a_seed_that_is_never_solved_counts_for_the_side_that_solves_it(page):
    found = row(
        run(OURS, 0, 1, solved=4.0),
        run(OURS, 1, 1, solved=5.0),
        run(OURS, 2, 1),
        run(PEER, 0, 1, solved=12.0),
        run(PEER, 1, 1),
        run(PEER, 2, 1, solved=8.0),
        until=475.0,
    )

    # 12 / 4 = 3 times sooner; ours alone; the peer alone
    assert page.ratios(found, PEER, page.sooner) == [pytest.approx(3.0), math.inf, 0.0]
    assert page.median_ratio(found, PEER, page.sooner) == pytest.approx(3.0)


def test_solved_is_a_mean_over_a_full_window(page):
    marks = [[1, 1.0, 0, None], [2, 2.0, 99, 480.0], [3, 3.0, 100, 474.9], [4, 4.0, 100, 475.0], [5, 5.0, 100, 500.0]]

    assert page.solved(marks, 475.0) == 4.0
    assert page.solved(marks[:3], 475.0) is None


def test_the_page_is_made_from_what_is_stored_and_leaves_the_rest_of_it_alone(page, tmp_path):
    speeds = row(
        run(OURS, 0, 5000, seconds=4.0, last=450.0),
        run(PEER, 0, 500, seconds=12.0, last=440.0),
        skipped={"CleanRL": "--cleanrl names no checkout"},
    )
    solve = row(run(OURS, 0, 1, solved=4.0), run(PEER, 0, 1), until=475.0, learning=False, place=1)
    grown = [row(run(OURS, 0, 100 * n), envs=n, learning=False, place=2 + n) for n in (1, 4)]
    for name, found in {"cartpole": speeds, "solve": solve, "growth-1": grown[0], "growth-4": grown[1]}.items():
        (tmp_path / f"control-{name}.json").write_text(json.dumps(found))
    written = tmp_path / "performance.md"
    written.write_text("# Performance\n\n<!-- control -->\nold\n<!-- /control -->\n\nbelow\n")

    page.write_page(tmp_path, written)
    once = written.read_text()
    page.write_page(tmp_path, written)

    assert written.read_text() == once
    assert "old" not in once
    assert once.startswith("# Performance\n\n<!-- control -->") and once.endswith("<!-- /control -->\n\nbelow\n")
    # whole: 1000 / 4 = 250 against 1000 / 12 = 83.3 steps a second, 3 times
    cells = "| Stable-Baselines3 | 500 | 12.0 | 300 | **10.00** (10.00 to 10.00) | **3.00** (3.00 to 3.00) |"
    assert f"{cells} 5 (10): reached |" in once
    assert "Not measured: CleanRL: --cleanrl names no checkout." in once
    assert "| Stable-Baselines3 | 0 of 1 | never (never to never) | **inf** (inf to inf) | 5 (10): reached |" in once
    assert "| cartpole | Understudy | 1 | 450 | 450 to 450 |" in once
    assert "| 4 | Understudy | 400 | 300 |" in once
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "performance-control-learning.png",
        "performance-control-growth-cpu.png",
    }


def test_cleanrls_own_lines_are_read_as_they_are():
    read = script("control").cleanrl_reader(512)
    ends = [
        f"global_step={step}, episodic_return={value}\n"
        for step, value in ((80, "[20.]"), (124, "[ 31.5]"), (400, "45.0"))
    ]

    assert [read(line) for line in ends[:2]] == [None, None]
    assert read("SPS: 2344\n") == [512, 2, 25.75]  # (20 + 31.5) / 2
    assert read(ends[2]) is None
    assert read("SPS: 2345\n") == [1024, 3, pytest.approx(96.5 / 3)]


@pytest.mark.skipif(not is_compiler_available(), reason="there is no C++ compiler")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_of_ours_is_a_config_that_runs_on_either_device(device):
    bench = script("control")
    setting, compiled = bench.Setting(device, None, None), set()

    for row in bench.ROWS.values():
        job = {"steps": row.steps, "seed": 1, "device": device, "threads": 1, "out": "-"}
        given = json.loads(bench.command(bench.OURS, row.sides[bench.OURS], job, setting)[2])
        assert given["device"] == device
        if device == "cuda" and not torch.cuda.is_available():  # a config refuses a device that is not here
            preset(ppo.Config, **given["fields"], steps=given["steps"])
            compiled.add("on" if given["fields"].get("compile") == "on" else "off")
            continue
        cfg = preset(ppo.Config, **given["fields"], steps=given["steps"], device=device)
        compiled.add(ppo.resolve_compile(cfg, is_user_policy=False)[0].compile)  # refuses what cannot be compiled

    assert "on" in compiled if device == "cpu" else compiled == {"off"}
