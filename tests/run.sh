#!/usr/bin/env bash
# Lint and test everything, in a .venv of its own unless PYTHON is given; --all: also the slow tests,
# what runs on a GPU (here on the CPU), and all stacks. Other arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PYTHON=$(bash tests/setup.sh requirements.txt requirements-report.txt requirements-dev.txt)
"$PYTHON" -m ruff check .
PATH="$(dirname -- "$PYTHON"):$PATH" shellcheck scripts/*.sh tests/*.sh .ci/run
"$PYTHON" -m pytest "$@"
if [[ ${1:-} == --all ]]; then
    "$PYTHON" tests/gpu --device cpu
    tests/matrix
fi
