"""A run that was killed is the run that never stopped, to the last bit; and what may change."""
import json
import os
import re
import shutil

import pytest
import torch

import generate
from conftest import ERAS, assert_rates, error_of, log_of, rates_of, results_of, saved, train
from launches import after_saving, fork, kill_itself


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 train images: enough for --repeated-aug, which counts in groups of 256."""
    folder = tmp_path_factory.mktemp("many")
    generate.images(folder, train=300)
    return folder


AUGMENTED = ["--reprob", "0.5", "--drop-path", "0.3", "--mixup", "0.8", "--cutmix", "1",
             "--warmup-epochs", "0", "--model-ema-decay", "0.9", "--epochs", "3"]


def assert_identical(run, other):
    """Losses, accuracies, weights, EMA and optimizer are equal bit for bit."""
    assert results_of(run) == results_of(other)
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        states = [saved(folder / name) for folder in (run, other)]
        for part in ("model", "model_ema"):
            for key, tensor in states[0][part].items():
                assert torch.equal(tensor, states[1][part][key]), (name, part, key)
        moments = [state["optimizer"]["state"] for state in states]
        assert all(torch.equal(moments[0][number]["exp_avg"], moments[1][number]["exp_avg"])
                   for number in moments[0])


def kill_in_the_second_epoch():
    """After two batches, when the first epoch's checkpoint is written."""
    import deit_plugin.accumulation as accumulation

    iterate = accumulation.Loader.__iter__

    def die_later(loader):
        for number, batch in enumerate(iterate(loader)):
            if number == 2 and epochs:
                kill_itself()
            yield batch
        epochs.append(1)

    epochs = []
    accumulation.Loader.__iter__ = die_later


def kill_after_the_second_log_line():
    """Before the second epoch's checkpoint is written."""
    import convert_to_deit

    save = convert_to_deit.save

    def save_the_first(state, path):
        if state["epoch"]:
            kill_itself()
        save(state, path)

    convert_to_deit.save = save_the_first


def leave_out_seeding():
    import deit_plugin.loaders as loaders

    loaders._seed_cpu = lambda *key: 0


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("era, processes, more", [
    (ERAS[-1], 1, ["--accum-iter", "2", "--repeated-aug"]),
    *[pytest.param(era, 2, [], marks=[] if era == ERAS[0] else pytest.mark.slow) for era in ERAS]])
def test_a_killed_run_ends_as_one_that_never_stopped(era, processes, more, workers, many, flags,
                                                     tmp_path):
    flags = [*flags, *AUGMENTED, *more, "--data-set", "folder", "--data-path", many,
             "--num_workers", workers]
    options = {"processes": processes, "era": era}
    train("pets", *flags, **options)
    killed, control = ([*flags, "--output_dir", tmp_path / name] for name in ("killed", "control"))
    kill = kill_in_the_second_epoch if workers == "2" else kill_after_the_second_log_line
    assert fork("pets", *killed, **options, before=kill).returncode
    if workers == "2":  # two negative controls: one continues without seeding, one has another seed
        shutil.copytree(tmp_path / "killed", tmp_path / "control")
        train("pets", *control, **options, before=leave_out_seeding)
    else:
        train("pets", *control, "--seed", "1", **options)
    assert "epoch 2 of 3 comes next" in train("pets", *killed, **options).stdout
    assert_identical(tmp_path / "run", tmp_path / "killed")
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "run", tmp_path / "control")


def test_more_epochs_follow_their_own_schedule(flags, tmp_path):
    """And log, best accuracy and time continue from the parent's checkpoint, not from its log."""
    parent, child = tmp_path / "run", tmp_path / "child"
    train("pets", *flags, "--epochs", "4", "--warmup-epochs", "1", "--lr", "0.01")
    best, state = max(row["test_acc1"] for row in log_of(parent)), saved(parent / "checkpoint.pth")
    for row in state["rows"]:
        row["train_seconds"] = 3600
    torch.save(state, tmp_path / "slow.pth")
    os.replace(tmp_path / "slow.pth", parent / "checkpoint.pth")  # the old one is mapped
    (parent / "log.txt").unlink()
    more = [*flags, "--epochs", "6", "--warmup-epochs", "1", "--lr", "0.01", "--output_dir", child,
            "--resume", parent / "checkpoint.pth"]
    killed = fork("pets", *more, before=after_saving(kill_itself))
    assert f"changed since {parent}/checkpoint.pth: --epochs 6 (there: 4)" in killed.stdout
    parent.rename(tmp_path / "moved")
    more[more.index(parent / "checkpoint.pth")] = tmp_path / "moved" / "checkpoint.pth"
    done = train("pets", *more)  # "so far" counts the whole run
    assert re.search(r"Epoch 6 of 6: .*; 4:\d\d:\d\d so far", done.stdout)
    (tmp_path / "moved").rename(parent)
    assert rates_of(child)[:4] == [row["train_lr"] for row in state["rows"]]
    train("pets", *flags, "--epochs", "6", "--warmup-epochs", "1", "--lr", "0.01", "--output_dir",
          tmp_path / "six")
    assert rates_of(child)[4:] == rates_of(tmp_path / "six")[4:]
    assert_rates(tmp_path / "six", 6, 1, 0.01 * 8 / 512)
    assert [row["epoch"] for row in log_of(child)] == list(range(6))
    facts = json.loads((child / "run.json").read_text())
    assert facts["parent"]["path"] == str(parent / "checkpoint.pth") and len(facts["launches"]) == 2
    assert saved(child / "best_checkpoint.pth")["epoch"] < 4 or max(
        row["test_acc1"] for row in log_of(child)) > best


def test_the_best_of_a_parent_that_trained_on_is_not_taken_over(flags, tmp_path):
    """Its best_checkpoint.pth comes from a later epoch than the checkpoint that is continued."""
    parent, child = tmp_path / "run", tmp_path / "child"
    flags = [*flags, "--lr", "0.05", "--warmup-epochs", "0"]
    train("pets", *flags, "--epochs", "1")
    kept = shutil.copy(parent / "checkpoint.pth", parent / "first.pth")
    with open(parent / "log.txt", "a") as log:
        log.write('{"epoch": 1, "test_acc1": 99}\n')
    best = saved(parent / "best_checkpoint.pth")
    torch.save({**best, "epoch": 1}, tmp_path / "later.pth")
    os.replace(tmp_path / "later.pth", parent / "best_checkpoint.pth")
    train("pets", *flags, "--resume", kept, "--epochs", "2", "--output_dir", child)
    done = train("pets", "--eval", "--resume", child / "best_checkpoint.pth", *flags[2:])
    row = log_of(child)[saved(child / "best_checkpoint.pth")["epoch"]]
    assert f"test accuracy {row['test_acc1']:.2f} %" in done.stdout
    assert f"loss {row['test_loss']:.4f}" in done.stdout


def scale_losses_by(scale, restored):
    """A loss scale, which the CPU does not have; what is restored goes to a file."""
    def change():
        from timm.utils import NativeScaler

        NativeScaler.state_dict = lambda _: {"scale": scale}
        NativeScaler.load_state_dict = lambda _, state: restored.write_text(str(state["scale"]))

    return change


def test_the_loss_scale_is_restored_and_the_old_checkpoint_let_go(flags, tmp_path):
    """A file that is mapped into memory keeps its space on the disk."""
    scale, old = scale_losses_by(1024, tmp_path / "restored"), tmp_path / "run" / "checkpoint.pth"

    def change():
        scale()
        after_saving(lambda: shutil.copy("/proc/self/maps", tmp_path / "maps"))()

    train("pets", *flags, "--epochs", "1", before=scale)
    train("pets", *flags, "--output_dir", tmp_path / "child", "--resume", old, before=change)
    assert (tmp_path / "restored").read_text() == "1024"
    assert str(old) not in (tmp_path / "maps").read_text()


def test_moved_weights_are_the_same_run_and_other_weights_or_a_photo_more_are_not(
        data, checkpoint, flags, tmp_path):
    own, moved, other = (tmp_path / name for name in ("own", "moved.pth", checkpoint.name))
    shutil.copytree(data / "folder", own)
    shutil.copy(checkpoint, moved)
    state = saved(checkpoint)["model"]
    torch.save({"model": {**state, "norm.bias": state["norm.bias"] + 1}}, other)
    flags += ["--data-set", "folder", "--data-path", own, "--epochs", "1"]
    train("pets", *flags)
    assert "nothing left" in train("pets", *flags, "--resume", moved).stdout
    line = error_of(fork("pets", *flags, "--resume", other))
    assert f"--resume {other}" in line and "checksum" in line and str(checkpoint) in line
    os.remove(moved)
    assert "nothing left" in train("pets", *flags, "--resume", moved).stdout
    shutil.copy(next(own.glob("train/ant/*")), own / "train" / "ant" / "new.png")
    line = error_of(fork("pets", *flags))
    assert "44 train images (there: 43)" in line and "--overwrite" in line
