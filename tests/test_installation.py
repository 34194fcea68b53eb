"""The name on the package index: every hint names our distribution, and another project's is noticed."""

import importlib
import json
import re
import time
import tomllib
from pathlib import Path

import pytest

from understudy.cli import main
from understudy.run.installation import DISTRIBUTION, SUMMARY, foreign_warning, install_hint

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = [
    *(ROOT / "understudy").rglob("*.py"),
    *(ROOT / "tests").rglob("*.py"),
    *(ROOT / "examples").rglob("*.py"),
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
]
TEXTS = [path for path in TEXTS if path.name not in ("installation.py", "test_installation.py")]  # tested below
HINT = re.compile(r"""install [^\n`]*?['"]?(?P<name>understudy[\w-]*|\.)\[(?P<extras>[\w,-]+)\]""")


def fake(folder: Path, name: str, summary: str, origin: dict | None = None) -> None:
    """A distribution as pip leaves it in `folder`."""
    info = folder / f"{name.replace('-', '_')}-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.6.0\nSummary: {summary}\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))


def test_the_names_in_code_are_those_of_the_project():
    assert (PROJECT["name"], PROJECT["description"]) == (DISTRIBUTION, SUMMARY)
    assert PROJECT["scripts"] == {"understudy": "understudy.cli:main"}


def hints() -> list[tuple[str, str, str]]:
    """(file, distribution, extra) of every sentence that tells somebody to install an extra of ours."""
    found = []
    for path in TEXTS:
        for match in HINT.finditer(path.read_text()):
            found += [(path.name, match["name"], extra) for extra in match["extras"].split(",")]
    return found


def test_every_install_hint_names_our_distribution_and_an_extra_it_has():
    extras = PROJECT["optional-dependencies"]

    wrong = [hint for hint in hints() if hint[1] not in (DISTRIBUTION, ".") or hint[2] not in extras]
    assert len(hints()) >= 4
    assert wrong == []


def test_every_hint_that_code_makes_names_an_extra_we_have():
    calls = [
        (path.name, extra)
        for path in (ROOT / "understudy").rglob("*.py")
        for extra in re.findall(r"install_hint\(['\"](\w+)['\"]\)", path.read_text())
    ]

    assert calls
    assert {extra for _, extra in calls} <= set(PROJECT["optional-dependencies"])


def test_nothing_tells_anybody_to_install_the_other_project():
    said = [
        (path.name, line)
        for path in TEXTS
        for line in path.read_text().splitlines()
        if re.search(r"pip install [^`#\n]*\bunderstudy(?!-rl)\b", line)
    ]

    assert said == []


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        (None, "pip install 'understudy-rl[video]'"),
        ({"url": "file:///a/wheel.whl", "archive_info": {}}, "pip install 'understudy-rl[video]'"),
        ({"url": "file:///a/clone", "dir_info": {}}, "pip install '.[video]' in the checkout"),
        ({"url": "file:///a", "dir_info": {"editable": True}}, "pip install -e '.[video]' in the checkout"),
    ],
)
def test_the_hint_follows_how_the_package_was_installed(tmp_path, monkeypatch, origin, hint):
    fake(tmp_path, DISTRIBUTION, SUMMARY, origin)
    monkeypatch.setattr("sys.path", [str(tmp_path)])  # where this package is really installed does not count

    assert install_hint("video") == hint


def test_build_metadata_in_the_current_folder_does_not_hide_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    fake(tmp_path / "site", DISTRIBUTION, SUMMARY, {"url": "file:///a", "dir_info": {}})
    fake(tmp_path, DISTRIBUTION, SUMMARY)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path))

    assert install_hint("video") == "pip install '.[video]' in the checkout"


def test_another_project_named_understudy_is_warned_of_in_one_sentence(tmp_path, monkeypatch, capsys):
    fake(tmp_path, "understudy", "Evaluate agents.")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert main(["compare", "nothing-here"]) == 2
    warning, refusal = capsys.readouterr().err.splitlines()
    assert warning.startswith("understudy: warning: the distribution 'understudy' 0.6.0 is installed")
    assert f"pip uninstall understudy {DISTRIBUTION}" in warning
    assert "nothing-here" in refusal


def test_an_earlier_installation_of_this_package_is_not_warned_of(tmp_path, monkeypatch):
    fake(tmp_path, "understudy", SUMMARY)
    monkeypatch.syspath_prepend(str(tmp_path))

    assert foreign_warning() is None


def test_looking_for_the_other_project_takes_under_five_milliseconds(tmp_path, monkeypatch):
    fake(tmp_path, "understudy", "Evaluate agents.")
    monkeypatch.syspath_prepend(str(tmp_path))
    seconds = []
    for _ in range(5):
        importlib.invalidate_caches()
        began = time.perf_counter()
        assert foreign_warning()
        seconds.append(time.perf_counter() - began)

    assert min(seconds) < 0.005
