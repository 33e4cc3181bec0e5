"""`patch.safetensors`, which a sparse run writes, and the patches that a run starts from."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_smf.checkpoint.fingerprint import model_fingerprint
from titan_smf.checkpoint.patch import chain, run_lineage
from titan_smf.checkpoint.patch_file import load_patch, save_patch
from titan_smf.checkpoint.patch_model import apply_to_model, patch_of_model
from titan_smf.errors import ConfigError, PatchError
from titan_smf.model.llama import MemoryLlama
from titan_smf.sparse.row_optimizer import RowOptimizer

PATCH_FILE = "patch.safetensors"

logger = logging.getLogger("titan_smf")


def apply_patches(model: MemoryLlama, paths: Sequence[str]) -> None:
    """Apply patches to a model, in their order. Collective.

    Raises:
        ConfigError: the model has no value tables.
        PatchError: a patch cannot be used, or does not fit the model or the patch before it.
    """
    key = "checkpoint.initial_patches"
    if not any(model.value_tables()):
        raise ConfigError(key, list(paths), "[] for a model without memory layers, it has no rows")
    patches = [load_patch(path) for path in paths]
    try:
        patch = chain(patches)
        apply_to_model(model, patch)
    except PatchError as error:
        raise PatchError(f"{key}, {', '.join(paths)}: {error}") from None
    logger.info("Patched by %s: now weights %s", ", ".join(paths), patch.metadata.result)


class RunPatch:
    """Writes the difference between the weights that a run began with and those it has.

    The fingerprint of the first is part of the run's state: a resumed run no longer has them.

    Args:
        model: the run's.
        optimizers: one for each table, with the base values of the rows they changed.
        folder: the run's, which gets the file.
    """

    def __init__(
        self, model: MemoryLlama, optimizers: Sequence[RowOptimizer], folder: Path
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.folder = folder
        self.base = ""
        """Fingerprint of the weights that the run began with."""

    def begin(self) -> None:
        """Take the present weights for the base. Collective."""
        self.base = model_fingerprint(self.model)
        logger.info("The base's fingerprint is %s", self.base)

    def save(self, step: int) -> None:
        """Write the patch from the base to the model after a step. Collective.

        Needs two and a half times the memory of the patch on rank 0.
        """
        if not self.optimizers[0].table.is_first_replica:
            return
        changed = [optimizer.base_rows() for optimizer in self.optimizers]
        lineage = [run_lineage(self.folder, step, self.base)]
        patch = patch_of_model(self.model, changed, self.base, lineage)
        if patch is not None:
            path = self.folder / PATCH_FILE
            save_patch(str(path), patch)
            logger.info("Wrote %s: %s rows changed", path, f"{len(patch.ids):,}")

    def state_dict(self) -> dict[str, Any]:
        """Return the base's fingerprint."""
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the base of the run that was saved."""
        self.base = state_dict["base"]
