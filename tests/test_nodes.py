"""Several machines: two launchers on this one, and the Slurm job with stand-ins for Slurm.

REAL_SLURM=1 also submits an array to the Slurm of this machine, which takes some minutes; for one
of two nodes see slurm.sh.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

from conftest import copy_bundle, copy_deit, error_of, log_of, results_of, train
from deit_plugin import provenance
from launches import ROOT, command, environment, fork, free_port, start_fork
from underway import end_of, meanwhile, wait_for, wait_for_epochs


def test_two_nodes_train_the_run_that_one_would(flags, tmp_path):
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (tmp_path / "shared").symlink_to(tmp_path)  # as the second node calls the folder
    first = start_fork("pets", *flags, NODE_RANK="0", forks_workers=False, **nodes)
    second = start_fork("pets", *flags, "--output_dir", tmp_path / "shared" / "run", NODE_RANK="1",
                        forks_workers=False, **nodes)
    done = [first(), second()]
    assert [node.returncode for node in done] == [0, 0], done
    assert "16 = 2 processes x 8 images" in done[0].stdout
    assert "Fine-tuning" not in done[1].stdout  # one node speaks for all
    for number, (node, others) in enumerate(zip(done, ("1 more", "machine 1")), start=1):
        assert f"This is machine {number} of 2, waiting for {others} at 127.0.0.1:" in node.stdout
    assert "This machine has joined" in done[1].stdout and "joined" not in done[0].stdout
    train("pets", *flags, "--output_dir", tmp_path / "one", processes=2)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "one")


def test_a_node_that_waits_for_another_can_be_interrupted(flags):
    """There torch waits in C++, which runs none of Python's signal handlers."""
    def interrupt():
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    port = free_port()
    done = fork("pets", *flags, NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port, forks_workers=False, before=meanwhile(interrupt))
    assert "machine 1 of 2, waiting for" in done.stdout
    assert done.returncode in (-signal.SIGINT, 130) and "Traceback" not in done.stderr


def test_machines_that_would_train_differently_are_refused(data, flags, tmp_path):
    """And all that differs is named."""
    pets, deit = shutil.copytree(data / "pets", tmp_path / "pets"), copy_deit(tmp_path / "deit")
    bundle = copy_bundle(tmp_path / "bundle")
    for path, old, new in ((pets / "annotations" / "trainval.txt", " 1 ", " 2 "),
                           (deit / "engine.py", "import", "\nimport"),
                           (bundle / "datasets.py", "import", "\nimport")):
        path.write_text(path.read_text().replace(old, new, 1))
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = start_fork("pets", *flags, NODE_RANK="0", **nodes)
    second = start_fork("pets", *flags, "--lr", "0.01", "--eval-freq", "2", "--batch-size", "4",
                        "--accum-iter", "2", "--data-path", pets, scripts=bundle / "scripts",
                        NODE_RANK="1", DEIT_DIR=deit, **nodes)
    for line in map(error_of, (first(), second())):
        for says in ("--lr 0.0*[31] .rank", "--eval-freq [12] .rank", "--batch-size [48] .rank",
                     "--accum-iter [12] .rank", "of the names and labels of the train images",
                     "checksum of this bundle's code", "checksum of DeiT's code",
                     ": launch with the same"):
            assert re.search(says, line)
    assert not (tmp_path / "run").exists()


def test_what_differs_harmlessly_between_machines_is_named():
    cpu = {"device": "CPU", "python": "3.11", "CUDA": None}
    named = provenance.in_words([{**cpu, "host": "a"}, {**cpu, "host": "a"},
                                 {**cpu, "host": "b", "CUDA": "12.6"}])
    assert named == ["a: CPU, CUDA None", "b: CPU, CUDA 12.6"]


STAND_INS = {
    # Runs the command on one "node" after the other.
    "srun": """
        [[ "$*" == *" --export=ALL --ntasks=2 --ntasks-per-node=1 "* ]] || exit 1
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit; done""",
    "scontrol": """
        case $1-$2 in
            show-hostnames) printf '%s\\n' node-a node-b ;;
            show-job) echo "JobId=$SLURM_JOB_ID ${ARRAY}JobName=x"
                      echo "   PreemptTime=$PREEMPTED"
                      echo "   Command=$SUBMITTED pets --flag"; echo "   WorkDir=/slurm.sh" ;;
            requeue-*) echo "$2" >> requeued ;;
        esac""",
    # Runs until the job is re-queued, as Slurm then ends it; or fails after FAILS seconds.
    "python": """
        echo "$NPROC_PER_NODE $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT" "${@@Q}"
        [[ " $* " != *" --dry-run "* ]] || exit 0
        touch started
        timeout ${FAILS:-20} bash -c "until [[ -e requeued ]]; do sleep 0.1; done"
        exit 143""",
}


@pytest.fixture
def slurm(tmp_path):
    """slurm(*arguments, **variables) starts slurm.sh as job 123456 on 2 nodes with 4 GPUs each."""
    for name, lines in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "scripts" / "slurm.sh", tmp_path / "slurm_script")  # as Slurm does

    def start(*arguments, **variables):
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PREEMPTED": "None", "ARRAY": "",
                 "SUBMITTED": str(ROOT / "scripts" / "slurm.sh"), "NPROC_PER_NODE": None,
                 "PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "123456",
                 "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4",
                 "SLURM_CPUS_ON_NODE": "40", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": "/"}
        return subprocess.Popen(
            [str(tmp_path / "slurm_script"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment(**{**known, **variables}))

    return start


def test_slurm_job_runs_the_recipe_on_every_node(slurm):
    done = end_of(slurm("scripts/pets.sh", "--resume", "a b.pth", "--lr", "1", "--dry-run"))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 2)
    for rank, line in enumerate(lines):
        assert line.startswith(f"4 2 {rank} node-a 13456 '{ROOT}/scripts/finetune.py' ")
        assert "'--data-set' 'pets'" in line
        assert line.endswith("'--resume' 'a b.pth' '--lr' '1' '--dry-run'")


@pytest.mark.parametrize("array, arguments, requeued", [
    ("none", ["--output_dir", "run"], "123456"), ("inherited", ["--output_dir=run"], "123456"),
    ("own", ["--seed", "%a", "--output_dir=run-%a"], "123456_2"),
])
def test_slurm_job_requeues_itself_before_the_time_limit(array, arguments, requeued, slurm,
                                                         tmp_path):
    """The last task of an array has the id of the whole array. A job that such a task has submitted
    inherits its variables, but belongs to no array."""
    variables = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "2"}
    job = slurm("pets", *arguments, **(variables if array != "none" else {}),
                ARRAY="ArrayJobId=123456 ArrayTaskId=2 " if array == "own" else "")
    wait_for((tmp_path / "started").exists, seconds=20)
    run = tmp_path / ("run-2" if array == "own" else "run")
    run.mkdir()
    (run / "checkpoint.pth").touch()
    assert "#SBATCH --signal=B:USR1@" in (tmp_path / "slurm_script").read_text()
    job.send_signal(signal.SIGUSR1)
    done = end_of(job)
    assert done.returncode == 143 and "continue from checkpoint.pth" in done.stdout
    assert (tmp_path / "requeued").read_text().split() == [requeued]
    assert ("'--seed' '2' '--output_dir=run-2'" in done.stdout) == (array == "own")


def test_slurm_job_that_saved_nothing_before_the_time_limit_is_not_requeued(slurm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").touch()  # which an earlier job has saved
    job = slurm("pets", "--output_dir", "run", FAILS="2")
    wait_for((tmp_path / "started").exists, seconds=20)
    job.send_signal(signal.SIGUSR1)
    assert "more --time" in error_of(end_of(job)) and not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("preempted", ["2030-01-31T12:00:00", "None"])
def test_slurm_job_that_ends_early_is_requeued_only_if_preempted(preempted, slurm, tmp_path):
    assert end_of(slurm("pets", PREEMPTED=preempted, FAILS="0.1")).returncode == 143
    assert (tmp_path / "requeued").exists() == (preempted != "None")


@pytest.mark.parametrize("arguments, variables, says", [
    (["dogs"], {}, "no recipe 'dogs'"), (["pets", "--overwrite"], {}, "--overwrite"),
    (["pets"], {"SLURM_JOB_ID": None}, "no Slurm job"),
    (["pets"], {"SUBMITTED": "(null)"}, "salloc"),
])
def test_slurm_job_that_cannot_run_says_why(arguments, variables, says, slurm, tmp_path):
    done = end_of(slurm(*arguments, **variables))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif("REAL_SLURM" not in os.environ, reason="REAL_SLURM=1 submits a job to Slurm")
def test_a_requeued_task_of_a_real_slurm_continues_on_two_nodes(flags, tmp_path):
    """Of an array of two, whose first task has ended; with flags that people pass from habit."""
    asked = ["--parsable", "--array=1-2", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=0",
             "--cpus-per-task=2", "--time=10", f"--output={tmp_path}/%a.log",
             ROOT / "scripts" / "slurm.sh", "pets"]
    words = command("pets", *flags, "--output_dir", f"{tmp_path}/run-%a", "--epochs", "%a00",
                    "--save-freq", "1")[2:]
    array = subprocess.run(["sbatch", *asked, *words], stdout=subprocess.PIPE, text=True,
                           check=True, env=environment(1)).stdout.strip()
    wait_for_epochs(tmp_path / "run-1", 100, seconds=300)
    wait_for(lambda: "Best" in (tmp_path / "1.log").read_text())
    subprocess.run(["scancel", "--signal=USR1", "--batch", f"{array}_2"], check=True)
    wait_for_epochs(tmp_path / "run-2", 200, seconds=500)
    assert [row["epoch"] for row in log_of(tmp_path / "run-2")] == list(range(200))
    assert "re-queued" in (tmp_path / "2.log").read_text()
    assert (tmp_path / "1.log").read_text().count("Fine-tuning") == 1  # it has not run again
