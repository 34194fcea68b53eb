"""`understudy lineage RUN`."""

from __future__ import annotations

import json
from pathlib import Path

from understudy.cli.flags import Parser
from understudy.run.lineage import code_version, format_chain, read_chain, verify
from understudy.run.redact import printable


def show(argv: list[str]) -> int:
    """Print where a run comes from; with --verify, what has changed since. 1 where something has."""
    parser = Parser(prog="understudy lineage", description="Where a policy comes from, back to the base model.")
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--verify", action="store_true", help="recompute every digest that can be recomputed")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse(argv)
    chain = read_chain(Path(args.run))
    checks = list(verify(chain)) if args.verify else []
    differing = [check for check in checks if check.state == "differs"]
    if args.json:
        verified = {"checks": [check._asdict() | {"run": str(check.run)} for check in checks]} if args.verify else {}
        print(json.dumps(chain | verified))
        return int(bool(differing))
    for line in format_chain(chain):
        print(printable(line))
    for check in checks:
        if check.state != "same":
            digests = f": {check.now[:12]}, was {check.was[:12]}" if check.state == "differs" else ""
            print(printable(f"{check.state}  {check.what}{digests}  (run {check.run})"))
    if args.verify:
        counts = ", ".join(f"{sum(c.state == state for c in checks)} {state}" for state in STATES)
        print(f"{len(checks)} digests: {counts}.")
        if (chain.get("code") or {}).get("sha256") != code_version()["sha256"]:
            print("The run was made by another state of this package's code than is installed now.")
    return int(bool(differing))


STATES = ("same", "differs", "gone", "unknown")
