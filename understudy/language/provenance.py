"""What a language run comes from: its model, data, reference, judges and template as links; a tokenizer by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from understudy.language.data.files import Table
from understudy.language.data.records import Tokenizer
from understudy.language.model.lora import base_of
from understudy.language.model.policy import model_dir
from understudy.run import lineage
from understudy.run.config import RequestError, to_dict
from understudy.run.lineage import (
    FILE,
    MODEL_SUFFIXES,
    changed_digest,
    combined_digest,
    data_digest,
    make_link,
    read_lineage,
)


def describe_provenance(recipe: str, cfg: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The lineage.json of a run that begins."""
    content = (
        {}
        if tokenizer is None
        else {"tokenizer": tokenizer_digest(tokenizer), "template": chat_template_digest(tokenizer)}
    )
    return lineage.make_lineage(f"language {recipe}", to_dict(cfg), collect_links(cfg, recipe), **content)


def collect_links(cfg: Any, recipe: str) -> list[dict[str, Any]]:
    """Everything that a config names and that lies in files."""
    folder = "reward_model" if recipe == "reward-model" and model_dir(cfg.model, "policy") == cfg.model else "policy"
    links = _model_links("model", cfg.model, folder)
    if reference := getattr(cfg, "reference", None):
        links += _model_links("reference", reference, "policy")
    for role in ("data", "evaluation_data", "pretraining"):
        source = getattr(cfg, role, None)
        if isinstance(source, Table):  # the run itself holds them
            links.append({"role": role, "path": f"{role}.jsonl", "files": {f"{role}.jsonl": source.digest}})
        elif source:
            exists = Path(source).exists()
            links.append(make_link(role, Path(source)) if exists else {"role": role, "path": source, "files": {}})
    for role in ("reward", "gold"):
        for spec in map(str, getattr(cfg, role, None) or ()):
            unweighted_spec = spec if Path(spec).is_dir() else spec.rpartition("*")[0]
            if unweighted_spec and (Path(unweighted_spec) / "config.json").is_file():
                links += _model_links(role, unweighted_spec, "reward_model")
            elif (file := Path(spec.rpartition(":")[0])).suffix == ".py" and file.is_file():
                links.append(make_link(role, file))
    if (reply := getattr(cfg, "reply", None)) and (file := Path(str(reply).rpartition(":")[0])).is_file():
        links.append(make_link("reply", file))
    if cfg.chat_template and len(cfg.chat_template) < 1000 and Path(cfg.chat_template).is_file():
        links.append(make_link("template", Path(cfg.chat_template)))
    return links


def check_reward_model_provenance(source: str, tokenizer: Tokenizer) -> None:
    """Refuse a reward model that is not what its own run wrote down: another tokenizer, or data that have changed since.

    Raises:
        RequestError: with the two digests.
    """
    run_dir = next((p for p in (Path(source), Path(source).parent) if (p / FILE).is_file()), None)
    if run_dir is None:
        return
    run_lineage = read_lineage(run_dir)
    current = {"tokenizer": tokenizer_digest(tokenizer), "template": chat_template_digest(tokenizer)}
    for name in ("tokenizer", "template"):
        if name in run_lineage and run_lineage[name] != current[name]:
            raise RequestError(
                f"its {name} has the digest {str(current[name])[:12]}..., '{run_dir}' was trained with "
                f"{str(run_lineage[name])[:12]}...: "
                f"put back the {name} it had"
            )
    for entry in run_lineage.get("links", []):
        if entry.get("role") == "data" and (new_digest := changed_digest(entry, run_dir)):
            raise RequestError(
                f"its data '{entry['path']}' have the digest {new_digest[:12]}..., '{run_dir}' was trained on "
                f"{combined_digest(entry)[:12]}...: put back the data, or train the reward model again"
            )


def check_reference(source: str, reference: Any, policy: Any) -> None:
    """Refuse a reference to whom the ids that a policy says mean other tokens, or none. One without a tokenizer has no say.

    Args:
        source: as the config names it.  reference, policy: each a `Policy`; the latter with its tokenizer.

    Raises:
        RequestError: with the two sizes, or the two digests.
    """
    policy_vocab_size, reference_vocab_size = (
        model.model.get_input_embeddings().num_embeddings for model in (policy, reference)
    )
    if policy_vocab_size != reference_vocab_size:
        raise RequestError(
            f"reference is {source!r}, whose vocabulary has {reference_vocab_size} tokens, the policy's "
            f"{policy_vocab_size}: name a model of the same"
        )
    try:
        reference_tokenizer = Tokenizer.load(model_dir(source, "policy"), has_fixed_length=True)
    except RequestError:
        return
    policy_tokens, reference_tokens = (
        {i: token for token, i in tokenizer.hf.get_vocab().items()}
        for tokenizer in (policy.tokenizer, reference_tokenizer)
    )
    if any(reference_tokens.get(i, token) != token for i, token in policy_tokens.items()):
        raise RequestError(
            f"reference is {source!r}, whose tokenizer has the digest "
            f"{tokenizer_digest(reference_tokenizer)[:12]}..., the policy's "
            f"{tokenizer_digest(policy.tokenizer)[:12]}...: one id means two tokens; name a model with the "
            "policy's tokenizer"
        )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A tokenizer by what it does: how it splits, its vocabulary and its special tokens; its template apart."""
    hf: Any = tokenizer.hf
    content: dict[str, Any] = {"vocabulary": hf.get_vocab(), "special": sorted(map(str, hf.all_special_tokens))}
    if (backend := getattr(hf, "backend_tokenizer", None)) is not None:
        backend_state = json.loads(backend.to_str())
        content["splits"] = {name: backend_state.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return data_digest(content)


def chat_template_digest(tokenizer: Tokenizer) -> str | None:
    """The digest of a chat template, None without one."""
    return data_digest(tokenizer.hf.chat_template) if tokenizer.hf.chat_template else None


def _model_links(role: str, source: str, folder: str) -> list[dict[str, Any]]:
    """A model as a link; with an adapter's base, where it is one. Of a hub id, the files of its copy here."""
    model_path = Path(model_dir(source, folder))
    if model_path.is_dir():
        base = base_of(model_path)
        return [
            make_link(role, model_path, suffixes=MODEL_SUFFIXES),
            *([] if base is None else _model_links(f"{role}'s base", base, "policy")),
        ]
    cached = try_to_load_from_cache(source, "config.json")
    if not isinstance(cached, str):
        return [{"role": role, "path": source, "files": {}}]
    snapshot = Path(cached).parent
    return [make_link(role, snapshot, suffixes=MODEL_SUFFIXES) | {"hub": source, "commit": snapshot.name}]
