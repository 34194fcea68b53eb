"""Tiny causal LMs of every tested family, made on the spot, with weights large enough that a mistake shows."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

V, H = 23, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5
FAMILIES = {
    "gpt2": lambda tied: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=H,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
    ),
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)),
    "qwen2": lambda tied: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)),
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied)),
    "gemma2": lambda tied: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            final_logit_softcapping=4.0,
            attn_logit_softcapping=3.0,
            tie_word_embeddings=tied,
        )
    ),
    "gemma3": lambda tied: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=tied,
        )
    ),
}


WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2, one layer windowed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
LEAN = ("llama", "qwen2", "qwen3", *WINDOWED)  # of those `lean` knows


def tiny_lean(family: str, seed: int = 0):
    """A model that `lean` knows, the weights of norms and biases at random too."""
    torch.manual_seed(seed)
    model = WINDOWED[family]() if family in WINDOWED else tiny(family, seed=seed)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    return model.eval()


def tiny(family: str, *, tied: bool = False, seed: int = 0):
    """A model of a family; the same weights for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[family](tied).eval()
