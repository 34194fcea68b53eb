"""A field that the other fields leave without effect is refused before anything is read, made or written."""

import dataclasses

import pytest

from tests.rehearsed import furnish
from understudy.language import dpo, grpo, ppo, reinforce, reward_model, sft
from understudy.run.config import RequestError, check_effects

GIVEN = {"model": "nowhere", "data": "nowhere.jsonl", "reward": "length"}
RL = (ppo, grpo, reinforce)

IDLE = [
    (sft, {"lora_alpha": 8.0}, {"lora_rank": 4}),
    (dpo, {"lora_target_modules": ("q_proj",)}, {"lora_rank": 4}),
    *((kind, {"evaluate_every": 5, "held_out": 0}, {"held_out": 8}) for kind in (sft, dpo, reward_model)),
    (sft, {"held_out": 5, "evaluation_data": "own.jsonl"}, {"evaluation_data": None}),
    *((kind, {"num_epochs": 3, "total_tokens": 9}, {"total_tokens": 0}) for kind in (sft, dpo, reward_model)),
    (dpo, {"label_smoothing": 0.1, "loss_type": "ipo"}, {"loss_type": "sigmoid"}),
    *((kind, {"max_turns": 3}, {"reply": "tool.py:reply"}) for kind in RL),
    (ppo, {"constraint_rate": 0.5}, {"constraint": ("repetition<=0.1",)}),
    (ppo, {"constraint_rate": 0.5, "constraint": ("repetition<=0.1:warn",)}, {"constraint": ("repetition<=0.1:hold",)}),
    (
        ppo,
        {"constraint_rollbacks": 1, "constraint": ("repetition<=0.1",)},
        {"constraint": ("kl_reference<=1:rollback",)},
    ),
    (ppo, {"reward_timeout": 5.0}, {"reward": "mine.py:score"}),
    (ppo, {"missing_score": "row"}, {"reward": ("length", "repetition*-1")}),
    (ppo, {"reward_timeout": 5.0}, {"gold": "mine.py:score*0.5"}),
    (ppo, {"max_new_tokens": 5, "fixed_length": 6}, {"fixed_length": 0}),
    (ppo, {"truncation": "drop", "fixed_length": 4}, {"fixed_length": 0}),
    (ppo, {"missing_eos_penalty": 1.0, "fixed_length": 4}, {"fixed_length": 0}),
    (grpo, {"overlong": 2, "fixed_length": 4}, {"fixed_length": 0}),
    (ppo, {"truncation_penalty": -3.0}, {"truncation": "penalty"}),
    (ppo, {"missing_eos_penalty": 1.0, "truncation": "drop"}, {"truncation": "terminal"}),
    (ppo, {"off_policy_ratio": "row"}, {"off_policy": "mask"}),
    (ppo, {"off_policy_high": 3.0}, {"off_policy": "truncate"}),
    (ppo, {"off_policy_low": 0.1, "off_policy": "truncate"}, {"off_policy": "mask"}),
    (grpo, {"kl_reference": "exact"}, {"kl_reference_coef": 0.1}),
    (grpo, {"kl_reference_target": 3.0}, {"kl_reference_coef": 0.1}),
    (ppo, {"kl_reference_horizon": 9}, {"kl_reference_target": 3.0}),
    (ppo, {"pretraining_coef": 0.5}, {"pretraining": "texts.jsonl"}),
    (ppo, {"critic_layers": 2}, {"critic": "top"}),
    (ppo, {"clip": 0.1, "objective": "penalty"}, {"objective": "clip"}),
    (ppo, {"kl_old_coef": 0.5}, {"objective": "penalty"}),
    (ppo, {"adaptive_kl_target": 0.5}, {"objective": "penalty"}),
    (ppo, {"adaptive_kl_target": 0.5, "kl_old_coef": 0.0, "objective": "penalty"}, {"kl_old_coef": 0.1}),
    (ppo, {"trust_region_fraction": 0.5, "trust_region_kl": 0.0}, {"trust_region_kl": 0.1}),
    (ppo, {"best_by": "score"}, {"evaluate_every": 2}),
    (grpo, {"target_kl": 0.1}, {"num_epochs": 2}),
    (ppo, {"target_kl": 0.1, "num_epochs": 1, "num_minibatches": 1}, {"num_minibatches": 2}),
    (grpo, {"whiten_rewards": True}, {"whiten_rewards": False}),
    (reinforce, {"whiten_rewards": True}, {"baseline": "standardize"}),
    (reinforce, {"whiten_rewards": True, "baseline": "moving"}, {"baseline": "none"}),
    (reinforce, {"group_size": 8, "baseline": "standardize"}, {"baseline": "leave_one_out"}),
    (reinforce, {"baseline_decay": 0.5}, {"baseline": "moving"}),
    (reinforce, {"gamma": 0.9}, {"baseline": "none"}),
]


def given(kind, fields) -> dict:
    names = {field.name for field in dataclasses.fields(kind.Config)}
    return {name: x for name, x in GIVEN.items() if name in names} | fields


@pytest.mark.parametrize(("kind", "idle", "mended"), IDLE, ids=lambda x: str(x) if isinstance(x, dict) else None)
def test_a_field_without_effect_is_refused(kind, idle, mended):
    name = next(iter(idle))

    with pytest.raises(RequestError, match=f"^{name} is .* or leave {name} out$"):
        kind.train(kind.Config(**given(kind, idle)))
    made = kind.Config(**given(kind, idle | mended))
    check_effects(made, made.needs())


@pytest.mark.parametrize("kind", [sft, dpo, reward_model, *RL])
def test_defaults_all_have_an_effect(kind):
    made = kind.Config(**given(kind, {}))

    check_effects(made, made.needs())


def test_centering_labelled_texts_is_refused(tmp_path):
    home = furnish(tmp_path)

    with pytest.raises(RequestError, match=r"^center_coef is 0\.1, which has no effect on labelled texts"):
        reward_model.train(
            reward_model.Config(model=str(home), data=str(home / "labelled.jsonl"), center_coef=0.1, quiet=True)
        )
