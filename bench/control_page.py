"""What bench/control.py found, as the control part of docs/performance.md: medians, ratios, curves."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "Understudy"
BEGIN, END = "<!-- control -->", "<!-- /control -->"
COLORS = {
    OURS: "#1f5fa8",
    "Stable-Baselines3": "#c65b2d",
    "SBX": "#8a5bb0",
    "CleanRL": "#4b8b3b",
    "PureJaxRL": "#777777",
}
Found = dict[str, Any]
Measure = Callable[[Found], float]


def rate(marks: list[list[float]], warmup: int) -> float:
    """Steps a second from the end of the last warm-up iteration to the end of the last; marks: [steps, seconds, ...]."""
    (first, since, *_), (last, until, *_) = marks[warmup - 1], marks[-1]
    return (last - first) / (until - since)


def solved(marks: list[list[Any]], threshold: float) -> float | None:
    """Seconds until the mean of the last 100 episodes reached a threshold; marks: [steps, seconds, window, mean]."""
    return next((seconds for _, seconds, window, mean in marks if window == 100 and mean >= threshold), None)


def steady(run: Found) -> float:
    return run["steps_per_second"]


def whole(run: Found) -> float:
    """Steps a second from process start to its end, imports, compilation and saving included."""
    return run["steps"] / run["seconds"]


def sooner(run: Found) -> float:
    """One over the seconds until solved; 0 for a run that was not."""
    return 1 / run["solved_seconds"] if run["solved_seconds"] else 0.0


def of_peer(row: Found, peer: str) -> list[Found]:
    return [run for run in row["runs"] if run["peer"] == peer]


def ratios(row: Found, peer: str, of: Measure) -> list[float]:
    """Ours over the peer's, repeat by repeat, where both are there; infinite where only the peer never got there."""
    theirs = {run["repeat"]: of(run) for run in of_peer(row, peer)}
    pairs = [(of(run), theirs[run["repeat"]]) for run in of_peer(row, OURS) if run["repeat"] in theirs]
    return [our / their if their else math.inf if our else math.nan for our, their in pairs]


def median_ratio(row: Found, peer: str, of: Measure) -> float:
    """The median of ratios; those that neither side got to count as 0."""
    return statistics.median(0.0 if math.isnan(ratio) else ratio for ratio in ratios(row, peer, of))


def stored(folder: Path) -> dict[str, Found]:
    """Every row that was measured, by its file's name without `control-`, in the order of the table."""
    rows = {path.stem.removeprefix("control-"): json.loads(path.read_text()) for path in folder.glob("control-*.json")}
    return dict(sorted(rows.items(), key=lambda item: item[1]["place"]))


def write_page(folder: Path, page: Path) -> None:
    """Put all that is stored between the marks of the page, and draw its pictures beside it."""
    rows = stored(folder)
    text = page.read_text() if page.exists() else "# Performance\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN, 1)
    page.write_text(
        f"{head}{BEGIN}\n{part(rows, page, sorted(folder.glob('profile-control-*.json')))}{END}{rest.split(END, 1)[1]}"
    )


def part(rows: dict[str, Found], page: Path, profiled: list[Path]) -> str:
    """The control half of the page."""
    lines = [
        "## Control",
        "",
        "Every measurement is a process of its own; sides take turns, A B B A, one seed a repeat for all of them. *Steady*:",
        "steps a second after the warm-up iterations that a row names. *Whole*: from process start to its end, imports,",
        "compilation, saving. Ratios are the median of repeats, in brackets the least and the greatest. *Memory*: the most",
        "that the process held (`ru_maxrss`). One thread means one core too: the process is bound to it.",
        "",
    ]
    sizes = {name: row for name, row in rows.items() if row["envs"]}
    for name, row in rows.items():
        if name not in sizes:
            lines += row_lines(name, row)
    learning = {name: row for name, row in rows.items() if row["learning"]}
    if learning:
        lines += learning_lines(learning, picture(draw_learning, learning, page, "control-learning"))
    for device in dict.fromkeys(row["device"] for row in sizes.values()):
        some = {name: row for name, row in sizes.items() if row["device"] == device}
        lines += growth_lines(some, picture(draw_growth, some, page, f"control-growth-{device.replace(':', '')}"))
    profiles = {path.stem.removeprefix("profile-control-"): json.loads(path.read_text()) for path in profiled}
    return "\n".join(lines + (profile_lines(profiles) if profiles else []))


def profile_lines(profiles: dict[str, Found]) -> list[str]:
    """Milliseconds of an iteration by step, and its share."""
    lines = ["### Where an iteration's time goes", "", "`python bench/control.py --profile NAME`: our side alone.", ""]
    parts = [name for name in next(iter(profiles.values()))["seconds"] if name != "whole"]
    lines += [f"| | iteration, ms | {' | '.join(parts)} | rest |", "|" + "---|" * (len(parts) + 3)]
    for name, found in profiles.items():
        spent = found["seconds"]
        rest = spent["whole"] - sum(spent[part] for part in parts if not part.startswith("of it"))
        shares = [f"{seconds / spent['whole']:.0%}" for seconds in [*(spent[part] for part in parts), rest]]
        lines.append(f"| {name} | {1e3 * spent['whole']:,.1f} | {' | '.join(shares)} |")
    return [*lines, ""]


def row_lines(name: str, row: Found) -> list[str]:
    """One row: its heading, its table, what it was run with."""
    timed = solve_table(row) if row["until"] is not None else speed_table(row)
    return [f"### {name}: {row['title']}", "", *timed, "", *facts(row), ""]


def speed_table(row: Found) -> list[str]:
    lines = ["| | steady, steps/s | whole, s | memory, MiB | ours / theirs, steady | whole | asked (aim) |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for peer in peers(row):
        found = of_peer(row, peer)
        cells = [
            f"{statistics.median(map(steady, found)):,.0f}",
            f"{statistics.median(run['seconds'] for run in found):,.1f}",
            f"{statistics.median(run['peak_mib'] for run in found):,.0f}",
        ]
        cells += (
            ["", "", ""] if peer == OURS else [*(spread(row, peer, of) for of in (steady, whole)), asked(row, peer)]
        )
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return lines


def solve_table(row: Found) -> list[str]:
    lines = [
        "| | solved | seconds, median (least to greatest) | ours is sooner by | asked (aim) |",
        "|---|---|---|---|---|",
    ]
    for peer in peers(row):
        found = of_peer(row, peer)
        seconds = [run["solved_seconds"] or math.inf for run in found]
        time = f"{number(statistics.median(seconds))} ({number(min(seconds))} to {number(max(seconds))})"
        done = f"{sum(map(math.isfinite, seconds))} of {len(found)}"
        last = ["", ""] if peer == OURS else [spread(row, peer, sooner), asked(row, peer)]
        lines.append(f"| {peer} | {done} | {time} | {' | '.join(last)} |")
    return lines


def spread(row: Found, peer: str, of: Measure) -> str:
    """A median ratio with the least and the greatest; empty where no repeat has both."""
    found = ratios(row, peer, of)
    return f"**{median_ratio(row, peer, of):.2f}** ({min(found):.2f} to {max(found):.2f})" if found else ""


def asked(row: Found, peer: str) -> str:
    """What the ratio must be at least, whether it is, and what is aimed at."""
    least, aim = row["asked"].get(peer, (None, None))
    if least is None:
        return "" if aim is None else f"- ({aim:g})"
    of = steady if row["until"] is None else sooner
    reached = ratios(row, peer, of) and median_ratio(row, peer, of) >= least
    return f"{least:g} ({aim:g}): {'reached' if reached else 'missed'}"


def facts(row: Found) -> list[str]:
    """What a reader needs to measure the row again."""
    load = max(run["load"] for run in row["runs"])
    versions = "; ".join(f"{peer}: {text}" for peer, text in row["versions"].items())
    repeats = len({run["repeat"] for run in row["runs"]})
    lines = [
        f"{row['note']} {repeats} repeats; {row['threads']} thread{'s' * (row['threads'] > 1)}; {row['device']}; "
        f"warm-up {row['warmup']} iterations; {row['processor']}, {row['cores']} cores, load before a run up to {load:.1f}. "
        f"`{row['command']}`. {versions}.",
    ]
    return lines + [f"Not measured: {peer}: {why}." for peer, why in row["skipped"].items()]


def peers(row: Found) -> list[str]:
    """Who was measured, in the order of the first repeat: ours first."""
    return list(dict.fromkeys(run["peer"] for run in row["runs"]))


def learning_lines(rows: dict[str, Found], image: str) -> list[str]:
    """The return each side had learned at the end, over seeds."""
    lines = ["### Equal learning", "", image, "", "The mean return of the last 100 training episodes at the end:", ""]
    lines += ["| | | seeds | median | least to greatest |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        for peer in peers(row):
            last = [mean for run in of_peer(row, peer) if (mean := run["marks"][-1][3]) is not None]
            if last:
                limits = f"{min(last):,.0f} to {max(last):,.0f}"
                lines.append(f"| {name} | {peer} | {len(last)} | {statistics.median(last):,.0f} | {limits} |")
    return [*lines, ""]


def growth_lines(rows: dict[str, Found], image: str) -> list[str]:
    """Steady steps a second and memory against the number of environments."""
    some = next(iter(rows.values()))
    lines = [f"### How speed grows with the number of environments: {some['title']}", "", image, ""]
    lines += ["| environments | side | steady, steps/s | memory, MiB |", "|---|---|---|---|"]
    for row in rows.values():
        for peer in peers(row):
            found = of_peer(row, peer)
            speed, held = (statistics.median(run[what] for run in found) for what in ("steps_per_second", "peak_mib"))
            lines.append(f"| {row['envs']} | {peer} | {speed:,.0f} | {held:,.0f} |")
    runs = [run for row in rows.values() for run in row["runs"]]
    return [*lines, "", *facts(some | {"runs": runs, "command": re.sub(r"growth-\d+", "growth", some["command"])}), ""]


def picture(draw: Callable[[dict[str, Found], Any], None], rows: dict[str, Found], page: Path, name: str) -> str:
    """Draw and save a picture beside the page; the line of Markdown that shows it."""
    from matplotlib.figure import Figure  # takes half a second, and only here

    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(rows, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(page.parent / f"performance-{name}.png", dpi=110)
    return f"![{name}](performance-{name}.png)"


def draw_learning(rows: dict[str, Found], figure: Any) -> None:
    """Reward against steps: every seed thin, their median thick."""
    for axes, (name, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        for peer in peers(row):
            marks = [run["marks"] for run in of_peer(row, peer)]
            for seed in marks:
                curve = [(m[0], m[3]) for m in seed if m[3] is not None]
                axes.plot([m[0] for m in curve], [m[1] for m in curve], color=color(peer), linewidth=0.6, alpha=0.5)
            columns = [c for c in zip(*marks, strict=False) if all(m[3] is not None for m in c)]
            middle = [(c[0][0], statistics.median(m[3] for m in c)) for c in columns]
            if middle:
                axes.plot(*zip(*middle, strict=True), color=color(peer), linewidth=2, label=peer)
        axes.set(title=name, xlabel="steps", ylabel="mean return, last 100 episodes")


def draw_growth(rows: dict[str, Found], figure: Any) -> None:
    axes = figure.subplots()
    for peer in dict.fromkeys(peer for row in rows.values() for peer in peers(row)):
        found = [
            (row["envs"], statistics.median(map(steady, of_peer(row, peer))))
            for row in rows.values()
            if of_peer(row, peer)
        ]
        axes.plot(*zip(*found, strict=True), color=color(peer), marker="o", markersize=3.5, label=peer)
    axes.set(xlabel="environments", ylabel="steps a second", xscale="log", yscale="log")


def color(peer: str) -> str | None:
    return COLORS.get(peer)


def number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "never"
