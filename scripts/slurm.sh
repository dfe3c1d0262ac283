#!/usr/bin/env bash
# A recipe as a Slurm job, on one node or many; re-queued when it has to stop, to be continued.
#     sbatch [--nodes=N] scripts/slurm.sh {cifar10,cifar100,flowers,pets,imagenet} [any flag]
#     sbatch --array=0-2 scripts/slurm.sh pets --seed %a --output_dir out/pets-seed%a [any flag]
# Flags of sbatch stand before this file's name and override those below; %a is the task's number.
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
usage="type sbatch [flags of sbatch] scripts/slurm.sh pets [flags of the recipe]"
too_short="no checkpoint was written in this time limit: submit the job again with more --time"
refuse() { printf 'error: %s\n' "$1" >&2; exit 2; }
saved() { stat -c %y "$output_dir/checkpoint.pth" 2>/dev/null || true; } # when it was written

requeue() {
    echo "Job $job has to stop: it is re-queued and will continue from checkpoint.pth"
    scontrol requeue "$job" || echo "Not re-queued: submit it again to continue" >&2
}

[[ -n "${SLURM_JOB_ID:-}" ]] || refuse "this is no Slurm job: $usage"
[[ " $* " != *" --overwrite "* ]] \
    || refuse "--overwrite would delete the run at every re-queue: empty --output_dir yourself"
shown=$(scontrol show job "$SLURM_JOB_ID")
job=$SLURM_JOB_ID # for an array's last task, this is the id of the whole array
# A job that was submitted from a task has its SLURM_ARRAY_*, but is not "JobId=... ArrayJobId=...".
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" && $shown != *"JobId=$job JobName="* ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
fi
# Slurm runs a copy of this file in its spool folder, but knows the path that was submitted.
submitted=${shown##*Command=} submitted=${submitted%%$'\n'*}
[[ $submitted == /* ]] || submitted=$SLURM_SUBMIT_DIR/$submitted
scripts=${submitted%%/slurm.sh*} recipe=$(basename -- "${1:-}" .sh)
[[ $submitted == */slurm.sh* ]] || refuse "neither salloc nor --wrap can run this: $usage"
[[ -e $scripts/$recipe.sh ]] || refuse "no recipe '${1:-}' in $scripts: $usage"
output_dir="" previous=""
for word; do
    [[ $previous != --output_dir ]] || output_dir=$word
    [[ $word != --output_dir=* ]] || output_dir=${word#*=}
    previous=$word
done
saved_before=$(saved)

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_NNODES MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # jobs that share their first node do not collide
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
# Before the time limit, see --signal above. A job that saves nothing would be re-queued forever.
trap '[[ $(saved) != "$saved_before" ]] || { kill "$!"; refuse "$too_short"; }; requeue' USR1
# From Slurm 22.05 on, srun does not take over the job's --cpus-per-task, but its --ntasks.
# shellcheck disable=SC2016 # each node has its own SLURM_NODEID
srun --kill-on-bad-exit=1 --export=ALL --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$scripts/$recipe.sh" "${@:2}" &
status=0
wait "$!" || wait "$!" || status=$? # the signal ends the first wait, not the run
# Where a partition has a GraceTime, Slurm ends the processes and calls that a failed job.
if ((status)) && [[ $(scontrol show job "$job") =~ PreemptTime=[0-9] ]]; then
    requeue
fi
exit "$status"
