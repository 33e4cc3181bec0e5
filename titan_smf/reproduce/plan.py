"""What a comparison of methods runs: models to begin with, methods, rates, seeds.

A plan is one TOML file. Its settings are those of training (`--help` of titan_smf.train), given by
phase; a later table of a phase outranks an earlier one:

    pretraining a base   [common]  [pretrain]  [bases.NAME]
    counting             [common]  [count]     [bases.NAME]  the arm's idf settings
    learning             [common]  [learn]     [bases.NAME]  [replay]  the arm's settings
    choosing rates       ... and last [tune]

    [[arms]]  a method: its name, its base, the settings `rate` that take each of `rates`

In text, `{seed}` stands for the seed of the run. A setting is overridden from the command line with
its phase before it: `--pretrain.training.steps 100`.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_smf.config.job import JobConfig
from titan_smf.config.parsing import (
    COMMAND_LINE,
    check_value,
    flatten,
    get,
    read_arguments,
    read_tables,
    settings_of,
)
from titan_smf.errors import ConfigError

PHASES = ("common", "pretrain", "count", "learn", "replay", "tune")
WITH_REPLAY = ", replay"


@dataclass
class Reproduce:
    """The section `[reproduce]`: what is compared and where it is kept."""

    folder: str = "outputs/reproduce"
    """Folder of the runs, the chosen rates and the report."""

    base_folder: str = "outputs/bases"
    """Folder of pretrained models and their counts, named by their settings: plans share them."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of world, model and data. Processes may share a plan, each with seeds of its own."""

    tuning_seed: int = 0
    """The seed on which rates are chosen, on facts that are not reported."""

    arms: list[str] = field(default_factory=list)
    """Arms to run, by name or group; [] = all. Names with commas are given as '["a, b", "c"]'."""

    vocabulary: int = 0
    """Train a tokenizer of this size on the text of pretraining; 0 = what [tokenizer] says."""


@dataclass(frozen=True)
class _ArmTable:
    """A table `[[arms]]` as it is written, but for its settings."""

    name: str
    base: str
    rate: list[str]
    """The settings that take the rate."""
    rates: list[float]
    factors: list[float] = field(default_factory=list)
    """What the settings of `rate` multiply it by, in their order; [] = by 1."""
    group: str = "core"
    replay: bool = False
    """Run it a second time with the settings of [replay], as an arm of the group "GROUP replay"."""
    tune: bool = True
    """Choose a rate on the tuning facts; false: only what it learns and forgets at each counts."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  a class attribute that pydantic reads


@dataclass(frozen=True)
class Arm(_ArmTable):
    """A method with its settings, to be run at several rates."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Full keys and values, over those of the phase `learn`."""


@dataclass(frozen=True)
class Plan:
    """Everything that is to be run."""

    source: str
    reproduce: Reproduce
    phases: dict[str, dict[str, Any]]
    """The settings of each phase, full key -> value."""
    bases: dict[str, dict[str, Any]]
    arms: list[Arm]

    def pretraining(self, base: str, seed: int) -> JobConfig:
        """Return the configuration by which a base is pretrained."""
        return self._config(seed, self.phases["pretrain"], self.bases[base])

    def counting(self, arm: Arm, seed: int) -> JobConfig:
        """Return the configuration by which the background of an arm is counted."""
        own = {key: value for key, value in arm.settings.items() if key.startswith("idf.")}
        return self._config(seed, self.phases["count"], self.bases[arm.base], own)

    def learning(self, arm: Arm, seed: int, rate: float, tuning: bool) -> JobConfig:
        """Return the configuration of an arm's run, on the facts for tuning or those reported."""
        rates = {key: factor * rate for key, factor in zip(arm.rate, arm.factors, strict=True)}
        last = self.phases["tune"] if tuning else {}
        described = {"job.description": arm.name}
        base = self.bases[arm.base]
        return self._config(seed, self.phases["learn"], base, arm.settings, rates, described, last)

    def _config(self, seed: int, *tables: dict[str, Any]) -> JobConfig:
        config = JobConfig()
        for table in ({"debug.seed": seed}, self.phases["common"], *tables):
            values = {key: _filled(value, seed) for key, value in table.items()}
            config.update(values, self.source)
        return config


def read_plan(argv: Sequence[str]) -> Plan:
    """Read the plan of `--job.config FILE` with the overrides in `argv`.

    Raises:
        ConfigError: the file or an override is not as this module's docstring says.
    """
    settings = settings_of(JobConfig)
    allowed = {f"reproduce.{key}": kind for key, kind in settings_of(Reproduce).items()}
    allowed |= {f"{phase}.{key}": kind for phase in PHASES for key, kind in settings.items()}
    path, overrides = read_arguments(argv, allowed)
    if path is None:
        raise ConfigError("job.config", None, "a plan, such as train_configs/reproduce_cpu.toml")
    tables = read_tables(path)
    if not tables.get("arms"):
        needed = "one table [[arms]] or more, as in the plan train_configs/demo.toml"
        raise ConfigError("arms", [], needed, path)
    given, arms = tables.pop("bases", {}), tables.pop("arms")
    if not isinstance(given, dict) or not all(isinstance(base, dict) for base in given.values()):
        raise ConfigError("bases", given, "tables of settings, [bases.NAME]", path)
    bases = {name: flatten(base, settings, path) for name, base in given.items()}
    reproduce = Reproduce()
    phases: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
    for key, value in (flatten(tables, allowed, path) | overrides).items():
        phase, _, name = key.partition(".")
        if phase == "reproduce":
            setattr(reproduce, name, value)
        else:
            phases[phase][name] = value
    plan = Plan(path, reproduce, phases, bases, list(_arms(arms, phases["replay"], settings, path)))
    _check(plan, overrides)
    where = COMMAND_LINE if "reproduce.arms" in overrides else path
    return dataclasses.replace(plan, arms=_chosen(plan.arms, reproduce.arms, where))


def _arms(
    tables: Any, replay: dict[str, Any], settings: dict[str, Any], path: str
) -> Iterator[Arm]:
    """Yield every arm, and behind it its twin with replay where it asks for one."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("arms", tables, "a list of tables, [[arms]]", path)
    for number, table in enumerate(tables):
        key = f"arms[{number}]"
        own = flatten(table.pop("settings", {}), settings, path)
        given: _ArmTable = check_value(key, table, _ArmTable, path)
        arm = Arm(**dataclasses.asdict(given), settings=own)
        arm = dataclasses.replace(arm, factors=arm.factors or [1.0] * len(arm.rate))
        if unknown := [name for name in arm.rate if settings.get(name) is not float]:
            raise ConfigError(f"{key}.rate", unknown[0], "a setting that is a number", path)
        if not arm.rate:
            raise ConfigError(f"{key}.rate", [], "the settings that take the rate", path)
        if not arm.rates or not _positive(arm.rates) or len(set(arm.rates)) < len(arm.rates):
            allowed = "one or more different numbers above 0"
            raise ConfigError(f"{key}.rates", arm.rates, allowed, path)
        if not _positive(arm.factors) or len(arm.factors) != len(arm.rate):
            allowed = "a number above 0 for each setting of `rate`"
            raise ConfigError(f"{key}.factors", arm.factors, allowed, path)
        if "finetune.method" not in own:
            allowed = "finetune.method among the settings: what learns"
            raise ConfigError(f"{key}.settings", list(own), allowed, path)
        yield arm
        if arm.replay:
            name, group = arm.name + WITH_REPLAY, f"{arm.group} replay"
            yield dataclasses.replace(arm, name=name, group=group, settings=replay | own)


def _positive(numbers: Sequence[float]) -> bool:
    return all(0 < number < math.inf for number in numbers)


def _check(plan: Plan, overrides: dict[str, Any]) -> None:
    names, seeds = [arm.name for arm in plan.arms], plan.reproduce.seeds
    slugs = [slug(name) for name in names]
    if same := [name for name in names if not slug(name) or slugs.count(slug(name)) > 1]:
        allowed = "a name of its own for each arm: names that differ in letters or digits"
        raise ConfigError("arms.name", same[0], allowed, plan.source)
    for arm in plan.arms:
        if arm.base not in plan.bases:
            allowed = f"a base: {', '.join(plan.bases) or 'there is no table [bases.NAME]'}"
            raise ConfigError("arms.base", arm.base, allowed, plan.source)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        where = COMMAND_LINE if "reproduce.seeds" in overrides else plan.source
        raise ConfigError("reproduce.seeds", seeds, "different numbers, 0 or more", where)


def _chosen(arms: Sequence[Arm], names: Sequence[str], source: str) -> list[Arm]:
    """Return the arms of these names or groups, or all, in the plan's order."""
    groups = sorted({arm.group for arm in arms})
    known = [arm.name for arm in arms]
    if unknown := [name for name in names if name not in (*groups, *known)]:
        near = [name for name in known if unknown[0] in name]
        near = near[:3] or difflib.get_close_matches(unknown[0], known, n=3, cutoff=0)
        allowed = (
            f"groups of arms, {', '.join(groups)}; or names, as {'; '.join(near)}. With commas in "
            f"a name: --reproduce.arms '{json.dumps(near[:1])}'"
        )
        raise ConfigError("reproduce.arms", unknown[0], allowed, source)
    return [arm for arm in arms if not names or {arm.name, arm.group} & set(names)]


def _filled(value: Any, seed: int) -> Any:
    """Return the value with the seed filled into every text inside it."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, list):
        return [_filled(item, seed) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        filled = {f.name: _filled(getattr(value, f.name), seed) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **filled)
    return value


def given_settings(config: JobConfig) -> dict[str, Any]:
    """Return the settings that a plan gives a run, as JSON values: what its results depend on.

    Defaults are not among them, nor how the work is spread over the ranks.
    """
    given = (key for key in sorted(config.origins) if not key.startswith("parallelism."))
    values = {key: get(config, key) for key in given}
    return json.loads(json.dumps(values, default=dataclasses.asdict))


def slug(name: str) -> str:
    """Return a name for a folder: letters and digits, all else a dash."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
