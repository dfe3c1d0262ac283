"""Runs that are killed or fail, and what the next launch makes of the folder they leave.

That a killed run continues as if it had never stopped is in test_journey.py, for all recipes.
"""
import contextlib
import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from conftest import error_of, log_of, rates_of, saved, train
from deit_plugin import launcher
from launches import PAIR, after_saving, fill_the_disk, fork, limit_file_size
from underway import end_of, kill_all, processes_of, running, wait_for, wait_for_epochs

# Longer than any test; with a save after the first 100 epochs.
LONG = ["--epochs", "500", "--save-freq", "100", "--eval-freq", "400"]
INTERRUPTED = "interrupted: .*{}; the same command {}\n"


@pytest.mark.parametrize("name, to_all, processes, status, says, more", [
    ("SIGTERM", False, PAIR, 143, "", []),
    ("SIGINT", False, 1, 130, INTERRUPTED.format("nothing saved yet", "starts again"), []),
    ("SIGINT", True, 1, 130, INTERRUPTED.format(
        "epochs? of 500 are saved in .*checkpoint.pth", "continues"), ["--save-freq", "1"]),
], ids=["end", "interrupt", "Ctrl-C"])
def test_ending_a_launch_ends_every_process(name, to_all, processes, status, says, more, flags,
                                            tmp_path):
    """And every data worker. Ctrl-C, which a terminal sends to all of them, says what is saved."""
    flags = [*flags, *LONG, "--num_workers", "1", *more]
    with running("pets", *flags, processes=processes) as run:
        wait_for_epochs(tmp_path / "run", 2)
        assert len(processes_of(tmp_path)) >= 2 * processes
        if name == "SIGTERM":
            assert "another run" in error_of(fork("pets", *flags, processes=processes))
        for process in [run.pid, *(processes_of(tmp_path) if to_all else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, getattr(signal, name))
        wait_for(lambda: not processes_of(tmp_path), seconds=20)
        done = end_of(run)
    assert done.returncode == status and re.fullmatch(says, done.stderr)


def test_ctrl_c_while_a_launch_decides(flags, tmp_path):
    """Whatever it is asking torch, timm or Pillow at that moment."""
    with running("pets", *flags) as run:
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        done = end_of(run, timeout=5)
    assert done.returncode == 130 and "nothing was started" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_killed_launch_leaves_nothing_that_the_next_cannot_clear(flags, tmp_path, monkeypatch):
    """No process, and a temporary folder that is not in use any more."""
    def left_by_the_next_launch():
        with launcher.temporary_folder() as used:
            assert Path(used).parent == Path(folder)
        return set(os.listdir(folder))

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        os.mkdir(f"{folder}/finetune-results")  # somebody's
        with running("pets", *flags, *LONG, "--num_workers", "1", TMPDIR=folder) as run:
            wait_for_epochs(tmp_path / "run")
            own = set(os.listdir(folder)) - {"finetune-results"}
            assert len(own) == 1 and own < left_by_the_next_launch()  # it is in use
            run.kill()
            wait_for(lambda: not processes_of(tmp_path), seconds=20)
        assert own < set(os.listdir(folder))
        assert left_by_the_next_launch() == {"finetune-results"}


@pytest.mark.parametrize("processes, workers, status, says", [
    (PAIR, 0, 137, "SIGKILL"), (1, 1, 1, "DataLoader worker.*--num_workers")])
def test_a_process_that_is_killed_is_named(processes, workers, status, says, flags, tmp_path):
    """A rank or a data worker, as the system kills one when memory runs out."""
    with running("pets", *flags, *LONG, "--num_workers", workers, processes=processes) as run:
        wait_for_epochs(tmp_path / "run")
        os.kill(max(processes_of(tmp_path)), signal.SIGKILL)
        done = end_of(run)
    assert re.search(says, error_of(done, status)) and not processes_of(tmp_path)


def test_a_finished_run_and_files_of_others_are_kept(flags, tmp_path):
    """Also under --overwrite, which deletes only files of a run."""
    run, own = tmp_path / "run", tmp_path / "run" / "checkpoint.pth"
    run.mkdir()
    (run / "log.txt").write_text("my notes")
    (run / "best_checkpoint.pth").write_text("mine")
    train("pets", *flags, "--overwrite")
    assert (run / "log.txt.old").read_text() == "my notes" and len(log_of(run)) == 2
    assert (run / "best_checkpoint.pth.old").read_text() == "mine"

    (run / "report.png").write_text("ours")
    (run / "notes.md").write_text("mine")
    with open(run / "log.txt", "a") as log:
        log.write('{"a": 1}\n[3]\n')
    before = own.read_bytes()
    assert "nothing left to train" in train("pets", *flags).stdout
    assert "nothing left to train" in train("pets", *flags[2:], "--resume", own).stdout
    refused = error_of(fork("pets", *flags, "--weight-decay", "0.3"))
    assert "--weight-decay 0.3 (there: 0.1)" in refused and "--overwrite" in refused
    assert "would delete" in error_of(fork("pets", *flags, "--resume", own, "--overwrite"))
    assert own.read_bytes() == before

    own.write_bytes(before[:-5000])
    damaged = error_of(fork("pets", *flags))
    assert str(own) in damaged and "--overwrite" in damaged
    train("pets", *flags, "--weight-decay", "0.3", "--epochs", "1", "--overwrite")
    assert [row["epoch"] for row in log_of(run)] == [0]
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "best_checkpoint.pth", "best_checkpoint.pth.old", "checkpoint.pth", "log.txt",
        "log.txt.old", "notes.md", "run.json"]
    own.unlink()
    train("pets", *flags, "--epochs", "1")  # a log is not thrown away
    assert len(log_of(run)) == 1 and '"epoch": 0' in (run / "log.txt.old").read_text()


@pytest.mark.parametrize("fails, says", [
    (limit_file_size, "too large: '.*checkpoint.pth'"),
    (fill_the_disk, "disk full: .* make room"),
])
def test_a_full_disk_keeps_the_last_whole_checkpoint(fails, says, flags, tmp_path):
    run, flags = tmp_path / "run", [*flags, "--epochs", "3"]
    line = error_of(fork("pets", *flags, before=after_saving(fails)), status=1)
    assert re.search(says, line)
    assert saved(run / "checkpoint.pth")["epoch"] == 0
    assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))
    train("pets", *flags[2:])  # without --resume
    assert "nothing left to train" in train("pets", *flags).stdout
    assert [row["epoch"] for row in log_of(run)] == [0, 1, 2]


def test_a_loss_that_is_not_finite_ends_the_run(flags):
    line = error_of(fork("pets", *flags, "--lr", "1e30", "--warmup-epochs", "0"), status=1)
    assert "not finite" in line and "--lr" in line


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


KILLS, EPOCHS = 20, 30


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_one_that_never_stopped(flags, tmp_path):
    """One run, killed KILLS times: at seeded random moments of its life, each fourth in a save.

    What each kill leaves is continued to the end in a copy of the folder, and must be the same run.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*flags, "--epochs", EPOCHS, "--warmup-epochs", "2"]
    began = time.monotonic()
    with running("pets", *flags, "--output_dir", whole, processes=2) as run:
        end_of(run, timeout=300)
    lifetime = time.monotonic() - began
    moments, in_a_save = random.Random(0), 0
    for kill in range(KILLS):
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
        assert [row["epoch"] for row in log_of(copy)] == list(range(EPOCHS))
        assert rates_of(copy) == rates_of(whole)
        assert not list(copy.glob(".*.tmp"))
        shutil.rmtree(copy)
        own = killed / "checkpoint.pth"
        if own.exists() and saved(own)["epoch"] > EPOCHS / 2:
            shutil.rmtree(killed)  # not to kill at the end of the run only
    assert in_a_save
