#!/usr/bin/env bash
# What the recipes share: the common hyper-parameters, and torch's launcher.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'END'
usage: scripts/{cifar10,cifar100,flowers,pets}.sh --resume CONVERTED --data-path FOLDER
                                                  --output_dir FOLDER [any flag of DeiT's]

Fine-tunes a converted MoCo v3 checkpoint with DeiT by the published recipe. Your own flags come
last, so each overrides the recipe's.

  --resume FILE      what convert_to_deit.py wrote
  --data-path DIR    the data set's folder (see README.md; CIFAR is downloaded when absent)
  --output_dir DIR   takes checkpoint.pth, best_checkpoint.pth and log.txt; the same command again
                     continues a run that was stopped
  --batch-size N     images of each process (128)
  --eval-freq N, --save-freq N
                     evaluate, and write checkpoint.pth, every N epochs and after the last
  --download         fetch Flowers or Pets where absent
  --overwrite        start anew in an --output_dir that holds a run, deleting that run
  --device cpu       rehearse without a GPU
  --check            check all that a launch needs, and every image; train nothing
  --dry-run          print the complete command and stop
  --all-flags        list every flag, DeiT's and ours
  --help             this text

environment, with defaults:
  DEIT_DIR           the DeiT checkout; default: the one that this bundle was copied into
  PYTHON             the Python to use (python3)
  NPROC_PER_NODE     processes on this machine, one for each GPU (8)
  NNODES NODE_RANK MASTER_ADDR MASTER_PORT
                     several machines (1, 0, 127.0.0.1, 29500; one machine takes a free port)
END
}

launcher=("$here/torch_launcher.py"
    --nproc_per_node "${NPROC_PER_NODE:-8}"
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-127.0.0.1}")
if [[ -n "${MASTER_PORT:-}" || "${NNODES:-1}" != 1 ]]; then
    launcher+=(--master_port "${MASTER_PORT:-29500}")
fi
run=("$here/finetune.py"
    --model deit_base_patch16_224 --batch-size 128 --epochs 100 --lr 3e-4 --warmup-epochs 3
    --no-pin-mem --no-repeated-aug --eval-freq 10)

for argument in "$@"; do
    case $argument in
        --help | -h) usage; exit 0 ;;
        --all-flags) run=("$here/finetune.py" --help); launcher=(); break ;;
        --dry-run) dry_run=yes ;;
        --check) check=yes ;;
        *) run+=("$argument") ;;
    esac
done
if [[ -n ${check:-} ]]; then  # by one process, without the launcher
    export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
    run+=(--check)
    launcher=()
fi
# Bash before 4.4 takes an empty array for one that is not set.
command=("${PYTHON:-python3}" -u ${launcher[@]+"${launcher[@]}"} "${run[@]}")

if [[ -n ${dry_run:-} ]]; then
    if [[ -n "${DEIT_DIR:-}" ]]; then printf 'DEIT_DIR=%q ' "$DEIT_DIR"; fi
    if [[ -n ${check:-} ]]; then printf 'NPROC_PER_NODE=%q ' "$NPROC_PER_NODE"; fi
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if ! command -v "${PYTHON:-python3}" >/dev/null; then
    echo "error: PYTHON=${PYTHON:-python3} is not a command: set PYTHON to your Python" >&2
    exit 2
fi
exec "${command[@]}"
