"""Lineage: every digest is written down at the start, leads back to the base model, and is held to; secrets are not."""

import json
import re
import shutil
from pathlib import Path

import pytest

import understudy
from tests.rehearsed import furnish, ppo_config, reward_config, sft_config
from understudy.cli import main
from understudy.control import ppo
from understudy.language import ppo as language_ppo
from understudy.language import reward_model, sft
from understudy.run import lineage
from understudy.run.config import RequestError
from understudy.run.redact import printable, redact

CONTROL = {"env": "CartPole-v1", "num_envs": 2, "num_steps_per_env": 8, "num_epochs": 1, "steps": 32, "quiet": True}
CANARY = "hf_canarycanarycanary"


@pytest.fixture
def runs(tmp_path):
    """base -> sft -> reward model on it; ppo from sft, judged by the reward model."""
    home = tmp_path / "base"
    home.mkdir()
    furnish(home)
    sft.train(sft_config(home, tmp_path / "sft"))
    reward_model.train(reward_config(home, tmp_path / "rm", model=str(tmp_path / "sft")))
    language_ppo.train(judged(tmp_path, "ppo"))
    return tmp_path


def judged(runs: Path, out: str, **fields) -> language_ppo.Config:
    given = {"model": str(runs / "sft"), "reward": str(runs / "rm" / "reward_model")}
    return ppo_config(runs / "base", runs / out, **given | fields)


def states(capsys, run: Path) -> list[str]:
    """What `lineage --verify` names, `state what`, without digests."""
    capsys.readouterr()
    main(["lineage", str(run), "--verify"])
    said = capsys.readouterr().out
    return re.findall(r"^((?:differs|gone|unknown)  [^:(]*)", said, flags=re.M)


def test_the_chain_leads_back_to_the_base_model(runs, capsys):
    assert main(["lineage", str(runs / "ppo"), "--verify"]) == 0

    said = capsys.readouterr().out
    lines = [line.split("  ") for line in said.splitlines()]
    links = [(len(words) - len("  ".join(words).lstrip().split("  ")), "  ".join(words).split()[:2]) for words in lines]
    named = [(depth, role, Path(path).relative_to(runs).as_posix()) for depth, (role, path) in links if role[-1] == ":"]
    assert named == [
        (1, "model:", "sft/policy"),
        (3, "model:", "base"),
        (3, "data:", "base/demonstrations.jsonl"),
        (1, "data:", "base/prompts.jsonl"),
        (1, "reward:", "rm/reward_model"),
        (3, "model:", "sft/policy"),  # whose run is above
        (3, "data:", "base/preferences.jsonl"),
    ]
    assert " 0 differs, 0 gone, 0 unknown." in said


def test_what_has_changed_or_gone_since_is_named(runs, capsys):
    (runs / "base/prompts.jsonl").write_text("changed\n")
    (runs / "base/demonstrations.jsonl").unlink()
    weights = runs / "rm/reward_model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0")
    (runs / "rm/lineage.json").write_text((runs / "rm/lineage.json").read_text() + " ")

    assert main(["lineage", str(runs / "ppo"), "--verify"]) == 1
    named = [line.strip().replace(str(runs) + "/", "") for line in states(capsys, runs / "ppo")]
    assert sorted(set(named)) == [
        "differs  data base/prompts.jsonl",
        "differs  lineage of rm",
        "differs  reward rm/reward_model/model.safetensors",
        "gone  data base/demonstrations.jsonl/demonstrations.jsonl",
    ]


def test_a_config_that_was_edited_differs(runs, capsys):
    config = runs / "sft/config.json"
    config.write_text(config.read_text().replace('"num_epochs": 1', '"num_epochs": 2'))

    assert [line.strip() for line in states(capsys, runs / "sft")] == ["differs  config"]


def test_lineage_as_json_holds_every_check(runs, capsys):
    assert main(["lineage", str(runs / "ppo"), "--verify", "--json"]) == 0

    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {check["state"] for check in found["checks"]} == {"same"}
    assert found["links"][0]["from"]["recipe"] == "language sft"
    assert {"python", "torch", "transformers", "gymnasium", "numpy"} <= found["packages"].keys()
    assert found["code"]["sha256"] == lineage.code_version()["sha256"]


def test_a_chain_that_leads_back_to_itself_ends(runs, capsys):
    about = json.loads((runs / "sft/lineage.json").read_text())
    about["links"][0] |= {"run": str(runs / "ppo"), "lineage": "0"}
    (runs / "sft/lineage.json").write_text(json.dumps(about))

    assert main(["lineage", str(runs / "ppo")]) == 0
    assert capsys.readouterr().out.count("(its run is above)") == 2  # ppo below sft, and sft below the reward model


def test_a_chain_of_runs_that_each_link_twice_to_the_one_before_is_walked_once(tmp_path, capsys):
    for number in range(60):
        run, before = tmp_path / str(number), tmp_path / str(number - 1)
        run.mkdir()
        links = [{"role": role, "path": str(before), "run": str(before)} for role in ("model", "reward")]
        (run / "lineage.json").write_text(json.dumps({"schema": 2, "links": links if number else []}))
        (run / "config.json").write_text('{"schema": 2}')

    assert main(["lineage", str(tmp_path / "59"), "--verify"]) == 1  # no digest is right
    assert capsys.readouterr().out.count("(its run is above)") == 59


NO_LINKS = {
    "NUL in a path": {"path": "a\0b"},
    "NUL in a run": {"run": "a\0b"},
    "NUL in a file": {"files": {"a\0b": "0"}},
    "a number for a path": {"path": 3},
    "a list": ["model"],
}


@pytest.mark.parametrize("link", NO_LINKS.values(), ids=NO_LINKS)
def test_a_lineage_whose_links_are_none_is_refused(link, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"schema": 2}')
    (tmp_path / "lineage.json").write_text(json.dumps({"schema": 2, "links": [link]}))

    assert main(["lineage", str(tmp_path), "--verify"]) == 2
    assert "has links that are none" in capsys.readouterr().err


ODD_LINKS = {
    "a name too long": {"path": "a" * 5000, "run": "b" * 5000, "files": {"c" * 5000: "0"}},
    "no path": {"role": "model", "files": {"x": 3}},
    "digests that are none": {"path": ".", "files": {"../..": [1]}},
}


@pytest.mark.parametrize("link", ODD_LINKS.values(), ids=ODD_LINKS)
def test_odd_links_are_named_as_gone(link, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"schema": 2}')
    (tmp_path / "lineage.json").write_text(
        json.dumps({"schema": 2, "links": [link], "vouched": {"code": {"env x": {"y" * 5000: 1}}}})
    )

    assert main(["lineage", str(tmp_path), "--verify"]) == 1
    assert "gone" in capsys.readouterr().out


def test_a_large_file_that_is_all_holes_is_not_hashed(tmp_path, capsys):
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.truncate(2**40)
    links = [{"role": "data", "path": str(tmp_path / "data.jsonl"), "files": {"data.jsonl": "0"}}]
    (tmp_path / "lineage.json").write_text(json.dumps({"schema": 2, "links": links}))
    (tmp_path / "config.json").write_text('{"schema": 2}')

    assert main(["lineage", str(tmp_path), "--verify"]) == 1
    assert "gone  data" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"data is .*nearly all of which are a hole"):
        lineage.make_link("data", tmp_path / "data.jsonl")


@pytest.mark.parametrize("moment", ["before config.json", "after it"])
def test_an_extension_that_is_killed_leaves_no_digest_that_differs(moment, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    ppo.train(
        ppo.Config(
            env="CartPole-v1", num_envs=2, num_steps_per_env=8, num_epochs=1, steps=16, quiet=True, output_dir=str(out)
        )
    )
    write, killed = lineage.write_json, False

    def kills(path, data):
        nonlocal killed
        if killed or (path.name == "config.json" and moment == "before config.json"):
            raise KeyboardInterrupt
        killed = path.name == "config.json"
        write(path, data)

    monkeypatch.setattr(lineage, "write_json", kills)
    with pytest.raises(KeyboardInterrupt):
        understudy.resume(out, steps=32)
    monkeypatch.undo()

    assert main(["lineage", str(out), "--verify"]) == 0
    understudy.resume(out)
    assert "config_before" not in json.loads((out / "lineage.json").read_text())
    assert main(["lineage", str(out), "--verify"]) == 0


def test_ppo_is_refused_where_the_reward_models_data_have_changed(runs):
    data = runs / "base/preferences.jsonl"
    was = lineage.sha256(data)[:12]
    data.write_text(data.read_text() + "\n")

    with pytest.raises(RequestError, match=rf"data .*{lineage.sha256(data)[:12]}.*trained on {was}") as found:
        language_ppo.train(judged(runs, "other"))
    assert "reward is" in str(found.value)
    assert not (runs / "other").exists()  # before step 1


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_ppo_is_refused_where_the_reward_models_tokenizer_or_template_is_another(runs, what):
    folder = runs / "rm/reward_model"
    if what == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    else:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"child"', '"chjld"'))

    with pytest.raises(RequestError, match=rf"its {what} has the digest \w{{12}}.*trained with \w+") as found:
        language_ppo.train(judged(runs, "other"))
    assert not (runs / "other").exists()
    assert "put back" in str(found.value)


@pytest.mark.parametrize("name", ["base/prompts.jsonl", "sft/policy/config.json"])
def test_a_run_does_not_go_on_with_other_data_or_another_model(runs, name):
    (runs / name).write_text((runs / name).read_text() + "\n")

    with pytest.raises(RequestError, match=r"whose digest is \w+\.\.\., the run began with \w+"):
        understudy.resume(runs / "ppo", steps=90)


def test_an_extended_run_has_the_digest_of_its_new_config(tmp_path, capsys):
    run = ppo.train(ppo.Config(output_dir=str(tmp_path / "run"), **CONTROL))
    understudy.resume(run.path, steps=64)

    assert main(["lineage", str(run.path), "--verify"]) == 0


def test_an_extended_run_that_other_versions_went_on_with_is_compared_again(tmp_path):
    run = ppo.train(ppo.Config(output_dir=str(tmp_path / "run"), **CONTROL))
    file = run.path / lineage.FILE
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"packages": about["packages"] | {"torch": "2.9"}}))
    for steps in (64, 96, 96):  # the first goes on with this torch, the second after an extension
        understudy.resume(run.path, steps=steps)

    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    changed = [event.get("not_compared", []) for event in events if event["kind"] == "resumed"]
    assert changed == [["steps", "packages"], ["steps"], []]


def test_a_control_run_leads_to_the_policy_it_began_with(tmp_path, capsys):
    first = ppo.train(ppo.Config(output_dir=str(tmp_path / "first"), **CONTROL))
    ppo.train(ppo.Config(output_dir=str(tmp_path / "second"), init_from=str(first.path), **CONTROL))

    assert main(["lineage", str(tmp_path / "second"), "--verify"]) == 0
    assert re.search(rf"init: {first.path}/policy  \w+\n +{first.path}  control ppo", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SECRET", "db_password"])
def test_a_secret_is_in_no_file_of_a_run(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, CANARY)
    out = tmp_path / "run"
    options = {"render_mode": f"{CANARY}"}

    with pytest.raises(RequestError, match="env is"):
        ppo.train(ppo.Config(output_dir=str(tmp_path / "refused"), env_options={CANARY: 1}, **CONTROL))
    iterations = ppo.iterate(ppo.Config(output_dir=str(out), log_every=1, **CONTROL | {"init_from": None}))
    next(iterations)
    with pytest.raises(RuntimeError, match=CANARY):
        iterations.throw(RuntimeError(f"{options} https://me:{CANARY}@example.org"))

    written = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert b"traceback" in written["events.jsonl"]
    assert not [file for file, data in written.items() if CANARY.encode() in data]


def test_a_secret_in_a_config_is_in_no_file_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    home = tmp_path / CANARY  # in the path of everything that is read
    home.mkdir()
    furnish(home)

    language_ppo.train(ppo_config(home, tmp_path / "run", log_samples=2, reward=f"contains:{CANARY}"))

    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"config.json", "lineage.json", "000001.jsonl"} <= {file.name for file in written}
    assert not [file for file in written if CANARY.encode() in file.read_bytes()]


def test_a_secret_that_is_in_the_data_is_not_in_the_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "cheerful")
    home = tmp_path / "base"
    home.mkdir()
    furnish(home)
    (home / "prompts.jsonl").write_text('{"prompt": "many cheerful horses"}\n')

    run = language_ppo.train(ppo_config(home, tmp_path / "run", log_samples=2))

    written = [file.read_text() for file in (run.path / "samples").iterdir()]
    assert "many [MY_SECRET] horses" in "".join(written)
    assert "cheerful" not in "".join(written)


def test_credentials_of_a_url_are_taken_out_and_nothing_else():
    assert redact("s3://key:secret@host/x and https://host/a@b") == "s3://[redacted]@host/x and https://host/a@b"


def test_an_error_on_the_command_line_shows_no_secret_and_steers_no_terminal(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", CANARY)

    assert main(["evaluate", f"{CANARY}\x1b[2J\u202e"]) == 2
    said = capsys.readouterr().err
    assert CANARY not in said and "\x1b" not in said and "\u202e" not in said


STEERING = {"a\x1b[31mred": r"a\x1b[31mred", "\x9b2J": r"\x9b2J", "\x1b]0;t\x07": r"\x1b]0;t\x07", "a\rb": r"a\rb"}
STEERING |= {"\u202eevil": r"\u202eevil", "\u2066x\u2069": r"\u2066x\u2069", "a\u200bb": r"a\u200bb", "\x00": r"\x00"}
STEERING |= {"line\nnext\ttab": "line\nnext\ttab", "Grüße 你好 🙂": "Grüße 你好 🙂"}


@pytest.mark.parametrize("text", STEERING)
def test_what_steers_a_terminal_is_written_out(text):
    assert printable(text) == STEERING[text]


def test_what_a_model_says_cannot_steer_the_terminal(tmp_path, capsys):
    """Every word of its vocabulary is an escape; whatever it samples, none reaches the terminal."""
    home = tmp_path / "base"
    home.mkdir()
    furnish(home)
    file = home / "tokenizer.json"
    about = json.loads(file.read_text())
    about["model"]["vocab"] = {f"\x1b[{i}m" if i > 5 else word: i for word, i in about["model"]["vocab"].items()}
    file.write_text(json.dumps(about))

    assert main(["generate", str(home), "--prompt", "", "--max-new-tokens", "8", "--count", "4"]) == 0
    said = capsys.readouterr().out
    assert r"\x1b[" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("run", "changed", "anew"),
    [
        ("ppo", "base/prompts.jsonl", ["--evaluation-data", "base/prompts.jsonl"]),
        ("ppo", "rm/reward_model/config.json", ["--reward", "length:4"]),
        ("rm", "base/preferences.jsonl", ["--evaluation-data", "base/preferences.jsonl"]),
    ],
)
def test_a_run_is_not_evaluated_by_files_that_changed_since(runs, capsys, monkeypatch, run, changed, anew):
    monkeypatch.chdir(runs)
    assert main(["evaluate", run]) == 0
    (runs / changed).write_text((runs / changed).read_text() + "\n")
    capsys.readouterr()

    assert main(["evaluate", run]) == 2
    assert f"put back the files it had, or name others with {anew[0]}" in capsys.readouterr().err
    assert main(["evaluate", run, *anew]) == 0


def test_a_run_that_moved_with_its_data_is_evaluated(runs, capsys):
    shutil.copytree(runs, runs.parent / "elsewhere")
    config = runs.parent / "elsewhere/ppo/config.json"
    config.write_text(config.read_text().replace(str(runs), str(runs.parent / "elsewhere")))

    assert main(["evaluate", str(config.parent)]) == 0
