"""Which models and environments of others are trained correctly, and which are refused: `make compatibility`.

    python bench/compatibility.py [language] [control]

Each world is a module beside this one, `compatibility_WORLD`, whose `main` writes bench/results/compatibility_WORLD.json and
docs/compatibility-WORLD.md. Without a name, all worlds are run.
"""

from __future__ import annotations

import argparse
import importlib

WORLDS = ("language", "control")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", choices=[*WORLDS, []], metavar="WORLD", help="language or control")
    worlds = parser.parse_args().worlds or WORLDS
    return max(importlib.import_module(f"compatibility_{world}").main() for world in worlds)


if __name__ == "__main__":
    raise SystemExit(main())
