"""FSDP2, HSDP, activation checkpointing and compile for a Llama with memory layers.

The dense part goes through torchtitan's own functions. The value tables stay outside FSDP: they
are split by rows once and never gathered, so each is set aside while FSDP takes the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_smf.model.llama import MemoryBlock, MemoryLlama
from titan_smf.torchtitan_api import (
    TORCH_DTYPE_MAP,
    ParallelDims,
    TitanJobConfig,
    apply_ac,
    apply_fsdp,
    op_sac_save_list,
)


def parallelize(
    model: MemoryLlama, parallel_dims: ParallelDims, job_config: TitanJobConfig
) -> MemoryLlama:
    """Apply what `[activation_checkpoint]`, `[compile]` and `[parallelism]` ask for.

    The model is on the meta device; its parameters become DTensors where there are several ranks.
    Gradients of the dense part are summed over all data-parallel ranks (the loss is divided by the
    global number of target tokens); those of a table are complete on the owner of each row.
    """
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=op_sac_save_list,  # type: ignore[arg-type]
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        _compile_blocks(model, job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        _shard(model, parallel_dims, job_config)
    return model


def _compile_blocks(model: MemoryLlama, backend: str) -> None:
    for name, block in list(model.layers.named_children()):
        # The routed lookup is a graph break: its split sizes depend on the data.
        whole = not any(isinstance(module, MemoryBlock) for module in block.modules())
        compiled = torch.compile(block, backend=backend, fullgraph=whole)
        model.layers.register_module(name, compiled)  # type: ignore[arg-type]


def _shard(model: MemoryLlama, parallel_dims: ParallelDims, job_config: TitanJobConfig) -> None:
    replicated = parallel_dims.dp_replicate_enabled
    mesh = parallel_dims.get_mesh(["dp_replicate", "fsdp"] if replicated else ["fsdp"])
    tables, model.tables = model.tables, nn.ModuleList()
    apply_fsdp(
        model,
        mesh,
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
        pp_enabled=False,
        reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
    )
    model.tables = tables
    for table in model.value_tables():
        table.shard(mesh)
    if mesh.device_type == "cpu":
        reduce_by_plain_sums(model)


def reduce_by_plain_sums(model: nn.Module) -> None:
    """Let FSDP use gloo, which has no pre-multiplied sum."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(model: MemoryLlama, policy: str) -> Iterator[None]:
    """Gather the dense part once, in the first forward pass inside, and keep it until the end.

    For many passes without gradients: each then communicates for its lookups alone. Ranks enter
    and leave together. Costs the memory of the dense part in the type of computing, therefore
    nothing is kept where `policy`, `parallelism.fsdp_reshard_after_forward`, is "always".
    """
    # What torchtitan's "default" lets go after each forward pass.
    layers = [model.tok_embeddings, *model.layers.values()] if policy == "default" else []
    released = [module for module in layers if isinstance(module, FSDPModule)]
    for module in released:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in released:
            module.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Let go of parameters that FSDP has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
