"""Runs that are killed, and what the next launch makes of the folder they leave."""
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from conftest import ERAS, command, environment, errors_of, launch, log_of, refusal_of, saved, train
from processes import finetune_processes, kill_all, lines_in, parent, running, wait_for

EPOCHS = 40  # of some 50 ms each in the miniature, so that there is time to kill


def flags_for(folder, data, checkpoint):
    return ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", folder,
            "--epochs", EPOCHS, "--warmup-epochs", "2", "--eval-freq", "2"]


def rates(folder):
    return [row["train_lr"] for row in log_of(folder)]


@pytest.mark.parametrize("era", ERAS)
def test_a_killed_run_continues_as_if_it_never_stopped(era, data, checkpoint, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train("pets", *flags_for(whole, data, checkpoint), era=era)
    with running("pets", *flags_for(killed, data, checkpoint), era=era) as run:
        wait_for(lambda: lines_in(killed / "log.txt") >= 3)
        kill_all(run, killed)
    before = saved(killed / "checkpoint.pth")
    assert before["epoch"] < EPOCHS - 1, "the run was over before it could be killed"
    marked = {name: torch.full_like(value, 7) for name, value in before["model_ema"].items()}
    torch.save({**before, "model_ema": marked}, killed / "marked.pth")  # before is still mapped
    os.replace(killed / "marked.pth", killed / "checkpoint.pth")
    done = train("pets", *flags_for(killed, data, checkpoint), era=era)
    assert f"epoch {before['epoch'] + 1} comes next" in done.stdout
    assert [row["epoch"] for row in log_of(killed)] == list(range(EPOCHS))
    assert rates(killed) == rates(whole)
    evaluated = [["test_acc1" in row for row in log_of(folder)] for folder in (whole, killed)]
    assert evaluated[0] == evaluated[1]
    # Only an average that was restored is near the mark: it moves by 0.004 % a step.
    average = saved(killed / "checkpoint.pth")["model_ema"]
    assert all((value - 7).abs().max() < 0.2 for value in average.values())


def test_a_finished_run_has_nothing_to_do_and_another_recipe_is_refused(data, checkpoint, tmp_path):
    flags = flags_for(tmp_path, data, checkpoint)
    train("pets", *flags)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    done = train("pets", *flags)
    assert "nothing left to train" in done.stdout
    refused = launch("pets", *flags, "--weight-decay", "0.3")
    assert "--weight-decay 0.3 (there: 0.1)" in refusal_of(refused)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    train("pets", *flags, "--weight-decay", "0.3", "--epochs", "1", "--overwrite")
    assert [row["epoch"] for row in log_of(tmp_path)] == [0]


def test_a_second_launch_into_a_live_folder_is_refused(data, checkpoint, tmp_path):
    flags = flags_for(tmp_path, data, checkpoint)
    with running("pets", *flags, "--epochs", "500"):
        wait_for(lambda: lines_in(tmp_path / "log.txt") >= 1)
        refused = launch("pets", *flags, "--epochs", "500")
    assert "another run" in refusal_of(refused)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ending_the_launcher_ends_every_process(name, data, checkpoint, tmp_path):
    flags = flags_for(tmp_path, data, checkpoint)
    with running("pets", *flags, "--epochs", "500") as run:
        wait_for(lambda: lines_in(tmp_path / "log.txt") >= 1)
        assert len(finetune_processes(tmp_path)) >= 2
        run.send_signal(name)
        wait_for(lambda: not finetune_processes(tmp_path), seconds=15)
        _, stderr = run.communicate(timeout=20)
        assert "Traceback" not in stderr


def test_one_process_killed_ends_the_others_and_is_named(data, checkpoint, tmp_path):
    flags = flags_for(tmp_path, data, checkpoint)
    with running("pets", *flags, "--epochs", "500", "--num_workers", "0") as run:
        wait_for(lambda: lines_in(tmp_path / "log.txt") >= 1)
        os.kill(max(finetune_processes(tmp_path)), signal.SIGKILL)
        _, stderr = run.communicate(timeout=30)
        assert run.returncode not in (0, None)
        assert "SIGKILL" in stderr and "Traceback" not in stderr
        assert not finetune_processes(tmp_path)


def test_a_killed_data_worker_is_named(data, checkpoint, tmp_path):
    """As the system kills one when memory runs out."""
    flags = flags_for(tmp_path, data, checkpoint)
    with running("pets", *flags, "--epochs", "500") as run:
        wait_for(lambda: lines_in(tmp_path / "log.txt") >= 1)
        processes = finetune_processes(tmp_path)
        os.kill(next(process for process in processes if parent(process) in processes),
                signal.SIGKILL)
        _, stderr = run.communicate(timeout=30)
        errors = errors_of(stderr)
        assert run.returncode == 1 and len(errors) == 1, stderr
        assert "DataLoader worker" in errors[0] and "--num_workers" in errors[0]
        assert not finetune_processes(tmp_path)


def test_a_broken_image_ends_all_processes_with_its_name(data, checkpoint, tmp_path):
    broken = tmp_path / "pets"
    shutil.copytree(data / "pets", broken)
    victim = sorted((broken / "images").glob("*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:300])
    done = launch("pets", *flags_for(tmp_path / "out", data, checkpoint), "--data-path", broken)
    errors = errors_of(done.stderr)
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert str(victim) in errors[0]


KILLS = int(os.environ.get("KILLS", 20))


def test_killed_at_random_moments_a_run_ends_as_one_that_never_stopped(data, checkpoint, tmp_path):
    """One run, killed KILLS times: at seeded random moments of its life, each fourth in a save.

    What each kill leaves is continued to the end in a copy of the folder, and must be the same run.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    train("pets", *flags_for(whole, data, checkpoint))
    lifetime = time.monotonic() - began
    moments = random.Random(0)
    in_a_save = 0
    for kill in range(KILLS):
        with running("pets", *flags_for(killed, data, checkpoint)) as run:
            moment = began_saving if kill % 4 == 0 else after(moments.uniform(0, lifetime))
            wait_for_moment(moment, run, killed)
            kill_all(run, killed)
        in_a_save += bool(list(killed.glob(".*.tmp")))
        copy = tmp_path / f"copy {kill}"
        shutil.copytree(killed, copy) if killed.exists() else copy.mkdir()
        train("pets", *flags_for(copy, data, checkpoint))
        assert [row["epoch"] for row in log_of(copy)] == list(range(EPOCHS))
        assert rates(copy) == rates(whole)
        assert not list(copy.glob(".*.tmp"))
        shutil.rmtree(copy)
        if (killed / "checkpoint.pth").exists() and \
                saved(killed / "checkpoint.pth")["epoch"] > EPOCHS / 2:
            shutil.rmtree(killed)  # not to kill at the end of the run only
    print(f"{KILLS} kills, {in_a_save} of them left a file half written")
    assert in_a_save


def wait_for_moment(moment, run, folder):
    wait_for(lambda: moment(folder) or run.poll() is not None, pause=0)


def began_saving(folder):
    """Whether a checkpoint is being written."""
    return list(folder.glob(".checkpoint.pth.*.tmp"))


def after(seconds):
    """A condition that holds from ``seconds`` from now on."""
    moment = time.monotonic() + seconds
    return lambda folder: time.monotonic() > moment


def test_a_damaged_checkpoint_is_named(data, checkpoint, tmp_path):
    flags = flags_for(tmp_path, data, checkpoint)
    train("pets", *flags, "--epochs", "1")
    damaged = tmp_path / "checkpoint.pth"
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    line = refusal_of(launch("pets", *flags, "--epochs", "1"))
    assert str(damaged) in line and "--overwrite" in line


def test_a_full_disk_keeps_the_last_whole_checkpoint(data, checkpoint, tmp_path):
    """A limit on the size of files stands for the full disk: both fail the write."""
    flags = flags_for(tmp_path, data, checkpoint)
    train("pets", *flags, "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    limited = ["bash", "-c", f"ulimit -f {len(before) // 2048}; exec \"$@\"", "bash",
               *command("pets", *flags, "--epochs", "1", "--overwrite")]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment())
    assert "cannot write" in refusal_of(done)
    assert not list(tmp_path.glob(".*.tmp"))
