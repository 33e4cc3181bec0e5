"""torchtitan's settings that would do nothing here, or harm, and what to do instead."""

_SHARD_INSTEAD = "split the model and its table over more ranks instead, as FSDP does by default"

# start of the key -> what to do instead
_UNSUPPORTED = {
    "job.config_file": "name the file on the command line, --job.config FILE",
    "job.save_config_file": "config.toml is always saved in job.dump_folder",
    "job.print_config": "config.toml is always saved in job.dump_folder",
    "job.custom_config_module": "the sections are those of titan_smf/config/sections.py",
    "profiling.enable_memory_snapshot": "measure with profiling.enable_profiling",
    "profiling.save_memory_snapshot_folder": "measure with profiling.enable_profiling",
    "metrics.disable_color_printing": "nothing is printed in colour",
    "metrics.save_for_all_ranks": "metrics are those of all ranks together",
    "metrics.enable_wandb": "read metrics.jsonl or TensorBoard's files",
    "model.hf_assets_path": "name the tokenizer in [tokenizer]",
    "model.tokenizer_path": "name the tokenizer in [tokenizer]",
    "model.converters": "set training.mixed_precision_param for a faster type",
    "model.print_after_conversion": "there are no model converters",
    "quantize.": "set training.mixed_precision_param for a faster type",
    "optimizer.early_step_in_backward": "gradients are clipped together, after the backward pass",
    "training.dataset": "name the text or the token shards in data.sources",
    "training.dataloader.": "batches are read from memory-mapped shards, without workers",
    "training.enable_cpu_offload": _SHARD_INSTEAD,
    "parallelism.tensor_parallel": _SHARD_INSTEAD,
    "parallelism.enable_async_tensor_parallel": _SHARD_INSTEAD,
    "parallelism.disable_loss_parallel": "there is no tensor parallelism",
    "parallelism.pipeline_parallel": _SHARD_INSTEAD,
    "parallelism.module_fqns_per_model_part": _SHARD_INSTEAD,
    "parallelism.context_parallel": "use a shorter training.seq_len, or full activation_checkpoint",
    "parallelism.expert_": "there are no experts",
    "checkpoint.enable_ft_dataloader_checkpoints": "the data position is always saved",
    "checkpoint.initial_load_model_only": "to go on with a run, start it again as it was started",
    "checkpoint.initial_load_in_hf": "start from a checkpoint of this project",
    "checkpoint.exclude_from_loading": "a run resumes whole, another run's weights come alone",
    "checkpoint.enable_first_step_checkpoint": "set checkpoint.interval to try saving early",
    "checkpoint.last_save_model_only": "the last checkpoint can be resumed, as each one can",
    "checkpoint.last_save_in_hf": "checkpoints are safetensors files already",
    "checkpoint.export_dtype": "checkpoints keep the types of training",
    "checkpoint.async_mode": "checkpoints are complete before training goes on",
    "checkpoint.create_seed_checkpoint": "initial values do not depend on the number of ranks",
    "validation.dataset": "name the text or the token shards in data.validation",
    "validation.dataloader.": "batches are read from memory-mapped shards, without workers",
    "comm.mode": "start one process without torchrun to try a configuration",
    "memory_estimation.": "start one process with few training.steps to measure",
    "fault_tolerance.": "start the same command again: it resumes from the last checkpoint",
    "experimental.": "there are no experiments to import",
    "debug.moe_force_load_balance": "there are no experts",
}


def unsupported(key: str) -> str | None:
    """What to do instead of giving this setting; None where it can be given."""
    return next((why for start, why in _UNSUPPORTED.items() if key.startswith(start)), None)
