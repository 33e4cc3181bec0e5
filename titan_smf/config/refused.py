"""torchtitan's settings that are refused, from `refused.toml`.

`python -m titan_smf.config.refused > docs/settings.md` writes the page that lists them.
"""

import tomllib
from pathlib import Path

REFUSED: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
"""How the key begins -> why it is refused, and what to do instead ("" for nothing)."""

_PAGE = """\
# torchtitan's settings that are refused

A file of torchtitan's settings can be used here, with these exceptions: they would do nothing, or
harm. Each of them may be given its default; with another value a run does not start, and says what
to do instead. All other settings, with their defaults: `python -m titan_smf.train --help SECTION`.

| Setting | Why it is refused | Instead |
|---|---|---|
"""


def refusal(key: str) -> str | None:
    """Return what to do instead of giving a setting, or else why; None if it can be given."""
    found = (reasons for start, reasons in REFUSED.items() if key.startswith(start))
    return next((instead or why for why, instead in found), None)


def page() -> str:
    """Return the page that lists every refused setting."""
    from titan_smf.config.job import JobConfig
    from titan_smf.config.parsing import settings_of

    rows = [
        (", ".join(f"`{key}`" for key in settings_of(JobConfig) if key.startswith(start)), *reasons)
        for start, reasons in REFUSED.items()
    ]
    return _PAGE + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(page(), end="")
