"""Data sources that name an invented world: `synthetic:world?seed=0&facts=2000&split=train`."""

from typing import NamedTuple
from urllib.parse import parse_qsl

from titan_smf.errors import ConfigError
from titan_smf.world.world import FACT_SETS, World

SYNTHETIC_PREFIX = "synthetic:"


class WorldSource(NamedTuple):
    """What a path `synthetic:world?...` names."""

    world: World
    split: str
    """Which part of the text to read: `train` or `validation`."""
    fact_set: str
    """Which facts to read, one of `FACT_SETS`."""


def parse_world(path: str) -> WorldSource:
    """Return the world, split and fact set that a path `synthetic:world?...` names.

    All settings with their defaults, any of which may be left out:
    `synthetic:world?seed=0&facts=2000&new_facts=500&tuning_facts=0&split=train&set=new_facts`

    Raises:
        ConfigError: unknown settings or values, or too few facts.
    """
    name, _, query = path.removeprefix(SYNTHETIC_PREFIX).partition("?")
    counts = {"seed": "0", "facts": "2000", "new_facts": "500", "tuning_facts": "0"}
    choices = {"split": ("train", "validation"), "set": FACT_SETS}
    settings = counts | {key: allowed[0] for key, allowed in choices.items()}
    given = dict(parse_qsl(query, keep_blank_values=True))
    chosen = settings | given
    if (
        name != "world"
        or set(chosen) != set(settings)
        or not all(chosen[key].isdecimal() for key in counts)
        or any(chosen[key] not in allowed for key, allowed in choices.items())
    ):
        pattern = "&".join(f"{key}={value}" for key, value in settings.items())
        raise ConfigError(
            "data.sources",
            path,
            f"{SYNTHETIC_PREFIX}world?{pattern}, in part or whole; "
            + "; ".join(f"{key}: {', '.join(allowed)}" for key, allowed in choices.items()),
        )
    world = World(*(int(chosen[key]) for key in counts))
    return WorldSource(world, chosen["split"], chosen["set"])
