#!/usr/bin/env bash
# CIFAR-100, by MoCo v3's transfer/README.md; checkpoint.pth every 10 epochs.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not with sh: type bash $0" >&2; exit 2; }; set -euo pipefail
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set cifar100 --epochs 100 --lr 3e-4 --warmup-epochs 3 \
    --no-pin-mem --no-repeated-aug --eval-freq 10 --weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.5 --cutmix 1 --save-freq 10 --your-flags "$@"
