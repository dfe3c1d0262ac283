#!/usr/bin/env bash
# A recipe as a Slurm job, on one node or many; re-queued when it has to stop, to be continued.
#     sbatch [--nodes=N] scripts/slurm.sh {cifar10,cifar100,flowers,pets,imagenet} [any flag]
# Flags of sbatch stand before this file's name and override those below.
#SBATCH --job-name=finetune
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

requeue() {
    echo "Job $SLURM_JOB_ID has to stop: it is re-queued and will continue from checkpoint.pth"
    scontrol requeue "$SLURM_JOB_ID" || echo "Not re-queued: submit it again to continue" >&2
}

[[ -n "${SLURM_JOB_ID:-}" ]] || refuse "this is no Slurm job: sbatch scripts/slurm.sh pets ..."
[[ " $* " != *" --overwrite "* ]] \
    || refuse "--overwrite would delete the run at every re-queue: empty --output_dir yourself"
# Slurm runs a copy of this file in its spool folder, but knows the path that was submitted.
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
scripts=${submitted%%/slurm.sh*}
[[ -e $scripts/${1:-}.sh ]] || refuse "no $scripts/${1:-}.sh: pass pets or another recipe"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_NNODES MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # jobs that share their first node do not collide
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
trap requeue USR1 # before the time limit: see --signal above
# From Slurm 22.05 on, srun does not take over the job's --cpus-per-task.
# shellcheck disable=SC2016 # each node has its own SLURM_NODEID
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$scripts/$1.sh" "${@:2}" &
status=0
wait "$!" || wait "$!" || status=$? # the signal ends the first wait, not the run
# Where a partition has a GraceTime, Slurm ends the processes and calls that a failed job.
if ((status)) && [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; then
    requeue
fi
exit "$status"
