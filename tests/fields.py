"""Which test shows what each config field of the language recipes does; `python -m tests.fields` writes the page."""

import dataclasses
from pathlib import Path

from tests.models import FAMILIES
from understudy.language import config, dpo, grpo, ppo, reinforce, reward_model, sft

PAGE = Path(__file__).parents[1] / "docs" / "language-fields.md"
CONFIGS = {
    "sft": sft.Config,
    "reward-model": reward_model.Config,
    "ppo": ppo.Config,
    "grpo": grpo.Config,
    "reinforce": reinforce.Config,
    "dpo": dpo.Config,
}
PPO, SFT, REWARD = "test_language_ppo.py::", "test_sft.py::", "test_reward_model.py::"
REFUSED, MODEL, GENERATE = "test_language_data_refusals.py::", "test_language_policy.py::", "test_generate.py::"

TRUST = "test_trust_region.py::"
TURNS, OFF = "test_multi_turn.py::", "test_off_policy.py::"
COUNTS = OFF + "test_a_token_counts_as_the_config_says"
SCHEDULE = "test_schedule.py::"
BOUNDS = "test_language_constraints.py::"

READ = "test_how_rows_are_read_does_not_change_what_is_learned"
BY_HAND = PPO + "test_the_loss_of_one_choice_by_hand"
CUT = PPO + "test_a_cut_completion_is_paid_as_the_config_says"
SEED = "test_a_seed_decides_every_parameter"
FIRST_STEP = "test_the_first_step_of_adam_is_one_learning_rate_long"
BFLOAT16 = "test_bfloat16_is_what_parameters_are_kept_in"
KL_HELD = PPO + "test_the_kl_is_held_at_its_target_wherever_its_coefficient_began"

MODES = "test_modes.py::"
TUNING: dict[str, tuple[str, ...]] = {
    "lora_rank": (
        MODES + "test_what_a_lora_run_changes_has_the_rank_that_was_asked_for",
        MODES + "test_a_lora_run_leaves_a_merged_policy_and_its_adapter_beside_it",
    ),
    "lora_alpha": (MODES + "test_an_adapter_counts_alpha_over_rank",),
    "lora_target_modules": (
        MODES + "test_an_adapter_goes_where_it_was_told_to",
        MODES + "test_a_layer_that_is_not_there_is_refused_with_those_that_are",
    ),
    "train_layers": (MODES + "test_of_a_policy_that_trains_its_top_layers_the_rest_stands_still",),
}

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "every recipe": {
        "model": (
            SFT + "test_a_run_is_a_model_to_go_on_from",
            REWARD + "test_training_goes_on_from_a_reward_models_run",
        ),
        "data": (
            SFT + "test_the_loss_is_the_surprise_of_the_completions_tokens_alone",
            "test_data_in_memory.py::test_rows_in_memory_teach_what_the_same_file_teaches",
        ),
        "data_config": (
            "test_data_files.py::test_another_split_and_configuration_of_a_directory_are_read_where_named",
        ),
        "data_split": (
            "test_data_files.py::test_another_split_and_configuration_of_a_directory_are_read_where_named",
            "test_data_files.py::test_a_part_of_what_has_none_is_refused",
        ),
        "columns": (REFUSED + "test_columns_of_other_names_are_mapped",),
        "total_tokens": (PPO + "test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for", SFT + FIRST_STEP),
        "seed": (PPO + SEED, SFT + SEED, REWARD + SEED),
        "output_dir": (PPO + "test_a_run_is_written_where_it_was_asked_for",),
        "held_out": (PPO + "test_held_out_prompts_are_not_trained_on",),
        "stop": (
            PPO + "test_completions_end_at_the_stop_ids_that_were_named",
            "test_stop_strings.py::test_rewards_are_given_the_text_before_the_stop_string",
            SFT + "test_a_stop_that_was_named_is_learned_and_saved",
            REWARD + "test_the_stop_ids_it_was_trained_with_come_back",
        ),
        "chat_template": (
            PPO + "test_chat_is_laid_out_by_the_template_which_is_saved_with_the_policy",
            SFT + "test_only_the_last_turn_of_a_chat_is_learned_from",
        ),
        "add_bos": (
            "test_records.py::test_a_bos_can_be_forced_and_is_saved_with_the_tokenizer",
            "test_records.py::test_a_bos_that_does_not_exist_cannot_be_forced",
            REFUSED + "test_a_bos_is_forced_where_it_was_asked_for",
        ),
        "max_length": (
            REFUSED + "test_a_row_longer_than_asked_for_is_refused",
            "test_records.py::test_the_field_that_limits_a_row_is_named",
        ),
        "too_long": (
            REFUSED + "test_a_run_goes_on_without_the_rows_that_are_too_long",
            "test_records.py::test_both_sides_of_a_pair_lose_as_much_of_their_prompt_and_keep_bos",
            REFUSED + "test_prompts_that_a_judge_reads_are_not_cut",
        ),
        "evaluation_data": (
            "test_evaluation_data.py::test_rows_of_their_own_are_evaluated_on_and_all_others_learned_from",
            "test_evaluation_data.py::test_a_run_is_evaluated_on_its_own_file",
        ),
        "device": (
            PPO + "test_a_run_works_on_the_device_it_was_given",
            REFUSED + "test_a_device_that_is_not_there_is_refused",
        ),
        "num_threads": (PPO + "test_a_run_takes_the_threads_it_was_given",),
        "dtype": (PPO + BFLOAT16, SFT + BFLOAT16, REWARD + BFLOAT16),
        "gradient_checkpointing": (
            MODEL + "test_gradient_checkpointing_changes_no_gradient",
            REWARD + "test_checkpointing_is_on_where_it_was_asked_for",
            PPO + READ,
        ),
        "trust_remote_code": (
            "faults/test_hostile.py::test_a_model_that_brings_code_is_refused",
            "faults/test_hostile.py::test_code_that_comes_with_a_model_is_run_when_the_user_asks_for_it_and_not_when_a_run_does",
        ),
        "packing": (
            MODEL + "test_log_probs_are_the_models_own_on_rows_without_padding",
            PPO + READ,
            SFT + READ,
            REWARD + READ,
        ),
        "learning_rate": (
            SFT + FIRST_STEP,
            REWARD + FIRST_STEP,
            PPO + "test_adamws_epsilon_stands_beside_the_gradients_size",
        ),
        "learning_rate_schedule": (SCHEDULE + "test_the_learning_rate_goes_on_as_its_schedule_says",),
        "warmup": (
            SCHEDULE + "test_the_learning_rate_rises_over_the_warm_ups_share_of_the_run",
            SCHEDULE + "test_the_stated_learning_rate_is_reached_after_the_warm_up",
        ),
        "adam_eps": (PPO + "test_adamws_epsilon_stands_beside_the_gradients_size",),
        "weight_decay": (PPO + "test_adamw_decays_weights_by_rate_times_decay",),
        "max_grad_norm": (PPO + "test_a_bound_on_the_gradient_holds_it",),
        "micro_batch_size": (
            PPO + READ,
            SFT + READ,
            REWARD + READ,
            "test_update.py::test_a_micro_batch_has_at_most_so_many_rows",
        ),
        "evaluate_every": (PPO + "test_evaluations_come_every_so_many_iterations_and_at_the_end",),
        "checkpoint_every": (PPO + "test_checkpoints_come_every_so_many_iterations_and_at_the_end",),
        "keep_checkpoints": ("faults/test_resume.py::test_the_newest_checkpoints_stay_and_older_ones_go",),
        "log_every": (PPO + "test_lines_of_metrics_come_every_so_many_iterations_and_are_means",),
        "log": (
            PPO + "test_metrics_go_to_tensorboard_where_it_is_there",
            REFUSED + "test_a_sink_without_its_package_is_refused",
        ),
        "quiet": (
            PPO + "test_a_run_that_is_not_quiet_says_how_it_goes",
            PPO + "test_a_run_is_written_where_it_was_asked_for",
        ),
    },
    "sft": TUNING
    | {
        "train_on": (
            "test_chat_templates.py::test_the_turns_that_were_asked_for_are_learned",
            SFT + "test_all_turns_of_a_chat_are_learned_from_where_asked",
        ),
        "num_epochs": (SFT + "test_every_row_is_learned_from_once_an_epoch",),
        "batch_size": (SFT + "test_every_row_is_learned_from_once_an_epoch",),
    },
    "reward-model": {
        "num_epochs": (REWARD + "test_so_many_pairs_make_a_step_and_every_one_comes_once_an_epoch",),
        "batch_size": (REWARD + "test_so_many_pairs_make_a_step_and_every_one_comes_once_an_epoch",),
        "center_coef": (REWARD + "test_centering_holds_the_scores_of_pairs_around_zero",),
        "normalize": (REWARD + "test_scores_of_what_was_learned_from_are_normalised_as_asked",),
    },
    "ppo": TUNING
    | {
        "reward": (
            PPO + "test_rewards_of_every_kind_add_up_by_their_weights_and_are_logged_apart",
            PPO + "test_a_python_function_is_a_reward_and_config_json_names_it",
        ),
        "gold": (PPO + "test_gold_is_measured_and_never_trained_on",),
        "reward_timeout": (PPO + "test_a_reward_function_that_takes_too_long_is_missing",),
        "unconditional": (
            REFUSED + "test_an_unconditional_run_starts_every_row_from_bos",
            "test_records.py::test_unconditional_with_a_prompt_column_is_refused",
        ),
        "keep_special_tokens": (
            "test_chat_templates.py::test_completions_keep_special_tokens_where_asked",
            PPO + "test_a_reward_function_reads_special_tokens_where_asked",
        ),
        "missing_score": (
            "test_reward_sum.py::test_none_leaves_the_row_to_the_other_terms",
            "test_reward_sum.py::test_none_leaves_out_the_row_where_that_is_asked_for",
            "test_reward_sum.py::test_a_run_leaves_out_what_it_was_asked_to",
        ),
        "reply": (
            TURNS + "test_a_recipe_learns_from_conversations",
            TURNS + "test_a_files_function_replies_from_a_process_of_its_own",
        ),
        "max_turns": (TURNS + "test_after_the_last_turn_nobody_is_asked", TURNS + "test_turns_are_the_policys_at_most"),
        "off_policy": (COUNTS, OFF + "test_every_recipe_weighs_what_an_engine_sampled"),
        "off_policy_ratio": (COUNTS,),
        "off_policy_low": (COUNTS, OFF + "test_a_band_without_a_width_is_refused"),
        "off_policy_high": (COUNTS, OFF + "test_every_recipe_weighs_what_an_engine_sampled"),
        "constraint": (
            BOUNDS + "test_a_spec_that_is_no_part_yet_is_measured_for_its_bound",
            BOUNDS + "test_a_held_bound_teaches_and_one_that_only_warns_changes_nothing",
            BOUNDS + "test_a_run_stops_at_a_bound_says_why_and_evaluates_what_it_has",
        ),
        "constraint_rate": (BOUNDS + "test_a_held_cost_is_taken_off_each_rows_score",),
        "constraint_rollbacks": (BOUNDS + "test_a_run_that_may_not_go_back_again_stops",),
        "completions_per_iteration": (PPO + "test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for",),
        "max_new_tokens": (PPO + "test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for",),
        "fixed_length": (
            PPO + "test_completions_of_a_fixed_length_have_it_and_no_other_end",
            PPO + "test_a_fixed_length_needs_no_stop_id",
        ),
        "temperature": (PPO + "test_sampled_log_probs_are_the_models_own_at_the_temperature",),
        "top_k": (OFF + "test_truncated_samples_count_the_mass_that_was_kept",),
        "top_p": (OFF + "test_truncated_samples_count_the_mass_that_was_kept",),
        "max_num_seqs": (
            PPO + "test_what_is_said_does_not_depend_on_the_slots",
            GENERATE + "test_many_rows_through_few_slots_keep_their_log_probs",
        ),
        "critic": (
            PPO + "test_the_critic_is_saved_with_a_trunk_of_its_own_or_none",
            PPO + "test_a_separate_critic_begins_by_expecting_the_reward_models_score",
            MODES + "test_an_error_of_the_critic_moves_its_top_layers_and_nothing_of_the_policy",
            MODES + "test_each_combination_passes_preflight_and_runs_or_is_refused",
        ),
        "critic_layers": (
            MODES + "test_top_layers_of_its_own_begin_by_seeing_what_the_trunk_sees",
            MODES + "test_top_layers_come_back_as_they_were_saved",
        ),
        "critic_init": (PPO + "test_a_fresh_critic_says_zero_or_something_small_at_random",),
        "critic_learning_rate": (PPO + "test_the_critics_learning_rate_is_its_own",),
        "critic_max_grad_norm": (PPO + "test_the_critics_gradient_has_a_bound_of_its_own",),
        "critic_warmup": (
            PPO + "test_while_the_critic_warms_up_the_actor_stands_still_to_the_bit",
            PPO + "test_after_the_warm_up_the_actor_learns",
        ),
        "reference": (PPO + "test_the_reference_is_the_directory_that_was_named",),
        "reference_mode": (
            MODES + "test_a_reference_shares_what_never_learns_and_copies_the_rest",
            MODES + "test_the_reference_says_the_same_to_the_bit_after_twenty_updates",
            MODES + "test_each_combination_passes_preflight_and_runs_or_is_refused",
        ),
        "num_epochs": (PPO + "test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for",),
        "num_minibatches": (PPO + "test_a_run_has_the_rows_tokens_and_optimizer_steps_it_was_asked_for",),
        "gamma": (PPO + "test_advantages_are_gaes_with_the_configs_gamma_and_lambda",),
        "lam": (PPO + "test_advantages_are_gaes_with_the_configs_gamma_and_lambda",),
        "lam_value": (PPO + "test_the_critics_targets_have_a_lambda_of_their_own",),
        "objective": (BY_HAND,),
        "clip": (BY_HAND,),
        "kl_old_coef": (BY_HAND,),
        "adaptive_kl_target": (PPO + "test_the_penaltys_coefficient_follows_its_target",),
        "target_kl": (TRUST + "test_target_kl_ends_an_update_early",),
        "value_coef": (BY_HAND,),
        "value_clip": (BY_HAND,),
        "entropy_coef": (BY_HAND,),
        "normalize_advantage": (
            PPO + "test_advantages_are_standardised_over_the_record_where_asked",
            PPO + "test_over_minibatches_advantages_are_left_for_the_update_to_standardise",
        ),
        "whiten_rewards": (PPO + "test_whitened_rewards_have_deviation_one_and_keep_their_mean",),
        "kl_reference": (BY_HAND, PPO + "test_the_kl_to_the_reference_is_paid_token_by_token_with_its_coefficient"),
        "kl_reference_coef": (
            BY_HAND,
            PPO + "test_the_kl_to_the_reference_is_paid_token_by_token_with_its_coefficient",
        ),
        "kl_reference_target": (KL_HELD, PPO + "test_without_a_target_the_coefficient_decides_how_far_the_policy_goes"),
        "kl_reference_horizon": (PPO + "test_the_reference_coefficient_follows_its_target_within_its_horizon", KL_HELD),
        "trust_region_kl": (
            TRUST + "test_a_run_undoes_an_update_that_went_too_far",
            TRUST + "test_a_run_inside_the_region_is_the_run_without_one",
        ),
        "trust_region_fraction": (TRUST + "test_a_sixteenth_of_the_rows_is_measured_at_least_eight",),
        "truncation": (CUT,),
        "truncation_penalty": (CUT,),
        "missing_eos_penalty": (CUT,),
        "pretraining": (PPO + "test_pretraining_text_comes_in_turn_beside_the_rows",),
        "pretraining_coef": (BY_HAND, PPO + "test_pretraining_text_pulls_the_policy_towards_it"),
        "evaluate_rows": (PPO + "test_evaluations_come_every_so_many_iterations_and_at_the_end",),
        "best_by": (
            "test_best.py::test_best_holds_the_policy_of_the_best_evaluation",
            "test_best.py::test_the_best_by_gold_is_not_that_by_score",
        ),
        "log_samples": (PPO + "test_so_many_completions_an_iteration_are_kept",),
        "preflight": (PPO + "test_a_run_that_would_learn_nothing_is_refused_unless_told_not_to_look",),
    },
}
SHARED = {field.name for field in dataclasses.fields(config.RolloutConfig)} - {
    field.name for field in dataclasses.fields(config.Config)
}
ROLLOUTS = {name: tests for name, tests in TABLE["ppo"].items() if name in SHARED}  # one cast, one `pay` for them all
GRPO, OBJECTIVE, SCORE = "test_grpo.py::", "test_objective.py::", "test_reward.py::"
KL_CHARGED = GRPO + "test_a_kl_in_the_loss_costs_what_its_coefficient_says"
TABLE["grpo"] = ROLLOUTS | {
    "group_size": (GRPO + "test_an_answer_is_compared_with_its_own_group",),
    "scale_by_std": (GRPO + "test_an_answer_is_compared_with_its_own_group",),
    "loss_aggregation": (GRPO + "test_what_weighs_the_same_changes_what_is_learned",),
    "objective": (
        GRPO + "test_the_objective_is_the_one_that_was_named",
        OBJECTIVE + "test_a_rows_ratio_is_the_geometric_mean_of_its_steps",
        OBJECTIVE + "test_a_clipped_weight_still_teaches",
    ),
    "clip": (OBJECTIVE + "test_the_bounds_of_a_ratio_may_differ",),
    "clip_high": (
        OBJECTIVE + "test_the_bounds_of_a_ratio_may_differ",
        GRPO + "test_one_bound_serves_for_both_where_no_other_is_given",
    ),
    "num_epochs": (GRPO + "test_passes_and_minibatches_are_what_was_asked_for",),
    "num_minibatches": (GRPO + "test_passes_and_minibatches_are_what_was_asked_for",),
    "target_kl": (TRUST + "test_target_kl_ends_an_update_early",),
    "entropy_coef": (GRPO + "test_the_objective_is_the_one_that_was_named",),
    "dynamic_sampling_rounds": (GRPO + "test_groups_that_all_score_the_same_are_replaced",),
    "overlong": (
        GRPO + "test_overlong_shaping_counts_from_the_limit",
        SCORE + "test_a_long_completion_is_charged_more_and_more",
    ),
    "kl_reference": (KL_CHARGED,),
    "kl_reference_coef": (KL_CHARGED,),
}
TABLE["reinforce"] = ROLLOUTS | {
    "baseline": (GRPO + "test_baselines_by_hand",),
    "group_size": (GRPO + "test_baselines_by_hand",),
    "baseline_decay": (GRPO + "test_a_moving_baseline_follows_the_scores",),
    "gamma": (GRPO + "test_a_discount_makes_early_tokens_answer_for_less",),
    "entropy_coef": (GRPO + "test_an_entropy_bonus_is_taken_off_the_loss",),
}
TABLE["dpo"] = TUNING | {
    "num_epochs": (GRPO + "test_at_first_nothing_is_preferred_and_then_the_chosen_side_gains",),
    "batch_size": (GRPO + "test_at_first_nothing_is_preferred_and_then_the_chosen_side_gains",),
    "loss_type": (
        OBJECTIVE + "test_dpo_and_ipo_by_hand",
        GRPO + "test_the_form_the_price_and_the_smoothing_reach_the_loss",
    ),
    "beta": (
        OBJECTIVE + "test_dpo_and_ipo_by_hand",
        GRPO + "test_the_form_the_price_and_the_smoothing_reach_the_loss",
    ),
    "label_smoothing": (
        OBJECTIVE + "test_dpo_and_ipo_by_hand",
        GRPO + "test_the_form_the_price_and_the_smoothing_reach_the_loss",
    ),
    "reference": (GRPO + "test_a_reference_of_its_own_is_where_dpo_measures_from",),
}
EVERY_FAMILY = (  # each is parametrised over all of `FAMILIES`, tied and untied
    MODEL + "test_log_probs_are_the_models_own_on_rows_without_padding",
    GENERATE + "test_the_samplers_log_probs_are_those_of_an_uncached_pass",
    SFT + "test_a_policy_of_every_family_is_learned_saved_and_loaded_as_it_is",
    MODES + "test_top_layers_of_its_own_begin_by_seeing_what_the_trunk_sees",
    MODES + "test_a_fresh_adapter_changes_nothing_and_is_all_that_learns",
    MODES + "test_an_adapter_is_sampled_from_as_it_is_trained",
    MODES + "test_merged_and_beside_its_base_an_adapter_says_the_same",
    REWARD + "test_hugging_faces_class_scores_padded_rows_as_we_do",
)


def page() -> str:
    """The table as Markdown."""
    lines = [
        "# Fields of the language recipes",
        "",
        "For every config field and model family, the test that shows what it does; files are in `tests/`. This page is",
        "written by `python -m tests.fields`. A test fails where a field has no row, a test is gone, or the page is old.",
    ]
    for title, rows in TABLE.items():
        defaults = {field.name: field for field in dataclasses.fields(CONFIGS.get(title, config.Config))}
        lines += ["", f"## {title}", "", "| field | default | shown by |", "|---|---|---|"]
        lines += [f"| `{name}` | {_default(defaults[name])} | {_joined(tests)} |" for name, tests in rows.items()]
    lines += ["", "## Model families", "", "| family | shown by |", "|---|---|"]
    lines += [f"| {family}, tied and untied | {_joined(EVERY_FAMILY)} |" for family in FAMILIES]
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field) -> str:
    """A field's default; fields with one by recipe say that of their base."""
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def _joined(tests: tuple[str, ...]) -> str:
    return "<br>".join(f"`{test}`" for test in tests)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
