"""The names that other libraries have for our fields: Stable-Baselines3, CleanRL, rsl_rl, TRL, verl, OpenRLHF."""

from __future__ import annotations

from collections.abc import Collection

PEERS = {  # our fields, the first that a recipe has -> what others call it
    "learning_rate": "lr",
    "learning_rate_schedule": "anneal_lr lr_schedule lr_scheduler lr_scheduler_type",
    "warmup": "warmup_ratio warmup_steps",
    "steps total_tokens": "total_timesteps timesteps total_steps num_steps_total total_episodes max_steps",
    "num_steps_per_env": "n_steps num_steps unroll_length",
    "num_envs": "n_envs",
    "env": "env_id env_name gym_id",
    "env_options": "env_kwargs",
    "hidden": "net_arch hidden_size hidden_sizes hidden_dims",
    "num_epochs": "n_epochs epochs update_epochs num_learning_epochs num_train_epochs num_ppo_epochs ppo_epochs",
    "num_minibatches": "n_minibatches nminibatches num_mini_batches",
    "batch_size num_minibatches": "batch_size minibatch_size mini_batch_size train_batch_size",
    "batch_size completions_per_iteration": "per_device_train_batch_size rollout_batch_size",
    "micro_batch_size": "gradient_accumulation_steps micro_train_batch_size",
    "clip": "clip_range clip_coef cliprange clip_param clip_eps clip_epsilon clip_ratio epsilon",
    "value_clip": "clip_range_vf cliprange_value clip_vloss value_clip_range vf_clip",
    "clip_high": "epsilon_high clip_ratio_high",
    "entropy_coef": "ent_coef entropy_coeff entropy_weight",
    "value_coef": "vf_coef value_loss_coef vf_loss_coef",
    "lam": "gae_lambda gae_lam lambda_",
    "normalize_advantage": "norm_adv normalize_advantages whiten_advantages",
    "normalize_obs": "norm_obs",
    "normalize_reward": "norm_reward",
    "max_grad_norm": "clip_grad grad_clip gradient_clip",
    "adam_eps": "adam_epsilon eps",
    "exploration": "use_sde",
    "kl_reference_coef beta": "kl_coef init_kl_coef kl_ctl kl_loss_coef beta",
    "reference": "ref_model ref_model_name reference_model",
    "model": "model_name model_name_or_path model_path pretrain policy_model sft_model_path",
    "data": "dataset dataset_name dataset_path train_file prompt_data train_files",
    "data_split": "dataset_split dataset_train_split",
    "data_config": "dataset_config",
    "reward": "reward_model reward_model_path reward_pretrain reward_fn reward_func reward_funcs",
    "max_new_tokens": "max_completion_length response_length generate_max_len",
    "group_size": "num_generations n_samples_per_prompt",
    "scale_by_std": "scale_rewards",
    "loss_type loss_aggregation": "loss_type",
    "lora_rank": "lora_r use_peft",
    "lora_target_modules": "target_modules",
    "stop": "stop_token stop_tokens stop_strings eos_token",
    "output_dir": "out save_dir log_dir save_path",
    "init_from": "checkpoint_path load_path load_model",
    "device": "cuda",
    "log": "report_to track tensorboard_log",
    "log_every": "logging_steps log_interval",
    "checkpoint_every": "save_steps save_freq save_interval",
    "evaluate_every": "eval_steps eval_freq eval_interval",
    "evaluate_episodes": "n_eval_episodes",
}


def own_name(name: str, fields: Collection[str]) -> str | None:
    """Which of a recipe's fields has this name elsewhere; None where none has."""
    for own_names, peer_names in PEERS.items():
        if name in peer_names.split():
            return next((field for field in own_names.split() if field in fields), None)
    return None
