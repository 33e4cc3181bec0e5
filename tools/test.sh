#!/usr/bin/env bash
# Set everything up, then lint, check types and imports, and run the tests. Arguments go to pytest;
# paths in them are relative to the repository root:
#
#     tools/test.sh                                  all but the slow and the GPU tests
#     tools/test.sh --fast                           those that start no process
#     tools/test.sh -m slow                          the slow ones
#     tools/test.sh tests/config -k help             some
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

python -m ruff check --quiet
python -m ruff format --check --quiet
python -m mypy
contract=$(lint-imports --no-logo --no-cache) || fail "$contract"
exec python -m pytest -m "not slow and not gpu" "$@"
