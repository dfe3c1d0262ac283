#!/usr/bin/env bash
# The whole journey in one command, on generated data: convert, fine-tune, show the accuracy.
# Minutes on 2 cores, without a GPU. DEIT_DIR, PYTHON and DEMO_DIR (demo-output) may be set.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

deit_commit=7e160fe43f0252d17191b71cbb5826254114ea5b
demo=${DEMO_DIR:-demo-output}
classes=20
mkdir -p "$demo"

find_deit() {
    if [[ -n "${DEIT_DIR:-}" ]]; then
        echo "DeiT: $DEIT_DIR"
        return
    fi
    DEIT_DIR=$demo/deit
    if [[ ! -e $DEIT_DIR/main.py ]]; then
        clone_deit || use_miniature
    fi
    echo "DeiT: $DEIT_DIR"
}

clone_deit() {
    rm -rf -- "$DEIT_DIR"
    GIT_TERMINAL_PROMPT=0 git clone --quiet https://github.com/facebookresearch/deit "$DEIT_DIR" \
        && git -C "$DEIT_DIR" checkout --quiet "$deit_commit"
}

use_miniature() {
    rm -rf -- "$DEIT_DIR"
    DEIT_DIR=$PWD/tests/mini_deit
    echo "DeiT cannot be cloned from here; the miniature DeiT of the tests takes its place."
}

step() { printf '\n== %s\n' "$*"; }

PYTHON=$(scripts/setup.sh requirements.txt requirements-report.txt)
export PYTHON
find_deit
export DEIT_DIR NPROC_PER_NODE=2

step "Generate a small Flowers folder ($classes classes) and a checkpoint in MoCo v3's form"
"$PYTHON" tests/generate.py flowers "$demo/flowers" --classes "$classes" \
    --train-per-class 16 --test-per-class 5
"$PYTHON" tests/generate.py checkpoint "$demo/moco-v3.pth.tar"

step "Convert the checkpoint"
"$PYTHON" convert_to_deit.py --input "$demo/moco-v3.pth.tar" --output "$demo/converted.pth"

step "Fine-tune by the Flowers recipe, made small: 2 processes, ViT-Tiny, 12 epochs"
scripts/flowers.sh --resume "$demo/converted.pth" --data-path "$demo/flowers" \
    --output_dir "$demo/run" --overwrite --device cpu --model deit_tiny_patch16_224 \
    --input-size 64 --batch-size 16 --epochs 12 --lr 5e-3 --weight-decay 0.05 --reprob 0 \
    --eval-freq 1 --num_workers 1

step "Result"
"$PYTHON" scripts/report.py "$demo/run"
"$PYTHON" - "$demo" "$classes" <<'END'
import json, pathlib, sys
demo, classes = pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2])
rows = [json.loads(line) for line in (demo / "run" / "log.txt").read_text().splitlines()]
best = max(row["test_acc1"] for row in rows if "test_acc1" in row)
print(f"\naccuracy {best:.1f} % on {classes} classes (chance: {100 / classes:.0f} %)")
print(f"checkpoints, log.txt and report.png are in {demo / 'run'}")
if best < 2 * 100 / classes:
    sys.exit("error: that is less than twice chance, so the run did not learn: see its log.txt")
END
