#!/usr/bin/env bash
# The whole journey in one command, on generated data: convert, fine-tune, show the accuracy.
# Needs no GPU. DEIT_DIR, PYTHON and DEMO_DIR (demo-output) may be set.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not with sh: type bash $0" >&2; exit 2; }
set -euo pipefail
(($# == 0)) || { echo "error: $1: the demo takes no arguments; DEMO_DIR=FOLDER is where it works" >&2; exit 2; }
# Paths are relative to the caller's folder, which the next step leaves.
DEIT_DIR=${DEIT_DIR:+$(readlink -m -- "$DEIT_DIR")}
DEMO_DIR=${DEMO_DIR:+$(readlink -m -- "$DEMO_DIR")}
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

demo=${DEMO_DIR:-demo-output}
classes=20

step() { printf '\n== %s\n' "$1"; }

step "Python and DeiT"
PYTHON=$(bash tests/setup.sh requirements.txt requirements-report.txt)
mkdir -p "$demo"
if [[ -z ${DEIT_DIR:-} ]]; then
    DEIT_DIR=$demo/deit
    [[ -e $DEIT_DIR/main.py ]] || GIT_TERMINAL_PROMPT=0 git clone --quiet \
        https://github.com/facebookresearch/deit "$DEIT_DIR" || {
        echo "DeiT cannot be cloned here: the tests' miniature of it takes its place" >&2
        DEIT_DIR=tests/mini_deit
    }
fi
export PYTHON DEIT_DIR NPROC_PER_NODE=2
echo "Python: $PYTHON, DeiT: $DEIT_DIR"

step "Make a small Flowers folder ($classes classes) and a checkpoint in MoCo v3's form"
"$PYTHON" tests/generate.py flowers "$demo/flowers" --classes "$classes" \
    --train-per-class 16 --test-per-class 5
"$PYTHON" tests/generate.py checkpoint "$demo/moco-v3.pth.tar"

step "Convert the checkpoint"
"$PYTHON" convert_to_deit.py --input "$demo/moco-v3.pth.tar" --output "$demo/converted.pth"

step "Fine-tune by the Flowers recipe, made small: 2 processes, ViT-Tiny, 12 epochs"
bash scripts/flowers.sh --resume "$demo/converted.pth" --data-path "$demo/flowers" \
    --output_dir "$demo/run" --overwrite --device cpu --model deit_tiny_patch16_224 \
    --input-size 64 --batch-size 16 --epochs 12 --lr 5e-3 --weight-decay 0.05 --reprob 0 \
    --eval-freq 1 --num_workers 1

step "Result (chance is $((100 / classes)) %)"
"$PYTHON" scripts/report.py "$demo/run"
