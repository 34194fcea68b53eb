"""Hostile files and directories: nothing in them is executed, each is refused in a sentence and within a second.

Everything here would leave a canary behind if any of its code ran.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import understudy
from tests.rehearsed import furnish, ppo_config
from understudy.cli import main
from understudy.control import ppo
from understudy.language import ppo as language_ppo
from understudy.language.data.records import Tokenizer
from understudy.language.model.policy import Policy
from understudy.language.rlhf import RLHFModels
from understudy.run import checkpoint, lineage, trust
from understudy.run.config import RequestError
from understudy.run.store import read_config

SECONDS = 1.0
EVIL = "import pathlib\npathlib.Path({canary!r}).write_text('ran')\n"
FILES = {
    "own_tool": "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
    "class Own(CartPoleEnv):\n    pass\n"
}


class Bomb:
    """What a pickle runs when it is read."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A control run, and what a language run needs; copied before anything is done to them."""
    home = tmp_path_factory.mktemp("made")
    config = {
        "num_envs": 2,
        "num_steps_per_env": 8,
        "num_epochs": 1,
        "steps": 48,
        "quiet": True,
        "checkpoint_every": 1,
    }
    ppo.train(ppo.Config(env="CartPole-v1", output_dir=str(home / "control"), **config))
    furnish(home / "model") if (home / "model").mkdir() is None else None
    language_ppo.train(ppo_config(home / "model", home / "language", total_tokens=40))
    return home


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """Where it all happens: copies of the runs, the working directory, first on the path; a canary that must not appear."""
    for name in ("control", "language", "model"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert not (tmp_path / "canary").exists(), "something of it was executed"
    for name in ("evil", "modeling_evil", "own_tool"):
        sys.modules.pop(name, None)


def evil(place: Path) -> str:
    return EVIL.format(canary=str(place / "canary"))


def bomb(place: Path) -> bytes:
    return pickle.dumps(Bomb(str(place / "canary")))


def refused(call, says: str) -> None:
    """In one sentence, within a second."""
    began = time.process_time()  # wall time depends on who else is running
    with pytest.raises(RequestError, match=says) as found:
        call()
    assert time.process_time() - began < SECONDS
    assert "\n" not in str(found.value)


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def reconfigure(run: Path, **fields) -> None:
    about = json.loads((run / "config.json").read_text())
    rewrite(run / "config.json", config=about["config"] | fields)


def bombs_of_weights(place: Path, file: Path) -> list[bytes]:
    """Contents that are no safetensors: a pickle, a pickle in a zip, a header of 2^62 bytes, one of more than there is."""
    with zipfile.ZipFile(place / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", bomb(place))
    torch.save({"w": torch.zeros(2)}, place / "pt")
    long_header = b'{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
    return [
        bomb(place),
        (place / "zip").read_bytes(),
        (place / "pt").read_bytes(),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", len(long_header)) + long_header,
        struct.pack("<Q", 64 * 2**20) + b"[" * 10,
        b"",
    ]


@pytest.mark.parametrize("which", range(7))
def test_weights_that_are_no_safetensors_are_refused(place, which):
    file = place / "control/policy/policy.safetensors"
    file.write_bytes(bombs_of_weights(place, file)[which])
    refused(lambda: understudy.load(place / "control"), "does not fit|cannot be read as safetensors")

    file = place / "language/policy/model.safetensors"
    file.write_bytes(bombs_of_weights(place, file)[which])
    refused(lambda: understudy.load(place / "language"), "cannot be loaded")


JSON = {
    "huge": "[" + "0," * (9 * 2**20) + "0]",
    "deep": "[" * 200_000,
    "a long number": '{"schema": ' + "1" * 5000 + "}",
    "a list": "[1, 2]",
    "another schema": '{"schema": 99}',
    "no JSON": "import os",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_that_is_none_of_ours_is_refused(place, text):
    (place / "control/policy/policy.json").write_text(text)
    refused(lambda: understudy.load(place / "control"), "policy")

    (place / "control/config.json").write_text(text)
    for verb in (["evaluate"], ["resume"], ["lineage"]):
        assert main([*verb, str(place / "control")]) == 2 or verb == ["lineage"]
    refused(lambda: understudy.resume(place / "control"), "config.json")

    (place / "language/policy/understudy.json").write_text(text)
    refused(lambda: understudy.load(place / "language"), "understudy.json")

    (place / "model/config.json").write_text(text.replace("a list", ""))
    refused(lambda: Policy.from_pretrained(place / "model"), "model is")


@pytest.mark.parametrize("name", ["config.json", "lineage.json"])
def test_our_json_that_is_nested_is_refused(place, name):
    file = place / "control" / name
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "more": ' + "[" * 900 + "]" * 900 + "}")

    refused(lambda: understudy.resume(place / "control", steps=64), "nested too deeply")
    refused(lambda: lineage.read_lineage(file.parent) if name == "lineage.json" else read_config(file.parent), "nested")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": ' + "1" * 5000 + "}"], ids=["deep", "a long number"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_json_of_a_tokenizer_that_cannot_be_read_is_refused(place, name, text):
    (place / "model" / name).write_text(text)

    refused(lambda: Tokenizer.load(place / "model"), "model is")


SIZES = {
    "a layer 10^9 wide": {"network": {"hidden": [10**9]}},
    "a million layers": {"network": {"hidden": [1] * 1_000_000}},
    "a width below": {"network": {"hidden": [-4]}},
    "a memory 10^9 wide": {"network": {"rnn_type": "gru", "rnn_hidden_size": 10**9}},
    "a layer of a million": {"network": {"hidden": [1_000_000, 1_000_000]}},
    "a Box of 10^9": {"observation_space": {"kind": "Box", "shape": [10**9], "dtype": "float32", "low": 0, "high": 1}},
    "a Discrete of 10^9": {"action_space": {"kind": "Discrete", "n": 10**9, "start": 0, "dtype": "int64"}},
    "a MultiDiscrete of 10^9": {"action_space": {"kind": "MultiDiscrete", "nvec": [10**9], "start": [0]}},
    "a MultiBinary of 10^9": {"action_space": {"kind": "MultiBinary", "n": [10**5, 10**4]}},
    "a space of no kind": {"action_space": {"kind": "os.system", "n": 2}},
    "a network of no kind": {"network": "os.system"},
    "a dtype of objects": {"observation_space": {"kind": "Box", "shape": [4], "dtype": "O", "low": 0, "high": 1}},
}


@pytest.mark.parametrize("about", SIZES.values(), ids=SIZES)
def test_sizes_are_not_believed(place, about):
    file = place / "control/policy/policy.json"
    network = about.get("network")
    if isinstance(network, dict):
        about = {"network": json.loads(file.read_text())["network"] | network}
    rewrite(file, **about)

    refused(lambda: understudy.load(place / "control"), "describes none|does not fit")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_sizes_of_a_language_model_are_not_believed(place, field):
    rewrite(place / "model/config.json", **{field: 10**9})

    refused(lambda: Policy.from_pretrained(place / "model"), f"{field} is 1000000000")


def checkpoint_of(place: Path) -> Path:
    return sorted((place / "control/checkpoints").iterdir())[-1]


def outside(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    target = path.parents[1] / "config.json"
    manifest["files"]["../../config.json"] = {"bytes": target.stat().st_size, "sha256": checkpoint.sha256(target)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def link(path: Path) -> None:
    (path / "state.json").rename(path.parents[2] / "state.json")
    (path / "state.json").symlink_to(path.parents[2] / "state.json")


def digest(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace('"iteration"', '"Iteration"'))


def script(path: Path) -> None:
    (path / "sitecustomize.py").write_text(evil(path.parents[2]))


def objects(path: Path) -> None:
    """Digests that are right, and a state that asks for an array of Python objects."""
    (path / "state.json").write_text(
        json.dumps({"schema": 1, "state": {"$array": "0", "dtype": "O", "shape": [10**9]}})
    )
    (path / "manifest.json").unlink()
    checkpoint.write_manifest(path)


@pytest.mark.parametrize("spoil", [outside, link, digest, script, objects], ids=lambda f: f.__name__)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(place, spoil):
    path = checkpoint_of(place)
    spoil(path)

    refused(lambda: understudy.resume(place / "control", checkpoint=path.name), "checkpoint is|is a link")


def test_links_in_a_run_are_refused_before_anything_is_written_through_them(place):
    mine = place / "mine.txt"
    mine.write_text("mine")
    for name in ("events.jsonl", "metrics.jsonl", "evaluation.json.part", "policy/policy.json", "samples"):
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(place / "control", place / "run")
        (place / "run" / name).unlink(missing_ok=True)
        (place / "run" / name).symlink_to(mine)

        assert main(["evaluate", str(place / "run"), "--episodes", "1"]) == 2
        assert main(["resume", str(place / "run"), "--steps", "96"]) == 2
        assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["control/policy", "control/policy/policy.json", "control/policy/policy.safetensors"])
def test_a_policy_behind_a_link_is_refused(place, name):
    (place / name).rename(place / "elsewhere")
    (place / name).symlink_to(place / "elsewhere")

    refused(lambda: understudy.load(place / "control"), "link|no plain file")


def test_a_pipe_is_not_waited_for(place):
    os.remove(place / "control/policy/policy.json")
    os.mkfifo(place / "control/policy/policy.json")
    refused(lambda: understudy.load(place / "control"), "no policy")

    os.remove(place / "model/tokenizer_config.json")
    os.mkfifo(place / "model/tokenizer_config.json")
    refused(lambda: Policy.from_pretrained(place / "model"), "no plain file")


CODE = {
    "an id of a module": {"env": "evil:X-v0"},
    "a class": {"env": "evil:X"},
    "os.system": {"env": "os:system", "env_options": {"command": "touch canary"}},
    "Popen": {"env": "subprocess:Popen", "env_options": {"args": ["touch", "canary"]}},
    "a function of a package": {  # called, it imports hubconfig.py of the working directory
        "env": "torch.hub:load",
        "env_options": {"repo_or_dir": ".", "source": "local", "model": "x"},
    },
    "a submodule": {"env": "evil.inside.it:X"},
    "a path": {"env": "../evil:X"},
    "the program itself": {"env": "pip.__main__:X"},
    "a wrapper": {"wrappers": ["evil:Wrapper"]},
    "a wrapper that is none": {"wrappers": ["os:system command=touch"]},
    "a native one": {"env": "evil:X", "vectorization": "native"},
}


@pytest.mark.parametrize("fields", CODE.values(), ids=CODE)
def test_an_environment_that_only_a_config_names_is_not_imported(place, fields):
    for name in ("evil.py", "hubconfig.py", "control/evil.py"):
        (place / name).write_text(evil(place))
    reconfigure(place / "control", **fields)

    refused(lambda: understudy.resume(place / "control"), r"names code as its|env is|wrappers is")
    assert main(["evaluate", str(place / "control"), "--episodes", "1"]) == 2


def test_code_in_the_run_itself_is_refused_even_with_a_right_signature(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place / "control"))
    (place / "control/evil.py").write_text(evil(place))
    reconfigure(place / "control", env="evil:X")
    rewrite(place / "control/lineage.json", vouched=trust.sign_code({"env": "evil:X"}))

    refused(lambda: understudy.resume(place / "control"), "is inside the run itself")


def test_a_digest_that_somebody_else_wrote_down_vouches_for_nothing(place):
    (place / "evil.py").write_text(evil(place))
    reconfigure(place / "control", env="evil:X")
    vouched = trust.sign_code({"env": "evil:X"})
    assert vouched is not None
    for signature in (None, "0" * 64, "", 3):
        rewrite(place / "control/lineage.json", vouched=vouched | {"signature": signature})

        refused(lambda: understudy.resume(place / "control"), "not what a run of yours began with")


def own_run(place: Path) -> Path:
    (place / "own_tool.py").write_text(FILES["own_tool"])
    config = {"num_envs": 2, "num_steps_per_env": 8, "num_epochs": 1, "steps": 32, "quiet": True}
    ppo.train(ppo.Config(env="own_tool:Own", output_dir=str(place / "own"), **config))
    return place / "own"


def test_the_users_own_run_goes_on_with_the_code_it_began_with(place):
    own = own_run(place)

    assert main(["evaluate", str(own), "--episodes", "1"]) == 0
    assert understudy.resume(own, steps=64).metrics[-1]["steps"] == 64


def test_code_that_has_changed_since_the_run_began_is_refused_until_it_is_named(place):
    own = own_run(place)
    (place / "own_tool.py").write_text(FILES["own_tool"] + "# otherwise\n")

    refused(
        lambda: understudy.resume(own, steps=64),
        "which your run began with, but own_tool.py has changed since: name it yourself with --env",
    )
    assert understudy.resume(own, steps=64, env="own_tool:Own").metrics[-1]["steps"] == 64


@pytest.mark.parametrize("field", ["reward", "gold", "reply"])
def test_a_function_of_a_file_inside_a_run_is_refused(place, field):
    file = place / "language/evil.py"
    file.write_text(evil(place) + "def score(prompts, completions):\n    return [0.0] * len(prompts)\n")
    spec = f"{file}:score"
    reconfigure(place / "language", **{field: spec if field == "reply" else [spec + ("*2" if field == "gold" else "")]})
    rewrite(place / "language/lineage.json", vouched=trust.sign_code({field: spec}))

    refused(lambda: understudy.resume(place / "language"), f"names code as its {field}.*inside the run itself")
    assert main(["evaluate", str(place / "language"), "--rows", "4"]) == 2


@pytest.mark.parametrize("spec", [f"{torch.hub.__file__}:load", f"{shutil.__file__}:rmtree"])
def test_a_function_of_an_installed_file_is_refused_too(place, spec):
    """A function of anybody's, called with columns of anybody's data, is as good as code of anybody's."""
    reconfigure(place / "language", reward=[spec])

    refused(lambda: understudy.resume(place / "language"), "names code as its reward")


@pytest.mark.parametrize("name", ["control os", "os system", "language __init__", "language ../evil", "", 3, None])
def test_a_recipe_that_is_none_is_not_imported(place, name):
    (place / "evil.py").write_text(evil(place))
    for run in ("control", "language"):
        rewrite(place / run / "config.json", recipe=name)

        refused(lambda run=run: understudy.resume(place / run), "names no recipe")
        assert main(["evaluate", str(place / run)]) == 2


def test_a_config_that_lacks_fields_is_refused(place):
    rewrite(place / "control/config.json", config={})
    refused(lambda: understudy.resume(place / "control"), "env is missing")
    assert main(["evaluate", str(place / "control")]) == 2


def test_an_archive_of_another_library_is_refused(place):
    with zipfile.ZipFile(place / "sb3.zip", "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": {":serialized:": "gASV"}}))
        archive.writestr("policy.pth", bomb(place))
    for path in (place / "sb3.zip", place / "pt"):
        refused(lambda path=path: understudy.load(path), "holds no policy")
    assert main(["evaluate", str(place / "sb3.zip")]) == 2
    assert main(["resume", str(place / "sb3.zip")]) == 2
    assert main(["generate", str(place / "sb3.zip"), "--prompt", "x"]) == 2


def test_a_checkpoint_of_torch_distributed_is_refused(place):
    """Its `.metadata` is a pickle, and so is what stands in its parts."""
    for name in ("control/policy", "language/policy", "model"):
        (place / name / ".metadata").write_bytes(bomb(place))
        (place / name / "__0_0.distcp").write_bytes(bomb(place))
        for file in [*(place / name).glob("*.safetensors"), *(place / name).glob("policy.json")]:
            file.unlink()

    refused(lambda: understudy.load(place / "control"), "no policy")
    refused(lambda: understudy.load(place / "language"), "cannot be loaded|no policy")
    refused(lambda: Policy.from_pretrained(place / "model"), "cannot be loaded|safetensors")


@pytest.mark.parametrize("name", ["../../canary", "/{place}/canary", "..\\..\\canary"])
def test_an_archive_whose_entries_lead_elsewhere_is_not_unpacked(place, name):
    with zipfile.ZipFile(place / "slip.zip", "w") as archive:
        archive.writestr(name.format(place=place), "written")
    for verb in (["evaluate"], ["resume"], ["generate", "--prompt", "x"], ["lineage"]):
        assert main([verb[0], str(place / "slip.zip"), *verb[1:]]) == 2
    shutil.copy(place / "slip.zip", place / "model/model.safetensors")
    refused(lambda: Policy.from_pretrained(place / "model"), "cannot be loaded")


def remote(place: Path, name: str, **fields) -> None:
    (place / "model/modeling_evil.py").write_text(evil(place) + "class Evil:\n    pass\n")
    rewrite(place / "model" / name, **fields)


CLASSES = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


@pytest.mark.parametrize("kind", [{}, {"model_type": "evil"}], ids=["of a known model", "of an unknown one"])
def test_a_model_that_brings_code_is_refused(place, kind):
    remote(place, "config.json", auto_map=CLASSES, **kind)

    refused(lambda: Policy.from_pretrained(place / "model"), "auto_map")
    assert main(["generate", str(place / "model"), "--prompt", "the"]) == 2


def test_a_tokenizer_that_brings_code_is_refused(place):
    remote(place, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})

    refused(lambda: Tokenizer.load(place / "model"), "auto_map")
    assert main(["generate", str(place / "model"), "--prompt", "the"]) == 2


@pytest.mark.parametrize("field", ["reward", "gold", "reference"])
def test_a_judge_or_reference_that_brings_code_is_refused(place, field):
    shutil.copytree(place / "model", place / "other")
    (place / "other/modeling_evil.py").write_text(evil(place) + "class Evil:\n    pass\n")
    rewrite(
        place / "other/config.json", auto_map=CLASSES | {"AutoModelForSequenceClassification": "modeling_evil.Evil"}
    )
    given = str(place / "other")

    refused(
        lambda: RLHFModels(
            ppo_config(place / "model", place / "out", **{field: given if field == "reference" else (given,)})
        ),
        f"{field} is .*auto_map",
    )


def test_code_that_comes_with_a_model_is_run_when_the_user_asks_for_it_and_not_when_a_run_does(place):
    reconfigure(place / "language", trust_remote_code=True)
    refused(lambda: understudy.resume(place / "language"), "names code as its trust_remote_code.*--trust-remote-code")

    remote(place, "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    refused(lambda: RLHFModels(ppo_config(place / "model", place / "out")), "auto_map")
    assert not (place / "canary").exists()
    with pytest.raises(RequestError, match="'Evil' has no attribute"):  # it is imported, and is no model
        RLHFModels(ppo_config(place / "model", place / "out", trust_remote_code=True))
    (place / "canary").unlink()  # the control of every other test here: this is what it looks like when code is run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_a_model_whose_weights_are_a_pickle_is_refused(place, name):
    (place / "model/model.safetensors").unlink()
    (place / "model" / name).write_bytes(bomb(place))

    refused(lambda: Policy.from_pretrained(place / "model"), "a pickle runs code")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../../weights.safetensors", "/etc/passwd"])
def test_an_index_that_names_other_files_than_safetensors_beside_it_is_refused(place, name):
    (place / "model" / "pytorch_model.bin").write_bytes(bomb(place))
    (place / "model/model.safetensors").rename(place / "model/part.safetensors")
    (place / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))

    refused(lambda: Policy.from_pretrained(place / "model"), "no safetensors file beside it")


def test_an_adapter_that_is_a_pickle_or_names_a_module_or_itself_is_refused(place):
    adapter = place / "adapter"
    adapter.mkdir()
    (place / "evil.py").write_text(evil(place))
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(place / "model")}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    (adapter / "adapter_model.bin").write_bytes(bomb(place))
    refused(lambda: Policy.from_pretrained(adapter), "without adapter_model.safetensors")

    save_file({"w": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    rewrite(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    refused(lambda: Policy.from_pretrained(adapter), "names a module to be imported")

    rewrite(adapter / "adapter_config.json", megatron_config=None, base_model_name_or_path=str(adapter))
    refused(lambda: Policy.from_pretrained(adapter), "an adapter whose base .* is an adapter too")


@pytest.mark.parametrize("schema", [None, 1, 3])
@pytest.mark.parametrize(
    ("world", "file"),
    [
        ("control", "config.json"),
        ("control", "policy/policy.json"),
        ("language", "config.json"),
        ("language", "policy/understudy.json"),
    ],
)
def test_a_run_of_another_format_is_refused_by_its_number(place, world, file, schema):
    path = place / world / file
    about = json.loads(path.read_text())
    assert about.pop("schema") == 2
    path.write_text(json.dumps(about if schema is None else about | {"schema": schema}))

    fix = "use a newer version" if schema == 3 else "use the version that wrote it, or make it anew"
    sentence = f"has schema {schema}, this version reads 2; {fix}" if schema else "has no schema, so it is none of this"
    if file != "config.json":
        refused(lambda: understudy.load(place / world), sentence)
    else:
        refused(lambda: understudy.resume(place / world), sentence)
        assert main(["evaluate", str(place / world)]) == main(["compare", str(place / world)]) == 2
