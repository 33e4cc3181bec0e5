"""Checks of the fields of rows that users wrote: JSON objects and the texts in them."""

import json
from typing import Any

EXCERPT = 40
"""Length of the beginning of a wrong value that messages show."""


class RowError(Exception):
    """Why a row cannot be used; the caller adds its place and what would be accepted."""


def parse_json(line: bytes) -> dict[str, Any]:
    """Return the object on a line of jsonl, or raise a RowError if there is none."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"is {excerpt(row)}, not an object")
    return row


def any_text_of(value: Any, name: str) -> str:
    """Return `value` if it is a text, maybe blank, that UTF-8 can encode.

    Raises:
        RowError: it is not; the message calls it `name`. So do all functions below.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {excerpt(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half of a surrogate pair") from error
    return value


def text_of(value: Any, name: str) -> str:
    """Return `value` if it is a text that is not blank."""
    if not any_text_of(value, name).strip():
        raise RowError(f"{name} is {excerpt(value)}, not a text")
    return value


def id_of(value: Any, name: str) -> str:
    """Return `value` as the id of a row: a text that is not blank, or an integer."""
    return str(value) if type(value) is int else text_of(value, name)


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """Return `value` if it is a list of one text or more, none of them blank."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is {excerpt(value)}, not a list of one text or more")
    return tuple(text_of(text, f"{name}[{index}]") for index, text in enumerate(value))


def excerpt(value: Any) -> str:
    """Return the beginning of a value, as JSON."""
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= EXCERPT else f"{shown[:EXCERPT]}..."
