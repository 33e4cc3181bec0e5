"""The words of the invented world, read from `words.toml`."""

import tomllib
from pathlib import Path
from typing import Any

WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("words.toml").read_text("utf-8"))
RELATIONS = tuple(WORDS["relations"])
"""What facts are about: birthplaces, trades and so on."""
