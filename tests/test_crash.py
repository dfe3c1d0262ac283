"""Runs that are killed or fail, and what the next launch makes of the folder they leave.

test_resume.py compares a run that was killed once with one that never stopped.
"""
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from conftest import error_of, forked, log_of, rates_of, saved, train
from deit_plugin import errors, launcher
from launches import (
    FORK,
    PAIR,
    after_saving,
    fill_the_disk,
    fork,
    kill_itself,
    limit_file_size,
    print_to_a_full_disk,
    run_code,
)
from underway import (
    end_of,
    kill_all,
    meanwhile,
    processes_of,
    running,
    wait_for,
    wait_for_epochs,
)

# Longer than any test; with a save after the first 100 epochs.
LONG = ["--epochs", "500", "--save-freq", "100", "--eval-freq", "400"]


def test_ending_a_launch_by_ctrl_c_ends_every_process_and_says_what_is_saved(flags, tmp_path):
    """A terminal sends SIGINT to all of them. For SIGTERM see test_errors.py, odd surroundings."""
    def interrupt():
        wait_for_epochs(tmp_path / "run", 2)
        for process in (*processes_of(tmp_path), os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGINT)

    done = fork("pets", *flags, *LONG, "--num_workers", "1", "--save-freq", "1",
                before=meanwhile(interrupt), forks_workers=False, LAUNCHED_INTO=tmp_path)
    wait_for(lambda: not processes_of(tmp_path), seconds=20)
    said = "interrupted: .* epochs? of 500 are saved in .*; the same command continues\n"
    assert done.returncode == 130 and re.fullmatch(said, done.stderr), done.stderr


def note_on_a_full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    errors.write_status("3 epochs")


def test_what_is_saved_stays_noted_if_a_worker_ends_while_it_notes_more(monkeypatch, tmp_path):
    monkeypatch.setenv(errors.STATUS, str(tmp_path / "status"))
    errors.write_status("2 epochs")
    forked(note_on_a_full_disk)
    assert errors.read_status() == "2 epochs"


def test_ctrl_c_tells_not_to_overwrite_again(capsys):
    with pytest.raises(SystemExit):
        launcher.interrupted(Namespace(eval=False, overwrite=True),
                             launcher.Machines(1, 1, 0, "127.0.0.1", 1))
    assert "the same command without --overwrite starts again" in capsys.readouterr().err


def test_after_ctrl_c_at_a_terminal_a_launch_dies_of_the_signal():
    """A shell goes on with a loop whose command has only exited."""
    ends = os.openpty()
    code = "from deit_plugin import errors; errors.end(130)"
    for stdin, status in ((ends[1], -signal.SIGINT), (subprocess.DEVNULL, 130)):
        assert run_code(code, stdin=stdin).returncode == status


def test_ctrl_c_while_a_launch_decides(flags, tmp_path):
    """Here while it imports torch."""
    with running("pets", *flags) as run:
        wait_for(lambda: "libtorch" in Path(f"/proc/{run.pid}/maps").read_text())
        run.send_signal(signal.SIGINT)
        done = end_of(run, timeout=20)
    assert done.returncode == 130 and "nothing was started" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_temporary_folders_of_killed_launches_are_removed(monkeypatch):
    """And none that is in use, or not ours."""
    def be_killed():
        with launcher.temporary_folder():
            kill_itself()

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        os.mkdir(f"{folder}/finetune-results")  # somebody's
        killed = FORK.Process(target=be_killed)
        killed.start()
        killed.join()
        assert len(os.listdir(folder)) == 2
        with launcher.temporary_folder() as used, launcher.temporary_folder():
            assert os.path.isdir(used) and len(os.listdir(folder)) == 3
        assert os.listdir(folder) == ["finetune-results"]


@pytest.mark.parametrize("processes, workers, status, says", [
    (PAIR, 0, 137, "SIGKILL"),
    pytest.param(1, 1, 1, "DataLoader worker.*--num_workers", marks=pytest.mark.slow)])
def test_a_process_that_is_killed_is_named(processes, workers, status, says, flags, tmp_path):
    """A rank or, also below, a data worker, as the system kills one when memory runs out."""
    def kill_one():
        wait_for_epochs(tmp_path / "run")
        os.kill(max(processes_of(tmp_path)), signal.SIGKILL)

    done = fork("pets", *flags, *LONG, "--num_workers", workers, processes=processes,
                before=meanwhile(kill_one), forks_workers=False, LAUNCHED_INTO=tmp_path)
    assert re.search(says, error_of(done, status)) and not processes_of(tmp_path)


def in_data_workers(fail):
    """For ``fork``'s before: data workers call ``fail`` when they hand over images."""
    def change():
        from multiprocessing.reduction import ForkingPickler

        dumps = ForkingPickler.dumps
        ForkingPickler.dumps = lambda *arguments: (
            fail() if torch.utils.data.get_worker_info() else dumps(*arguments))

    return change


def have_too_long_a_path():
    """For a socket."""
    raise OSError("path too long")


@pytest.mark.parametrize("fail, says", [
    (kill_itself, "DataLoader worker.*--num_workers"),
    (have_too_long_a_path, "a data worker cannot hand over.*path too long")])
def test_a_data_worker_that_fails_does_not_hang_the_run(fail, says, flags):
    done = fork("pets", *flags, "--num_workers", "1", before=in_data_workers(fail))
    assert re.search(says, error_of(done, status=1))


def test_files_of_others_are_kept(flags, tmp_path):
    """Also under --overwrite, which deletes only files of a run."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("log.txt", "best_checkpoint.pth", "notes.md"):
        (run / name).write_text("mine")
    train("pets", *flags, "--epochs", "1", "--overwrite")
    for name in ("log.txt.old", "best_checkpoint.pth.old", "notes.md"):
        assert (run / name).read_text() == "mine"
    (run / "checkpoint.pth").unlink()
    train("pets", *flags, "--epochs", "1")  # a log is not thrown away
    assert len(log_of(run)) == 1 and '"epoch": 0' in (run / "log.txt.old").read_text()


def test_a_finished_run_is_kept_unless_it_is_to_be_overwritten(run, flags, refusal):
    own = run / "checkpoint.pth"
    (run / "report.png").write_text("ours")
    before = own.read_bytes()
    for words in ([], ["--resume", own]):
        assert "nothing left to train" in train("pets", *flags, *words).stdout
    assert own.read_bytes() == before
    assert "would delete" in refusal("pets", *flags, "--resume", own, "--overwrite")
    more = refusal("pets", *flags, "--epochs", "3")
    assert f"--resume {own}" in more and "another --output_dir" in more
    own.write_bytes(before[:-5000])
    damaged = refusal("pets", *flags)
    assert str(own) in damaged and "--overwrite" in damaged
    own.unlink()
    best = run / "best_checkpoint.pth"
    assert "is a file of --output_dir" in refusal("pets", *flags, "--resume", best)
    train("pets", *flags, "--weight-decay", "0.3", "--epochs", "1", "--overwrite")
    assert [row["epoch"] for row in log_of(run)] == [0]
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "best_checkpoint.pth", "checkpoint.pth", "log.txt", "predictions.csv", "run.json"]


@pytest.mark.parametrize("fails, says", [
    (limit_file_size, "too large: '.*checkpoint.pth'"),
    (fill_the_disk, "disk full: .* make room"),
    (print_to_a_full_disk, "disk full: standard output"),
])
def test_a_full_disk_keeps_the_last_whole_checkpoint(fails, says, flags, tmp_path):
    run, flags = tmp_path / "run", [*flags, "--epochs", "3"]
    line = error_of(fork("pets", *flags, before=after_saving(fails)), status=1)
    assert re.search(says, line)
    assert saved(run / "checkpoint.pth")["epoch"] == 0
    assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))
    train("pets", *flags[2:])  # without --resume
    assert [row["epoch"] for row in log_of(run)] == [0, 1, 2]


def test_a_loss_that_is_not_finite_ends_the_run(flags):
    line = error_of(fork("pets", *flags, "--lr", "1e30", "--warmup-epochs", "0"), status=1)
    assert "not finite" in line and "--lr" in line


def test_no_traceback_of_a_data_worker_whose_run_was_killed():
    """Its run asks for an image, and is killed before it gets it."""
    code = """if True:
        import socket
        from deit_plugin.errors import guard
        from multiprocessing import reduction, resource_sharer

        def run():
            reduction.DupFd(0)
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(resource_sharer._resource_sharer._address)
            resource_sharer.stop(timeout=10)

        guard(run)"""
    done = run_code(code, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_one_that_never_stopped(flags, tmp_path):
    """One run, killed 20 times: at seeded random moments of its life, each fourth in a save.

    What each kill leaves is continued to the end in a copy of the folder, and must be the same run.
    """
    whole, killed, epochs = tmp_path / "whole", tmp_path / "killed", 30
    flags = [*flags, "--epochs", epochs, "--warmup-epochs", "2"]
    began = time.monotonic()
    with running("pets", *flags, "--output_dir", whole, processes=2) as run:
        end_of(run, timeout=300)
    lifetime = time.monotonic() - began
    moments, in_a_save = random.Random(0), 0
    for kill in range(20):
        with running("pets", *flags, "--output_dir", killed, processes=2) as run:
            if kill % 4 == 0:
                wait_for(lambda: list(killed.glob(".checkpoint.pth.*.tmp"))
                         or run.poll() is not None, pause=0)  # noqa: B023 (called here only)
            else:
                time.sleep(moments.uniform(0, lifetime))
            kill_all(run, killed)
        in_a_save += bool(list(killed.glob(".*.tmp")))
        copy = tmp_path / f"copy {kill}"
        shutil.copytree(killed, copy) if killed.exists() else copy.mkdir()
        train("pets", *flags, "--output_dir", copy, processes=2)
        assert [row["epoch"] for row in log_of(copy)] == list(range(epochs))
        assert rates_of(copy) == rates_of(whole)
        assert not list(copy.glob(".*.tmp"))
        shutil.rmtree(copy)
        own = killed / "checkpoint.pth"
        if own.exists() and saved(own)["epoch"] > epochs / 2:
            shutil.rmtree(killed)  # not to kill at the end of the run only
    assert in_a_save
