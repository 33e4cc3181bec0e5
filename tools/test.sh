#!/usr/bin/env bash
# Set everything up, then lint, check types and imports, and run the tests. Arguments go to pytest;
# paths in them are relative to the repository root:
#
#     tools/test.sh                                  all but the slow and the GPU tests
#     tools/test.sh --fast                           those that start no process
#     tools/test.sh -m slow                          the slow ones
#     tools/test.sh tests/config -k help             some
#     tools/test.sh -n 0 --pdb tests/config          without the two processes that share the tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

python -m ruff check --quiet
python -m ruff format --check --quiet
python -m mypy
contract=$(lint-imports --no-logo --no-cache) || fail "$contract"
# Two processes, each with whole files: the tests of a file share runs. On two cores a quarter faster.
exec python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" "$@"
