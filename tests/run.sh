#!/usr/bin/env bash
# Lint and test everything, in a .venv of its own unless PYTHON is given; --all: also the slow tests
# and all stacks. Other arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PYTHON=$(bash tests/setup.sh requirements.txt requirements-report.txt requirements-dev.txt)
"$PYTHON" -m ruff check .
PATH="$(dirname -- "$PYTHON"):$PATH" shellcheck scripts/*.sh tests/*.sh tests/gpu .ci/run
"$PYTHON" -m pytest "$@"
if [[ ${1:-} == --all ]]; then
    tests/matrix
fi
