"""The name this package has on the package index, and how its extras are installed."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata

from understudy.run.config import RequestError

DISTRIBUTION = "understudy-rl"  # the index gives `understudy` to another project
SUMMARY = "One policy-gradient library for agents in Gymnasium environments and language models under a reward."


def version() -> str:
    """The version of this package; "unknown" where it is on the path without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package, from the index or from the checkout that it came from."""
    direct_urls = (
        distribution.read_text("direct_url.json") for distribution in metadata.distributions(name=DISTRIBUTION)
    )
    checkout = next(
        (origin["dir_info"] for text in direct_urls if text and "dir_info" in (origin := json.loads(text))), None
    )
    if checkout is None:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    editable = "-e " if checkout.get("editable") else ""
    return f"pip install {editable}'.[{extra}]' in the checkout"


def require_package(package: str, extra: str, request: str) -> None:
    """Raise `RequestError` where a package of an extra is missing; `request` says what it is for, as "video is on"."""
    if importlib.util.find_spec(package) is None:
        raise RequestError(f"{request}, for which the package {package} is missing: {install_hint(extra)}")


def foreign_warning() -> str | None:
    """A sentence where the other project named `understudy` is installed too; its files may have replaced ours."""
    # An earlier installation of this package had that name and our summary.
    others = (
        distribution
        for distribution in metadata.distributions(name="understudy")
        if distribution.metadata["Summary"] != SUMMARY
    )
    if (other := next(others, None)) is None:
        return None
    return (
        f"the distribution 'understudy' {other.version} is installed, which is another project and writes to the same "
        f"folder as {DISTRIBUTION}: run `pip uninstall understudy {DISTRIBUTION}` and install {DISTRIBUTION} again"
    )
