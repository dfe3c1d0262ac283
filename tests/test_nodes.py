"""Several machines: two launchers on this one, and the Slurm job with stand-ins for Slurm.

REAL_SLURM=1 also submits a job to the Slurm of this machine, which takes some minutes.
"""
import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import ports
from conftest import ROOT, command, environment, log_of, train
from processes import finetune_processes, lines_in, running, wait_for


@contextlib.contextmanager
def two_nodes(*flags):
    """A launch on each of two nodes, one process each; ended when the block is left."""
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.free())}
    with running("pets", *flags, processes=1, NODE_RANK="0", **shared) as first, \
            running("pets", *flags, processes=1, NODE_RANK="1", **shared) as second:
        yield first, second


def processes_of_node(rank, folder):
    """Those of ``finetune_processes(folder)`` that a node's launcher started."""
    setting = f"NODE_RANK={rank}".encode()
    return [process for process in finetune_processes(folder)
            if setting in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")]


def test_two_nodes_train_the_run_that_one_would(data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "pets"]
    with two_nodes(*flags, "--output_dir", tmp_path / "two") as nodes:
        outputs, errors = zip(*(node.communicate(timeout=120) for node in nodes))
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "2 processes x 8 images = 16 images" in outputs[0]
    assert "Fine-tuning" not in outputs[1]  # one node speaks for all
    train("pets", *flags, "--output_dir", tmp_path / "one", processes=2)
    assert log_of(tmp_path / "two") == log_of(tmp_path / "one")


def test_a_node_that_goes_down_ends_the_other(data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path]
    with two_nodes(*flags, "--epochs", "500") as (first, second):
        wait_for(lambda: lines_in(tmp_path / "log.txt") >= 1)
        for process in [second.pid, *processes_of_node(1, tmp_path)]:
            os.kill(process, signal.SIGKILL)
        _, stderr = first.communicate(timeout=60)
        assert first.returncode not in (0, None)
        assert "onnection" in stderr  # is lost, which is all that this node can know
        wait_for(lambda: not finetune_processes(tmp_path), seconds=15)


@pytest.mark.parametrize("seconds", [1, 8])
def test_a_node_that_waits_for_the_first_ends_when_told(seconds, data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path]
    with running("pets", *flags, processes=1, NNODES="2", NODE_RANK="1", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=str(ports.free())) as waiting:
        time.sleep(seconds)  # while it imports torch; when it waits in vain
        waiting.send_signal(signal.SIGTERM)
        _, stderr = waiting.communicate(timeout=15)
        assert waiting.returncode in (143, -signal.SIGTERM) and "Traceback" not in stderr
        wait_for(lambda: not finetune_processes(tmp_path), seconds=15)


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
    "show": "printf '%q ' \"$@\"; echo",
    # Runs until the job is re-queued, as Slurm then ends it; with FAILS set, fails at once.
    "python": """
        touch started
        for ((tenths = 0; tenths < 200; tenths++)); do
            [[ -z ${FAILS:-} && ! -e requeued ]] || exit 143
            sleep 0.1
        done""",
}


class Job:
    """``slurm.sh`` as job 123456 of two nodes with 4 GPUs each, in a folder with stand-ins."""

    def __init__(self, folder, *arguments, **variables):
        self.folder = folder
        for name, lines in STAND_INS.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
            (folder / name).chmod(0o755)
        shutil.copy(ROOT / "scripts" / "slurm.sh", folder / "slurm_script")  # as Slurm does
        known = {"PATH": f"{folder}:{os.environ['PATH']}", "PREEMPTED": "None",
                 "SUBMITTED": str(ROOT / "scripts" / "slurm.sh"), "NPROC_PER_NODE": None,
                 "PYTHON": str(folder / "python"), "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2",
                 "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4",
                 "SLURM_CPUS_ON_NODE": "40"}
        self.process = subprocess.Popen(
            [str(folder / "slurm_script"), *arguments], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True,
            env=environment(**{**known, **variables}))

    def end(self):
        """Wait for it: (exit status, stdout, stderr)."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def requeued(self):
        """The ids of the jobs that it re-queued."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


def test_slurm_job_runs_the_recipe_on_every_node(tmp_path):
    flags = ["--resume", "a b.pth", "--batch-size", "256"]
    status, out, err = Job(tmp_path, "pets", *flags, PYTHON="show").end()
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 2)
    for rank, line in enumerate(lines):
        assert (f"--nproc_per_node 4 --nnodes 2 --node_rank {rank} --master_addr node-a "
                "--master_port 13456 ") in line
        assert "--data-set pets" in line and line.endswith(r"--resume a\ b.pth --batch-size 256 ")


def test_slurm_job_requeues_itself_when_its_time_is_nearly_up(tmp_path):
    job = Job(tmp_path, "pets")
    wait_for((tmp_path / "started").exists, seconds=20)
    assert "#SBATCH --signal=B:USR1@" in (tmp_path / "slurm_script").read_text()
    job.process.send_signal(signal.SIGUSR1)
    status, out, _ = job.end()
    assert status == 143 and "will continue from checkpoint.pth" in out
    assert job.requeued() == ["123456"]


@pytest.mark.parametrize("preempted, requeued", [("2030-01-31T12:00:00", ["123456"]), ("None", [])])
def test_slurm_job_that_ends_early_is_requeued_only_if_preempted(preempted, requeued, tmp_path):
    job = Job(tmp_path, "pets", PREEMPTED=preempted, FAILS="yes")
    assert job.end()[0] == 143
    assert job.requeued() == requeued


@pytest.mark.parametrize("arguments, variables, says", [
    (["dogs"], {}, "'dogs'"),
    ([], {}, "no recipe ''"),
    (["pets", "--overwrite"], {}, "--overwrite"),
    (["pets"], {"SLURM_JOB_ID": None}, "no Slurm job"),
    (["pets"], {"SUBMITTED": "/elsewhere/slurm.sh"}, "/elsewhere/slurm.sh"),
])
def test_slurm_job_that_cannot_run_says_why(arguments, variables, says, tmp_path):
    status, out, err = Job(tmp_path, *arguments, **variables).end()
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and says in err and "usage: sbatch" in err
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif("REAL_SLURM" not in os.environ, reason="REAL_SLURM=1 submits a job to Slurm")
def test_a_requeued_job_of_a_real_slurm_continues(data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path,
             "--epochs", "200"]
    asked = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10",
             f"--output={tmp_path / 'job'}"]
    job = subprocess.run(
        ["sbatch", *asked, ROOT / "scripts" / "slurm.sh", "pets", *command("pets", *flags)[1:]],
        stdout=subprocess.PIPE, text=True, check=True, env=environment()).stdout.strip()
    wait_for(lambda: lines_in(tmp_path / "log.txt") >= 3)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: lines_in(tmp_path / "log.txt") == 200, seconds=500)
    assert f"continued from {tmp_path / 'checkpoint.pth'}" in (tmp_path / "job").read_text()
    assert [row["epoch"] for row in log_of(tmp_path)] == list(range(200))
