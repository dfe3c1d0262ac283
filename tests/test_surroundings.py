"""What shells, clusters and earlier launches leave behind, and folders that are not only ours."""
import os
import shutil
import signal
import subprocess
import sys
import time

from conftest import error_of, log_of, train
from launches import SCRIPTS, fork, launch
from underway import end_of, processes_of, running, wait_for_epochs


def test_odd_surroundings_change_nothing(data, checkpoint, tmp_path):
    """Links and a tilde; `nohup ... | head -1`; a job folder with a long path; and what Kubernetes,
    software of a cluster, and users of Python leave in the environment."""
    long = tmp_path / ("job" * 20) / "tmp"
    for folder in (long, tmp_path / "bin"):
        folder.mkdir(parents=True)
    for link, target in (("bin/pets.sh", SCRIPTS / "pets.sh"), ("linked", SCRIPTS),
                         ("data", data / "pets"), ("start.pth", checkpoint)):
        (tmp_path / link).symlink_to(target)
    flags = ["--resume=~/start.pth", "--data-path=~/data", "--output_dir"]
    odd = {"PET_MAX_RESTARTS": "3", "PET_RDZV_ENDPOINT": "192.0.2.1:1", "PET_NNODES": "2",
           "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "NODE_RANK": "1", "RANK": "3",
           "HOME": tmp_path, "TMPDIR": long, "PYTHONSAFEPATH": "1"}
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; processes inherit it
    with running("pets", *flags, tmp_path / "run", "--num_workers", "1", "--epochs", "20",
                 processes=2, scripts=tmp_path / "bin", **odd) as run:
        signal.signal(signal.SIGHUP, handler)
        run.stdout.readline()
        run.stdout.close()
        run.stdout = None
        wait_for_epochs(tmp_path / "run")
        for process in [run.pid, *processes_of(tmp_path)]:
            os.kill(process, signal.SIGHUP)
        done = end_of(run)
    assert (done.returncode, done.stderr) == (0, "") and len(log_of(tmp_path / "run")) == 20
    odd.update(RANK="", WORLD_SIZE="", LOCAL_RANK="")
    done = launch("pets", *flags, "~/run", "--hold-out", "0.2", processes=2,
                  scripts=tmp_path / "linked", **odd)
    assert "--hold-out 0.2 (there: 0.0)" in error_of(done)  # by one process, about the same run
    for script in ("report.py", "predict.py", "export.py"):
        subprocess.run([sys.executable, "-OO", SCRIPTS / script, "--help"], check=True,
                       stdout=subprocess.DEVNULL)


def test_too_few_gpus_are_named_before_any_process_starts(flags, tmp_path):
    counter = tmp_path / "sitecustomize.py"  # Python imports it at its start
    counter.write_text(f"open({str(tmp_path / 'started')!r}, 'a').write('x')")
    line = error_of(launch("pets", *flags, "--device", "cuda", processes=8, PYTHONPATH=tmp_path,
                           CUDA_VISIBLE_DEVICES=""))
    assert "NPROC_PER_NODE=8" in line and "0 GPUs" in line and "--device cpu" in line
    assert (tmp_path / "started").read_text() == "x"
    check = fork("pets", *flags, "--device", "cuda", "--check", processes=8,
                 CUDA_VISIBLE_DEVICES="")
    assert "GPUs: not checked" in check.stdout and "needs 8" in check.stdout


def test_help_without_exec_bits_or_a_deit_and_with_another_shell(tmp_path):
    scripts = shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for path in scripts.glob("*.sh"):
        path.chmod(0o644)
    done = launch("pets", "--help", scripts=scripts, DEIT_DIR=None, PYTHON=None)
    for word in ("DEIT_DIR", "NPROC_PER_NODE", "--dry-run", "--resume", "--accum-iter"):
        assert word in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    if "bash" not in os.path.realpath("/bin/sh"):
        for name in ("pets.sh", "launch.sh"):
            refused = subprocess.run(["sh", scripts / name], capture_output=True, text=True)
            assert "bash" in error_of(refused)


def test_files_of_others_in_the_folder_are_kept(flags, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").write_text("my notes")
    (run / "best_checkpoint.pth").write_text("mine")
    train("pets", *flags, "--epochs", "1", "--overwrite")
    assert (run / "log.txt.old").read_text() == "my notes" and len(log_of(run)) == 1
    assert (run / "best_checkpoint.pth.old").read_text() == "mine"
    (run / "report.png").write_text("ours")
    (run / "notes.md").write_text("mine")
    with open(run / "log.txt", "a") as log:
        log.write('{"a": 1}\n[3]\n')
    assert "nothing left" in train("pets", *flags, "--epochs", "1").stdout
    train("pets", *flags, "--epochs", "1", "--weight-decay", "0.3", "--overwrite")
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "best_checkpoint.pth", "best_checkpoint.pth.old", "checkpoint.pth", "log.txt",
        "log.txt.old", "notes.md", "run.json"]


def break_the_feeder():
    """A data worker's thread that hands over images fails, as with a socket's path too long."""
    from multiprocessing import reduction

    from deit_plugin import loaders

    begin = loaders.begin_data_worker

    def begin_and_break(number):
        begin(number)
        reduction.ForkingPickler.dumps = None

    loaders.begin_data_worker = begin_and_break


def test_a_data_worker_that_cannot_hand_over_images_does_not_hang_the_run(flags, tmp_path):
    began = time.monotonic()
    done = fork("pets", *flags, "--num_workers", "1", before=break_the_feeder,
                FINETUNE_FIRST_FAILURE=tmp_path / "first")
    assert "data worker cannot hand over" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode and time.monotonic() - began < 60
