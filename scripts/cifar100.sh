#!/usr/bin/env bash
# CIFAR-100: what differs from the other recipes.
command set -euo pipefail 2>/dev/null || { echo "error: not with sh: type bash $0" >&2; exit 2; }
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set cifar100 \
    --weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.5 --cutmix 1 --your-flags "$@"
