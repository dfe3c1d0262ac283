#!/usr/bin/env bash
# Oxford-IIIT Pets: what differs from the other recipes.
command set -euo pipefail 2>/dev/null || { echo "error: not with sh: type bash $0" >&2; exit 2; }
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set pets \
    --weight-decay 0.1 --reprob 0 --drop-path 0 --mixup 0.8 --cutmix 0 --save-freq 10 --your-flags "$@"
