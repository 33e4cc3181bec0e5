# Sourced by tools/test.sh and tools/demo.sh: go to the repository root, with a Python environment
# first in PATH that has the project and all it needs.
#
# The environment is the active virtual environment or conda environment, if there is one (conda's
# base does not count: it is not ours to fill); otherwise .venv at the repository root, made here.

fail() {
    echo "error: $*" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

make_venv() {
    local name lacking=
    for name in python3.12 python3.11 python3.13 python3 python; do
        supported "$name" || continue
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "Making $1 with $("$name" --version)"
            "$name" -m venv "$1"
            return
        fi
        lacking=$name
    done
    [ -z "$lacking" ] || fail "$lacking cannot make virtual environments: install its venv module" \
        "(Debian and Ubuntu: apt install $lacking-venv)"
    fail "Python 3.11 to 3.13 is needed; PATH has none as python3.11, ..., python3.13 or python3"
}

CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [ -n "${VIRTUAL_ENV:-}" ]; then
    environment=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    environment=$CONDA_PREFIX
else
    environment=$PWD/.venv
    [ -e "$environment/bin/python" ] || make_venv "$environment"
fi
supported "$environment/bin/python" || fail "$environment has no working Python 3.11 to 3.13:" \
    "activate another environment, or none (and remove .venv) to have one made"
"$environment/bin/python" tools/install.py </dev/null || exit
export PATH="$environment/bin:$PATH"
