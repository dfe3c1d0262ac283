#!/usr/bin/env bash
# Runs finetune.py by the Python that PYTHON names.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not with sh: type bash $0" >&2; exit 2; }
set -euo pipefail

python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "error: PYTHON=$python is not a command: set PYTHON to your Python" >&2
    exit 2
}
exec "$python" "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/finetune.py" "$@"
