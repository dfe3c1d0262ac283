#!/usr/bin/env bash
# Lint and test everything, in a .venv of its own unless PYTHON is given. Arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PYTHON=$(scripts/setup.sh requirements.txt requirements-report.txt requirements-dev.txt)
"$PYTHON" -m ruff check .
PATH="$(dirname -- "$PYTHON"):$PATH" shellcheck scripts/*.sh tests/*.sh .ci/run
"$PYTHON" -m pytest "$@"
if (($# == 0)); then tests/matrix s1; fi  # the oldest stack, where its Python is there
