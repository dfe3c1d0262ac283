#!/usr/bin/env bash
# ImageNet, by MoCo v3's README.md: DeiT's defaults in everything, for 150 epochs.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not with sh: type bash $0" >&2; exit 2; }; set -euo pipefail
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh" --data-set imagenet --epochs 150 \
    --your-flags "$@"
