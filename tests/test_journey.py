"""The four recipes as a user launches them: trained, killed, and continued to the end."""
import pytest

from conftest import ERAS, REAL_DEIT, RECIPES, log_of, saved, train
from processes import kill_all, running, wait_for

TRAINING_IMAGES = {"cifar10": 50, "cifar100": 50, "flowers": 49, "pets": 49}
EPOCHS = 5 if REAL_DEIT else 40  # of some 50 ms each in the miniature: time enough to kill


def noise(stderr):
    """The lines that none of these small runs should print."""
    return [line for line in stderr.splitlines() if "official" not in line]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("era", ERAS)
def test_recipe_trains_is_killed_and_continues(recipe, era, data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / recipe, "--output_dir", tmp_path,
             "--epochs", EPOCHS, "--warmup-epochs", "2"]
    with running(recipe, *flags, era=era) as run:
        wait_for((tmp_path / "checkpoint.pth").exists, seconds=300)
        kill_all(run, tmp_path)
        stdout, stderr = run.communicate()
    images = TRAINING_IMAGES[recipe]
    assert f"on {recipe}: {images} training and 21 test images" in stdout
    assert f"2 processes x 8 images = 16 images; 3 steps an epoch, {EPOCHS} epochs" in stdout
    assert f"start: {checkpoint} (the classifier head is new)" in stdout
    assert stdout.count("Fine-tuning") == 1  # by the first process alone
    assert noise(stderr) == []

    trained = saved(tmp_path / "checkpoint.pth")["epoch"] + 1
    assert trained < EPOCHS, "the run was over before it could be killed"
    done = train(recipe, *flags, era=era)
    assert f"epoch {trained} comes next" in done.stdout
    assert noise(done.stderr) == []
    rows = log_of(tmp_path)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert all(0 <= row["test_acc1"] <= row["test_acc5"] <= 100 for row in rows)
    best = ["best_checkpoint.pth"] if any(row["test_acc1"] for row in rows) else []
    for name in ["checkpoint.pth", *best]:
        state = saved(tmp_path / name)
        assert state["model"].keys() == state["model_ema"].keys()
    assert saved(tmp_path / "checkpoint.pth")["epoch"] == EPOCHS - 1
