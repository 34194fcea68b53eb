"""The name this package has on the package index, and how its extras are installed."""

from __future__ import annotations

import json
from importlib import metadata

DISTRIBUTION = "understudy-rl"  # the index gives `understudy` to another project
SUMMARY = "One policy-gradient library for agents in Gymnasium environments and language models under a reward."


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package, from the index or from the checkout that it came from."""
    try:
        origin = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    if "dir_info" not in origin:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}'.[{extra}]' in the checkout"


def foreign_warning() -> str | None:
    """A sentence where the other project named `understudy` is installed too; its files may have replaced ours."""
    try:
        other = metadata.distribution("understudy")
    except metadata.PackageNotFoundError:
        return None
    if other.metadata["Summary"] == SUMMARY:  # an earlier installation of this package
        return None
    return (
        f"the distribution 'understudy' {other.version} is installed, which is another project and writes to the same "
        f"folder as {DISTRIBUTION}: run `pip uninstall understudy {DISTRIBUTION}` and install {DISTRIBUTION} again"
    )
