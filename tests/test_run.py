"""What a run computes, says and writes, and what can be made of its checkpoints."""
import argparse
import json
import re
import shutil

import pytest
import torch

from conftest import ERAS, cells, error_of, log_of, saved, train
from launches import MODEL, OTHER_MODEL, TESTS, fork


@pytest.mark.parametrize("recipe, era", [
    *cells(("cifar10", "head"), ("pets", "head")), *(("imagenet", era) for era in ERAS)])
def test_first_epoch_is_that_of_the_published_modules(recipe, era, data, flags, tmp_path):
    """At the peak learning rate, so that optimizer and weight decay matter."""
    # The published flowers modules ignore --reprob; at 0 both ways are the same.
    flags = [*flags, "--data-path", data / recipe, "--epochs", "1", "--warmup-epochs", "0",
             "--num_workers", "1", "--lr", "0.01", "--input-size",
             "224", *([] if recipe == "imagenet" else ["--reprob", "0"])]
    options = {"era": era, "processes": 2}
    train(recipe, *flags, **options)
    train(recipe, *flags, "--output_dir", tmp_path / "published", script=TESTS / "published.py",
          **options)
    ours, theirs = log_of(tmp_path / "run")[0], log_of(tmp_path / "published")[0]
    assert ours["train_loss"] == theirs["train_loss"]
    assert ours["train_lr"] == theirs["train_lr"] == pytest.approx(0.01 * 16 / 512)
    weights = [torch.load(tmp_path / name / "checkpoint.pth", **TRUSTED)["model"]
               for name in ("run", "published")]
    assert all(torch.equal(*tensors) for tensors in zip(*(each.values() for each in weights)))


TRUSTED = {"weights_only": False} if hasattr(torch.serialization, "add_safe_globals") else {}


def test_what_a_run_says_and_writes(flags, checkpoint, tmp_path):
    folder = tmp_path / "run"
    done = train("pets", *flags, "--weight-decay", "0.2")
    assert done.stdout.count("; test accuracy") == 2  # said once for each evaluation
    assert "Accuracy of the network" not in done.stdout and "Namespace" not in done.stdout
    assert "8 = 1 process x 8 images" in done.stdout
    assert re.findall(r"Epoch (\d) of 2: .* to go", done.stdout) == ["1", "2"]
    *_, best, report = done.stdout.splitlines()
    assert "Best" in best and str(folder / "best_checkpoint.pth") in best
    assert f"report.py {folder}" in report
    rows = log_of(folder)
    assert f"{max(row['test_acc1'] for row in rows):.2f} %" in best
    assert all(row["train_seconds"] > 0 for row in rows)

    facts = json.loads((folder / "run.json").read_text())
    assert len(facts["classes"]) == 37
    settings = facts["settings"]
    assert settings["effective batch size"] == 8 and settings["weight_decay"] == 0.2
    for differs in ("--weight-decay 0.2 (published: 0.1)", "--epochs 2 (published: 100)",
                    "effective batch size 8 (published: 1024)",
                    "49 train images (published: 3680)", "21 test images (published: 3669)"):
        assert differs in facts["differs"] and differs in done.stdout
    assert not any("--lr" in text or "--drop-path" in text for text in facts["differs"])


def test_epochs_without_evaluation_claim_no_accuracy_and_train_the_same(flags, tmp_path):
    flags = [*flags, "--epochs", "4", "--num_workers", "1", "--warmup-epochs", "0"]
    train("pets", *flags)
    third = train("pets", *flags, "--eval-freq", "3", "--output_dir", tmp_path / "third",
                  "--no-model-ema")
    claims = ["test_acc1" in row for row in log_of(tmp_path / "third")]
    assert claims == [False, False, True, True] and third.stdout.count("; test accuracy") == 2
    losses = [[row["train_loss"] for row in log_of(tmp_path / name)] for name in ("run", "third")]
    assert losses[0] == losses[1]
    last = tmp_path / "third" / "checkpoint.pth"
    assert saved(last)["model_ema"] is None
    flags += ["--epochs", "5", "--resume", last, "--output_dir", tmp_path / "fifth"]
    assert "--model-ema True (there: False)" in error_of(fork("pets", *flags))


@pytest.fixture(scope="module")
def tuned(data, checkpoint, tmp_path_factory):
    """The folder of a Pets run that has learnt something."""
    folder = tmp_path_factory.mktemp("tuned")
    train("pets", "--resume", checkpoint, "--data-path", data / "pets", "--output_dir", folder,
          "--lr", "1e-1", "--warmup-epochs", "0", "--epochs", "1")
    return folder


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_counts_every_image_once(processes, data, tuned, tmp_path):
    """Of a checkpoint as plain DeiT writes it, over any number of processes."""
    path = tmp_path / "deit.pth"
    torch.save({**saved(tuned / "checkpoint.pth"), "args": argparse.Namespace(lr=1e-3)}, path)
    done = train("pets", "--eval", "--resume", path, "--data-path", data / "pets",
                 processes=processes)
    row = log_of(tuned)[0]
    assert done.stdout.count(": test accuracy") == 1
    assert f"test accuracy {row['test_acc1']:.2f} %, top-5 {row['test_acc5']:.2f} %" in done.stdout
    assert f"loss {row['test_loss']:.4f}" in done.stdout and "21 images" in done.stdout


def test_what_a_run_that_goes_on_elsewhere_must_have_in_common(data, tuned, tmp_path):
    """As with DeiT: --resume names a run's checkpoint, --output_dir another folder."""
    flags = ["--data-path", data / "pets", "--output_dir", tmp_path / "run", "--epochs", "2",
             "--lr", "1e-1", "--warmup-epochs", "0"]
    own = tuned / "checkpoint.pth"
    few = fork("pets", *flags, "--resume", own, "--epochs", "1")
    assert "pass more --epochs" in error_of(few)
    plain = saved(own)
    del plain["settings"], plain["origin"]
    torch.save(plain, tmp_path / "deit.pth")  # as plain DeiT's, but for the type of "args"
    for path in (own, tmp_path / "deit.pth"):
        other = fork("pets", *flags, "--resume", path, "--weight-decay", "0.3")
        assert "--weight-decay 0.3 (there: 0.1)" in error_of(other)
    held = fork("pets", *flags, "--resume", own, "--hold-out", "0.2")
    assert "--hold-out 0.2 (there: 0.0)" in error_of(held)
    groups = saved(own)
    groups["optimizer"]["param_groups"] = groups["optimizer"]["param_groups"][:1]
    torch.save(groups, tmp_path / "other_commit.pth")
    assert "another DeiT commit" in error_of(
        fork("pets", *flags, "--resume", tmp_path / "other_commit.pth"))
    assert not (tmp_path / "run").exists()


def test_own_images_train_and_evaluate(data, flags, tmp_path):
    """test_accumulation.py continues such a run."""
    run, own = tmp_path / "run", shutil.copytree(data / "folder", tmp_path / "own")
    flags = [*flags, "--data-set", "folder", "--data-path", own]
    for options in (["--check"], []):
        done = train("pets", *flags, *options)
        assert "on folder: 43 train and 6 test images, 3 classes" in done.stdout
    assert json.loads((run / "run.json").read_text())["classes"] == ["ant", "bee", "cow"]
    assert saved(run / "checkpoint.pth")["model"]["head.weight"].shape[0] == 3
    evaluate = [*flags, "--eval", "--resume", run / "checkpoint.pth"]
    (own / "val").rename(own / "test")
    assert "on 6 images" in train("pets", *evaluate).stdout
    for changed, its in ((["--model", OTHER_MODEL], MODEL), (["--input-size", "64"], "32")):
        assert f"{' '.join(changed)} (there: {its})" in error_of(fork("pets", *evaluate, *changed))
    for split in ("train", "test"):
        (own / split / "ant").rename(own / split / "zebra")
    assert "only here: zebra; only there: ant" in error_of(fork("pets", *evaluate))
    (own / "test" / "bee").rename(own / "bee")
    assert "bee" in error_of(fork("pets", *flags, "--output_dir", tmp_path / "new"))
