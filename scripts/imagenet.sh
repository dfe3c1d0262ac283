#!/usr/bin/env bash
# ImageNet, by MoCo v3's README.md: DeiT's defaults in everything, for 150 epochs.
command set -euo pipefail 2>/dev/null || { echo "error: not with sh: type bash $0" >&2; exit 2; }
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set imagenet --epochs 150 \
    --your-flags "$@"
