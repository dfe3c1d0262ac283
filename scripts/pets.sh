#!/usr/bin/env bash
# Oxford-IIIT Pets: what differs from the other recipes.
set -euo pipefail
exec "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set pets \
    --weight-decay 0.1 --reprob 0 --drop-path 0 --mixup 0.8 --cutmix 0 --save-freq 10 --your-flags "$@"
