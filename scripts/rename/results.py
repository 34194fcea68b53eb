"""Committed results, whose settings carry names of config fields, under today's names. `results.py ROOT`; safe to run
twice."""

import json
import sys
from pathlib import Path

from fields import CONTROL, LANGUAGE, METRICS

VALUES = {"step": "token_mean", "row": "sequence_mean_token_mean", "budget": "token_sum_over_budget"}


def renamed(settings: dict, table: dict[str, str]) -> dict:
    found = {table.get(name, name): value for name, value in settings.items()}
    if found.get("loss_aggregation") in VALUES:
        found["loss_aggregation"] = VALUES[found["loss_aggregation"]]
    if isinstance(found.get("normalize_advantage"), bool):
        found["normalize_advantage"] = "batch" if found["normalize_advantage"] else "none"
    return found


def main(root: Path) -> None:
    for path in sorted((root / "bench" / "results").rglob("*.json")):
        text = path.read_text()
        data = json.loads(text)
        if not isinstance(data, dict):
            continue
        if "settings" in data:
            data["settings"] = renamed(data["settings"], LANGUAGE)
        if path.parent.name == "scores":
            data["config"] = renamed(data["config"], CONTROL)
        for name, side in data.get("sides", {}).items():
            if name in ("Understudy", "bare environment"):
                data["sides"][name] = renamed(side, CONTROL)
        if path.parent.name == "real_data":
            data["iterations"] = [renamed(line, METRICS) for line in data.get("iterations", [])] or None
            data = {name: value for name, value in data.items() if value is not None}
        new = json.dumps(data, indent=1) + "\n"
        if json.loads(new) != json.loads(text):
            indent = next(
                (n for n in (1, 2, None) if json.dumps(json.loads(text), indent=n).strip() == text.strip()), 1
            )
            path.write_text(json.dumps(data, indent=indent) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
