"""What a language run comes from: its model, data, reference, judges and template as links; a tokenizer by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from understudy.language.data import Table
from understudy.language.lora import base_of
from understudy.language.model import home
from understudy.language.text import Tokenizer
from understudy.run import lineage
from understudy.run.config import RequestError, to_json
from understudy.run.lineage import FILE, MODEL, changed, digest_of, link, of_data, read_lineage


def describe(recipe: str, cfg: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The lineage.json of a run that begins."""
    content = {} if tokenizer is None else {"tokenizer": digest(tokenizer), "template": template(tokenizer)}
    return lineage.describe(f"language {recipe}", to_json(cfg), links(cfg, recipe), **content)


def links(cfg: Any, recipe: str) -> list[dict[str, Any]]:
    """Everything that a config names and that lies in files."""
    inside = "reward_model" if recipe == "reward-model" and home(cfg.model, "policy") == cfg.model else "policy"
    found = _models("model", cfg.model, inside)
    if reference := getattr(cfg, "reference", None):
        found += _models("reference", reference, "policy")
    for role in ("data", "evaluation_data", "pretraining"):
        source = getattr(cfg, role, None)
        if isinstance(source, Table):  # the run itself holds them
            found.append({"role": role, "path": f"{role}.jsonl", "files": {f"{role}.jsonl": source.digest}})
        elif source:
            there = Path(source).exists()
            found.append(link(role, Path(source)) if there else {"role": role, "path": source, "files": {}})
    for role in ("reward", "gold"):
        for spec in map(str, getattr(cfg, role, None) or ()):
            text = spec if Path(spec).is_dir() else spec.rpartition("*")[0]
            if text and (Path(text) / "config.json").is_file():
                found += _models(role, text, "reward_model")
            elif (file := Path(spec.rpartition(":")[0])).suffix == ".py" and file.is_file():
                found.append(link(role, file))
    if (reply := getattr(cfg, "reply", None)) and (file := Path(str(reply).rpartition(":")[0])).is_file():
        found.append(link("reply", file))
    if cfg.template and len(cfg.template) < 1000 and Path(cfg.template).is_file():
        found.append(link("template", Path(cfg.template)))
    return found


def as_declared(source: str, tokenizer: Tokenizer) -> None:
    """Refuse a reward model that is not what its own run wrote down: another tokenizer, or data that have changed since.

    Raises:
        RequestError: with the two digests.
    """
    run = next((p for p in (Path(source), Path(source).parent) if (p / FILE).is_file()), None)
    if run is None:
        return
    about = read_lineage(run)
    now = {"tokenizer": digest(tokenizer), "template": template(tokenizer)}
    for name in ("tokenizer", "template"):
        if name in about and about[name] != now[name]:
            raise RequestError(
                f"its {name} has the digest {str(now[name])[:12]}..., '{run}' was trained with {str(about[name])[:12]}...: "
                f"put back the {name} it had"
            )
    for one in about.get("links", []):
        if one.get("role") == "data" and (other := changed(one, run)):
            raise RequestError(
                f"its data '{one['path']}' have the digest {other[:12]}..., '{run}' was trained on "
                f"{digest_of(one)[:12]}...: put back the data, or train the reward model again"
            )


def check_reference(given: str, reference: Any, policy: Any) -> None:
    """Refuse a reference to whom the ids that a policy says mean other tokens, or none. One without a tokenizer has no say.

    Args:
        given: as the config names it.  reference, policy: each a `Policy`; the latter with its tokenizer.

    Raises:
        RequestError: with the two sizes, or the two digests.
    """
    size, other = (model.model.get_input_embeddings().num_embeddings for model in (policy, reference))
    if size != other:
        raise RequestError(
            f"reference is {given!r}, whose vocabulary has {other} tokens, the policy's {size}: name a model of the same"
        )
    try:
        there = Tokenizer.load(home(given, "policy"), fixed_length=True)
    except RequestError:
        return
    own, theirs = ({i: token for token, i in each.hf.get_vocab().items()} for each in (policy.tokenizer, there))
    if any(theirs.get(i, token) != token for i, token in own.items()):
        raise RequestError(
            f"reference is {given!r}, whose tokenizer has the digest {digest(there)[:12]}..., the policy's "
            f"{digest(policy.tokenizer)[:12]}...: one id means two tokens; name a model with the policy's tokenizer"
        )


def digest(tokenizer: Tokenizer) -> str:
    """A tokenizer by what it does: how it splits, its vocabulary and its special tokens; its template apart."""
    hf: Any = tokenizer.hf
    about: dict[str, Any] = {"vocabulary": hf.get_vocab(), "special": sorted(map(str, hf.all_special_tokens))}
    if (backend := getattr(hf, "backend_tokenizer", None)) is not None:
        whole = json.loads(backend.to_str())
        about["splits"] = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return of_data(about)


def template(tokenizer: Tokenizer) -> str | None:
    """The digest of a chat template, None without one."""
    return of_data(tokenizer.hf.chat_template) if tokenizer.hf.chat_template else None


def _models(role: str, source: str, folder: str) -> list[dict[str, Any]]:
    """A model as a link; with an adapter's base, where it is one. Of a hub id, the files of its copy here."""
    place = Path(home(source, folder))
    if place.is_dir():
        base = base_of(place)
        return [link(role, place, endings=MODEL), *([] if base is None else _models(f"{role}'s base", base, "policy"))]
    cached = try_to_load_from_cache(source, "config.json")
    if not isinstance(cached, str):
        return [{"role": role, "path": source, "files": {}}]
    snapshot = Path(cached).parent
    return [link(role, snapshot, endings=MODEL) | {"hub": source, "commit": snapshot.name}]
