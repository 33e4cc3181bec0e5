"""Settings from a TOML file and from the command line, checked against typed dataclass sections.

    file  --read_tables-->     tables  --flatten-->  {setting: value}
    argv  --read_arguments-->  {setting: value}

A setting is named by its full key, `section.key`. Whatever does not fit is a `ConfigError`: an
unknown key names the nearest valid one, a wrong type says what is allowed. Imports no torch.
"""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from titan_smf.errors import ConfigError

COMMAND_LINE = "command line"
FILE_FLAG = "job.config"
_ALIASES = {"job.config_file": FILE_FLAG}  # torchtitan's name for it
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def settings_of(section: type, prefix: str = "") -> dict[str, Any]:
    """Return all settings of a dataclass of sections: full key -> type, in order of definition."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name = prefix + field.name
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            settings |= settings_of(field.type, name + ".")
        else:
            settings[name] = field.type
    return settings


def get(config: Any, key: str) -> Any:
    """Return the value of a setting, or a section, by its full key."""
    return reduce(getattr, key.split("."), config)


def describe_type(annotation: Any) -> str:
    """Say in words what a type allows."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if get_origin(annotation) is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if dataclasses.is_dataclass(annotation):
        fields = dataclasses.fields(annotation)
        return "a table {" + ", ".join(f"{f.name} = {describe_type(f.type)}" for f in fields) + "}"
    words = [describe_type(choice) for choice in arguments if choice is not NoneType]
    return ("none or " if NoneType in arguments else "") + " or ".join(words)


def check_value(key: str, value: Any, annotation: Any, source: str) -> Any:
    """Return `value` as the setting's type; nothing is converted but whole numbers to `float`."""
    try:
        # JSON rather than Python input: strict mode then still builds dataclasses from tables.
        as_json = json.dumps(value, default=str)
        return TypeAdapter(annotation).validate_json(as_json, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        if detail["loc"] and isinstance(detail["loc"][0], int):  # inside a list
            parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
            key += "".join(parts)
            value = detail["input"]
        raise ConfigError(key, value, describe_type(annotation), source) from None


def check_text(key: str, text: str, annotation: Any) -> Any:
    """Return the value of a setting given as a word: text, TOML or JSON; `a,b` is a list."""
    for value in _possible_values(text):
        try:
            return check_value(key, value, annotation, COMMAND_LINE)
        except ConfigError:
            continue
    raise ConfigError(key, text, describe_type(annotation), COMMAND_LINE)


def _possible_values(text: str) -> Iterator[Any]:
    """Yield what a word of the command line can mean, the plainest first."""
    if text.lower() == "none":
        yield None
    yield text
    for parse in (_parse_toml, json.loads, float):
        with suppress(ValueError):
            yield parse(text)
    yield [_parse_toml(item.strip(), or_text=True) for item in text.split(",")]


def _parse_toml(text: str, or_text: bool = False) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        if or_text:
            return text
        raise


def check_known(key: str, value: Any, known: Sequence[str], source: str) -> None:
    """Raise unless `key` is one of `known`; the message names the nearest one."""
    if key in known:
        return
    section, _, name = key.rpartition(".")
    leaves = {other: other.rpartition(".")[2] for other in known}
    beside = [other for other in known if other.startswith(section + ".")]
    if same_name := [other for other in known if leaves[other] == name]:
        nearest = difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
    elif beside:
        close = difflib.get_close_matches(name, [leaves[other] for other in beside], n=1)
        nearest = [other for other in beside if leaves[other] in close]
    else:
        nearest = difflib.get_close_matches(key, known, n=1)
    if nearest:
        allowed = f"{nearest[0]} is the nearest setting, none has this name"
    elif beside:
        allowed = f"the settings that --help {section} lists, none has this name"
    else:
        sections = dict.fromkeys(other.partition(".")[0] for other in known)
        allowed = f"the sections {', '.join(sections)}, none has this name"
    raise ConfigError(key, value, allowed, source)


def read_tables(path: str) -> dict[str, Any]:
    """Return the tables of a TOML file as they are.

    Raises:
        ConfigError: no such file, not TOML, a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(FILE_FLAG, path, _readable_file(path, error), COMMAND_LINE) from None
    try:
        # Without an end of line the last line's mistakes would be placed at "end of document".
        return tomllib.loads(text + "\n")
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None


def _readable_file(path: str, error: Exception) -> str:
    """Say what `--job.config` allows instead, with the configurations that lie near `path`."""
    if isinstance(error, UnicodeDecodeError):
        return f"a TOML file, which is UTF-8 text ({error.reason} at byte {error.start})"
    if isinstance(error, PermissionError):
        return "a file that this user can read"
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(file.name for file in folder.glob("*.toml"))
    near = difflib.get_close_matches(Path(path).name, names, n=5, cutoff=0.0)
    found = f"in {folder}: {', '.join(near)}" if near else f"{folder} has none"
    return f"an existing TOML file; {found}"


def _syntax_error(path: str, text: str, message: str) -> ConfigError:
    """Return the error that names the line, and the setting on it, of tomllib's `message`."""
    lines = text.rstrip("\n").split("\n")
    place = re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", message)
    number = min(int(place[1]) if place and place[1] else len(lines), len(lines))
    line = lines[number - 1].strip()
    headers = [m[1] for m in map(re.compile(r"\s*\[+([^\[\]]+)\]").match, lines[:number]) if m]
    name = line.partition("=")[0].strip() if "=" in line else ""
    key = ".".join(part for part in (*headers[-1:], name) if part) or "TOML"
    reason = message.replace(place[0], "") if place else message
    twice = reason.startswith(("Cannot overwrite", "Cannot declare", "Duplicate"))
    allowed = f"each key and each [section] once ({reason})" if twice else f"TOML syntax ({reason})"
    return ConfigError(key, line, allowed, f"{path}, line {number}")


def flatten(
    tables: dict[str, Any], settings: dict[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Return the settings in nested tables, full key -> value of the setting's type.

    Raises:
        ConfigError: an unknown key, a value of a wrong type.
    """
    values: dict[str, Any] = {}
    for name, value in tables.items():
        key = prefix + name
        is_section = any(setting.startswith(key + ".") for setting in settings)
        if is_section and not isinstance(value, dict):
            raise ConfigError(key, value, f"a table of settings, [{key}]", path)
        # Of an unknown table name the setting in it, not the table.
        if is_section or (key not in settings and isinstance(value, dict) and value):
            values |= flatten(value, settings, path, key + ".")
        else:
            check_known(key, value, list(settings), path)
            values[key] = check_value(key, value, settings[key], path)
    return values


def read_arguments(
    argv: Sequence[str], settings: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Return the file given by `--job.config`, if any, and the overrides, full key -> value.

    `--section.key value` or `--section.key=value`; a true-or-false setting without a value is true.

    Raises:
        ConfigError: unknown, repeated or valueless options, values of a wrong type, other words.
    """
    types = {**settings, FILE_FLAG: str}
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError("argument", word, "--section.key value", COMMAND_LINE)
        name, equals, text = word[2:].partition("=")
        key = name.replace("-", "_")
        key = _ALIASES.get(key, key)
        given = bool(equals) or (bool(words) and not words[0].startswith("--"))
        if given and not equals:
            text = words.pop(0)
        check_known(key, text if given else None, list(types), COMMAND_LINE)
        if key in values:
            raise ConfigError(key, text, "one value, but the option is given twice", COMMAND_LINE)
        if not given and types[key] is not bool:
            allowed = f"a value after it: {describe_type(types[key])}"
            raise ConfigError(key, None, allowed, COMMAND_LINE)
        values[key] = check_text(key, text if given else "true", types[key])
    return values.pop(FILE_FLAG, None), values
