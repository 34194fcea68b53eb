"""Break the formulas one at a time; a test must turn red each time. `python tests/mutants.py [FILE ...] [--workers N]`.

HAND holds breakages that someone thought of, with what they would mean; each must be killed. The mechanical pass makes every
comparison, sign, mask, detach, index and end flag of a file wrong, one at a time; nine in ten must be killed, and a
survivor that no test can kill stands in EQUIVALENT with its reason. A new file is one line in TESTS.

Each mutant runs in a fork of this process, which has torch and pytest loaded, on a copy of the package. What a fork may take
is measured in seconds of its own processor time, so a busy machine kills no mutant. Forks end when this process does.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

sys.dont_write_bytecode = True  # a mutant must never meet another one's cache

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 5, 10  # processor seconds for one mutant: times what its unbroken file takes, and more; a hang is a kill
WALL_SECONDS = 900  # for one that waits without working
ENOUGH = 0.9  # of the mechanical mutants

GUARD, FAULTS, RESUME, DIFFERS = (
    f"faults/test_{name}.py" for name in ("update_guard", "more_faults", "resume", "resume_differs")
)
ESTIMATORS, OBJECTIVES, TWIN = "invariants/test_estimators.py", "invariants/test_objectives.py", "worlds/test_twin.py"
TESTS = {  # file -> the tests that must notice, the likeliest first
    "batch.py": ("test_batch.py", TWIN),
    "reduce.py": ("test_reduce.py", "test_update.py", OBJECTIVES),
    "distribution.py": ("test_distribution.py",),
    "sample.py": ("test_sample.py", TWIN),
    "reward.py": ("test_reward.py", "test_rlhf_example.py", TWIN),
    "value.py": ("test_value.py", ESTIMATORS, TWIN, "test_numpy_actor.py"),
    "advantage.py": ("test_advantage.py", ESTIMATORS, TWIN),
    "objective.py": ("test_objective.py", OBJECTIVES, TWIN),
    "update.py": (
        "test_update.py",
        OBJECTIVES,
        TWIN,
        f"{GUARD}::test_an_update_that_is_not_finite_leaves_no_trace",
        f"{GUARD}::test_a_step_size_that_was_steered_comes_back",
        f"{GUARD}::test_a_record_in_which_nothing_was_chosen_is_no_fault",
        "test_trust_region.py::test_an_update_that_is_rejected_leaves_no_trace",
    ),
    "language/trust_region.py": ("test_trust_region.py",),
    "control/normalize.py": (
        "test_normalize.py",
        "test_control_signals.py::test_a_running_return_does_not_cross_a_cut",
        "test_control_signals.py::test_the_first_record_is_scaled_by_itself_and_counted_once",
    ),
    "control/rollout.py": ("test_rollout.py",),
    "control/record_layout.py": ("test_rollout.py",),
    "control/envs/infos.py": (
        "test_infos.py::test_merged_infos_hold_every_number_exactly",
        "test_infos.py::test_merged_infos_take_any_two_values_of_a_key",
        "test_infos.py::test_merged_infos_say_in_which_rows_a_key_was_given",
        "test_infos.py::test_what_cannot_be_sent_is_left_out_at_any_depth",
    ),
    "control/ppo.py": (
        "test_control_signals.py::test_an_adaptive_kl_coefficient_is_steered_by_the_policy_that_acted",
        "test_control_signals.py::test_a_skipped_update_leaves_the_kl_coefficient",
    ),
    "control/fast/numpy_actor.py": ("test_numpy_actor.py",),
    "control/envs/masks.py": ("test_masks.py",),
    "control/envs/spaces.py": ("test_spaces.py",),
    "control/networks.py": ("test_numpy_actor.py",),
    "control/policy.py": ("test_numpy_actor.py", "test_own_network.py"),
    "control/fast/optimizer.py": (
        "test_optimizer.py",
        "test_init_optimizer.py",
    ),
    "control/presets.py": ("test_policy.py",),
    "control/config.py": ("test_policy.py",),
    "control/fast/vector_env.py": ("test_vector_env.py",),
    "fast/compiled_update.py": ("test_compiled_update.py",),
    "study/overoptimise.py": ("test_overoptimise.py",),
    "run/guard.py": (GUARD,),
    "run/spikes.py": tuple(
        f"{FAULTS}::test_{name}"
        for name in (
            "a_spike_is_found_in_every_line_it_lasts",
            "a_spike_is_held_against_the_lines_before_it_alone",
            "before_twenty_lines_nothing_is_a_spike_and_what_is_missing_is_no_line",
            "what_hardly_moves_has_no_spikes_and_what_falls_is_none",
            "the_line_itself_is_none_of_those_it_is_held_against",
            "what_is_zero_throughout_has_no_spikes",
            "lines_looked_at_in_pieces_give_what_they_give_at_once",
        )
    ),
    "run/checkpoint.py": (
        f"{RESUME}::test_state_of_every_kind_comes_back",
        f"{FAULTS}::test_a_checkpoint_gets_its_name_when_all_that_is_in_it_is_on_the_disk",
        f"{FAULTS}::test_what_a_killed_write_left_behind_is_no_part_of_the_next",
        f"{FAULTS}::test_a_file_that_is_missing_is_said_to_be",
        f"{FAULTS}::test_a_state_of_another_form_is_refused_by_its_number",
        f"{FAULTS}::test_json_with_more_bytes_than_are_read_is_refused",
        f"{FAULTS}::test_a_disk_that_says_it_wrote_and_did_not_is_found_out_when_it_is_read_back",
        f"{FAULTS}::test_files_that_may_not_grow_end_the_run_in_a_sentence_and_leave_no_part_of_a_checkpoint",
        f"{RESUME}::test_the_newest_checkpoints_stay_and_older_ones_go",
        f"{RESUME}::test_another_schema_is_refused_by_its_number",
        f"{RESUME}::test_where_all_are_damaged_nothing_is_begun_anew",
        f"{RESUME}::test_a_checkpoint_that_is_named_is_the_one_used_or_none",
        f"{RESUME}::test_a_damaged_checkpoint_is_put_away_and_the_one_before_is_used",
        "faults/test_hostile.py::test_a_checkpoint_that_is_not_what_it_says_is_refused",
        "faults/test_hostile.py::test_json_that_is_none_of_ours_is_refused",
        "faults/test_hostile.py::test_a_pipe_is_not_waited_for",
    ),
    "language/model/token_distribution.py": ("test_token_distribution.py", "test_language_policy.py"),
    "language/model/forward.py": ("test_reading.py", "test_language_policy.py"),
    "language/model/optimizer.py": ("test_master_weights.py",),
    "language/model/policy.py": ("test_language_policy.py", "test_generate.py", "test_modes.py"),
    "language/rollout/generate.py": (
        "test_generate.py",
        "test_multi_turn.py",
        "test_reading.py",
        "test_stop_strings.py",
    ),
    "language/rollout/kv_cache.py": ("test_generate.py", "test_reading.py"),
    "fast/linear.py": ("test_linear.py",),
    "control/training.py": ("test_linear.py",),
    "language/fast/llama.py": ("test_fast_llama.py", "test_generate.py"),
    "language/rollout/multi_turn.py": ("test_multi_turn.py", "test_stop_strings.py"),
    "language/model/top_layers.py": ("test_modes.py",),
    "language/model/lora.py": ("test_modes.py",),
    "language/training.py": ("test_schedule.py",),
    "control/own_network.py": ("test_own_network.py",),
    "run/metrics.py": ("test_metrics.py",),
    "run/store.py": (
        f"{RESUME}::test_newer_checkpoints_than_the_one_named_are_set_aside",
        f"{RESUME}::test_more_steps_extend_a_run_and_are_written_down",
    ),
    "run/lineage.py": (
        f"{DIFFERS}::test_other_versions_are_not_compared_and_the_next_resume_goes_by_them",
        "faults/test_lineage.py::test_an_extended_run_has_the_digest_of_its_new_config",
        "faults/test_lineage.py::test_an_extended_run_that_other_versions_went_on_with_is_compared_again",
    ),
    "run/resume.py": (
        "test_resume_refusals.py",
        "faults/test_run_directory.py::test_a_resume_that_is_refused_lets_go_of_the_run",
    ),
    "language/data/files.py": ("test_data_files.py", "test_records.py"),
    "language/data/layouts.py": ("test_layouts.py",),
    "language/data/tokenizer.py": ("test_chat_templates.py", "test_records.py", "test_stop_strings.py"),
    "language/data/records.py": ("test_chat_templates.py", "test_records.py"),
    "language/reward_model.py": (
        "test_reward_model.py::test_labels_on_one_side_are_noted_because_their_accuracy_says_nothing",
    ),
}
HAND_ONLY = {  # too much of them is Hugging Face's bookkeeping, or that of whole runs
    "run/guard.py",
    "run/checkpoint.py",
    "run/lineage.py",
    "run/metrics.py",
    "run/store.py",
    "run/resume.py",
    "control/own_network.py",
    "control/envs/infos.py",
    "control/presets.py",
    "control/config.py",
    "control/networks.py",
    "control/policy.py",
    "control/ppo.py",
    "control/training.py",
    "fast/compiled_update.py",
    "language/model/policy.py",
    "language/model/forward.py",
    "language/model/optimizer.py",
    "language/rollout/generate.py",
    "language/rollout/kv_cache.py",
    "language/fast/llama.py",
    "language/model/top_layers.py",
    "language/model/lora.py",
    "language/training.py",
    "language/data/files.py",
    "language/data/layouts.py",
    "language/data/tokenizer.py",
    "language/data/records.py",
    "language/reward_model.py",
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    meaning: str
    at: int | None = None
    """Where `old` stands; None where it stands once."""


HAND = [
    Mutant("batch.py", "self.terminated | self.truncated", "self.terminated", "a truncated episode never ends"),
    Mutant(
        "batch.py",
        "start[:, 2:] = self.ended[:, :-2]",
        "start[:, 1:] = self.ended[:, :-1]",
        "forgets before the last obs",
    ),
    Mutant(
        "batch.py", "self.mask.reshape(-1).nonzero()", "(self.mask | True).reshape(-1).nonzero()", "learns from padding"
    ),
    Mutant(
        "batch.py",
        "dataclasses.fields(trajectory)} | fields)",
        "dataclasses.fields(trajectory) if f.name not in fields} | fields | {'value': 0})",
        "what is found is thrown away",
    ),
    Mutant("batch.py", 'if not f.metadata.get("shared")', "", "cuts what all steps share"),
    Mutant(
        "batch.py", "trajectory.state, trajectory.start)", "trajectory.state, trajectory.ended)", "forgets at the end"
    ),
    Mutant("reduce.py", "return mask / mask.sum().clamp(min=1)", "return mask / mask.numel()", "mean over padding"),
    Mutant(
        "reduce.py",
        "weight = mask / mask.sum(dim=1, keepdim=True)",
        "weight = mask / mask.sum(dim=0, keepdim=True)",
        "rows and columns mixed up",
    ),
    Mutant("reduce.py", "logprob - behavior_logprob, 0.0).detach()", "behavior_logprob - logprob, 0.0)", "mu / pi"),
    Mutant(
        "reduce.py",
        'if ratio == "row_mean" else 1\n        )',
        'if ratio == "row" else 1)',
        "product and mean change places",
    ),
    Mutant(
        "reduce.py",
        'in_bounds = mask if mode == "truncate"',
        'in_bounds = mask if mode == "mask"',
        "what is cut is left out",
    ),
    Mutant(
        "reduce.py",
        "torch.where(in_bounds, weight.clamp(max=high), 0.0)",
        "torch.where(in_bounds, weight, 0.0)",
        "no bound",
    ),
    Mutant(
        "reduce.py", "weight.square().sum() * mask.sum()", "weight.square().sum() * mask.numel()", "padding's share"
    ),
    Mutant("reduce.py", "weight / mask.any(dim=1).sum().clamp(min=1)", "weight / mask.shape[0]", "empty rows count"),
    Mutant("reduce.py", "(mask.shape[0] * budget)", "budget", "per_budget sums the rows"),
    Mutant("reduce.py", "torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)", "x.mean()", "a mean over padding"),
    Mutant("reduce.py", "(mask.sum() - 1).clamp(min=1)", "mask.sum().clamp(min=1)", "the biased variance"),
    Mutant(
        "reduce.py", "masked_var(target - value, mask)", "masked_var(value, mask)", "explains the value, not the target"
    ),
    Mutant(
        "reduce.py", "(square / (size - 1).clamp(min=1))[index]", "(square / size)[index]", "a group's biased variance"
    ),
    Mutant(
        "reduce.py", "return max(\n        1.0, float(sums", "return min(1.0, float(sums", "copies narrow an interval"
    ),
    Mutant(
        "reduce.py", "(groups if groups > 1 else len(x)) - 1", "len(x) - 1", "rows for clusters as degrees of freedom"
    ),
    Mutant(
        "reduce.py", "(2 * k - 1 + odd) / (2 * k + odd)", "(2 * k - 1) / (2 * k)", "Student's t of even degrees alone"
    ),
    Mutant("reduce.py", "n = num_clusters if fraction", "n = n if fraction", "copies that agree narrow an interval"),
    Mutant("reduce.py", "z2 / (4 * n * n)", "0.0", "a share of all or nothing has no width"),
    Mutant("distribution.py", "torch.where(allowed, logits,", "torch.where(~allowed, logits,", "the mask inverted"),
    Mutant("distribution.py", "return cls(logits.log_softmax(dim=-1))", "return cls(logits)", "unnormalised"),
    Mutant("distribution.py", "return -exponential", "return exponential", "noise is not Gumbel"),
    Mutant(
        "distribution.py",
        "torch.finfo(logits.dtype).min / 2",
        "torch.finfo(logits.dtype).min * 2",
        "-inf at disallowed actions",
    ),
    Mutant("distribution.py", "(self.logp + noise).argmax", "noise.argmax", "ignores the policy"),
    Mutant(
        "distribution.py",
        "(self.logp.exp() * torch.where(self.logp > MIN_LOGPROB, self.logp - other.logp, 0.0))",
        "(other.logp.exp() * torch.where(other.logp > MIN_LOGPROB, other.logp - self.logp, 0.0))",
        "KL turned round",
    ),
    Mutant(
        "distribution.py",
        "return -(self.logp.exp() * self.logp.clamp(min=MIN_LOGPROB))",
        "return (self.logp.exp() * self.logp.clamp(min=MIN_LOGPROB))",
        "entropy's sign",
    ),
    Mutant("distribution.py", "noise < self.logits.sigmoid()", "noise > self.logits.sigmoid()", "yes is no"),
    Mutant(
        "distribution.py",
        "self.mean + self.log_std.exp() * noise",
        "self.mean + (2 * self.log_std).exp() * noise",
        "variance for deviation",
    ),
    Mutant("distribution.py", "- self.log_std - HALF_LOG_2PI", "- HALF_LOG_2PI", "a density without its width"),
    Mutant(
        "distribution.py",
        "(2 * (self.log_std - other.log_std))",
        "(2 * (other.log_std - self.log_std))",
        "KL's ratio turned round",
    ),
    Mutant(
        "distribution.py",
        "super().log_prob(action) - self._log_jacobian",
        "super().log_prob(action) + self._log_jacobian",
        "Jacobian's sign",
    ),
    Mutant(
        "distribution.py",
        "slope + torch.where(squashed, self.half_width, 1.0).log()",
        "slope",
        "the width is not in the density",
    ),
    Mutant(
        "distribution.py",
        "return super().entropy() + expected.sum(dim=-1)",
        "return super().entropy()",
        "entropy of the unsquashed",
    ),
    Mutant(
        "distribution.py",
        "features.square() @ weight_std.square()",
        "features.square() @ weight_std",
        "deviation for variance",
    ),
    Mutant("distribution.py", "(noise * self.weight_std)", "noise", "noise without its width"),
    Mutant("reward.py", ".amax(dim=1)", ".amin(dim=1)", "never paid, or paid at the first step"),
    Mutant("reward.py", "torch.where(mask, column, -1)", "column.expand_as(mask)", "paid in the padding"),
    Mutant(
        "value.py", "trajectory.ended | (following == steps)", "following == steps", "bootstraps from the next episode"
    ),
    Mutant("value.py", "trajectory.ended | (following == steps)", "trajectory.ended", "a cut row does not bootstrap"),
    Mutant(
        "value.py",
        "torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=steps)",
        "at_or_after",
        "V of the step itself",
    ),
    Mutant("value.py", "(column + 1)", "(column + 2)", "steps over the last observation"),
    Mutant(
        "advantage.py", "torch.where(terminated, 0.0, next_value)", "next_value", "bootstraps past a terminal state"
    ),
    Mutant(
        "advantage.py",
        "torch.where(terminated, 0.0, next_value)",
        "torch.where(truncated, 0.0, next_value)",
        "truncation is terminal",
    ),
    Mutant("advantage.py", "next_value) - value, mask)", "next_value) + value, mask)", "V's sign"),
    Mutant("advantage.py", "_trace_decay(gamma * lam, delta", "_trace_decay(lam, delta", "the trace is not discounted"),
    Mutant(
        "advantage.py",
        "torch.where(ended, 0.0, torch.where(mask, torch.full_like(like, decay), 1.0))",
        "torch.where(mask, torch.full_like(like, decay), 1.0)",
        "traces cross an end",
    ),
    Mutant(
        "advantage.py",
        "torch.where(mask, torch.full_like(like, decay), 1.0)",
        "decay",
        "gamma counts columns, not choices",
    ),
    Mutant("advantage.py", "mask[:, 1:] | ended[:, :-1]", "mask[:, 1:]", "pay after an end counts"),
    Mutant(
        "advantage.py",
        "return _zero_masked(_backward_sum(reward, carry), mask)",
        "return _backward_sum(reward, carry)",
        "tool pay counts twice",
    ),
    Mutant("advantage.py", "if scale_by_std else centred", "if not scale_by_std else centred", "the flag inverted"),
    Mutant(
        "advantage.py",
        "(score - mean) * size / (size - 1)",
        "(score - mean) * (size - 1) / (size - 1)",
        "own score in the baseline",
    ),
    Mutant(
        "objective.py", "-batch.advantage * torch.where", "batch.advantage * torch.where", "makes bad actions likelier"
    ),
    Mutant("objective.py", "torch.minimum(ratio * advantage", "torch.maximum(ratio * advantage", "clips the wrong way"),
    Mutant("objective.py", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)", "clip's ends swapped"),
    Mutant(
        "objective.py",
        "ratio = (logprob - old_logprob).exp()",
        "ratio = (old_logprob - logprob).exp()",
        "ratio turned round",
    ),
    Mutant("objective.py", "- entropy_coef * entropy", "+ entropy_coef * entropy", "entropy is punished"),
    Mutant(
        "objective.py", "policy_loss + value_coef * value_loss", "policy_loss + value_loss", "value_coef is ignored"
    ),
    Mutant(
        "objective.py",
        "kl_old_coef * batch.old_distribution.kl(distribution)",
        "-kl_old_coef * batch.old_distribution.kl(distribution)",
        "the KL is rewarded",
    ),
    Mutant(
        "objective.py",
        "kl_old_coef * batch.old_distribution.kl(distribution)",
        "kl_old_coef * distribution.kl(batch.old_distribution)",
        "KL turned round in the loss",
    ),
    Mutant(
        "objective.py",
        "return torch.maximum(value_loss, squared_error(clipped_value",
        "return torch.minimum(value_loss, squared_error(clipped_value",
        "critic's clip",
    ),
    Mutant("objective.py", "return 0.5 * (value", "return (value", "twice the squared error"),
    Mutant(
        "objective.py",
        "if kl < target / 1.5:\n        return coef / 2",
        "if kl < target / 1.5:\n        return coef * 2",
        "KL runs away",
    ),
    Mutant(
        "objective.py",
        "torch.where(batch.mask, distribution.log_prob(batch.action), batch.behavior_logprob)",
        "distribution.log_prob(batch.action)",
        "infinite loss in padding",
    ),
    Mutant("update.py", "else batch.flatten_steps()", "else batch", "padding is shuffled in"),
    Mutant(
        "update.py", "if not minibatch.mask.any():\n                    continue", "", "an empty minibatch makes a step"
    ),
    Mutant("update.py", " or verify is not dict", "", "a single step that is rejected cannot be undone"),
    Mutant("update.py", "(FloatingPointError, UpdateRejected)", "FloatingPointError", "a rejection ends the run"),
    Mutant("language/trust_region.py", "policy.head.frozen()", "policy.head", "the old head learns along"),
    Mutant("language/trust_region.py", "old.kl(new)", "new.kl(old)", "the KL is the other way round"),
    Mutant("language/trust_region.py", 'if not metrics["kl_update"] <=', 'if metrics["kl_update"] >', "nan passes"),
    Mutant("language/trust_region.py", "* len(learned) // max(num_rows, 1)", "", "the first rows are measured"),
    Mutant(
        "update.py",
        "if transform_minibatch is None else transform_minibatch(shuffled[rows])",
        "",
        "advantages are not standardised",
    ),
    Mutant("update.py", "batch = recompute(batch)", "recompute(batch)", "the record is never made anew"),
    Mutant("update.py", "zero_grad(set_to_none=True)\n    totals", "step()\n    totals", "gradients pile up"),
    Mutant(
        "update.py",
        "(loss * weight[rows]).sum()",
        "(loss * weight[rows]).sum() * len(minibatch)",
        "scaled by the minibatch",
    ),
    Mutant("update.py", "totals.get(name, 0.0) + mean", "mean", "metrics of the last micro-batch"),
    Mutant(
        "update.py",
        "return mean_metrics(minibatch_metrics) |",
        "return mean_metrics(minibatch_metrics[-1:]) |",
        "metrics of the last minibatch",
    ),
    Mutant(
        "update.py",
        'return require_finite("gradient\'s norm", norm, GRAD_NORM_FIX)',
        "return norm",
        "a broken gradient is learnt from",
    ),
    Mutant(
        "update.py",
        'require_finite("loss", total, LOSS_FIX).backward()',
        "total.backward()",
        "a broken loss is learnt from",
    ),
    Mutant("update.py", "generator=generator, device", "device", "the order is not the generator's"),
    Mutant("control/normalize.py", "delta.square() * self.count", "0 * self.count", "variance between batches is lost"),
    Mutant(
        "control/normalize.py",
        "_as_dict(trajectory.obs)[name][trajectory.mask]",
        "_as_dict(trajectory.obs)[name].flatten(0, 1)",
        "padding is gathered",
    ),
    Mutant("control/normalize.py", "np.where(ended, 0.0, 1.0)", "np.where(ended, 1.0, 1.0)", "returns cross an end"),
    Mutant(
        "control/normalize.py",
        "np.where(mask, self.gamma, 1.0)",
        "np.where(mask, 1.0, 1.0)",
        "the running return is not discounted",
    ),
    Mutant(
        "control/normalize.py",
        "0.0, self.running_returns)",
        "self.running_returns, self.running_returns)",
        "returns cross a cut",
    ),
    Mutant("control/normalize.py", "self.is_already_updated = True", "pass", "the first record is gathered twice"),
    Mutant("control/envs/infos.py", "array.dtype != dtype or", "", "a fraction beside a whole number is cut off"),
    Mutant("control/envs/infos.py", "or array.shape[1:] != shape", "", "a second shape ends the run"),
    Mutant(
        "control/envs/infos.py", "isinstance(value, dict) or _can_pickle(value)", "True", "what cannot be sent is sent"
    ),
    Mutant("control/ppo.py", "and not was_skipped", "", "a skipped update steers the coefficient"),
    Mutant("control/normalize.py", "(x - mean)", "x", "observations are not centred"),
    Mutant("control/normalize.py", "(reward / ", "((reward - self.moments.mean.float()) / ", "rewards are centred"),
    Mutant("control/normalize.py", "returns.T[mask.T]", "returns.T.reshape(-1)", "padding is gathered"),
    Mutant(
        "control/rollout.py",
        "mask, reward, masked_terminated, masked_done ^ masked_terminated), done",
        "mask, reward, masked_terminated, truncated & mask), done",
        "a death at the time limit is both",
    ),
    Mutant(
        "control/rollout.py",
        "np.asarray(terminated, dtype=bool) & stepped",
        "np.asarray(terminated, dtype=bool)",
        "a reset ends an episode",
    ),
    Mutant("control/rollout.py", "np.where(stepped, call.reward, 0.0)", "call.reward", "a reset is paid"),
    Mutant(
        "control/rollout.py",
        "self._final_obs(info, done) if self.autoreset_mode is AutoresetMode.SAME_STEP and done.any() else obs",
        "obs",
        "V of the next episode's first obs",
    ),
    Mutant(
        "control/rollout.py",
        "call.mask & stepped &",
        "call.mask &",
        "resets are steps",
    ),
    Mutant(
        "control/rollout.py",
        "torch.from_numpy(done | self.needs_reset)",
        "torch.from_numpy(done & ~done)",
        "memory crosses an end",
    ),
    Mutant("control/rollout.py", "int(trajectory.mask.sum())", "trajectory.mask.numel()", "all is counted"),
    Mutant(
        "control/record_layout.py",
        "fast_stack(terminated) | fast_stack(truncated)]",
        "fast_stack(terminated) & fast_stack(truncated)]",
        "no room for the last observation",
    ),
    Mutant(
        "control/record_layout.py",
        "np.where(is_next_obs, next_obs_index[call_index], call_index)",
        "call_index",
        "a last obs is the one before it",
    ),
    Mutant(
        "control/rollout.py", "(terminated, truncated, self.needs_reset)", "(terminated, truncated)", "resets are heard"
    ),
    Mutant(
        "control/rollout.py",
        "self.num_finished += masked_done",
        "self.masked_done += masked_terminated",
        "an episode that is cut does not count",
    ),
    Mutant("control/rollout.py", 'options={"reset_mask": done.copy()}', "options=None", "one end resets every row"),
    Mutant("control/rollout.py", "row if done[row] else np.argmax(done)", "np.argmax(done)", "another row's last obs"),
    Mutant(
        "control/rollout.py",
        "policy_output,\n            mask,\n            np.array",
        "policy_output, self.all_rows, np.array",
        "surplus episodes are learnt from",
    ),
    Mutant(
        "control/rollout.py", "self.needs_reset = done if", "self.needs_reset = ~done if", "the wrong rows are pending"
    ),
    Mutant("control/rollout.py", "(done & call.mask).nonzero()", "done.nonzero()", "surplus episodes are reported"),
    Mutant("control/rollout.py", "self.returns[done], self.lengths", "_, self.lengths", "returns of episodes pile up"),
    Mutant(
        "control/record_layout.py",
        ".max(axis=1) % 2 == 0",
        ".max(axis=1) < 0",
        "a cut row has no obs after its last step",
    ),
    Mutant(
        "control/record_layout.py",
        "keep_slot[row_index, slot] > is_next_obs",
        "is_next_obs == 0",
        "what was not chosen stands in the padding",
    ),
    Mutant("control/rollout.py", "int(self.episode[row])))", "0))", "every episode is the first"),
    Mutant("control/rollout.py", "self.episode.max() + 1", "self.episode + 1", "a group begins from several states"),
    Mutant(
        "control/rollout.py", "sub_env.episode = int(self.episode[0]) - 1", "pass", "self-resetting envs lose count"
    ),
    Mutant("control/rollout.py", "self.num_calls % self.noise_interval", "self.num_calls % 1", "noise is never held"),
    Mutant(
        "control/rollout.py",
        "choosing=~self.needs_reset)",
        "choosing=self.needs_reset)",
        "masks where nothing is chosen",
    ),
    Mutant(
        "control/rollout.py",
        "((info, ~done), (reset_info, done))",
        "((info, done), (reset_info, ~done))",
        "masks of last obs",
    ),
    Mutant("control/fast/numpy_actor.py", "np.minimum(np.maximum((", "(((", "the scaled observation has no bound"),
    Mutant("control/fast/numpy_actor.py", "x += bias", "x += 0", "layers have no bias"),
    Mutant("control/fast/numpy_actor.py", "draws * self.log_std.exp()", "draws", "noise has deviation 1"),
    Mutant(
        "control/fast/numpy_actor.py",
        "x if obs_normalizer is None else obs_normalizer(x)",
        "x",
        "many rows are not scaled",
    ),
    Mutant("fast/compiled_update.py", "torch.stack(parts).sum(dim=0)", "parts[0]", "the first chunk's gradient"),
    Mutant(
        "fast/compiled_update.py",
        "mask=batch.mask & valid[:, None]",
        "mask=batch.mask",
        "rows that fill up are learnt from",
    ),
    Mutant(
        "fast/compiled_update.py", "(norm + 1e-6)).clamp(max=1.0)", "(norm + 1e-6))", "small gradients are made large"
    ),
    Mutant("fast/compiled_update.py", "/ (1 - beta1**t)", "", "the first moment is not corrected"),
    Mutant("fast/compiled_update.py", "math.sqrt(1 - beta2**t)", "1.0", "the second moment is not corrected"),
    Mutant(
        "fast/compiled_update.py", "_width(right) < _width(", "_width(right) > _width(", "the wrong products are turned"
    ),
    Mutant("fast/compiled_update.py", "node.update_arg(0, graph", "(graph", "nothing is laid out for oneDNN"),
    Mutant(
        "fast/compiled_update.py",
        "(index, graph.call_function(aten.arange.default, (_width(zeros),)))",
        "(index, index)",
        "all",
    ),
    Mutant("fast/compiled_update.py", "            _lower_linear()\n", "", "products go through Python"),
    Mutant(
        "fast/compiled_update.py",
        "return x if is_transposed else super()",
        "return super()",
        "turned factors are laid out",
    ),
    Mutant("fast/compiled_update.py", "0.134132465", "0.134132865", "tanh off by less than a millionth"),
    Mutant(
        "fast/compiled_update.py",
        "x = aten.clamp.default(x, -TANH_SATURATION, TANH_SATURATION)",
        "",
        "tanh beyond its quotient's range",
    ),
    Mutant(
        "fast/compiled_update.py",
        ".dtype == torch.float32 for node",
        ".dtype != torch.int8 for node",
        "doubles are rounded",
    ),
    Mutant(
        "fast/compiled_update.py",
        "_tanh_by_sigmoid, _tanh_by_rational, [_is_float32]",
        "_tanh_by_sigmoid, _tanh_by_sigmoid, [_is_float32]",
        "no quotient",
    ),
    Mutant("fast/linear.py", "tanh_backward(grad, y)", "tanh_backward(grad, y / 2)", "tanh's gradient"),
    Mutant(
        "fast/compiled_update.py",
        'cache_key_tag=f"understudy {crc32(Path(__file__).read_bytes())}"',
        "",
        "stale compiled forms",
    ),
    Mutant("control/training.py", "    keep_freed_memory()\n", "", "freed memory is given back"),
    Mutant(
        "fast/compiled_update.py",
        "if _width(left) <= MAX_NARROW_SIZE:",
        "if _width(left) < MAX_NARROW_SIZE:",
        "a side of four is a call",
    ),
    Mutant(
        "fast/compiled_update.py",
        "aten.unsqueeze.default, (x, dim)",
        "aten.unsqueeze.default, (x, 0)",
        "columns become rows",
    ),
    Mutant(
        "fast/compiled_update.py",
        "order[part.start : part.start + self.minibatch_size]",
        "order[: self.minibatch_size]",
        "the first rows again and again",
    ),
    Mutant(
        "value.py",
        "round_up_rows(len(chunk)) - len(chunk) if len(chunk) < CHUNK_STEPS else 0",
        "0",
        "pieces of any number of rows",
    ),
    Mutant("value.py", "[: shape.numel()]", "", "what fills up a piece is told, too"),
    Mutant(
        "advantage.py",
        "if torch.equal(masked_reward := _zero_masked(reward, mask), reward):",
        "if torch.equal(masked_reward := _zero_masked(reward, mask), masked_reward):",
        "pay between choices is lost",
    ),
    Mutant("control/fast/vector_env.py", "if info != {} else merged", "if False else merged", "what infos say is lost"),
    Mutant(
        "control/fast/vector_env.py", "if info != {} else merged", "if info else merged", "an info that is none passes"
    ),
    Mutant(
        "control/fast/vector_env.py",
        '.astype(self.dtype, casting="same_kind", copy=False)',
        "",
        "numbers of another type",
    ),
    Mutant("control/fast/vector_env.py", "(x <= self.last)", "(x < self.last)", "the last choice is none"),
    Mutant("control/fast/vector_env.py", "(self.start <= x) &", "", "choices below the first"),
    Mutant("control/fast/vector_env.py", "x.dtype == self.dtype and", "", "numbers of any type are choices"),
    Mutant(
        "control/fast/vector_env.py",
        "int(space.start) + int(space.n)",
        "int(space.n)",
        "choices end as if they began at 0",
    ),
    Mutant(
        "control/fast/vector_env.py",
        "super().__init__(space.n, space._np_random,",
        "super().__init__(space.n, None,",
        "drawn anew",
    ),
    Mutant(
        "control/fast/vector_env.py", "space = vars(env.unwrapped)", "space = vars(env)", "what is wrapped stays slow"
    ),
    Mutant("control/fast/vector_env.py", "obs.shape == self.shape", "True", "another shape passes"),
    Mutant(
        "control/fast/vector_env.py",
        "concatenate(self.single_observation_space, self._env_obs, self._observations)",
        "self._observations",
        "stale",
    ),
    Mutant(
        "control/fast/numpy_actor.py",
        "distribution, distribution.log_prob",
        "distribution, -distribution.log_prob",
        "log-probs of what is unlikely",
    ),
    Mutant("control/networks.py", "(self.critic or self.actor)", "self.actor", "the actor's features are valued"),
    Mutant(
        "control/policy.py",
        "forward_value(obs if self.obs_scale is None else self.obs_scale(obs, self.dtype))",
        "forward_value(obs)",
        "V unscaled",
    ),
    Mutant(
        "control/fast/optimizer.py",
        'torch.no_grad()(methods["step"])',
        'methods["step"]',
        "a step is part of the graph",
    ),
    Mutant(
        "value.py",
        "isinstance(trajectory, Batch) else _forward_value",
        "True else _forward_value",
        "what sampled is told anew",
    ),
    Mutant(
        "fast/compiled_update.py",
        "outputs[-min(num_minibatches, len(samples)) :, 1:]",
        "outputs[:, 1:]",
        "metrics of all epochs",
    ),
    Mutant(
        "control/normalize.py", "len(self.running_returns) != len(trajectory)", "True", "rows forget between records"
    ),
    Mutant("control/normalize.py", ".clamp(-CLIP, CLIP).to(dtype)", ".to(dtype)", "observations have no bound"),
    Mutant(
        "control/normalize.py",
        "self.mean_and_std(i, x.dtype)",
        "self.mean_and_std(i, torch.float32)",
        "float64 is lost",
    ),
    Mutant("control/policy.py", "super().train(False)", "super().train(mode)", "dropout acts"),
    Mutant(
        "control/envs/masks.py",
        "info if terminated or truncated else self._with_mask(info)",
        "info",
        "steps have no mask",
    ),
    Mutant("control/envs/spaces.py", "(space.high == 255).all()", "True", "a board is a photograph"),
    Mutant(
        "control/envs/spaces.py",
        "middle + half * value",
        "half * value",
        "actions are not moved to the middle of their bounds",
    ),
    Mutant(
        "distribution.py",
        "torch.where(self.log_std > 0, self",
        "torch.where(self.log_std > 9, self",
        "wide normals by few nodes",
    ),
    Mutant("distribution.py", "math.log(2) - folded - bend", "math.log(2) - folded", "the bend at 0 is left out"),
    Mutant(
        "control/presets.py", "if value != default and value", "if value == default and value", "fields without effect"
    ),
    Mutant("value.py", "torch.where(mask, value.gather(1, index), 0.0)", "value.gather(1, index)", "V after no step"),
    Mutant(
        "language/model/token_distribution.py",
        "logits = self.softcap * torch.tanh(logits / self.softcap)",
        "logits = torch.tanh(logits / self.softcap)",
        "a cap without its size",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "else logits / self.temperature",
        "else logits",
        "scores at another temperature than it samples",
    ),
    Mutant(
        "language/model/token_distribution.py", "right=True", "right=False", "a token of probability 0 can be drawn"
    ),
    Mutant(
        "language/model/token_distribution.py",
        "level - pad(cumulative",
        "level - 0 * pad(cumulative",
        "within its block a token is looked for from 0",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "num_rows - len(x)))",
        "0))",
        "a kernel for each number of chosen tokens",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "grad_logit[token_rows, token[token_rows] - start] += scaled_grad[token_rows, 0]",
        "pass",
        "the token itself gets no gradient",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "total[rows] - torch.linalg.vecdot(p, logit)",
        "total[rows]",
        "an entropy without logits",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "self._logprob_cache and torch.equal(token, self._logprob_cache[0])",
        "self._logprob_cache",
        "others' log-probs",
    ),
    Mutant(
        "fast/linear.py",
        "_linear_op(x.t(), grad.t()).t()",
        "_linear_op(x.t(), grad.t()).t() / 2",
        "half a gradient, if wide",
    ),
    Mutant(
        "fast/linear.py", "TRIM_THRESHOLD, 2**31 - 1", "TRIM_THRESHOLD, 2**17", "freed memory goes back to the system"
    ),
    Mutant(
        "language/model/token_distribution.py",
        "return gap.exp() - 1 - gap",
        "return -gap",
        "the KL of single tokens can be negative",
    ),
    Mutant(
        "language/model/forward.py",
        "torch.where(text.mask, column, -1).amax(dim=1) + 2",
        "torch.where(text.mask, column, -1).amax(dim=1) + 1",
        "nothing to bootstrap a cut row from",
    ),
    Mutant(
        "language/model/forward.py",
        "position[packed_row, start : start + num_columns[row]] = torch.arange(num_columns[row]",
        "position[packed_row, start : start + num_columns[row]] = start + torch.arange(num_columns[row]",
        "packed rows see each other",
    ),
    Mutant(
        "language/model/forward.py",
        "                _zero_rates(owner, NOISE_RATE_NAMES)\n",
        "                pass\n",
        "noise stays on",
    ),
    Mutant(
        "language/model/forward.py",
        "            module.eval()\n",
        "            pass\n",
        "dropout is on where nobody named it",
    ),
    Mutant(
        "language/model/forward.py", "ids[1, :half] = ids[0, :half]", "ids[1] = ids[0]", "no later token is another one"
    ),
    Mutant(
        "language/model/forward.py",
        "packing\n            and (difference :=",
        "not packing\n            and (difference :=",
        "packed rows see each other",
    ),
    Mutant(
        "language/model/policy.py",
        "copy.deepcopy(policy.model, {id(parameter): parameter for parameter in shared_parameters})",
        "policy.model",
        "the reference learns along",
    ),
    Mutant(
        "language/model/policy.py",
        " if name not in self.frozen_parameter_names",
        "",
        "a critic that has warmed up lets the base learn",
    ),
    Mutant(
        "language/model/policy.py",
        "else adapter.merged_state_dict()",
        "else model.state_dict()",
        "saved without its adapter",
    ),
    Mutant(
        "language/model/top_layers.py",
        "_hidden_states_of(calls[0]).detach()",
        "_hidden_states_of(calls[0])",
        "the critic moves the lower layers",
    ),
    Mutant(
        "language/model/top_layers.py",
        "layers_and_norm(trunk)[0][-len",
        "layers_and_norm(trunk)[0][:len",
        "reads beside the lowest layers",
    ),
    Mutant(
        "language/model/top_layers.py",
        "copy.deepcopy(layers[-num_layers:])",
        "layers[-num_layers:]",
        "the critic's layers are the policy's",
    ),
    Mutant("language/model/top_layers.py", "return self.norm(hidden)", "return hidden", "the last norm is left out"),
    Mutant(
        "language/model/top_layers.py",
        "for part in (*layers[-num_layers:], norm)",
        "for part in layers[-num_layers:]",
        "the norm is frozen",
    ),
    Mutant(
        "language/training.py",
        "self.steps - decay_start) / max(self.total_steps - decay_start",
        "self.steps) / max(self.total_steps",
        "falls early",
    ),
    Mutant(
        "language/data/files.py", "if counts != {len(chosen)}:", "if False:", "a shard that is missing is not noticed"
    ),
    Mutant(
        "language/data/files.py",
        "cell.strip() if is_input else cell",
        "cell",
        "a policy trains on prompts of white space",
    ),
    Mutant(
        "language/data/layouts.py",
        "if not all(repeats_prompt):",
        "if False:",
        "prompts are taken out where they are not repeated",
    ),
    Mutant("language/data/layouts.py", '        content = ""\n', "        pass\n", "tool calls need a content"),
    Mutant(
        "language/data/tokenizer.py",
        "return ids if ids == [self.bos_token_id] else []",
        "return [self.bos_token_id]",
        "BOS nobody asked for",
    ),
    Mutant(
        "language/data/tokenizer.py",
        "(\n                self._render_prefill(prompt)\n                if _is_prefill(prompt)\n                else",
        "(",
        "a begun answer is closed",
    ),
    Mutant(
        "language/data/tokenizer.py", "tokenize=False, **self.template_arguments", "tokenize=False", "tools are dropped"
    ),
    Mutant(
        "language/data/records.py",
        "row[begin - 1 : end - 1] = False",
        "row[begin:end] = False",
        "what others say is learned",
    ),
    Mutant(
        "language/reward_model.py", "if low > 0.5 or high <= 0.5:", "if low > 0.5:", "bad texts alone are not noted"
    ),
    Mutant(
        "language/training.py",
        "min(batch_size, num_data_rows - self.rows % num_data_rows)",
        "min(batch_size, num_data_rows)",
        "an epoch overshoots",
    ),
    Mutant("language/model/lora.py", "torch.manual_seed(seed)", "pass", "an adapter of another seed each time"),
    Mutant("language/model/lora.py", "parameter.data = parameter.data.float()", "pass", "an adapter in half precision"),
    Mutant(
        "language/model/lora.py",
        "weight + module.get_delta_weight(ADAPTER_NAME)",
        "weight",
        "merged without the adapter",
    ),
    Mutant("language/model/lora.py", "return set(targets) or names", "return names", "an adapter on every layer"),
    Mutant("language/model/lora.py", "if weight.ndim == 3 and", "if weight.ndim == 9 and", "experts learn nothing"),
    Mutant("language/model/lora.py", "if _last_names(name) in called}", "}", "a layer that is never called is adapted"),
    Mutant(
        "language/model/optimizer.py",
        "[MASTER] = parameter.data",
        "[MASTER] = half.float()",
        "the copies are rounded, too",
    ),
    Mutant(
        "language/model/optimizer.py",
        "value.to(parameter.device, copy=True)",
        "value.to(parameter)",
        "a state is rounded",
    ),
    Mutant(
        "language/model/optimizer.py", " or not torch.equal(master.to(half.dtype), half)", "", "old weights come back"
    ),
    Mutant(
        "language/rollout/multi_turn.py",
        "self.mask += [False]",
        "self.mask += [True]",
        "what others say is learned from",
    ),
    Mutant("language/rollout/multi_turn.py", "len(ids) >= limit", "len(ids) > limit", "no room is left for the policy"),
    Mutant(
        "language/rollout/multi_turn.py", "if turn < max_turns - 1 else []", "", "somebody is asked after the last turn"
    ),
    Mutant(
        "language/rollout/multi_turn.py", "starts=[len(row.ids)", "starts=[0", "every turn has the noise of the first"
    ),
    Mutant(
        "language/rollout/multi_turn.py", "            self.stopped = False\n", "", "a row without room counts as ended"
    ),
    Mutant("language/rollout/multi_turn.py", "*self.messages[:-1]]", "*self.messages]", "a turn stands there twice"),
    Mutant("language/rollout/multi_turn.py", "if reply is not None and row", "if row", "None does not end a row"),
    Mutant(
        "language/rollout/multi_turn.py",
        "seed for row in active]",
        "seed for row in rows[: len(active)]]",
        "rows take others' seeds",
    ),
    Mutant("language/rollout/generate.py", "torch.tensor(completion.mask)", "True", "what others say is learned from"),
    Mutant(
        "language/rollout/generate.py",
        "previous_config, model.generation_config = model.generation_config, GenerationConfig()",
        "previous_config = model.generation_config",
        "a checkpoint's own settings change what is sampled",
    ),
    Mutant(
        "language/rollout/generate.py",
        "torch.stack(output.scores)",
        "torch.stack(output.logits)",
        "log-probs of another sampler",
    ),
    Mutant(
        "language/rollout/generate.py",
        "torch.manual_seed(hash((seed, start)) if start else seed)",
        "torch.manual_seed(seed)",
        "a turn repeats the noise of the first",
    ),
    Mutant(
        "language/rollout/generate.py",
        "seeds=range(len(prompts)), max_num_seqs=1\n    )",
        "seeds=range(len(prompts)))",
        "the ring is not tried",
    ),
    Mutant(
        "language/rollout/generate.py", "attention_mask=torch.ones_like(ids),", "", "a pad id in a prompt is not read"
    ),
    Mutant(
        "language/rollout/generate.py", "max_new_tokens=limit - start", "max_new_tokens=limit", "the limit begins anew"
    ),
    Mutant(
        "language/rollout/generate.py",
        "torch.tensor(self.starts, device=noise.device)",
        "torch.zeros(len(noise), dtype=torch.long, device=noise.device)",
        "every turn has the noise of the first",
    ),
    Mutant(
        "language/rollout/kv_cache.py",
        "        self.mask[:, self.column] = 0.0\n",
        "",
        "does not see its own last token",
    ),
    Mutant(
        "language/rollout/kv_cache.py",
        "age < self.window",
        "age <= self.window",
        "a window too wide by one",
    ),
    Mutant(
        "language/rollout/kv_cache.py",
        "position_ids=self.length[:, None],",
        "position_ids=torch.zeros_like(self.length)[:, None],",
        "every new token at position 0",
    ),
    Mutant("language/rollout/generate.py", " or row in stopped_rows", "", "what a stop string ended counts as cut"),
    Mutant(
        "language/rollout/generate.py", "ids=completion.ids[:end], ", "", "an engine's words behind a stop string stay"
    ),
    Mutant(
        "language/data/tokenizer.py",
        "if not previous_text.startswith(string, match.start())",
        "",
        "an old stop string cuts",
    ),
    Mutant(
        "language/data/tokenizer.py",
        "self.find_stop_string([*before, *ids[:turn_start]], ids[turn_start:])",
        "self.find_stop_string(before, ids)",
        "a stop string begins in what others say",
    ),
    Mutant(
        "language/data/tokenizer.py", "        if not is_closed:\n            return ids\n", "", "a turn is left open"
    ),
    Mutant(
        "language/data/tokenizer.py",
        "self._last_written_ids(before, MARGIN_TOKENS) if len(last_ids) < max_ids else []",
        "[]",
        "a completion that begins with a blank",
    ),
    Mutant(
        "language/data/tokenizer.py", "stops or self.stops, stop_strings", "stops, stop_strings", "a stop string alone"
    ),
    Mutant(
        "language/rollout/generate.py",
        "is_last & (rows >= 0)",
        "is_last",
        "a slot that is nobody's ends again and again",
    ),
    Mutant(
        "language/rollout/kv_cache.py",
        "rows[destination_rows] = rows[source_rows]",
        "pass",
        "who moves up leaves what it read behind",
    ),
    Mutant("language/rollout/generate.py", "            self.num_tokens[-1] = 0\n", "", "nobody outgrows the limit"),
    Mutant(
        "language/rollout/kv_cache.py", "age < length[:, None]", "age <= length[:, None]", "sees what is not its own"
    ),
    Mutant(
        "language/rollout/kv_cache.py",
        "first_column + self.column_index[:width]\n        ) % capacity",
        "self.column_index[:width] + 0 * first_column) % capacity",
        "prompts lie at the left",
    ),
    Mutant(
        "language/fast/llama.py",
        "_apply_rotary(qkv[:, :, :-1], rotary_factors[:, None])",
        "qkv[:, :, :-1]",
        "a new token is not turned",
    ),
    Mutant("language/fast/llama.py", "torch.complex(cos, sin)", "torch.complex(cos, -sin)", "turned the wrong way"),
    Mutant(
        "language/fast/llama.py",
        "_apply_rotary(qkv[..., :-1, :], rotary_factors)",
        "qkv[..., :-1, :]",
        "a prompt is not turned",
    ),
    Mutant(
        "language/fast/llama.py",
        "queries.transpose(2, 3),\n            keys",
        "queries, keys",
        "halves of pairs stand apart",
    ),
    Mutant(
        "language/fast/llama.py",
        "[self.head_dim**-0.5] * self.num_queries_per_kv_head",
        "[1.0] * self.num_queries_per_kv_head",
        "scores are not scaled",
    ),
    Mutant(
        "language/fast/llama.py",
        "rotary_factors.conj().resolve_conj()",
        "rotary_factors",
        "a gradient is turned the same way",
    ),
    Mutant(
        "language/fast/llama.py", "/ -normed.shape[-1]", "/ normed.shape[-1]", "a norm's gradient along what it normed"
    ),
    Mutant(
        "language/fast/llama.py",
        "flat.index_add_(0, gather_index[repeat_index]",
        "flat.index_add_(0, 0 * repeat_index",
        "a prompt's gradient",
    ),
    Mutant(
        "language/fast/llama.py",
        "argmax(dim=1) + 1, 0)",
        "argmax(dim=1) + 2, 0)",
        "answers that begin apart pass as one",
    ),
    Mutant("language/fast/llama.py", "distance < self.window", "distance <= self.window", "a window too wide by one"),
    Mutant(
        "language/fast/llama.py", "mlp.up_proj.weight * mlp_norm", "mlp.up_proj.weight", "a norm's weights are left out"
    ),
    Mutant(
        "language/fast/llama.py",
        "recomputes_activations or trunk.dtype.itemsize < 4",
        "recomputes_activations",
        "half precision is read in half precision",
    ),
    Mutant(
        "language/fast/llama.py",
        'any(getattr(module, "gradient_checkpointing", False)',
        "any(False",
        "activations are kept",
    ),
    Mutant(
        "language/fast/llama.py",
        "window_mask_per_head if layer.is_sliding else full_mask_per_head",
        "full_mask_per_head",
        "a window is not kept",
    ),
    Mutant(
        "language/fast/llama.py",
        "4 * num_columns[row] < 3 *",
        "4 * num_columns[row] <= 3 *",
        "rows of three quarters attend apart",
    ),
    Mutant(
        "language/fast/llama.py",
        "(row_offset[row] * num_vectors + column)",
        "(row_offset[row] + column)",
        "groups lie over each other",
    ),
    Mutant(
        "language/rollout/generate.py",
        "positions = self.last_positions + 1\n",
        "last_positions = self.last_positions\n",
        "every token has the place of the first",
    ),
    Mutant(
        "language/fast/llama.py",
        "x + linear(attended.view",
        "linear(attended.view",
        "what went around attention is lost",
    ),
    Mutant(
        "language/fast/llama.py",
        "m._forward_hooks or m._forward_pre_hooks or ",
        "",
        "who watches a trunk sees nothing",
    ),
    Mutant(
        "language/fast/llama.py",
        'any(rope_type in getattr(trunk.rotary_emb, "rope_type", "")',
        'any(rope_type in ""',
        "positions grow",
    ),
    Mutant(
        "language/rollout/generate.py",
        "kv_cache.length.masked_fill_(row_of_slot < 0, 0)",
        "pass",
        "a freed slot grows on",
    ),
    Mutant(
        "language/rollout/generate.py",
        "logprob[row, first:end] = torch.tensor(completion.logprob)",
        "logprob[row, first + 1 : end + 1] = torch.tensor(completion.logprob)",
        "log-probs one column late",
    ),
    Mutant(
        "language/rollout/generate.py",
        "(terminated if completion.stopped or has_fixed_length else truncated)[row, end - 1] = True",
        "terminated[row, end - 1] = True",
        "a cut row counts as ended",
    ),
    Mutant("reward.py", "score - missing_eos_penalty", "score + missing_eos_penalty", "a cut row is rewarded"),
    Mutant("reward.py", "is_dropped = score.isnan() |", "is_dropped =", "a missing score is zero"),
    Mutant("reward.py", "mask & ~is_dropped[:, None]", "mask", "rows without a score learn"),
    Mutant(
        "reward.py",
        "coef * (reference_logprob - logprob)",
        "coef * (logprob - reference_logprob)",
        "paid for leaving the reference",
    ),
    Mutant(
        "reward.py",
        "coef * (1 + max(-0.2, min(0.2, kl / target - 1))",
        "coef * (1 - max(-0.2, min(0.2, kl / target - 1))",
        "the controller runs away",
    ),
    Mutant(
        "objective.py",
        "(logprob - batch.behavior_logprob).exp() * ((-log_ratio).exp() - 1 + log_ratio)",
        "((-log_ratio).exp() - 1 + log_ratio)",
        "k3's gradient is that of the forward KL",
    ),
    Mutant(
        "objective.py",
        "0.5 * (logprob - _reference_logprob(batch)).square()",
        "(logprob - _reference_logprob(batch)).square()",
        "twice the KL's gradient",
    ),
    Mutant(
        "objective.py",
        "chosen - rejected - pairs.margin)",
        "chosen - rejected + pairs.margin)",
        "a margin that is given away",
    ),
    Mutant(
        "objective.py",
        "center_coef * (chosen + rejected).square()",
        "center_coef * (chosen - rejected).square()",
        "pulls apart sides together",
    ),
    Mutant(
        "objective.py",
        "loss = -log_ratio.detach().exp()",
        "loss = -log_ratio.exp()",
        "gradient through a clipped weight",
    ),
    Mutant(
        "objective.py",
        "(logratio_difference - 1 / (2 * beta)).square()",
        "(logratio_difference - 1 / beta).square()",
        "IPO's target doubled",
    ),
    Mutant("objective.py", "return loss + coef * row_loss", "return loss + row_loss", "pretraining at full weight"),
    Mutant(
        "language/model/token_distribution.py",
        "lambda logp: Categorical(logp).entropy()",
        "lambda logp: -Categorical(logp).entropy()",
        "entropy's sign",
    ),
    Mutant(
        "objective.py",
        "/ batch.mask.sum(dim=1, keepdim=True).clamp(\n        min=1\n    )\n    log_ratio = log_ratio.expand_as",
        "\n    log_ratio = log_ratio.expand_as",
        "a row's ratio is a product",
    ),
    Mutant("update.py", "parameter.copy_(value)", "parameter.copy_(parameter)", "parameters stay where they got to"),
    Mutant("update.py", "buffer.copy_(value)", "buffer.copy_(buffer)", "buffers stay where they got to"),
    Mutant(
        "update.py",
        "optimizer.load_state_dict(optimizer_copy.state_dict())",
        "optimizer_copy",
        "moments stay where they got to",
    ),
    Mutant(
        "update.py",
        "optimizer.zero_grad(set_to_none=True)\n    on_nonfinite(error)",
        "on_nonfinite(error)",
        "what is not finite stays in the gradients",
    ),
    Mutant(
        "update.py", "not math.isfinite(value.item())", "math.isnan(value.item())", "what is infinite is stepped with"
    ),
    Mutant("update.py", "not math.isfinite(value.item())", "math.isinf(value.item())", "nan is stepped with"),
    Mutant("update.py", "(num_epochs * num_minibatches > 1", "(num_epochs > 1", "no way back within one epoch"),
    Mutant("update.py", "(num_epochs * num_minibatches > 1", "(num_minibatches > 1", "no way back between epochs"),
    Mutant(
        "update.py",
        "copy.deepcopy((optimizer, [*policy.buffers()]))",
        "(optimizer, [*policy.buffers()])",
        "what was before is what is now",
    ),
    Mutant("run/guard.py", "MAX_CONSECUTIVE_SKIPS = 3", "MAX_CONSECUTIVE_SKIPS = 2", "ends a run at the second"),
    Mutant("run/guard.py", "MAX_CONSECUTIVE_SKIPS = 3", "MAX_CONSECUTIVE_SKIPS = 4", "lets three pass"),
    Mutant("run/guard.py", "self.training_run.iteration + 1", "self.training_run.iteration", "notes the update before"),
    Mutant(
        "run/guard.py",
        "recent_skips == [*range(iteration - MAX_CONSECUTIVE_SKIPS + 1, iteration + 1)]",
        "len(recent_skips) == MAX_CONSECUTIVE_SKIPS",
        "three anywhere in a run end it",
    ),
    Mutant("run/guard.py", 'self.training_run.recipe_state.get("skipped", ())', "()", "each is the first"),
    Mutant(
        "run/guard.py",
        'recent_skips = self.training_run.recipe_state["skipped"] = [\n            *self.training_run.recipe_state.get("skipped", ()),\n',
        'recent_skips = self.skipped = [\n            *getattr(self, "skipped", ()),\n',
        "a resumed run begins to count anew",
    ),
    Mutant("run/guard.py", 'run.event("update_skipped"', 'dict(kind="update_skipped"', "not written down"),
    Mutant(
        "run/guard.py",
        "if not self.training_run.cfg.quiet",
        "if self.training_run.cfg.quiet",
        "said where it should not be",
    ),
    Mutant("run/guard.py", "/ names[-1]", "/ names[0]", "names the oldest checkpoint"),
    Mutant("run/guard.py", "if not names:", "if names:", "a run without a checkpoint has one"),
    Mutant(
        "run/guard.py",
        "{fix}; {describe_last_checkpoint(run)}",
        "{describe_last_checkpoint(run)}",
        "does not say what to lower",
    ),
    Mutant("run/spikes.py", "1.4826 * np.median", "np.median", "a MAD is no standard deviation"),
    Mutant("run/spikes.py", "MIN_DEVIATIONS = 10.0", "MIN_DEVIATIONS = 9.0", "nearer"),
    Mutant("run/spikes.py", "MIN_DEVIATIONS = 10.0", "MIN_DEVIATIONS = 11.0", "farther"),
    Mutant(
        "run/spikes.py", "WINDOW, MIN_WINDOW = 100, 20", "WINDOW, MIN_WINDOW = 100, 10", "says something of ten lines"
    ),
    Mutant("run/spikes.py", "[late - WINDOW])", "[late - WINDOW + 1])", "a line is held against itself"),
    Mutant(
        "run/spikes.py", "values[:index][None]", "values[: index + 1][None]", "an early line is held against itself"
    ),
    Mutant(
        "run/spikes.py", "max(0, first_line - 2 * WINDOW)", "first_line", "forgets what was before when asked in pieces"
    ),
    Mutant(
        "run/spikes.py",
        "0.01 * np.abs(window_median)",
        "0.01 * window_median",
        "a negative median has no least deviation",
    ),
    Mutant(
        "run/spikes.py",
        "np.maximum(window_deviation, 0.01 * np.abs(window_median))",
        "window_deviation",
        "whatever hardly moves is a spike",
    ),
    Mutant("run/spikes.py", "return value is not None and", "return value is not None or", "nan is a value"),
    Mutant("run/checkpoint.py", "        sync(file)\n", "", "a file that is not on the disk"),
    Mutant("run/checkpoint.py", "    sync(manifest)\n", "", "a manifest that is not on the disk"),
    Mutant("run/checkpoint.py", "    sync(folder)\n", "", "a name that is not on the disk"),
    Mutant("run/checkpoint.py", "        sync(directory)\n", "        pass\n", "names inside that are not on the disk"),
    Mutant("run/checkpoint.py", "        verify(partial_dir)  #", "        #", "a disk is believed"),
    Mutant(
        "run/checkpoint.py",
        "    shutil.rmtree(partial_dir, ignore_errors=True)  # of a process",
        "    # of a process",
        "what was left behind is in the way",
    ),
    Mutant(
        "run/checkpoint.py",
        "        shutil.rmtree(partial_dir, ignore_errors=True)\n        if isinstance",
        "        if isinstance",
        "what could not be written stays",
    ),
    Mutant("run/checkpoint.py", "list_checkpoints(folder)[:-keep]", "list_checkpoints(folder)[:-1]", "keeps one"),
    Mutant(
        "run/checkpoint.py", "list_checkpoints(folder)[:-keep]", "list_checkpoints(folder)[keep:]", "keeps the oldest"
    ),
    Mutant("run/checkpoint.py", 'manifest.get("schema") != SCHEMA', "False", "any form of a manifest is read"),
    Mutant(
        "run/checkpoint.py",
        'not isinstance(document, dict) or document.get("schema") != SCHEMA',
        "not isinstance(document, dict)",
        "any form of a state is read",
    ),
    Mutant("run/checkpoint.py", 'or sha256(file) != entry.get("sha256")', "", "sizes are enough"),
    Mutant("run/checkpoint.py", "sorted(present ^ (", "sorted(present - (", "what is missing is not missed"),
    Mutant("run/checkpoint.py", "sorted(present ^ (", "sorted((", "what is too much is let be"),
    Mutant(
        "run/checkpoint.py", "reversed(list_checkpoints(folder))", "list_checkpoints(folder)", "goes on from the oldest"
    ),
    Mutant("run/checkpoint.py", "            _quarantine(folder, name, str(error))\n", "", "what is damaged stays"),
    Mutant("run/checkpoint.py", "if p.name.isdigit() and p.is_dir()", "if p.is_dir()", "any directory is a checkpoint"),
    Mutant("run/checkpoint.py", "path.stat().st_size > max_bytes", "False", "JSON of any size is read"),
    Mutant(
        "run/checkpoint.py",
        "ValueError, RecursionError) as error:\n        if",
        "ValueError) as error:\n        if",
        "depth",
    ),
    Mutant("distribution.py", "self.logp.clamp(min=MIN_LOGPROB)", "self.logp", "0 log 0 is nan"),
    Mutant(
        "distribution.py",
        "torch.where(self.logp > MIN_LOGPROB, self.logp - other.logp, 0.0)",
        "(self.logp - other.logp)",
        "nan",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "bias.clamp(min=MIN_LOGPROB)",
        "bias",
        "a token ruled out by the bias makes the entropy nan",
    ),
    Mutant(
        "language/model/forward.py",
        "torch.where(one == other, 0.0, one - other)",
        "(one - other)",
        "-inf is nan from -inf",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "ranked / ranked.sum(dim=-1, keepdim=True)",
        "ranked",
        "the kept mass is in no log-prob",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "probability_before = ranked.cumsum(dim=-1) - ranked",
        "probability_before = ranked.cumsum(dim=-1)",
        "one too few",
    ),
    Mutant(
        "language/model/token_distribution.py",
        "ranked[:, top_k:] = 0",
        "ranked[:, top_k + 1 :] = 0",
        "top_k keeps one more",
    ),
    Mutant(
        "language/rollout/generate.py",
        "probabilities = self.truncate_probabilities(probabilities)",
        "self.truncate_probabilities(probabilities)",
        "top_k and top_p without effect",
    ),
    Mutant(
        "language/trust_region.py",
        "learned = batch.mask.any(dim=1).nonzero()",
        "learned = (batch.mask.any(dim=1) | True).nonzero()",
        "rows without a chosen token are measured",
    ),
    Mutant("control/own_network.py", "if most > MIN_PROBABILITY:", "if False:", "a network may ignore the mask"),
    Mutant(
        "control/own_network.py", "if float((part.logp", "if 0 * float((part.logp", "log-probs need not be normalised"
    ),
    Mutant(
        "control/own_network.py", "return not bool(allowed.all())", "return True", "a mask that allows all proves it"
    ),
    Mutant("control/own_network.py", "if ran_out_of_memory(error):", "if False:", "memory is the network's fault"),
    Mutant(
        "run/metrics.py",
        'x[-1] if name.startswith("evaluation_") else _mean_of_values',
        "statistics",
        "the mean evaluation",
    ),
    Mutant(
        "run/store.py", "if newer := checkpoint.set_aside_newer(self.checkpoint):", "if newer := []:", "newer ones stay"
    ),
    Mutant(
        "run/store.py",
        "        self.accepted()\n        changed",
        "        changed",
        "a resumed run's new values are never written",
    ),
    Mutant(
        "run/resume.py",
        "        return recipe.train(config, resume=ResumePoint(reopened, checkpoint_path, event_fields, accepted), **objects)",
        "        accepted()\n        return recipe.train(config, resume=ResumePoint(reopened, checkpoint_path, event_fields, dict), **objects)",
        "config.json is written before the checks",
    ),
    Mutant(
        "run/resume.py",
        'if _with_absolute_paths(change["from"]) != _with_absolute_paths(change["to"])',
        "if False",
        "another reward is not noticed",
    ),
    Mutant("run/lineage.py", '{"went_on": went_on | {"config": now}} if went_on', "{} if went_on", "another config's"),
    Mutant(
        "control/fast/optimizer.py",
        "if sha256(place / WEIGHTS) == sha256(policy / WEIGHTS):",
        "if True:",
        "newer moments",
    ),
]

EQUIVALENT = {
    (
        "objective.py",
        "log_ratio = torch.where(batch.mask, logprob - _reference_logprob(batch), 0.0)",
        "log_ratio = torch.where(batch.mask, logprob - _reference_logprob(batch), logprob - _reference_logprob(batch))",
    ): "where nothing was chosen both sides are the sampler's own log-prob",
    (
        "fast/linear.py",
        "multiplications >= MIN_ONEDNN_MULTIPLICATIONS",
        "multiplications > MIN_ONEDNN_MULTIPLICATIONS",
    ): "at exactly the bound both libraries give the product",
    (
        "fast/linear.py",
        "if grad.shape[1] <= x.shape[1]:",
        "if grad.shape[1] < x.shape[1]:",
    ): "either orientation gives the product: one is quicker",
    (
        "fast/linear.py",
        "if grad.shape[1] <= x.shape[1]:",
        "if grad.shape[1] >= x.shape[1]:",
    ): "either orientation gives the product: one is quicker",
    (
        "language/model/token_distribution.py",
        "cumulative = p.cumsum(dim=-1)",
        "cumulative = p.cumsum(dim=(1))",
    ): "the log-probs are a matrix: its last dimension is dimension 1",
    (
        "language/model/token_distribution.py",
        "return self._map_chosen(lambda logp: logp.argmax(dim=-1))",
        "return self._map_chosen(lambda logp: logp.argmax(dim=(1)))",
    ): "the log-probs are a matrix: its last dimension is dimension 1",
    (
        "language/model/token_distribution.py",
        "else self.head(self._chosen_hidden).log_softmax(dim=-1)",
        "else self.head(self._chosen_hidden).log_softmax(dim=(1))",
    ): "the log-probs are a matrix: its last dimension is dimension 1",
    (
        "language/model/token_distribution.py",
        "return function(self.head(hidden).log_softmax(dim=-1), *rest)",
        "return function(self.head(hidden).log_softmax(dim=(1)), *rest)",
    ): "the log-probs are a matrix: its last dimension is dimension 1",
    (
        "language/model/token_distribution.py",
        "return self._map_chosen(lambda logp, token: logp.gather(-1, token[:, None])[:, 0], action)",
        "return self._map_chosen(lambda logp, token: logp.gather((1), token[:, None])[:, 0], action)",
    ): "the log-probs are a matrix: its last dimension is dimension 1",
    (
        "language/model/token_distribution.py",
        "if len(self._chosen_hidden) * vocabulary_size > MAX_STORED_LOGITS",
        "if len(self._chosen_hidden) * vocabulary_size >= MAX_STORED_LOGITS",
    ): "at exactly the bound both ways give the same numbers",
    (
        "language/model/token_distribution.py",
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[-1]',
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1 - 1]).shape[-1]',
    ): "only the width of what the head gives is asked for, which any row or none has",
    (
        "language/model/token_distribution.py",
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[-1]',
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[-(1):]).shape[-1]',
    ): "only the width of what the head gives is asked for, which any row or none has",
    (
        "language/model/token_distribution.py",
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[-1]',
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[(1)]',
    ): "only the width of what the head gives is asked for, which any row or none has",
    (
        "language/model/token_distribution.py",
        'return getattr(self.head.project, "out_features", 0) or self.head(self._chosen_hidden[:1]).shape[-1]',
        'return getattr(self.head.project, "out_features", 0) and self.head(self._chosen_hidden[:1]).shape[-1]',
    ): "the same width, found by asking the head; or 0, and then all is kept whole: only memory differs",
    (
        "reduce.py",
        "mean + zeros.index_add(0, index, x - mean[index]) / size",
        "mean - (zeros.index_add(0, index, x - mean[index]) / size)",
    ): "what is added is the rounding of the first mean, in the last bit",
    (
        "objective.py",
        "outside = (ratio < 1 - low) | (ratio > 1 + high)",
        "outside = (ratio <= 1 - low) | (ratio > 1 + high)",
    ): "a ratio lies on the bound itself with probability 0, and it is only counted",
    (
        "objective.py",
        "outside = (ratio < 1 - low) | (ratio > 1 + high)",
        "outside = (ratio < 1 - low) | (ratio >= 1 + high)",
    ): "a ratio lies on the bound itself with probability 0, and it is only counted",
    (
        "objective.py",
        "with torch.set_grad_enabled(entropy_coef > 0): # without a coefficient it is only looked at",
        "with torch.set_grad_enabled(entropy_coef >= 0): # without a coefficient it is only looked at",
    ): "it only saves a graph: the coefficient 0 leaves no gradient",
    (
        "objective.py",
        'return loss, {"loss": loss.detach(), "accuracy": ((score > 0) == (labelled.label > 0.5)).to(loss.dtype)}',
        'return loss, {"loss": loss.detach(), "accuracy": ((score > 0) == (labelled.label >= 0.5)).to(loss.dtype)}',
    ): "a label of exactly 0.5 is neither good nor bad",
    (
        "reward.py",
        "terminated, truncated = terminated | truncated, torch.zeros_like(truncated)",
        "terminated, truncated = terminated | truncated, torch.zeros_like(terminated)",
    ): "both have the same shape and type",
    (
        "reward.py",
        "is_cut = (truncated & mask).any(dim=1)",
        "is_cut = (truncated).any(dim=1)",
    ): "in a record of text an end stands at a chosen step",
    (
        "distribution.py",
        "return (self.logits > 0).long()",
        "return (self.logits >= 0).long()",
    ): "at even odds both outcomes are a mode",
    (
        "distribution.py",
        "points = self.mean[..., None, :] + self.log_std.exp()[..., None, :] * nodes[:, None]",
        "points = self.mean[..., None, :] - (self.log_std.exp()[..., None, :] * nodes[:, None])",
    ): "the nodes and their weights are symmetric about 0",
    (
        "distribution.py",
        "nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))",
        "nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) - (torch.diag(off_diagonal, -1)))",
    ): "eigh reads one triangle; its sign changes neither the eigenvalues nor the squares of the vectors",
    (
        "control/normalize.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "observations and rewards carry no gradient",
    (
        "distribution.py",
        "return torch.where(squashed, slope + torch.where(squashed, self.half_width, 1.0).log(), 0.0)",
        "return torch.where(squashed, slope + torch.where(squashed, self.half_width, self.half_width).log(), 0.0)",
    ): "the log of 0 stands in the branch that is not taken, and the width is not learnt",
    (
        "control/rollout.py",
        "self.num_calls, self.returns = self.num_calls + 1, self.returns + call.reward",
        "self.num_calls, self.returns = self.num_calls - (1), self.returns + call.reward",
    ): "only whether the calls are a multiple of `hold` is ever asked",
    (
        "control/fast/numpy_actor.py",
        "nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),",
        "nn.ELU: lambda x: np.where(x >= 0, x, np.expm1(np.minimum(x, 0))),",
    ): "at 0 both are 0",
    (
        "control/fast/numpy_actor.py",
        "self.noise = list((draws if self.log_std is None else draws * self.log_std.exp()).numpy()[::-1])",
        "self.noise = list((draws if self.log_std is None else draws * self.log_std.exp()).numpy()[::(1)])",
    ): "independent draws, in another order",
    (
        "value.py",
        "@torch.no_grad()",
        "@torch.enable_grad()",
    ): "what it returns is detached; this only saves the graph",
    (
        "value.py",
        "if trajectory.mask.numel() < MIN_CHUNKED_STEPS",
        "if trajectory.mask.numel() <= MIN_CHUNKED_STEPS",
    ): "a record of just as many steps is the same either way",
    (
        "advantage.py",
        "carry = torch.cat([carry[:, :-shift] * carry[:, shift:], carry[:, -shift:]], dim=1)",
        "carry = torch.cat([carry[:, :-shift] * carry[:, shift:], carry[:, :shift]], dim=1)",
    ): "the last `shift` carries fill the shape and are never read again",
    (
        "objective.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ): "every metric is detached below; this only saves its graph",
}
"""(file, old, new) of a mechanical mutant's line -> why no test can kill it."""


def mechanical(file: str, source: str) -> Iterator[Mutant]:
    """Every comparison, sign, mask, detach, index and end flag of a file made wrong, one at a time."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    assert source.isascii(), f"{file}: positions are counted in bytes"

    def span(node: ast.expr) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        return source[slice(*span(node))]

    tree = ast.parse(source)
    for node in [n for n in _code(tree) if isinstance(n, ast.expr)]:
        start, _ = span(node)
        for new, meaning in _broken(node, text):
            if new != text(node):
                yield Mutant(file, text(node), new, meaning, start)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, without annotations."""
    yield node
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from _code(child)


COMPARISONS = {ast.Lt: ("<=", ">"), ast.Gt: (">=", "<"), ast.LtE: ("<", ">="), ast.GtE: (">", "<="), ast.Eq: ("!=",)}
COMPARISONS |= {ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",)}
SIGNS = {ast.Add: "-", ast.Sub: "+"}
FLAGS = {"terminated": "truncated", "truncated": "terminated"}


def _broken(node: ast.expr, text) -> Iterator[tuple[str, str]]:
    """Wrong versions of one expression, and what was done to it."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            for other in COMPARISONS[type(op)]:
                yield f"{text(left)} {other} {text(right)}", "comparison"
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            yield f"{text(left)} {SIGNS[type(op)]} ({text(right)})", "sign"
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd(), right=right):
            yield from ((text(left), "flag dropped"), (text(right), "flag dropped"))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            if "mask" in text(right):
                yield text(left), "mask dropped"
            if "mask" in text(left):
                yield text(right), "mask dropped"
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield f"({text(operand)})", "sign"
        case ast.BoolOp(op=op, values=[left, right]):
            yield f"{text(left)} {'and' if isinstance(op, ast.Or) else 'or'} {text(right)}", "and / or"
        case ast.Call(func=ast.Attribute(value=value, attr="detach")):
            yield text(value), "detach dropped"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="no_grad")):
            yield "torch.enable_grad()", "gradient let through"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="where"), args=[condition, yes, no]):
            yield f"torch.where({text(condition)}, {text(yes)}, {text(yes)})", "mask dropped"
            yield f"torch.where({text(condition)}, {text(no)}, {text(no)})", "mask closed"
        case ast.Name(id=name, ctx=ast.Load()) if name in FLAGS:
            yield FLAGS[name], "end flag"
        case ast.Attribute(value=value, attr=name, ctx=ast.Load()) if name in FLAGS:
            yield f"{text(value)}.{FLAGS[name]}", "end flag"
        case ast.Slice(lower=lower, upper=upper) if lower or upper:
            ends = [text(end) if end else "" for end in (lower, upper)]
            if lower:
                yield f"{ends[0]} + 1:{ends[1]}", "index shift"
            if upper:
                yield f"{ends[0]}:{ends[1]} - 1", "index shift"
            if bool(lower) != bool(upper):
                end = ends[0] or ends[1]
                turned = end[1:] if end.startswith("-") else f"-({end})"
                yield (f":{turned}" if lower else f"{turned}:"), "the other end"
        case ast.Subscript(value=value, slice=index):
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            for i, part in enumerate(parts):
                if isinstance(part, ast.Constant) and type(part.value) is int:
                    moved = [text(p) if j != i else str(part.value + 1) for j, p in enumerate(parts)]
                    yield f"{text(value)}[{', '.join(moved)}]", "index shift"


def hand_made(file: str, source: str) -> Iterator[Mutant]:
    mine = [mutant for mutant in HAND if mutant.file == file]
    if stale := [mutant.old for mutant in mine if source.count(mutant.old) != 1]:
        sys.exit("\n".join([f"mend HAND: in {file} these must stand once and do not", *map(repr, stale)]))
    yield from mine


def line_of(mutant: Mutant, source: str) -> tuple[str, str, str]:
    """The file, and the whole lines that a mutant changes before and after: how EQUIVALENT names it."""
    start = source.index(mutant.old) if mutant.at is None else mutant.at
    stop = start + len(mutant.old)
    first, last = source.rfind("\n", 0, start) + 1, source.find("\n", stop)
    before, after = source[first:last], source[first:start] + mutant.new + source[stop:last]
    return mutant.file, " ".join(before.split()), " ".join(after.split())


def apply(mutant: Mutant, source: str) -> str:
    start = source.index(mutant.old) if mutant.at is None else mutant.at
    return source[:start] + mutant.new + source[start + len(mutant.old) :]


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    killed: bool
    by: str
    """The test that noticed; empty where none did, or where the tests could not be read or ran out of time."""
    timed_out: bool
    seconds: float
    """Processor time."""


class Stage:
    """A copy of the package and its tests on which one mutant at a time plays."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        for name in ("understudy", "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        self.note = self.folder / "noticed"

    def put(self, file: str, source: str) -> None:
        (self.folder / "understudy" / file).write_text(source)

    def play(self, tests: tuple[str, ...], kills: Counter[str], seconds: int) -> int:
        """Start the tests in a fork; its process id. Exit code 0: nobody noticed."""
        self.note.unlink(missing_ok=True)
        parent, child = os.getpid(), os.fork()
        if child:
            return child
        code = 1
        try:
            os.setsid()
            _die_with(parent)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder))
            options = ["-x", "-q", "-o", "addopts=", "--import-mode=importlib", "--assert=plain"]
            options += ["-p", "no:cacheprovider", "-p", "no:unraisableexception", f"--basetemp={self.folder / 'tmp'}"]
            code = int(
                pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[_Order(kills, self.note)])
            )
        finally:
            os._exit(code)


class _Order:
    """A plugin of pytest: the tests that noticed most so far run first, and the one that notices now is written down."""

    def __init__(self, kills: Counter[str], note: Path) -> None:
        self.kills, self.note = kills, note

    def pytest_collection_modifyitems(self, items) -> None:
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.note.write_text(report.nodeid)


def _die_with(parent: int) -> None:
    """In a fork: end when the parent does, however it ends (Linux), and by the signals that end it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run(
    mutants: list[Mutant], sources: dict[str, str], allowed: dict[str, int], workers: int
) -> Generator[Outcome, None, None]:
    """What became of each mutant, in the order they finish."""
    free, busy, waiting = [Stage() for _ in range(workers)], {}, list(reversed(mutants))
    kills: dict[str, Counter[str]] = {file: Counter() for file in sources}
    try:
        while waiting or busy:
            while waiting and free:
                mutant, stage = waiting.pop(), free.pop()
                file = mutant.file
                stage.put(file, apply(mutant, sources[file]))
                child = stage.play(TESTS[file], kills[file], allowed[file])
                busy[child] = (mutant, stage, time.monotonic())
            time.sleep(0.01)
            for child, (mutant, stage, since) in list(busy.items()):
                done, status, used = os.wait4(child, os.WNOHANG)
                if not done and time.monotonic() - since < WALL_SECONDS:
                    continue
                _end(child)  # and what it started
                if not done:
                    _, status, used = os.wait4(child, 0)
                del busy[child]
                stage.put(mutant.file, sources[mutant.file])
                free.append(stage)
                code = os.waitstatus_to_exitcode(status)
                if code in (4, 5):  # pytest: wrong usage, no tests
                    sys.exit(f"{mutant.file}: no tests ran, mend TESTS")
                by = stage.note.read_text() if stage.note.exists() else ""
                kills[mutant.file][by] += 1
                timed_out = not done or code in (-signal.SIGXCPU, -signal.SIGKILL)
                yield Outcome(mutant, code != 0, by, timed_out, used.ru_utime + used.ru_stime)
    finally:
        for child in busy:
            _end(child)
            os.waitpid(child, 0)
        for stage in [*free, *(stage for _, stage, _ in busy.values())]:
            shutil.rmtree(stage.folder, ignore_errors=True)


def _end(child: int) -> None:
    """End a fork and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def show(mutant: Mutant, source: str) -> str:
    line = source.count("\n", 0, source.index(mutant.old) if mutant.at is None else mutant.at) + 1
    _, before, after = line_of(mutant, source)
    return f"  {mutant.file}:{line} ({mutant.meaning})\n    - {before}\n    + {after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    args = parser.parse_args()
    if unknown := (set(args.files) | {mutant.file for mutant in HAND}) - set(TESTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(TESTS)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # by way of every `finally`

    began, files = time.monotonic(), args.files or list(TESTS)
    sources = {file: (ROOT / "understudy" / file).read_text() for file in files}
    allowed = dict.fromkeys(files, WALL_SECONDS)
    untouched = [Mutant(file, "", "", "nothing is broken", 0) for file in files]
    with contextlib.closing(run(untouched, sources, allowed, args.workers)) as outcomes:
        for outcome in outcomes:
            if outcome.killed:
                sys.exit(f"{outcome.by or 'the tests'} of {outcome.mutant.file}: red before anything is broken")
            allowed[outcome.mutant.file] = int(PATIENCE[0] * outcome.seconds + PATIENCE[1])

    kinds, known, failed, table = {"hand-made": hand_made, "mechanical": mechanical}, set(), False, {}
    for kind, make in kinds.items():
        chosen = {f: s for f, s in sources.items() if kind == "hand-made" or f not in HAND_ONLY}
        mutants = [m for file, source in chosen.items() for m in make(file, source)]
        equivalent = [m for m in mutants if kind == "mechanical" and line_of(m, sources[m.file]) in EQUIVALENT]
        known |= {line_of(m, sources[m.file]) for m in equivalent}
        mutants = [m for m in mutants if m not in equivalent]
        found: list[Outcome] = []
        with contextlib.closing(run(mutants, sources, allowed, args.workers)) as outcomes:
            for outcome in outcomes:
                found.append(outcome)
                left = sum(not o.killed for o in found)
                print(f"\r{kind}: {len(found)} of {len(mutants)}, {left} survived", end="", file=sys.stderr, flush=True)
        print("\r", end="", file=sys.stderr)
        killed, out_of_time = sum(o.killed for o in found), sum(o.timed_out for o in found)
        print(
            f"{kind}: {killed} of {len(mutants)} killed, {out_of_time} of them by the clock, {len(equivalent)} equivalent"
        )
        for o in found:
            if not o.killed or o.timed_out:
                print(show(o.mutant, sources[o.mutant.file]) + ("\n    by the clock" if o.killed else "\n    SURVIVED"))
        for m in equivalent:
            print(f"{show(m, sources[m.file])}\n    equivalent: {EQUIVALENT[line_of(m, sources[m.file])]}")
        failed |= killed < (len(mutants) if kind == "hand-made" else ENOUGH * len(mutants))
        for file in files:
            mine = [o.killed for o in found if o.mutant.file == file]
            table[kind, file] = f"{sum(mine)} of {len(mine)}"
        table |= {("equivalent", file): sum(m.file == file for m in equivalent) for file in files}
    print("\n| file | hand-made | mechanical | equivalent |\n|---|---|---|---|")
    for file in files:
        print(f"| `{file}` | {' | '.join(str(table[kind, file]) for kind in (*kinds, 'equivalent'))} |")
    for name in [name for name in EQUIVALENT.keys() - known if name[0] in files]:
        print(f"EQUIVALENT names a mutant that there is no more: {name}")
        failed = True
    print(f"{time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    import pytest
    import torch
    import torch.distributions
    from gymnasium import vector  # noqa: F401 - loaded once, not in every fork

    torch.set_num_threads(1)
    one = torch.ones(1, requires_grad=True)
    torch.optim.Adam([one]).step()
    torch.testing.assert_close(one, one)  # both load much at their first use: once here, not in every fork
    gc.freeze()
    sys.exit(main())
