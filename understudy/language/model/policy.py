"""Any Hugging Face causal LM as a policy: `policy(ids) -> distribution, value`; its critic; its frozen reference."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from understudy.batch import TokenBatch
from understudy.language.data.records import Tokenizer
from understudy.language.model.forward import (
    TOLERANCE,
    check_causal,
    compute_hidden_states,
    disable_dropout,
    force_eval_mode,
    ran_out_of_memory,
    trunk_of,
)
from understudy.language.model.loading import attention_warning, load_model, refuse_nonfinite
from understudy.language.model.lora import ADAPTER, Adapter, base_of
from understudy.language.model.token_distribution import Head, TokenDistribution
from understudy.language.model.top_layers import TopLayers, frozen_parameter_names, make_top_layers
from understudy.language.rollout.completions import complete_prompts
from understudy.run.checkpoint import CorruptFileError, load_tensors
from understudy.run.config import RequestError
from understudy.run.store import SCHEMA, read_versioned_json, write_json

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # a fresh score head is no news
CriticKind = Literal["none", "shared", "separate", "top"]


class Critic(nn.Module):
    """V at every token: one linear output on the policy's own trunk, on a trunk of its own, or on a `Top` of its own."""

    def __init__(self, hidden_size: int, trunk: nn.Module | None, *, init: Literal["zero", "normal"] = "zero") -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.bias)
        if init == "zero":
            nn.init.zeros_(self.head.weight)  # Ziegler et al. 2019, policy's value head
        else:
            nn.init.normal_(self.head.weight, std=(hidden_size + 1) ** -0.5)  # Ziegler et al. 2019, reward head

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T]."""
        return self.head(hidden.to(self.head.weight.dtype))[..., 0].float()


class Policy(nn.Module):
    """A causal LM that chooses tokens, its critic, and the temperature it is sampled at.

    Rows are right-padded: causal attention then needs no mask and no positions, and padding cannot reach a token.

    Attributes:
        version: optimizer updates so far; what was sampled carries the version that sampled it.
        is_head_separable: head and trunk give the model's own logits; otherwise the model's forward is used as it is.
        uses_own_kv_cache: our key-value cache gives the same log-probs; otherwise Hugging Face's `generate` samples.
            None until the first prompts were continued both ways.
        tokenizer: its `Tokenizer`, where it has one; saved with it.
        warnings: what was found out while loading, to be said once.
        adapter: the LoRA adapter it learns by, where it has one.
        frozen_parameter_names: names of the model's parameters that do not learn.
    """

    needs_whole_rows = True  # rows are read whole

    def __init__(
        self, model: Any, critic: Critic | None = None, *, temperature: float = 1.0, packing: bool = False
    ) -> None:
        super().__init__()
        self.model, self.critic, self.packing = model, critic, packing
        self.temperature = temperature
        self.version = 0
        self.is_head_separable = True
        self.uses_own_kv_cache: bool | None = None
        self.tokenizer: Any = None
        self.warnings: list[str] = []
        self.adapter: Adapter | None = None
        self.frozen_parameter_names: frozenset[str] = frozenset()
        disable_dropout(self)
        self.train()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        critic: CriticKind = "none",
        critic_init: Literal["zero", "normal"] = "zero",
        critic_layers: int = 1,
        temperature: float = 1.0,
        packing: bool = False,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Policy:
        """The causal LM of a directory, a run or a hub id. Where the directory holds an adapter, it is merged into its base.

        Args:
            critic: none; "shared", a value head on the policy's trunk; "separate", a trunk of its own, begun as a copy;
                "top", `critic_layers` layers of its own, begun as copies, on the policy's lower ones.
            critic_init: the value head begins at 0, or at random with standard deviation 1/sqrt(H + 1).
            packing: put several rows into one when reading, so that little is spent on padding.
            gradient_checkpointing: recompute activations in the backward pass (slower, less memory).
            trust_remote_code: run code that comes with the model. Without it such a model is refused.

        Raises:
            RequestError: there is no causal LM there.
        """
        source = model_dir(str(source), "policy")
        model = load_model(AutoModelForCausalLM, source, dtype=dtype, trust_remote_code=trust_remote_code)
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
        critic_trunk = None
        if critic in ("separate", "top"):
            critic_trunk = (
                copy.deepcopy(trunk_of(model)) if critic == "separate" else make_top_layers(model, critic_layers)
            )
        critic_module = None if critic == "none" else Critic(hidden_size_of(model), critic_trunk, init=critic_init)
        policy = cls(model, critic_module, temperature=temperature, packing=packing)
        if base := base_of(source):
            policy.warnings.append(f"model '{source}' is an adapter on '{base}': it is merged into its weights")
        if warning := attention_warning(model):
            policy.warnings.append(warning)
        vocabulary = model.get_input_embeddings().num_embeddings
        policy.verify_separable_head(
            [torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()]
        )
        check_causal(policy)
        return policy

    @classmethod
    def load(cls, path: Path) -> Policy:
        """What `save` wrote, critic and all.

        Raises:
            RequestError: what is there is none of it.
        """
        problem = f"policy is '{path}', which holds no readable understudy.json"
        settings = read_versioned_json(path / "understudy.json", problem)
        temperature, critic = settings.get("temperature"), str(settings.get("critic"))
        if not isinstance(temperature, int | float) or critic not in get_args(CriticKind):
            raise RequestError(f"{problem}: its temperature is {temperature!r}, its critic {critic!r}; give another")
        policy = cls.from_pretrained(path, temperature=temperature)
        try:
            policy.critic = _load_critic(policy.model, critic, settings.get("critic_layers", 1), path / "critic")
        except (CorruptFileError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RequestError) or ran_out_of_memory(error):
                raise
            raise RequestError(
                f"policy is '{path}', whose critic does not fit it ({' '.join(str(error).split())[:160]}): give another"
            ) from error
        if policy.critic is not None:
            refuse_nonfinite(policy.critic, path / "critic")
        if (path / "tokenizer_config.json").is_file():
            generation_defaults = policy.model.generation_config
            policy.tokenizer = Tokenizer.load(
                path, has_fixed_length=generation_defaults.eos_token_id is None and not generation_defaults.stop_strings
            )
        return policy

    def save(self, path: Path) -> None:
        """A directory that `AutoModelForCausalLM.from_pretrained` loads as it is; the critic in a folder of its own.

        Where the policy learns by an adapter, the model is saved with it merged, and the adapter as it is in `adapter/`.
        """
        path.mkdir(parents=True, exist_ok=True)
        stops, stop_strings = (
            ((), ()) if self.tokenizer is None else (self.tokenizer.stops, self.tokenizer.stop_strings)
        )
        self.model.generation_config = make_generation_config(self.model, self.temperature, stops, stop_strings)
        save_model(self.model, self.adapter, path)
        if self.tokenizer is not None:
            self.tokenizer.save(path)
        shutil.rmtree(path / "critic", ignore_errors=True)
        settings: dict[str, Any] = {
            "schema": SCHEMA,
            "world": "language",
            "temperature": self.temperature,
            "critic": "none",
        }
        if self.critic is not None:
            (path / "critic").mkdir()
            settings["critic"] = "shared"
            if isinstance(trunk := self.critic.trunk, TopLayers):
                settings |= {"critic": "top", "critic_layers": len(trunk.layers)}
                save_file(trunk.state_dict(), path / "critic" / "top.safetensors")
            elif trunk is not None:
                settings["critic"] = "separate"
                trunk.save_pretrained(path / "critic")  # pyright: ignore[reportCallIssue]
            save_file(self.critic.head.state_dict(), path / "critic" / "head.safetensors")
        write_json(path / "understudy.json", settings)

    def add_lora_adapter(self, *, rank: int, alpha: float, targets: tuple[str, ...] = (), seed: int = 0) -> None:
        """Learn by a fresh LoRA adapter from here on; see `Adapter`."""
        self.adapter = Adapter(self.model, rank=rank, alpha=alpha, targets=targets, seed=seed)
        self.frozen_parameter_names = frozenset(
            name for name, _ in self.model.named_parameters() if ".lora_" not in name
        )
        if not targets and self.adapter.unadapted_names:
            self.warnings.append(
                f"lora_rank adapts {self.adapter.adapted_fraction:.1%} of the entries of the model's matrices: all but "
                f"{', '.join(self.adapter.unadapted_names)}, which are no linear layers"
            )

    def train_top_layers(self, num_layers: int) -> None:
        """Learn by the top `num_layers` layers, and the norm behind them, from here on."""
        self.frozen_parameter_names = frozen_parameter_names(self.model, num_layers)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.frozen_parameter_names)

    @property
    def trunk(self) -> Any:
        """The model without its head."""
        return trunk_of(self.model)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 64,
        num_completions: int = 1,
        temperature: float | None = None,
        greedy: bool = False,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str]]:
        """Continue prompts: a list of `num_completions` texts for each. Equal seeds give equal texts.

        Args:
            prompts: a list of prompts, or a single one: text, or a chat as a list of messages.
            max_new_tokens: tokens a completion may have, within the model's context.
            temperature: of sampling; by default the policy's own.
            greedy: take the likeliest token each time, instead of sampling.
            stop: texts or ids that end a completion; by default those of the policy. The text ends before them.

        Raises:
            RequestError: the policy has no tokenizer, a prompt fills the context, or a number is out of range.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "num_completions": num_completions,
            "temperature": temperature,
            "sample": not greedy,
        }
        return complete_prompts(self, prompts, **options, stop=stop, seed=seed)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head(self) -> Head:
        """The policy's head as it is now, temperature and all."""
        if not self.is_head_separable:
            return Head(nn.Identity(), temperature=self.temperature)
        return head_of(self.model, self.temperature)

    def forward(self, obs: TokenBatch | Tensor) -> tuple[TokenDistribution, Tensor]:
        """What comes after each token, and what is still to come there.

        Args:
            obs: ids [B, T], right-padded, or a `Text`: then only its masked-in columns are asked about.

        Returns:
            A distribution over the next token [B, T], and V [B, T], 0 without a critic.
        """
        text = obs if isinstance(obs, TokenBatch) else TokenBatch(obs, torch.ones_like(obs, dtype=torch.bool))
        critic_trunk = None if self.critic is None else self.critic.trunk
        with critic_trunk.record_calls(self.trunk) if isinstance(critic_trunk, TopLayers) else nullcontext([]) as calls:
            if self.is_head_separable:
                hidden = critic_hidden = compute_hidden_states(self.trunk, text, packing=self.packing)
            else:
                output = self.model(text.ids, use_cache=False, output_hidden_states=self.critic is not None)
                hidden, critic_hidden = (
                    output.logits,
                    output.logits if self.critic is None else output.hidden_states[-1],
                )
        if isinstance(critic_trunk, TopLayers):
            critic_hidden = (
                compute_hidden_states(partial(critic_trunk.forward_as_trunk, calls), text, packing=self.packing)
                if self.is_head_separable
                else critic_trunk(calls)
            )
        elif critic_trunk is not None:
            critic_hidden = compute_hidden_states(critic_trunk, text, packing=self.packing)
        value = torch.zeros(text.ids.shape, device=hidden.device) if self.critic is None else self.critic(critic_hidden)
        return TokenDistribution(hidden, text.mask, self.head), value

    def distribution(self, text: TokenBatch) -> TokenDistribution:
        """The distribution over the next token alone, [B, T]: no critic is read."""
        if not self.is_head_separable:
            return self(text)[0]
        return TokenDistribution(compute_hidden_states(self.trunk, text, packing=self.packing), text.mask, self.head)

    def value(self, text: TokenBatch) -> Tensor:
        """V alone, [B, T], of a critic that is separate: the policy itself is not read."""
        if self.critic is None or self.critic.trunk is None or isinstance(self.critic.trunk, TopLayers):
            return self(text)[1]
        return self.critic(compute_hidden_states(self.critic.trunk, text, packing=self.packing))

    def compute_masked_outputs(self, text: TokenBatch) -> Tensor:
        """The log-probs of the tokens at the masked-in columns, [n]: what checks compare."""
        return self.distribution(text).log_prob(text.action)[text.mask]

    @torch.no_grad()
    def verify_separable_head(self, prompts: Sequence[Sequence[int]]) -> None:
        """Take the fast path only where it gives the model's own log-probs on these prompts; a remark where it does not.

        Raises:
            RequestError: the model cannot read a row of tokens.
        """
        if not self.is_head_separable:
            return
        ids = torch.tensor([list(prompts[0])], device=self.device)
        name = type(self.model).__name__
        try:
            model_logprob = (self.model(ids, use_cache=False).logits.float() / self.temperature).log_softmax(dim=-1)
        except Exception as error:  # whatever a model raises that wants more than tokens
            if ran_out_of_memory(error):
                raise
            raise RequestError(
                f"model is a {name}, which cannot read a row of tokens ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]}): give another"
            ) from error
        try:
            policy_logprob = self.head(
                compute_hidden_states(self.trunk, TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
            ).log_softmax(dim=-1)
            gap = float(
                torch.where(policy_logprob == model_logprob, 0.0, policy_logprob - model_logprob).abs().max()
            )  # tokens ruled out are -inf in both
            problem = "" if gap <= TOLERANCE[self.model.dtype] else f"is {gap:.2g} nats from this model's own log-probs"
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            problem = f"cannot be used apart ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        if problem:
            self.is_head_separable = False
            self.warnings.append(
                f"the head on the trunk {problem}: it runs through its own logits and through Hugging Face's generate"
            )

    def train(self, mode: bool = True) -> Policy:
        super().train(mode)
        force_eval_mode(self.model, self.critic)
        return self

    def actor_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that learn."""
        return [
            parameter for name, parameter in self.model.named_parameters() if name not in self.frozen_parameter_names
        ]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else list(self.critic.parameters())


class Reference(nn.Module):
    """A policy as it was at one moment, frozen; its digest says which.

    Args:
        shared: parameters of the policy that will never learn: they are not copied but frozen and read by both.
    """

    def __init__(self, policy: Policy, *, shared_parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        model = copy.deepcopy(policy.model, {id(parameter): parameter for parameter in shared_parameters})
        self.policy = Policy(model, temperature=policy.temperature, packing=policy.packing)
        self.policy.is_head_separable, self.policy.uses_own_kv_cache = (
            policy.is_head_separable,
            policy.uses_own_kv_cache,
        )
        self.requires_grad_(False).eval()
        self.digest = module_digest(self.policy.model)

    @torch.no_grad()
    def forward(self, text: TokenBatch) -> TokenDistribution:
        """Its distribution over the next token; hidden states, not logits, are kept."""
        return self.policy(text)[0]


def _load_critic(model: Any, kind: str, num_layers: int, path: Path) -> Critic | None:
    """The critic that `Policy.save` wrote."""
    if kind == "none":
        return None
    trunk = None
    if kind == "separate":
        trunk = load_model(AutoModel, path, dtype=torch.float32)
    if kind == "top":
        trunk = TopLayers(trunk_of(model), num_layers)
        trunk.load_state_dict(load_tensors(path / "top.safetensors"))
    critic = Critic(hidden_size_of(model), trunk)
    critic.head.load_state_dict(load_tensors(path / "head.safetensors"))
    return critic


def save_model(model: Any, adapter: Adapter | None, path: Path) -> None:
    """A model in Hugging Face's layout, its adapter merged into it; the adapter as it is, for going on, in `adapter/`."""
    shutil.rmtree(path / ADAPTER, ignore_errors=True)
    model.save_pretrained(path, state_dict=None if adapter is None else adapter.merged_state_dict())
    if adapter is not None:
        adapter.save(path / ADAPTER)


def enable_gradient_checkpointing(model: Any) -> None:
    """Gradient checkpointing: in training mode, activations are made again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def model_dir(source: str, folder: str) -> str:
    """Where a model is: the folder of a run, where `source` is a run; else `source` itself."""
    subfolder = Path(source) / folder
    return str(subfolder) if (subfolder / "config.json").is_file() else source


def head_of(model: Any, temperature: float) -> Head:
    """The output embedding of a causal LM, and what its config says is done after it."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = float(getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or 0.0)
    return Head(model.get_output_embeddings(), scale=scale, softcap=softcap, temperature=temperature)


def hidden_size_of(model: Any) -> int:
    """H, the size of the hidden states that a model's head is given; layers inside may be wider (OPT)."""
    head: Any = model.get_output_embeddings() or getattr(model, "score", None)
    return head.weight.shape[1] if hasattr(head, "weight") else model.config.get_text_config().hidden_size


def make_generation_config(
    model: Any, temperature: float, stops: Iterable[int], stop_strings: Sequence[str] = ()
) -> GenerationConfig:
    """How the policy is sampled, in Hugging Face's words: its temperature and stops, whatever else the model came with."""
    defaults = model.generation_config
    ids: dict[str, Any] = {name: getattr(defaults, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if stops := sorted(stops):
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    if stop_strings:
        ids["stop_strings"] = [*stop_strings]
    return GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, **ids)


def module_digest(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of every tensor."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()
