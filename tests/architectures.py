"""Tiny language models of the architectures that transformers knows, made on the spot with weights at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

VOCABULARY = 177  # of the tokenizer of rehearsal.py
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
Kind = Literal["dense", "window", "mixture", "recurrent", "hybrid", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Architecture:
    """One architecture: its `model_type`, and the fields of its config beside `SIZES`."""

    kind: Kind
    fields: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Fields of `SIZES` that its config does not take."""


HEADLESS = ("num_attention_heads", "num_key_value_heads")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("dense"),
    "qwen2": Architecture("dense"),
    "qwen3": Architecture("dense", {"head_dim": 8}),
    "mistral": Architecture("window", {"sliding_window": 5}),
    "gemma": Architecture("dense", {"head_dim": 8}),
    "gemma2": Architecture("window", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3_text": Architecture("window", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gpt2": Architecture("dense"),
    "gpt_bigcode": Architecture("dense"),
    "gpt_neo": Architecture("window", {"attention_types": [[["global", "local"], 1]], "window_size": 5}),
    "gpt_neox": Architecture("dense"),
    "gptj": Architecture("dense", {"rotary_dim": 4}),
    "codegen": Architecture("dense", {"rotary_dim": 4, "num_attention_heads": 4}),
    "opt": Architecture("dense", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "falcon": Architecture("dense"),
    "bloom": Architecture("dense"),
    "mpt": Architecture("dense", {"expansion_ratio": 2, "attn_config": {"attn_impl": "torch"}}),
    "xglm": Architecture("dense", {"ffn_dim": 24, "d_model": 16, "num_layers": 2, "attention_heads": 2}),
    "biogpt": Architecture("dense"),
    "openai-gpt": Architecture("dense"),
    "ctrl": Architecture("dense", {"dff": 24}),
    "phi": Architecture("dense"),
    "phi3": Architecture("dense"),
    "persimmon": Architecture("dense"),
    "stablelm": Architecture("dense"),
    "starcoder2": Architecture("dense"),
    "olmo": Architecture("dense"),
    "olmo2": Architecture("dense"),
    "olmo3": Architecture("window", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "cohere": Architecture("dense"),
    "cohere2": Architecture("window", {"sliding_window": 5}),
    "granite": Architecture("dense", {"logits_scaling": 2.0, "embedding_multiplier": 2.0}),
    "glm": Architecture("dense", {"head_dim": 8}),
    "glm4": Architecture("dense", {"head_dim": 8}),
    "smollm3": Architecture("dense"),
    "ernie4_5": Architecture("dense"),
    "exaone4": Architecture("window", {"sliding_window": 5, "sliding_window_pattern": 2}),
    "helium": Architecture("dense", {"head_dim": 8}),
    "nemotron": Architecture("dense"),
    "seed_oss": Architecture("dense", {"head_dim": 8}),
    "apertus": Architecture("dense"),
    "arcee": Architecture("dense"),
    "modernbert-decoder": Architecture("window", {"local_attention": 8}),
    "bitnet": Architecture("dense"),
    "diffllama": Architecture("dense", {"num_key_value_heads": 2, "attention_dropout": 0.0}),  # it takes no other
    "mixtral": Architecture("mixture", EXPERTS),
    "qwen2_moe": Architecture("mixture", {**MANY, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": Architecture("mixture", {**MANY, "head_dim": 8}),
    "gpt_oss": Architecture("mixture", {**EXPERTS, "head_dim": 8, "sliding_window": 5}),
    "olmoe": Architecture("mixture", MANY),
    "phimoe": Architecture("mixture", EXPERTS),
    "granitemoe": Architecture("mixture", EXPERTS),
    "ernie4_5_moe": Architecture("mixture", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12}),
    "deepseek_v3": Architecture(
        "mixture",
        {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1}
        | {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2},
    ),
    "llama4_text": Architecture(
        "mixture", {**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 24, "attention_chunk_size": 8}
    ),
    "jamba": Architecture(
        "hybrid",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2}
        | {"use_mamba_kernels": False},
    ),
    "bamba": Architecture(
        "hybrid",
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "lfm2": Architecture("hybrid", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": Architecture(
        "hybrid",
        {
            **MANY,
            "head_dim": 8,
            "shared_expert_intermediate_size": 12,
            "layer_types": ["linear_attention", "full_attention"],
        }
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "recurrent_gemma": Architecture(
        "hybrid", {"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
    ),
    "mamba": Architecture("recurrent", {"state_size": 4, "use_mambapy": False}, HEADLESS),
    "mamba2": Architecture("recurrent", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}, HEADLESS),
    "falcon_mamba": Architecture("recurrent", {"state_size": 4, "use_mambapy": False}, HEADLESS),
    "rwkv": Architecture("recurrent", {"attention_hidden_size": 16, "context_length": 64}, HEADLESS),
    "xlstm": Architecture("recurrent", {"num_heads": 2}, HEADLESS),
    "bert": Architecture("encoder"),
    "roberta": Architecture("encoder"),
    "electra": Architecture("encoder", {"embedding_size": 16}),
    "roformer": Architecture("encoder", {"embedding_size": 16}),
    "xlnet": Architecture("encoder", {"d_inner": 24, "d_head": 8}, ("max_position_embeddings",)),
    "bart": Architecture("encoder-decoder"),
    "t5": Architecture("encoder-decoder", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}),
    "mbart": Architecture("encoder-decoder"),
    "pegasus": Architecture("encoder-decoder"),
}


def make(name: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A model of this architecture, its weights large enough that a mistake shows; the same for the same seed."""
    about = ARCHITECTURES[name]
    sizes = {key: value for key, value in SIZES.items() if key not in about.without}
    config = AutoConfig.for_model(name, **{**sizes, "initializer_range": 0.3, **about.fields, **fields})
    kind = AutoModelForSeq2SeqLM if about.kind == "encoder-decoder" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config).float().eval()
        for module in model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return model
