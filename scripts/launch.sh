#!/usr/bin/env bash
# What all recipes share: model, batch size, and torch's launcher.
[ -n "${BASH_VERSION:-}" ] || { echo "error: not with sh: type bash $0" >&2; exit 2; }
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

usage() {
    cat <<'END'
usage: scripts/{cifar10,cifar100,flowers,pets,imagenet}.sh --resume CONVERTED --data-path FOLDER
           --output_dir FOLDER [any flag of DeiT's]

Fine-tunes a converted MoCo v3 checkpoint with DeiT, using the published recipe. Your own flags
override the recipe. The same command again continues a run that was stopped.

  --accum-iter N     for fewer GPUs: accumulate N batches per process for one optimizer step
  --data-set folder  your own images, in train/CLASS/ and val/CLASS/ below --data-path
  --download         download Flowers or Pets if they are missing
  --hold-out SHARE   evaluate on a share of the train images instead of the test images
  --eval             evaluate a run's checkpoint, given by --resume; train nothing
  --overwrite        start from scratch and delete the run that is in --output_dir
  --check            check everything a launch needs, and every image; train nothing
  --dry-run          print the complete command and stop
  --all-flags        list every flag, DeiT's and ours

environment variables and their defaults:
  DEIT_DIR           the DeiT checkout (default: the folder that this bundle was copied into)
  PYTHON             the Python to use (default: python3)
  NPROC_PER_NODE     processes on this machine, one per GPU (default: 8; with --eval: 1)
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                     for several machines: their number (default: 1), this one's number from 0,
                     the address and a free port (default: 29500) of the first
END
}

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

python=${PYTHON:-python3}
[[ " $* " != *" --eval "* ]] || : "${NPROC_PER_NODE:=1}"
command -v "$python" >/dev/null || refuse "PYTHON=$python is not a command: set PYTHON to your Python"
: "${NPROC_PER_NODE:=8}" "${NNODES:=1}" "${MASTER_PORT:=29500}"
if [[ $NNODES == 1 ]]; then # such variables in the environment are for several machines
    NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((10000 + RANDOM % 20000))
fi
for number in NPROC_PER_NODE NNODES MASTER_PORT; do
    [[ ${!number} =~ ^[1-9][0-9]*$ ]] || refuse "$number=${!number}: must be a whole number, 1 or more"
done
if ! [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || ((10#$NODE_RANK >= NNODES)); then
    refuse "NODE_RANK=${NODE_RANK:-}: must be 0 to $((NNODES - 1)), for NNODES=$NNODES machines"
fi
[[ -n ${MASTER_ADDR:-} ]] || refuse "MASTER_ADDR is missing: set it to the first machine's address"
single_process=(env "NPROC_PER_NODE=$NPROC_PER_NODE" "WORLD_SIZE=$((NPROC_PER_NODE * NNODES))"
    ${DEIT_DIR:+"DEIT_DIR=$DEIT_DIR"} "$python" -u)
start=("${single_process[@]}" "$here/deit_plugin/launcher.py" --nproc_per_node "$NPROC_PER_NODE"
    --nnodes "$NNODES" --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
run=("$here/finetune.py" --model deit_base_patch16_224 --batch-size 128)

dry_run=
for argument in "$@"; do
    case $argument in
        --help | -h) usage; exit 0 ;;
        --all-flags) start=("${single_process[@]}"); run=("$here/finetune.py" --help); break ;;
        --dry-run) dry_run=yes ;;
        --check) start=("${single_process[@]}"); run+=(--check) ;; # for WORLD_SIZE processes
        *) run+=("$argument") ;;
    esac
done
if [[ -n $dry_run ]]; then
    printf '%q ' "${start[@]}" "${run[@]}"
    echo
    exit 0
fi
exec "${start[@]}" "${run[@]}"
