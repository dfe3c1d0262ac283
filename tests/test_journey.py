"""The four recipes: trained, killed, and continued to the end."""
import signal

import pytest
import torch

from conftest import TRAIN_IMAGES, assert_rates, cells, log_of, rewrite, saved, train
from launches import MODEL, after_saving, fork, kill_itself
from underway import end_of, processes_of, running, wait_for

# Of some 100 ms each in the miniature: time to kill.
EPOCHS, WARMUP = 12 if "micro" in MODEL else 5, 2
# Each recipe and each DeiT occur at least once; with --all, or one DeiT named, all occur.
FAST = (("cifar10", "2020"), ("cifar100", "2021"), ("flowers", "2020"), ("pets", "head"))


@pytest.mark.parametrize("recipe, era", cells(*FAST))
def test_recipe_trains_is_killed_and_continues(recipe, era, data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / recipe, "--output_dir", tmp_path,
             "--epochs", EPOCHS, "--warmup-epochs", WARMUP, "--eval-freq", "2",
             "--num_workers", "1"]
    options = {"era": era, "processes": 2}
    if recipe == "pets":  # as a user launches it
        with running(recipe, *flags, **options) as run:
            wait_for((tmp_path / "checkpoint.pth").exists, seconds=300)
            run.kill()  # and all its processes end
            wait_for(lambda: not processes_of(tmp_path), seconds=20)
            killed = end_of(run)
    else:
        killed = fork(recipe, *flags, **options, before=after_saving(kill_itself))
        assert killed.returncode == 128 + signal.SIGKILL
    for said in (f"on {recipe}: {TRAIN_IMAGES[recipe]} train and 21 test images",
                 "16 = 2 processes x 8 images", "3 steps", str(checkpoint), "head is new"):
        assert said in killed.stdout
    assert killed.stdout.count("Fine-tuning") == 1  # by rank 0 alone

    state = saved(tmp_path / "checkpoint.pth")
    trained = state["epoch"] + 1
    assert trained < EPOCHS, "the run was over before it could be killed"
    for name, start in saved(checkpoint)["model"].items():
        if name != "pos_embed":  # which is resampled to the input size here
            average = state["model_ema"][name]
            assert torch.allclose(average, start, atol=1e-5), "the EMA started from random weights"
    rewrite(tmp_path / "checkpoint.pth", lambda state: {**state, "model_ema": {
        name: torch.full_like(value, 7) for name, value in state["model_ema"].items()}})
    done = train(recipe, *flags, **options)
    assert f"epoch {trained + 1} of {EPOCHS} comes next" in done.stdout
    assert done.stderr == ""

    rows = log_of(tmp_path)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert_rates(tmp_path, EPOCHS, WARMUP, 3e-4 * 16 / 512)
    evaluated = [row for row in rows if "test_acc1" in row]
    assert [row["epoch"] for row in evaluated] == [*range(1, EPOCHS - 1, 2), EPOCHS - 1]
    state = saved(tmp_path / "checkpoint.pth")
    assert state["epoch"] == EPOCHS - 1
    # Only an average that was restored is near the mark: it moves by 0.004 % a step.
    assert all((value - 7).abs().max() < 0.2 for value in state["model_ema"].values())
    best = max(evaluated, key=lambda row: row["test_acc1"])
    assert saved(tmp_path / "best_checkpoint.pth")["epoch"] == best["epoch"]
