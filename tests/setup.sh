#!/usr/bin/env bash
# Print the Python to use: $PYTHON where it is set, else the one of a .venv made here, once, with
# the requirements files named on the command line.
set -euo pipefail

if [[ -n "${PYTHON:-}" ]]; then
    command -v "$PYTHON" || { echo "error: PYTHON=$PYTHON is not a command: set it to your Python, or unset it" >&2; exit 2; }
    exit 0
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed-$(cat -- "$@" | cksum | cut -d' ' -f1)
if [[ ! -e $stamp ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' \
        || { echo "error: python3 is missing or older than 3.8: install one, or set PYTHON" >&2; exit 2; }
    echo "Setting up .venv (torch alone is several GB; a few minutes, once) ..." >&2
    python3 -m venv .venv >&2
    arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2
    touch "$stamp"
fi
echo "$PWD/.venv/bin/python"
