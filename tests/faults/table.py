"""The faults that are injected, row by row, and the tests that show what becomes of each.

A test's number is the kinds of fault it injects at a time; one that is parametrised counts once for each of its cases.
`make faults` runs them all and writes docs/reliability.md; a row without tests here is shown there as not covered.
"""

from __future__ import annotations

from typing import NamedTuple

RESUME, SUPERVISE = "tests/faults/test_resume.py", "tests/faults/test_fault_tolerant.py"
RECORDS, GUARD, HOSTILE = (
    f"tests/faults/test_{name}.py" for name in ("fault_tolerant_records", "update_guard", "hostile")
)
MORE, LINEAGE = "tests/faults/test_more_faults.py", "tests/faults/test_lineage.py"
JUDGE, COLLECT, SPACES, TEXT = (f"tests/test_{name}.py" for name in ("reward_sum", "rollout", "spaces", "records"))
DATA, REFUSALS, GENERATE = (f"tests/test_{name}.py" for name in ("data_files", "language_data_refusals", "generate"))
PREFLIGHT, LANGUAGE = "tests/test_language_preflight.py", "tests/faults/test_language_faults.py"


class Row(NamedTuple):
    """A row: its number, the fault, what is to happen, and tests by file::name with the kinds each injects at a time."""

    name: str
    fault: str
    expected: str
    tests: dict[str, int]


ROWS = (
    Row(
        "F1",
        "the trainer is killed with SIGKILL",
        "resumed, it ends with the same bytes",
        {f"{RESUME}::test_a_killed_run_ends_with_the_bytes_of_one_that_was_not": 1},
    ),
    Row(
        "F2",
        "SIGTERM, SIGINT",
        "saved after the iteration, exit 143 or 130, resumed to the same bytes",
        {f"{RESUME}::test_a_signal_saves_exits_as_it_should_and_resumes_to_the_same_bytes": 1},
    ),
    Row(
        "F3",
        "SIGINT twice",
        "exit within two seconds, the last checkpoint whole",
        {f"{RESUME}::test_a_second_interrupt_exits_within_two_seconds_and_harms_nothing": 1},
    ),
    Row(
        "F4",
        "killed within a checkpoint write",
        "no part of a checkpoint is taken for one; resumed to the same bytes",
        {f"{RESUME}::test_a_killed_run_ends_with_the_bytes_of_one_that_was_not": 1},
    ),
    Row(
        "F5",
        "a checkpoint's file cut, a bit of it flipped, deleted",
        "found by its digest, put away, the checkpoint before is used, and said",
        {f"{RESUME}::test_a_damaged_checkpoint_is_put_away_and_the_one_before_is_used": 1},
    ),
    Row(
        "F6",
        "all checkpoints damaged; the one asked for damaged or missing",
        "refused; nothing begun anew, nothing written over",
        {
            f"{RESUME}::test_where_all_are_damaged_nothing_is_begun_anew": 1,
            f"{RESUME}::test_a_checkpoint_that_is_named_is_the_one_used_or_none": 2,
        },
    ),
    Row(
        "F7",
        "the disk is full",
        "what was begun is removed; the run goes on, and ends in a sentence at the third refusal",
        {
            f"{RESUME}::test_a_disk_that_refuses_a_checkpoint_does_not_end_the_run_at_once": 1,
            f"{RESUME}::test_metrics_that_cannot_be_written_are_said_once_and_the_run_goes_on": 1,
            f"{LANGUAGE}::test_samples_that_cannot_be_written_are_said_once_and_the_run_goes_on": 1,
            f"{MORE}::test_files_that_may_not_grow_end_the_run_in_a_sentence_and_leave_no_part_of_a_checkpoint": 1,
        },
    ),
    Row(
        "F8",
        "the run's directory cannot be made or written to, vanishes, or keeps other bytes than were written",
        "refused in a sentence; or said, made again, and gone on",
        {
            f"{MORE}::test_a_directory_that_cannot_be_made_is_refused_before_anything_is_learned": 1,
            f"{MORE}::test_a_directory_that_may_not_be_written_to_ends_the_run_in_a_sentence": 1,
            f"{MORE}::test_a_disk_that_says_it_wrote_and_did_not_is_found_out_when_it_is_read_back": 1,
            f"{MORE}::test_a_directory_that_vanishes_is_made_again_at_the_next_checkpoint": 1,
        },
    ),
    Row(
        "F9",
        "two processes on one run; a dead one's lock; the clock jumps",
        "the second is refused; a dead one holds nobody; no byte depends on the clock",
        {
            f"{RESUME}::test_a_second_process_on_a_run_is_refused": 2,
            f"{MORE}::test_a_clock_that_jumps_changes_no_byte": 1,
        },
    ),
    Row(
        "F10",
        "hostile files",
        "nothing executed, refused in a sentence within a second",
        {
            f"{HOSTILE}::test_weights_that_are_no_safetensors_are_refused": 1,
            f"{HOSTILE}::test_json_that_is_none_of_ours_is_refused": 1,
            f"{HOSTILE}::test_sizes_are_not_believed": 1,
            f"{HOSTILE}::test_sizes_of_a_language_model_are_not_believed": 1,
            f"{HOSTILE}::test_a_checkpoint_that_is_not_what_it_says_is_refused": 1,
            f"{HOSTILE}::test_links_in_a_run_are_refused_before_anything_is_written_through_them": 5,
            f"{HOSTILE}::test_a_policy_behind_a_link_is_refused": 1,
            f"{HOSTILE}::test_a_pipe_is_not_waited_for": 2,
            f"{HOSTILE}::test_an_environment_that_only_a_config_names_is_not_imported": 1,
            f"{HOSTILE}::test_code_in_the_run_itself_is_refused_even_with_a_right_signature": 1,
            f"{HOSTILE}::test_a_digest_that_somebody_else_wrote_down_vouches_for_nothing": 4,
            f"{HOSTILE}::test_code_that_has_changed_since_the_run_began_is_refused_until_it_is_named": 1,
            f"{HOSTILE}::test_a_function_of_a_file_inside_a_run_is_refused": 1,
            f"{HOSTILE}::test_a_function_of_an_installed_file_is_refused_too": 1,
            f"{HOSTILE}::test_a_recipe_that_is_none_is_not_imported": 1,
            f"{HOSTILE}::test_a_config_that_lacks_fields_is_refused": 1,
            f"{HOSTILE}::test_an_archive_of_another_library_is_refused": 2,
            f"{HOSTILE}::test_a_checkpoint_of_torch_distributed_is_refused": 1,
            f"{HOSTILE}::test_an_archive_whose_entries_lead_elsewhere_is_not_unpacked": 1,
            f"{HOSTILE}::test_a_model_whose_weights_are_a_pickle_is_refused": 1,
            f"{HOSTILE}::test_an_index_that_names_other_files_than_safetensors_beside_it_is_refused": 1,
            f"{HOSTILE}::test_an_adapter_that_is_a_pickle_or_names_a_module_or_itself_is_refused": 3,
        },
    ),
    Row(
        "F11",
        "a model that brings code along",
        "refused without a flag",
        {
            f"{HOSTILE}::test_a_model_that_brings_code_is_refused": 1,
            f"{HOSTILE}::test_a_tokenizer_that_brings_code_is_refused": 1,
            f"{HOSTILE}::test_a_judge_or_reference_that_brings_code_is_refused": 1,
            f"{HOSTILE}::test_code_that_comes_with_a_model_is_run_when_the_user_asks_for_it_and_not_when_a_run_does": 1,
        },
    ),
    Row(
        "F12",
        "an environment raises, once or always",
        "restarted alone; the budget spent, the run is saved and says so",
        {
            f"{SUPERVISE}::test_a_fault_says_what_happened_and_where": 1,
            f"{SUPERVISE}::test_a_run_goes_on_over_faults_and_writes_each_down": 1,
            f"{SUPERVISE}::test_one_fault_more_than_restarts_are_allowed_ends_it_in_a_sentence": 1,
            f"{SUPERVISE}::test_when_the_restarts_are_spent_the_run_is_saved_and_says_so": 1,
        },
    ),
    Row(
        "F13",
        "an environment's process is killed",
        "restarted alone within five seconds, its step masked",
        {
            f"{SUPERVISE}::test_a_killed_environment_is_back_within_five_seconds_and_its_row_alone_is_cut": 1,
            f"{SUPERVISE}::test_the_loss_of_the_nursery_is_survived": 1,
            f"{RECORDS}::test_the_step_before_a_fault_is_truncated_and_what_was_last_seen_stands_masked_after_it": 1,
            f"{SUPERVISE}::test_when_the_trainer_is_killed_its_environments_end_even_one_that_hangs": 1,
        },
    ),
    Row(
        "F14",
        "an environment hangs, in a step or a reset",
        "ended at its time limit, restarted alone",
        {
            f"{SUPERVISE}::test_a_fault_in_a_reset_is_mended_within_it": 1,
            f"{SUPERVISE}::test_faults_in_all_rows_at_once_are_handled_at_once": 1,
            f"{SUPERVISE}::test_an_environment_that_hangs_at_once_is_refused": 1,
        },
    ),
    Row(
        "F15",
        "an environment's constructor fails in its process",
        "refused with the row and the traceback",
        {
            f"{SUPERVISE}::test_an_environment_that_cannot_be_made_is_refused_at_once": 1,
            f"{SUPERVISE}::test_an_environment_that_cannot_be_made_again_spends_the_restarts": 1,
            f"{SUPERVISE}::test_what_takes_too_long_apart_is_refused_and_where_it_hung_is_known": 1,
        },
    ),
    Row(
        "F16",
        "observations, rewards, ends and infos that are not what they should be",
        "caught at the step they happen; masked, or refused with their place",
        {
            f"{SUPERVISE}::test_a_fault_ends_its_own_episode_at_its_last_observation_and_no_other": 1,
            f"{SUPERVISE}::test_a_broken_number_where_the_space_is_of_whole_ones_is_a_fault": 1,
            f"{MORE}::test_what_is_no_observation_reward_end_or_info_ends_the_run_at_its_step": 1,
            f"{COLLECT}::test_a_reward_that_is_no_number_is_refused_and_its_place_named": 1,
            f"{COLLECT}::test_an_observation_that_is_no_number_is_refused_and_its_place_named": 1,
        },
    ),
    Row(
        "F17",
        "action spaces at the edge",
        "learned in, or refused before there is a run",
        {
            f"{MORE}::test_an_action_space_at_the_edge_is_learned_in_or_refused_before_there_is_a_run": 1,
            f"{SPACES}::test_every_number_becomes_an_action_in_the_space": 1,
        },
    ),
    Row(
        "F18",
        "autoreset modes, EnvPool, steps that only reset",
        "the same record and the same advantages in each; a ghost step is masked",
        {
            f"{COLLECT}::test_chosen_steps_carry_the_same_in_every_mode": 1,
            f"{COLLECT}::test_advantages_of_whole_episodes_are_the_same_in_every_mode": 1,
            f"{RECORDS}::test_a_fault_leaves_the_same_record_in_every_mode": 1,
            "tests/test_envpool.py::test_reset_rows_of_envpool_are_no_steps": 1,
        },
    ),
    Row(
        "F19",
        "a reward function raises, hangs, ends its process, gives what is no score",
        "its rows are missing and never zero; an interrupt stays one",
        {
            f"{JUDGE}::test_a_row_that_raises_is_missing_and_the_others_are_scored": 1,
            f"{JUDGE}::test_none_nan_and_infinity_are_missing_for_their_row_alone": 3,
            f"{JUDGE}::test_a_text_is_no_score": 1,
            f"{JUDGE}::test_what_is_no_list_of_numbers_is_no_score": 1,
            f"{JUDGE}::test_a_file_that_gives_no_list_of_numbers_gives_no_score": 1,
            f"{JUDGE}::test_tensors_of_a_number_a_row_are_scores": 1,
            f"{JUDGE}::test_too_many_scores_are_no_scores": 1,
            f"{JUDGE}::test_a_wrong_number_of_scores_is_asked_again_row_by_row": 1,
            f"{JUDGE}::test_an_interrupt_is_not_taken_for_a_bad_row": 1,
            f"{JUDGE}::test_a_function_of_this_process_that_exits_ends_it": 1,
            f"{JUDGE}::test_a_function_that_forks_is_answered_for_by_its_parent_alone": 1,
            f"{JUDGE}::test_a_row_that_hangs_is_ended_and_the_others_are_scored": 1,
            f"{JUDGE}::test_a_row_that_hangs_without_letting_go_of_the_interpreter_is_ended": 1,
            f"{JUDGE}::test_a_row_that_ends_the_process_is_missing_and_the_others_are_scored": 1,
            f"{JUDGE}::test_a_row_that_raises_system_exit_is_missing": 1,
            f"{JUDGE}::test_what_a_late_function_started_ends_with_it": 1,
            f"{JUDGE}::test_what_a_function_prints_does_not_reach_the_protocol": 1,
            f"{REFUSALS}::test_a_reward_function_that_fails_is_counted_as_missing": 1,
            f"{LANGUAGE}::test_a_secret_that_a_judge_tells_is_in_no_file_of_a_run": 1,
        },
    ),
    Row(
        "F22",
        "an update that is not finite: loss, gradient, ratio, advantage, target, parameter; nothing to learn from",
        "left out, the state before it back bit for bit, noted; three in a row end the run",
        {
            f"{GUARD}::test_an_update_that_is_not_finite_leaves_no_trace": 1,
            f"{GUARD}::test_a_record_in_which_nothing_was_chosen_is_no_fault": 1,
            f"{GUARD}::test_what_comes_after_is_what_comes_without_the_update_that_was_left_out": 1,
            f"{GUARD}::test_every_recipe_goes_on_after_an_update_that_was_left_out": 1,
            f"{GUARD}::test_three_in_a_row_end_the_run_and_name_the_last_good_checkpoint": 1,
            f"{GUARD}::test_before_there_is_a_checkpoint_three_in_a_row_say_so": 1,
            f"{GUARD}::test_a_resumed_run_counts_on": 1,
            f"{GUARD}::test_parameters_that_are_not_finite_are_in_no_checkpoint_and_end_the_run": 1,
            "tests/test_advantage.py::test_equal_scores_have_no_advantage_whatever_their_rounding": 1,
        },
    ),
    Row(
        "F23",
        "loss or gradient a hundredfold, for one step and for five",
        "a finding each; nothing is done about it",
        {
            f"{MORE}::test_a_spike_is_found_in_every_line_it_lasts": 1,
            f"{MORE}::test_spikes_of_a_run_are_events_and_change_nothing": 1,
            f"{LANGUAGE}::test_spikes_of_a_language_run_are_events_and_change_nothing": 2,
        },
    ),
    Row(
        "F24",
        "prompts and completions at the edge: empty, too long, special tokens, lone surrogates; no end",
        "refused with their row, or read as they are; counted and masked",
        {
            f"{MORE}::test_odd_prompts_are_read_or_refused_with_their_row": 1,
            f"{TEXT}::test_a_prompt_begins_with_exactly_one_bos": 1,
            f"{TEXT}::test_an_empty_prompt_without_a_bos_is_refused": 1,
            f"{TEXT}::test_a_row_longer_than_the_context_is_refused_with_both_numbers": 1,
            f"{GENERATE}::test_a_row_ends_at_a_stop_id_and_at_the_limit": 1,
            f"{GENERATE}::test_an_empty_prompt_is_refused": 1,
            f"{LANGUAGE}::test_a_policy_that_ends_at_once_or_never_is_counted_and_harms_nothing": 1,
            f"{LANGUAGE}::test_a_prompt_of_no_tokens_is_refused_with_its_row": 3,
        },
    ),
    Row(
        "F25",
        "data: missing columns and cells, wrong types, equal pairs, damaged files",
        "refused with their row, or left out and counted",
        {
            f"{DATA}::test_a_file_of_the_wrong_form_is_refused": 1,
            f"{DATA}::test_a_file_without_rows_is_refused": 1,
            f"{DATA}::test_a_damaged_archive_is_refused": 3,
            f"{DATA}::test_text_that_is_not_utf8_is_refused": 1,
            f"{TEXT}::test_an_empty_cell_is_refused_with_its_row": 1,
            f"{TEXT}::test_a_cell_that_is_no_text_is_refused_with_its_row": 1,
            f"{TEXT}::test_a_pair_of_equals_is_left_out_and_the_others_keep_their_row": 1,
            f"{TEXT}::test_a_margin_that_is_no_number_is_refused_with_its_row": 1,
            f"{TEXT}::test_any_other_label_is_refused_with_its_row": 1,
            f"{REFUSALS}::test_a_missing_column_is_named_with_the_flag_that_maps_it": 1,
            f"{REFUSALS}::test_a_row_longer_than_the_context_is_named_with_its_length": 1,
            f"{LANGUAGE}::test_a_row_of_a_megabyte_is_refused_with_its_row_or_read": 1,
            f"{LANGUAGE}::test_rows_that_are_all_the_same_are_learned_from_and_none_is_held_out": 1,
        },
    ),
    Row(
        "F26",
        "tokenizer, template and model that do not go together",
        "refused before the first step, with both digests where there are two",
        {
            f"{LINEAGE}::test_ppo_is_refused_where_the_reward_models_tokenizer_or_template_is_another": 1,
            f"{LINEAGE}::test_ppo_is_refused_where_the_reward_models_data_have_changed": 1,
            f"{LINEAGE}::test_a_run_does_not_go_on_with_other_data_or_another_model": 1,
            f"{PREFLIGHT}::test_a_tokenizer_with_more_ids_than_the_model_is_caught": 1,
            f"{PREFLIGHT}::test_a_stop_that_is_read_as_padding_is_caught": 1,
            f"{PREFLIGHT}::test_a_reward_model_of_another_vocabulary_is_fed_with_its_own": 1,
            "tests/test_reward_model.py::test_whatever_was_the_padding_a_score_is_read_at_the_last_token": 1,
            f"{LANGUAGE}::test_a_token_that_the_model_has_not_is_refused_with_its_row": 1,
            f"{LANGUAGE}::test_a_text_of_the_pretraining_that_the_model_has_no_token_for_is_refused": 1,
            f"{LANGUAGE}::test_tokens_that_no_text_contains_do_no_harm": 1,
            f"{LANGUAGE}::test_a_tokenizer_that_pads_with_its_end_learns_what_one_with_padding_of_its_own_does": 1,
            f"{LANGUAGE}::test_a_word_of_a_reference_that_is_another_is_refused_with_both_digests": 2,
            f"{LANGUAGE}::test_a_reference_whose_tokens_are_the_policys_is_taken": 1,
            f"{LANGUAGE}::test_a_reference_of_another_size_is_refused_for_pairs_too": 1,
            f"{REFUSALS}::test_a_reference_of_another_vocabulary_is_refused": 1,
            f"{REFUSALS}::test_chat_without_a_template_is_refused": 1,
            f"{REFUSALS}::test_an_unknown_template_is_refused": 1,
            f"{REFUSALS}::test_a_model_without_a_stop_id_is_refused": 1,
            f"{REFUSALS}::test_an_unknown_stop_is_refused": 1,
            f"{TEXT}::test_a_template_with_broken_grammar_is_refused": 1,
            f"{TEXT}::test_a_template_that_refuses_a_row_is_reported_with_its_row": 1,
            f"{TEXT}::test_a_template_that_hides_an_assistants_turn_is_refused": 1,
            f"{TEXT}::test_a_template_that_writes_the_prompt_by_what_the_answer_says_is_refused": 1,
            f"{TEXT}::test_a_stop_id_outside_the_vocabulary_is_refused": 1,
        },
    ),
    Row(
        "F28",
        "no memory left, in a pass or in sampling",
        "one sentence with what to lower; the last checkpoint named; resumed to the same bytes",
        {f"{GUARD}::test_out_of_memory_stops_with_advice_and_harms_nothing": 1},
    ),
    Row(
        "F31",
        "secrets: in variables, tracebacks, urls, paths, specs, data, the command line",
        "not there in what is written or shown",
        {
            f"{LINEAGE}::test_a_secret_is_in_no_file_of_a_run": 2,
            f"{LINEAGE}::test_a_secret_in_a_config_is_in_no_file_of_a_run": 2,
            f"{LINEAGE}::test_a_secret_that_is_in_the_data_is_not_in_the_samples": 1,
            f"{LANGUAGE}::test_a_secret_that_a_judge_tells_is_in_no_file_of_a_run": 1,
            f"{LINEAGE}::test_credentials_of_a_url_are_taken_out_and_nothing_else": 1,
            f"{LINEAGE}::test_an_error_on_the_command_line_shows_no_secret_and_steers_no_terminal": 1,
        },
    ),
    Row(
        "F32",
        "terminal escapes and changes of direction in completions",
        "shown in their written form",
        {
            f"{LINEAGE}::test_what_steers_a_terminal_is_written_out": 1,
            f"{LINEAGE}::test_what_a_model_says_cannot_steer_the_terminal": 1,
        },
    ),
    Row(
        "F34",
        "a tracker cannot be reached, or fails later",
        "said once; the run and metrics.jsonl are as without it",
        {f"{MORE}::test_a_tracker_that_fails_is_said_once_and_ends_no_run": 1},
    ),
    Row(
        "F35",
        "a run of an older form, or of a newer one",
        "read, or refused with its number",
        {
            f"{HOSTILE}::test_a_run_of_another_format_is_refused_by_its_number": 12,
            f"{RESUME}::test_another_schema_is_refused_by_its_number": 1,
            f"{MORE}::test_a_state_of_another_form_is_refused_by_its_number": 1,
        },
    ),
)
