"""Templates that turn the items of a set into text, from `templates.toml` or a user's file."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titan_smf import storage
from titan_smf.config.parsing import check_value
from titan_smf.errors import ConfigError, DataError

BUILT_IN = Path(__file__).with_name("templates.toml")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """The parts of an item's text; `templates.toml` says what each is."""

    prompt: str
    answer: str
    stop: list[str] = field(default_factory=list)
    separator: str = "\n"
    examples: list[dict[str, str]] = field(default_factory=list)
    replace: list[list[str]] = field(default_factory=list)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  a class attribute that pydantic reads

    def with_shots(self, shots: int) -> "Template":
        """Return the template with its first `shots` examples alone."""
        return dataclasses.replace(self, examples=self.examples[:shots])

    def prompt_of(self, item: Mapping[str, str]) -> str:
        """Return the text before the answer: the examples, then the item.

        Raises:
            DataError: the item lacks a field.
        """
        shown = [self._fill(self.prompt, e) + self.answer_of(e) for e in self.examples]
        return self.separator.join([*shown, self._fill(self.prompt, item)])

    def answer_of(self, item: Mapping[str, str]) -> str:
        """Return the text that follows the prompt; raises like `prompt_of`."""
        return self._fill(self.answer, item)

    def _fill(self, form: str, item: Mapping[str, str]) -> str:
        missing = [name for name in _FIELD.findall(form) if name not in item]
        if missing:
            raise DataError(
                f"has no {missing[0]!r}, which {form!r} asks for, but {', '.join(item)}"
            )
        return _FIELD.sub(lambda name: self._clean(item[name[1]]), form)

    def _clean(self, text: str) -> str:
        for pattern, replacement in self.replace:
            text = re.sub(pattern, replacement, text)
        return text


def load_template(name: str) -> Template:
    """Read a template by its name in `templates.toml`, or by `FILE.toml#NAME`.

    Raises:
        ConfigError: there is no such template, or it cannot be used.
    """
    file, _, chosen = name.rpartition("#")
    source = file or str(BUILT_IN)
    try:
        tables = tomllib.loads(storage.read_bytes(source).decode())
    except (DataError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            "evaluation.template", name, f"a TOML file of templates ({error})"
        ) from None
    if chosen not in tables:
        allowed = f"{', '.join(tables)}; or FILE.toml#NAME for one of your own"
        raise ConfigError("evaluation.template", name, allowed)
    template: Template = check_value(f"{chosen}", tables[chosen], Template, source)
    _check(template, chosen, source)
    return template


def _check(template: Template, name: str, source: str) -> None:
    if template.prompt.endswith(" "):
        allowed = "a prompt that does not end with a space: the space belongs to the answer"
        raise ConfigError(f"{name}.prompt", template.prompt, allowed, source)
    if "" in template.stop:
        raise ConfigError(f"{name}.stop", template.stop, "texts that are not empty", source)
    for rule in template.replace:
        try:
            pattern, replacement = rule
            re.sub(pattern, replacement, "")
        except (ValueError, re.error) as error:
            allowed = f"[regular expression, replacement] ({error})"
            raise ConfigError(f"{name}.replace", rule, allowed, source) from None
    for example in template.examples:
        try:
            template.with_shots(0).prompt_of(example), template.answer_of(example)
        except DataError as error:
            allowed = f"the fields of the template; this {error}"
            raise ConfigError(f"{name}.examples", example, allowed, source) from None
