"""What a run's folder says of the run that made a patch."""

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from titan_smf.checkpoint.patch import LineageStep


def run_lineage(folder: Path, steps: int, parent: str, data: str = "") -> LineageStep:
    """Returns a run's part in the lineage of a patch, as far as its `config.toml` tells.

    Args:
        folder: the run's.
        steps: training steps that led to the patch.
        parent: fingerprint of the weights it started from.
        data: what it learned, in words; empty for what its settings say.
    """
    settings = folder / "config.toml"
    if not settings.is_file():
        return LineageStep("", steps, data, parent)
    content = settings.read_bytes()
    data = data or _data_of(tomllib.loads(content.decode()))
    return LineageStep(hashlib.sha256(content).hexdigest(), steps, data, parent)


def _data_of(settings: dict[str, Any]) -> str:
    """What a run learned, by its settings: the path of its stream or of its sources."""
    if path := settings.get("stream", {}).get("path"):
        return str(path)
    sources = settings.get("data", {}).get("sources", [])
    return ", ".join(str(source.get("path")) for source in sources)
