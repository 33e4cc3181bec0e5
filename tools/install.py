"""Install the project, editable and with what its tests need, into the environment that runs this.

Does nothing where that was done before for the same pyproject.toml. An installed torch is never
replaced: one in the supported range is kept as it is, another one ends this with a message.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = Path(sys.prefix, ".titan_smf-installed")
LOG = Path(sys.prefix, "titan_smf-install.log")
DEFAULT_TORCH = "torch<2.14"
"""What an environment without torch gets: the release that the tests are run with most."""


def main() -> int:
    """Install if needed; returns the exit code."""
    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    dependencies = tomllib.loads(pyproject.decode())["project"]["dependencies"]
    supported = next(line for line in dependencies if line.startswith("torch>"))
    torch = installed_torch()
    if torch and not satisfies(torch, supported):
        print(
            f"error: {sys.prefix} has torch {torch}; supported: {supported}. It is left as it is:\n"
            "  activate another environment, or none to have .venv made",
            file=sys.stderr,
        )
        return 1
    done = hashlib.sha256(pyproject + str(ROOT).encode()).hexdigest()
    if torch and STAMP.is_file() and STAMP.read_text() == done:
        return 0
    # Naming the installed torch keeps pip from choosing another one for a dependency's sake.
    code = pip_install("--editable", ".[test]", f"torch=={torch}" if torch else DEFAULT_TORCH)
    if code == 0:
        STAMP.write_text(done)
    return code


def installed_torch() -> str | None:
    """The version of torch in this environment, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def satisfies(installed: str, requirement: str) -> bool:
    """Whether the version meets the requirement, `name>=a,<b`; local builds (+cu130) count."""
    from pip._vendor.packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(installed, prereleases=True)


def pip_install(*what: str) -> int:
    """Run `pip install`, showing the line it is at on a terminal, and its end if it fails."""
    print(f"Installing into {sys.prefix}: up to 1.4 GB and some minutes; log: {LOG}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar", "off", *what]
    width = os.get_terminal_size().columns - 1 if sys.stdout.isatty() else 0
    last: deque[str] = deque(maxlen=30)
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            last.append(line)
            if width:
                print(f"\r\033[K{line.rstrip()[:width]}", end="", flush=True)
    print("\r\033[K" if width else "", end="")
    if pip.returncode != 0:
        print("".join(last) + f"error: the installation failed; log: {LOG}", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    if sys.argv[1:]:  # it takes none, and --help must not install
        sys.exit(__doc__)
    sys.exit(main())
