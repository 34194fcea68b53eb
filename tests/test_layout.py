"""Who may import whom: the floor plan's table, read from every file's syntax tree. A new room is one line."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "understudy"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))

ROOMS = {  # each loads in a bare torch install
    "batch": set(),
    "distribution": set(),
    "reduce": set(),
    "reward": set(),
    "advantage": {"reduce"},
    "sample": {"distribution"},
    "value": {"sample", "batch", "fast/linear"},
    "objective": {"batch"},
    "update": {"batch", "reduce"},
    "constraints": {"run/config"},
    "fast/linear": set(),
    "fast/compiled_update": {"batch", "fast/linear", "reduce", "update"},
}
ANYTHING_SHARED = {*ROOMS, "run", "fast"}
WORLDS = {  # what a file of a world may import besides its own world; files not listed are recipes
    "control/networks": {"distribution", "fast/linear"},
    "control/rollout": {"sample", "batch", "run/config"},
    "language/model/policy": {"distribution", "batch", "run/checkpoint", "run/config", "run/store"},
    "language/rollout/generate": {"sample", "batch", "run/config"},
}
HOUSES = {  # a folder or file -> the folders and files of ours that all of it may import
    "control": ANYTHING_SHARED,
    "language": ANYTHING_SHARED,
    "run": {"run"},
    "doctor": {"run"},
    "studio": {"run"},
    "study": {"run"},
    "cli": {"__init__", "control", "language", "doctor", "studio", "study", "run"},
    "fast": set(),
    "__init__": {*ANYTHING_SHARED, "control", "language"},
    "__main__": {"cli"},
}
ONLY_IN = {  # a package of others -> where alone it may be imported
    "gymnasium": "control/",
    "transformers": "language/",
    "tokenizers": "language/",
    "peft": "language/",
}
LAZY = ("cli/__init__", "__init__")
EXTRAS = {"envpool", "matplotlib", "moviepy", "peft", "tensorboard", "trackio", "wandb"}  # may be absent or slow
# slow, and only for runs that compile
COMPILER = {"torch.fx.experimental.proxy_tensor", "torch._inductor", "torch._inductor.inductor_prims"}
NOT_NAMES = {"utils", "common", "base", "core", "misc"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
UNSAFE_CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all")}
UNSAFE_CALLS |= {"np.load", "numpy.load", "pd.read_pickle", "runpy.run_path", "runpy.run_module"}
UNSAFE_WORDS = {"allow_pickle", "weights_only", "shell"}  # arguments
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "runpy", "code"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(tree: ast.AST, here: str) -> list[str]:
    """Every module that is imported anywhere in the file, by its full dotted name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["understudy", *here.split("/")][: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from understudy import control` names a house, `from understudy import load` what the front door offers
            rooms = [alias.name if alias.name in {*ROOMS, *HOUSES} else "__init__" for alias in node.names]
            found += [f"{module}.{room}" for room in rooms] if module == "understudy" else [module]
    return found


def ours(modules: list[str]) -> list[str]:
    """Those of this package, as paths: `control/ppo`."""
    return [name.removeprefix("understudy.").replace(".", "/") for name in modules if name.startswith("understudy")]


def may_import(here: str, there: str) -> bool:
    house, other = here.split("/")[0], there.split("/")[0]
    if here in ROOMS:
        return there in ROOMS[here]
    if here in WORLDS:
        return other == house or there in WORLDS[here]
    return other == house or other in HOUSES[house]


@EVERY_FILE
def test_a_file_imports_only_what_the_plan_allows(path):
    here = name_of(path)
    assert here in ROOMS or here.split("/")[0] in HOUSES, f"{here} has no line in this file's tables"

    forbidden = [there for there in ours(imports(ast.parse(path.read_text()), here)) if not may_import(here, there)]
    assert forbidden == []


@EVERY_FILE
def test_a_room_imports_only_torch_from_others(path):
    if (here := name_of(path)) not in ROOMS:
        return
    others = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), here)}

    assert others - set(sys.stdlib_module_names) <= {"torch", "understudy"}


@EVERY_FILE
def test_a_package_of_others_is_imported_only_in_its_place(path):
    here = name_of(path)
    modules = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), here)}

    astray = [
        name
        for name, place in ONLY_IN.items()
        if name in modules and not f"{here}/".startswith(f"{place.rstrip('/')}/")
    ]
    assert astray == []


@EVERY_FILE
def test_imports_stand_at_the_top_but_where_loading_is_lazy(path):
    if (here := name_of(path)) in LAZY:
        return
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [
        imports(node, here) for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)
    ]

    assert [
        names for names in inside if not {name.split(".")[0] for name in names} <= EXTRAS and not set(names) <= COMPILER
    ] == []


@EVERY_FILE
def test_nothing_read_from_a_file_is_executed(path):
    tree = ast.parse(path.read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]

    assert UNSAFE_CALLS.isdisjoint(calls)
    assert UNSAFE_WORDS.isdisjoint(node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword))
    assert UNSAFE_MODULES.isdisjoint(name.split(".")[0] for name in imports(tree, name_of(path)))


def test_code_that_is_named_at_run_time_is_imported_in_few_places():
    """Each of them is behind `run/trust.py`, or takes names from the user or from a table of ours."""
    calls = ("importlib.import_module", "spec.loader.exec_module")
    places = {
        name_of(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    }

    assert places <= {
        "__init__",
        "run/resume",
        "cli/control",
        "cli/language",
        "control/envs/make",
        "language/data/files",
        "language/rewards/worker",
        "run/trackers",
    }


@EVERY_FILE
def test_no_file_is_named_for_what_belongs_nowhere(path):
    assert NOT_NAMES.isdisjoint(name_of(path).split("/"))


@EVERY_FILE
def test_a_file_opens_with_a_sentence(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), "the first sentence says which step this is"


def test_the_public_names_are_sorted():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]

    for names in map(ast.literal_eval, lists):
        assert list(names) == sorted(names)


def test_the_tables_see_an_import_however_it_is_written():
    lines = (
        "import understudy.control.ppo",
        "from understudy import language",
        "from .batch import Batch",
        "from . import cli, load",
    )

    assert ours(imports(ast.parse("\n".join(lines)), "objective")) == [
        "control/ppo",
        "language",
        "batch",
        "cli",
        "__init__",
    ]


def test_the_worlds_never_import_each_other():
    assert not may_import("control/ppo", "language/ppo")
    assert not may_import("language/ppo", "control/networks")
    assert not may_import("control/__init__", "language")


def test_doctor_reads_runs_and_never_a_world():
    assert may_import("doctor/rules", "run/store")
    assert not may_import("doctor/rules", "control/preflight")
