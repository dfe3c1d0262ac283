"""Several machines: two launchers on this one, and the Slurm job with stand-ins for Slurm.

REAL_SLURM=1 also submits a job to the Slurm of this machine, which takes some minutes.
"""
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

from conftest import error_of, log_of, results_of, train
from launches import ROOT, command, environment, free_port, start_fork
from underway import end_of, kill_all, processes_of, running, wait_for, wait_for_epochs


@contextlib.contextmanager
def two_nodes(folder, *flags):
    """Launches of the Pets recipe under way on two nodes; the second calls the folder "shared"."""
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (folder / "shared").symlink_to(folder)
    other = ["--output_dir", folder / "shared" / "run"]
    with running("pets", *flags, NODE_RANK="0", **nodes) as first, \
            running("pets", *flags, *other, NODE_RANK="1", **nodes) as second:
        yield first, second


def test_two_nodes_train_the_run_that_one_would(flags, tmp_path):
    with two_nodes(tmp_path, *flags) as nodes:
        done = [end_of(node, timeout=120) for node in nodes]
    assert [node.returncode for node in done] == [0, 0], done
    assert "16 = 2 processes x 8 images" in done[0].stdout
    assert "Fine-tuning" not in done[1].stdout  # one node speaks for all
    for number, (node, others) in enumerate(zip(done, ("1 more", "machine 1")), start=1):
        assert f"This is machine {number} of 2, waiting for {others} at 127.0.0.1:" in node.stdout
    assert "This machine has joined" in done[1].stdout and "joined" not in done[0].stdout
    train("pets", *flags, "--output_dir", tmp_path / "one", processes=2)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "one")


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_waits_for_another_can_be_interrupted(rank, flags, tmp_path):
    """There torch waits in C++, which runs none of Python's signal handlers."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        if rank:  # this test is the first machine, and says nothing
            first = stack.enter_context(socket.create_server(("127.0.0.1", port)))
            first.settimeout(60)
        node = stack.enter_context(running("pets", *flags, NNODES="2", NODE_RANK=rank,
                                           MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        if rank:
            stack.enter_context(first.accept()[0])
        else:
            wait_for(lambda: is_open(port), seconds=60)
        time.sleep(1)
        node.send_signal(signal.SIGINT)
        done = end_of(node, timeout=10)
    assert f"machine {rank + 1} of 2, waiting for" in done.stdout
    assert done.returncode in (-signal.SIGINT, 130) and "Traceback" not in done.stderr
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("changed, says", [
    ("--lr 0.01", "--lr 0.0*[31] .rank"), ("--eval-freq 2", "--eval-freq [12] .rank"),
    ("--save-freq 3", "--save-freq [13] .rank"),
    ("--batch-size 4 --accum-iter 2", "--batch-size [48] .rank.* --accum-iter [12] .rank"),
    ("--data-path OTHER", "4[89] train images .rank"),
])
def test_machines_launched_with_different_flags_are_refused(changed, says, data, flags, tmp_path):
    other = shutil.copytree(data / "pets", tmp_path / "other")
    listed = other / "annotations" / "trainval.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = start_fork("pets", *flags, NODE_RANK="0", **nodes)
    second = start_fork("pets", *flags, *changed.replace("OTHER", str(other)).split(),
                        NODE_RANK="1", **nodes)
    for line in map(error_of, (first(), second())):
        assert re.search(says, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_node_that_goes_down_ends_the_other(flags, tmp_path):
    with two_nodes(tmp_path, *flags, "--epochs", "500") as (first, second):
        wait_for_epochs(tmp_path / "run")
        kill_all(second, tmp_path / "shared")
        done = end_of(first)
        assert done.returncode != 0
        assert "onnection" in done.stderr  # is lost, which is all that this node can know
        wait_for(lambda: not processes_of(tmp_path), seconds=20)


STAND_INS = {
    # Runs the command on one "node" after the other.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit; done""",
    "scontrol": """
        case $1-$2 in
            show-hostnames) printf '%s\\n' node-a node-b ;;
            show-job) echo "   PreemptTime=$PREEMPTED"; echo "   Command=$SUBMITTED pets --flag" ;;
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
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PREEMPTED": "None",
                 "SUBMITTED": str(ROOT / "scripts" / "slurm.sh"), "NPROC_PER_NODE": None,
                 "PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "123456",
                 "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4",
                 "SLURM_CPUS_ON_NODE": "40", "SLURM_NNODES": "2"}
        return subprocess.Popen(
            [str(tmp_path / "slurm_script"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment(**{**known, **variables}))

    return start


def test_slurm_job_runs_the_recipe_on_every_node(slurm):
    done = end_of(slurm("pets", "--resume", "a b.pth", "--batch-size", "256", "--dry-run"))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 2)
    for rank, line in enumerate(lines):
        assert line.startswith(f"4 2 {rank} node-a 13456 '{ROOT}/scripts/finetune.py' ")
        assert "'--data-set' 'pets'" in line
        assert line.endswith("'--resume' 'a b.pth' '--batch-size' '256' '--dry-run'")


def test_slurm_job_requeues_itself_when_its_time_is_nearly_up(slurm, tmp_path):
    job = slurm("pets")
    wait_for((tmp_path / "started").exists, seconds=20)
    assert "#SBATCH --signal=B:USR1@" in (tmp_path / "slurm_script").read_text()
    job.send_signal(signal.SIGUSR1)
    done = end_of(job)
    assert done.returncode == 143 and "continue from checkpoint.pth" in done.stdout
    assert (tmp_path / "requeued").read_text().split() == ["123456"]


@pytest.mark.parametrize("preempted", ["2030-01-31T12:00:00", "None"])
def test_slurm_job_that_ends_early_is_requeued_only_if_preempted(preempted, slurm, tmp_path):
    assert end_of(slurm("pets", PREEMPTED=preempted, FAILS="0.1")).returncode == 143
    assert (tmp_path / "requeued").exists() == (preempted != "None")


@pytest.mark.parametrize("arguments, variables, says", [
    (["dogs"], {}, "/dogs.sh"), (["pets", "--overwrite"], {}, "--overwrite"),
    (["pets"], {"SLURM_JOB_ID": None}, "no Slurm job"),
    (["pets"], {"SUBMITTED": "/elsewhere/slurm.sh"}, "/elsewhere/pets.sh"),
])
def test_slurm_job_that_cannot_run_says_why(arguments, variables, says, slurm, tmp_path):
    done = end_of(slurm(*arguments, **variables))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif("REAL_SLURM" not in os.environ, reason="REAL_SLURM=1 submits a job to Slurm")
def test_a_requeued_job_of_a_real_slurm_continues(flags, tmp_path):
    asked = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10",
             f"--output={tmp_path / 'job'}", ROOT / "scripts" / "slurm.sh", "pets"]
    job = subprocess.run(["sbatch", *asked, *command("pets", *flags, "--epochs", "200")[2:]],
                         stdout=subprocess.PIPE, text=True, check=True,
                         env=environment(2)).stdout.strip()
    wait_for_epochs(tmp_path / "run", 3)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for_epochs(tmp_path / "run", 200, seconds=500)
    assert "comes next" in (tmp_path / "job").read_text()
    assert [row["epoch"] for row in log_of(tmp_path / "run")] == list(range(200))
