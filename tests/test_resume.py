"""A run that was killed is the run that never stopped, to the last bit; and what may change."""
import json
import re
import shutil

import pytest
import torch

from conftest import ERAS, assert_rates, log_of, results_of, rewrite, saved, train
from launches import after_saving, fork, kill_itself

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


@pytest.mark.parametrize("era, processes, workers, more", [
    (ERAS[-1], 1, "2", ["--accum-iter", "2", "--repeated-aug"]), (ERAS[0], 2, "0", []),
    *[pytest.param(era, 2, "2", [], marks=pytest.mark.slow) for era in ERAS]])
def test_a_killed_run_ends_as_one_that_never_stopped(era, processes, workers, more, data,
                                                     flags, tmp_path):
    """Also if it had logged an epoch without saving it. Another seed ends otherwise."""
    # --repeated-aug counts in groups of 256 images.
    folder = data / ("imagenet" if "--repeated-aug" in more else "folder")
    flags = [*flags, *AUGMENTED, *more, "--data-set", "folder", "--data-path", folder,
             "--num_workers", workers]
    options = {"processes": processes, "era": era}
    train("pets", *flags, **options)
    killed, control = ([*flags, "--output_dir", tmp_path / name] for name in ("killed", "control"))
    assert fork("pets", *killed, **options, before=after_saving(kill_itself)).returncode
    with open(tmp_path / "killed" / "log.txt", "a") as log:
        log.write('{"epoch": 1, "train_loss": 9}\n{"epo')
    assert "epoch 2 of 3 comes next" in train("pets", *killed, **options).stdout
    assert_identical(tmp_path / "run", tmp_path / "killed")
    train("pets", *control, "--seed", "1", "--epochs", "1", **options)
    losses = [log_of(tmp_path / name)[0]["train_loss"] for name in ("run", "control")]
    assert losses[0] != losses[1]


def test_more_epochs_follow_their_own_schedule(run, flags, tmp_path):
    """And log, time and a best accuracy, here one that cannot be reached, are the parent's."""
    child, moved = tmp_path / "child", tmp_path / "moved"
    rewrite(run / "checkpoint.pth", lambda state: {
        **state, "best": {"epoch": 0, "acc1": 101.0},
        "rows": [{**row, "train_seconds": 3600} for row in state["rows"]]})
    rewrite(run / "best_checkpoint.pth", lambda state: {**state, "epoch": 0})
    (run / "log.txt").unlink()
    more = [*flags, "--epochs", "4", "--warmup-epochs", "1", "--output_dir", child]
    killed = fork("pets", *more, "--resume", run / "checkpoint.pth",
                  before=after_saving(kill_itself))
    assert f"changed since {run}/checkpoint.pth: --epochs 4 (there: 2)" in killed.stdout
    run.rename(moved)
    done = train("pets", *more, "--resume", moved / "checkpoint.pth")
    assert re.search(r"Epoch 4 of 4: .*; 2:\d\d:\d\d so far", done.stdout)  # of the whole run
    assert [row["epoch"] for row in log_of(child)] == list(range(4))
    assert_rates(child, 4, 1, 3e-4 * 8 / 512)
    facts = json.loads((child / "run.json").read_text())
    assert facts["parent"]["path"] == str(run / "checkpoint.pth") and len(facts["launches"]) == 2
    assert "Best test accuracy: 101.00 % after epoch 1" in done.stdout
    assert saved(child / "best_checkpoint.pth")["epoch"] == 0


def test_the_best_of_a_parent_that_trained_on_is_not_taken_over(run, flags, decide, tmp_path):
    """If its best_checkpoint.pth comes from a later epoch than the checkpoint that goes on."""
    own, best = run / "checkpoint.pth", run / "best_checkpoint.pth"
    rewrite(own, lambda state: {**state, "best": {"epoch": 0, "acc1": 50.0}})
    rewrite(best, lambda state: {**state, "epoch": 1})
    found = decide("pets", *flags, "--resume", own, "--epochs", "3", "--output_dir",
                   tmp_path / "child")
    assert found.decided.start.best is None


def test_the_loss_scale_is_restored_and_the_old_checkpoint_let_go(run, flags, tmp_path):
    """The CPU has no loss scale. A file that is mapped into memory keeps its space on the disk."""
    def watch():
        from timm.utils import NativeScaler

        NativeScaler.load_state_dict = lambda _, state: restored.write_text(str(state["scale"]))
        after_saving(lambda: shutil.copy("/proc/self/maps", tmp_path / "maps"))()

    restored = tmp_path / "restored"
    rewrite(run / "checkpoint.pth", lambda state: {**state, "scaler": {"scale": 1024}})
    train("pets", *flags, "--epochs", "3", "--output_dir", tmp_path / "child", "--resume",
          run / "checkpoint.pth", before=watch)
    assert restored.read_text() == "1024"
    assert str(run / "checkpoint.pth") not in (tmp_path / "maps").read_text()


def test_moved_weights_are_the_same_run_and_others_are_not(checkpoint, run, flags, decide, refusal,
                                                           tmp_path):
    moved, other = tmp_path / "moved.pth", tmp_path / checkpoint.name
    shutil.copy(checkpoint, moved)
    assert not decide("pets", *flags, "--resume", moved).problems
    moved.unlink()  # the run does not need it any more
    assert not decide("pets", *flags, "--resume", moved).problems
    state = saved(checkpoint)["model"]
    with open(other, "wb") as file:  # as the converter does: only values in the file differ
        torch.save({"model": {**state, "norm.bias": state["norm.bias"] + 1}}, file)
    line = refusal("pets", *flags, "--resume", other)
    assert f"--resume {other}" in line and "checksum" in line and str(checkpoint) in line


def test_an_image_more_makes_another_run(data, run, flags, refusal, tmp_path):
    pets = shutil.copytree(data / "pets", tmp_path / "pets")
    with open(pets / "annotations" / "trainval.txt", "a") as listed:
        listed.write("dog_breed2_9 2 2 2\n")
    line = refusal("pets", *flags, "--data-path", pets)
    assert "50 train images (there: 49)" in line and "--overwrite" in line
    assert "names and labels of the train images" in line and "there: " in line
