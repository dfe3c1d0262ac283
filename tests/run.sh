#!/usr/bin/env bash
# Lint and test everything, in a .venv of its own unless PYTHON is given; --all: also the slow tests
# and all stacks. Other arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PYTHON=$(bash tests/setup.sh requirements.txt requirements-report.txt requirements-dev.txt)
"$PYTHON" -m ruff check .
PATH="$(dirname -- "$PYTHON"):$PATH" shellcheck scripts/*.sh tests/*.sh tests/gpu .ci/run
first=${1:-}
if "$PYTHON" -c 'import xdist' 2> /dev/null; then  # one test on each core
    set -- -n auto --maxprocesses 4 --dist worksteal "$@"
else
    echo "without pytest-xdist: one test after the other" >&2
fi
"$PYTHON" -m pytest "$@"
if [[ $first == --all ]]; then
    tests/matrix
fi
