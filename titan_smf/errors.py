"""The errors that a user can cause; each says what is wrong, where, and what to do about it."""

from typing import Any


class UserError(Exception):
    """A mistake that the user can correct; entry points print it once and exit with code 2.

    The message is complete on its own: what is wrong, where (file, key, line), what to do.
    """


class ConfigError(UserError):
    """A setting has a value that cannot be used.

    Args:
        key: the setting's full name, `section.key`.
        got: the value that was given.
        allowed: what would be accepted, or what to change, in words.
        source: where the value was given, a file name or `command line`; entry points fill it in
            when the check that raised did not know.
    """

    def __init__(self, key: str, got: Any, allowed: str, source: str = "") -> None:
        super().__init__(key, got, allowed, source)
        self.key = key
        self.got = got
        self.allowed = allowed
        self.source = source

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        return f"{where}{self.key}: got {self.got!r}; allowed: {self.allowed}"


class DataError(UserError):
    """Text, token shards or a stream cannot be used as they are."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another model or tokenizer."""


class IdfError(UserError):
    """A file of document frequencies is missing, torn, or counted with another model or setting."""


class PatchError(UserError):
    """A patch is missing, torn, of other weights, or cannot be merged with another."""


class EndpointError(UserError):
    """A chat endpoint cannot be reached, or refuses what it is asked."""
