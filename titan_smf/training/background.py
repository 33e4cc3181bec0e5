"""Loads the counts of background data that rank slots, and checks that they are of the model."""

import logging

import torch
from torch.distributed.tensor import DTensor

from titan_smf.data.tokenizer import Tokenizer
from titan_smf.model.llama import MemoryLlama
from titan_smf.sparse.accesses import OwnedSlots
from titan_smf.sparse.document_frequency import Background, addressing_fingerprint
from titan_smf.sparse.idf_file import IdfModel, check_idf, load_idf, read_metadata
from titan_smf.sparse.idf_report import usage_warning

logger = logging.getLogger("titan_smf")


def load_background(
    path: str,
    model: MemoryLlama,
    tokenizer: Tokenizer,
    device: torch.device,
    owned: OwnedSlots | None = None,
) -> Background:
    """Load the counts of this rank's slots, or of those given. Collective.

    Raises:
        IdfError: the file is missing or torn, or counts for another model or tokenizer.
    """
    metadata = read_metadata(path)
    check_idf(path, metadata, idf_model(model, tokenizer))
    if warning := usage_warning(metadata):
        logger.warning("%s: %s", path, warning)
    logger.info("Background: %d documents, %s", metadata.documents, path)
    return load_idf(path, owned or OwnedSlots.of(model.value_tables()), device)


def idf_model(model: MemoryLlama, tokenizer: Tokenizer) -> IdfModel:
    """Describe what the counts depend on of a model. Collective: gathers keys and queries."""
    memory = model.model_args.memory
    addressing = {}
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".memory.query", ".memory.keys")):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            layer = name.split("layers.")[1].split(".")[0]  # without the names of wrappers
            addressing[f"{layer}.{name.split('.memory.')[1]}"] = whole
    return IdfModel(
        slots=memory.num_slots,
        tables=memory.num_tables,
        memory_layers=sorted(memory.layers),
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        addressing_fingerprint=addressing_fingerprint(addressing),
    )
