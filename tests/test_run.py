"""What a run computes, says and writes, and what can be made of its checkpoints."""
import argparse
import itertools
import json
import re
import shutil
import time

import pytest
import torch

from conftest import TRAIN_IMAGES, cells, error_of, log_of, saved, train
from deit_plugin.data import evaluated_on
from launches import TESTS, fork


@pytest.mark.parametrize("recipe, era", cells(
    ("cifar10", "2020"), ("imagenet", "2021"), ("pets", "head"),
    recipes=[*TRAIN_IMAGES, "imagenet"]))
def test_first_epoch_is_that_of_the_published_modules(recipe, era, data, flags, tmp_path):
    """At the peak learning rate, so that optimizer and weight decay matter."""
    # The published flowers modules ignore --reprob; at 0 both ways are the same.
    flags = [*flags, "--data-path", data / recipe, "--epochs", "1", "--warmup-epochs", "0",
             "--num_workers", "1", "--lr", "0.01", "--input-size",
             "224", *([] if recipe == "imagenet" else ["--reprob", "0"]),
             *(["--clip-grad", "0.05"] if recipe == "pets" else [])]
    options = {"era": era, "processes": 2}
    train(recipe, *flags, **options)
    train(recipe, *flags, "--output_dir", tmp_path / "published", script=TESTS / "published.py",
          **options)
    ours, theirs = log_of(tmp_path / "run")[0], log_of(tmp_path / "published")[0]
    assert ours["train_loss"] == theirs["train_loss"]
    assert ours["train_lr"] == theirs["train_lr"] == pytest.approx(0.01 * 16 / 512)
    weights = [saved(tmp_path / name / "checkpoint.pth", trust=True)["model"]
               for name in ("run", "published")]
    assert all(torch.equal(*tensors) for tensors in zip(*(each.values() for each in weights)))


def test_what_a_run_says_and_writes(flags, checkpoint, tmp_path):
    folder = tmp_path / "run"
    said = train("pets", *flags, "--weight-decay", "0.2", "--epochs", "4", "--eval-freq", "2",
                 "--no-model-ema", processes=2).stdout
    assert "Accuracy of the network" not in said and "Namespace" not in said
    lines = said.splitlines()
    assert len(lines) < 16 and [line for line in lines if line.startswith("Epoch")] == lines[-6:-2]
    for number, line in enumerate(lines[-6:-2], start=1):
        assert re.match(rf"Epoch {number} of 4: loss [\d.]+, learning rate \S+; .*"
                        r"0:00:\d\d so far, about 0:00:\d\d to go", line)
        assert line.count("; test accuracy") == (number % 2 == 0)
    rows = log_of(folder)
    best = max(row.get("test_acc1", 0) for row in rows)
    assert f"Best test accuracy: {best:.2f} %" in lines[-2]
    assert str(folder / "best_checkpoint.pth") in lines[-2] and f"report.py {folder}" in lines[-1]
    assert ["test_acc1" in row for row in rows] == [False, True] * 2
    assert saved(folder / "checkpoint.pth")["model_ema"] is None

    facts = json.loads((folder / "run.json").read_text())
    settings, launch = facts["settings"], facts["launches"][0]
    assert settings["effective batch size"] == 16 and settings["weight_decay"] == 0.2
    for differs in ("--weight-decay 0.2 (published: 0.1)", "--epochs 4 (published: 100)",
                    "effective batch size 16 (published: 1024)",
                    "49 train images (published: 3680)", "21 test images (published: 3669)"):
        assert differs in facts["differs"] and differs in said
    assert not any("--lr" in text or "--drop-path" in text for text in facts["differs"])
    assert launch["versions"]["torch"] == torch.__version__ and launch["processes"] == 2
    assert {"timm", "CUDA", "cuDNN"} <= set(launch["versions"])
    assert any(package.startswith("torch==") for package in launch["packages"])
    assert launch["started"] <= launch["ended"] and str(checkpoint) in launch["command"]
    assert facts["origin"]["path"] == str(checkpoint) and len(launch["machines"]) == 1
    assert set(launch["bundle"]) == {"folder", "commit", "modified", "crc32"}


def let_time_fly():
    """Half a minute between any two looks at the clock."""
    time.monotonic = itertools.count(0, 31).__next__


def test_verbose_brings_deit_s_lines_and_a_long_epoch_its_batches(flags):
    flags += ["--verbose", "--epochs", "1"]
    said = train("pets", *flags, before=let_time_fly, PATH="/bin").stdout  # perhaps without git
    assert re.search(r"  batch 2 of 6, loss [\d.]+, [\d.]+ images/s, about 0:\d\d:\d\d to go", said)
    for words in ("  test batch 1 of 2, ", "Epoch: [0]", "Epoch 1 of 1", "learning rate 1e-06; ",
                  "8 = 1 process x 8 images"):
        assert words in said


def test_what_a_run_that_goes_on_elsewhere_must_have_in_common(run, checkpoint, flags, refusal,
                                                              tmp_path):
    """As with DeiT: --resume names a run's checkpoint, --output_dir another folder."""
    own, plain, regrouped, other = run / "checkpoint.pth", *(
        tmp_path / name for name in ("deit.pth", "other_commit.pth", "other"))
    state = saved(own)
    torch.save({name: argparse.Namespace(**part) if name == "args" else part
                for name, part in state.items() if name not in ("settings", "origin")}, plain)
    flags += ["--output_dir", other, "--epochs", "3", "--resume", own]
    for words, says in (
            (["--epochs", "2"], "pass more --epochs"),
            (["--weight-decay", "0.3"], "--weight-decay 0.3 (there: 0.1)"),
            (["--resume", plain, "--weight-decay", "0.3"], "--weight-decay 0.3 (there: 0.1)"),
            (["--no-model-ema"], "--model-ema False (there: True)")):
        assert says in refusal("pets", *flags, *words)
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    torch.save(state, regrouped)
    assert "another DeiT commit" in error_of(fork("pets", *flags, "--resume", regrouped))
    assert not other.exists()
    other.mkdir()
    shutil.copy(checkpoint, other / "checkpoint.pth")
    assert "move it" in refusal("pets", *flags)


def test_own_images_train_and_evaluate(own, flags, decide, refusal, tmp_path):
    """On val/, or valid/; on test/ if it is asked for or alone. test_accumulation.py continues."""
    (own / "val").rename(own / "valid")
    shutil.copytree(own / "valid", own / "test")
    next((own / "test" / "ant").iterdir()).unlink()
    flags += ["--data-set", "folder", "--data-path", own, "--epochs", "1"]
    said = train("pets", *flags).stdout
    assert "on folder: 43 train and 6 test images, 3 classes" in said
    assert f"evaluation on 6 images of {own}/valid" in said
    evaluate = [*flags, "--eval", "--resume", tmp_path / "run" / "checkpoint.pth"]

    def images(*words):
        found = decide("pets", *evaluate, *words)
        assert not found.problems
        return evaluated_on(found.data, found.args)

    assert images() == f"6 images of {own}/valid"
    assert images("--test-split") == f"5 images of {own}/test"
    shutil.rmtree(own / "valid")
    assert f"on 5 images of {own}/test" in train("pets", *evaluate).stdout
    assert "--input-size 64 (there: 32)" in refusal("pets", *evaluate, "--input-size", "64")
    for split in ("train", "test"):
        (own / split / "ant").rename(own / split / "zebra")
    assert "only here: zebra; only there: ant" in refusal("pets", *evaluate)
