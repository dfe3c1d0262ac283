"""What is decided, once, before any process trains; and that the checkpoint is all that counts."""
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import datasets
from conftest import error_of, log_of, rewrite, saved, train
from deit_plugin import narrator, weights
from deit_plugin.data import checksum
from deit_plugin.job import Job, Start, for_deit
from launches import after_saving, fork, kill_itself


def test_all_problems_are_named_in_one_answer_by_one_process(flags):
    done = fork("pets", *flags, "--data-path", "/no/data", "--model", "no_such", "--mixup", "-1",
                "--decay-rate", "0.5", "--output_dir", __file__, "--device", "cuda", processes=8,
                CUDA_VISIBLE_DEVICES="")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and len(lines) == 6, done.stderr
    for words in ("/no/data", "--model no_such", "--mixup -1", "--decay-rate has no effect",
                  f"--output_dir {__file__}", "NPROC_PER_NODE=8, but torch can use 0 GPUs"):
        assert len([line for line in lines if line.startswith("error: ") and words in line]) == 1


def job(data_set="pets", hold_out=0.0, published=None, parent=None, is_moco_v3=True):
    start = Start("a.pth", mark=[], continues=False, epoch=0, has_head=False, parent=parent,
                  origin={"is_moco_v3": is_moco_v3}, rows=[], best=None, launches=[])
    args = Namespace(data_set=data_set, hold_out=hold_out)
    return Job(args, {"lr": 0.1}, published, None, [], start, {})


RECIPE = {"published": {"lr": 0.1}}


@pytest.mark.parametrize("options, accuracy, reason", [
    (RECIPE, 93.2, None), ({**RECIPE, "data_set": "cifar100"}, 90.5, None),
    ({"published": {"lr": 0.2}}, 93.2, "--lr 0.1 (published: 0.2)"), ({}, 93.2, "no recipe"),
    ({**RECIPE, "parent": {"path": "b.pth"}}, 93.2, "continues another"),
    ({**RECIPE, "is_moco_v3": False}, 93.2, "other weights"),
    ({**RECIPE, "hold_out": 0.2}, None, "nothing was published"),
    ({"data_set": "folder"}, None, "nothing was published"),
])
def test_only_the_recipe_from_moco_v3_s_weights_is_comparable(options, accuracy, reason):
    decided = job(**options)
    assert decided.published_accuracy == accuracy
    assert reason in decided.not_comparable if reason else decided.not_comparable is None


@pytest.mark.parametrize("unscale, rate", [(False, 1.2), (True, 0.3)])
def test_the_rate_that_deit_scales_counts_accumulated_batches(unscale, rate):
    decided = job()
    decided.args.accum_iter, decided.args.lr, decided.args.unscale_lr = 4, 0.3, unscale
    assert for_deit(decided).lr == pytest.approx(rate) and decided.args.lr == 0.3


@pytest.mark.parametrize("reprob, more", [("0.25", "random erasing acts here"), ("0", "")])
def test_flowers_with_and_without_random_erasing_is_the_recipe(reprob, more, data, flags, decide):
    found = decide("flowers", *flags, "--data-path", data / "flowers", "--reprob", reprob)
    said = narrator.describe(found.decided, found.data)
    assert not any("--reprob" in text for text in found.decided.differs) and more in said


def test_a_checkpoint_that_is_replaced_while_workers_start_is_refused(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"model": {"module.b": torch.ones(3)}}, path)
    mark = weights.mark_of(path)
    assert list(weights.read_again(path, mark, trust=False)["model"]) == ["b"]
    torch.save({"model": {"module.b": torch.zeros(3)}}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(OSError, match="a.pth was replaced"):
        weights.read_again(path, mark, trust=False)


def test_data_are_known_by_names_and_labels(own, tmp_path):
    """A folder that was moved is the same."""
    def known(*other_labels):
        args = Namespace(data_set="folder", data_path=str(own), input_size=32)
        images = datasets.build_dataset(True, args)[0]
        images.targets = [*other_labels, *images.targets[len(other_labels):]]
        return checksum(images, str(own))

    before, relabelled = known(), known(2, 2)
    own = own.rename(tmp_path / "moved")
    assert known() == before
    image = next((own / "train" / "ant").iterdir())
    image.rename(image.with_name("renamed.png"))
    assert len({before, relabelled, known()}) == 3


def test_a_kill_before_the_best_checkpoint_has_its_name(flags, tmp_path):
    """The next launch names it, or a later one that is better, and none of another epoch."""
    run = tmp_path / "run"
    assert fork("pets", *flags, before=after_saving(kill_itself)).returncode == 137
    assert not (run / "best_checkpoint.pth").exists() and len(log_of(run)) == 1
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    train("pets", *flags)
    best = max(log_of(run), key=lambda row: row["test_acc1"])
    checkpoint = saved(run / "best_checkpoint.pth")
    assert checkpoint["epoch"] == checkpoint["best"]["epoch"] == best["epoch"]
    assert checkpoint["best"]["acc1"] == best["test_acc1"]
    flags += ["--output_dir", copy, "--epochs", "1"]
    rewrite(copy / "checkpoint.pth", lambda state: {
        **state, "settings": {**state["settings"], "epochs": 1}})
    assert "nothing left" in train("pets", *flags).stdout
    assert saved(copy / "best_checkpoint.pth")["epoch"] == 0


def test_a_run_of_an_earlier_version_goes_on_with_its_log(run, flags, decide, tmp_path):
    """That had no rows, no best and no checksums in its checkpoint."""
    rows = log_of(run)
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        rewrite(run / name, lambda state: {
            **{key: value for key, value in state.items() if key not in ("rows", "best")},
            "settings": {key: value for key, value in state["settings"].items()
                         if "checksum" not in key}})
    with open(run / "log.txt", "a") as log:
        log.write('{"epoch": 2, "test_acc1": 99}\n{"epo')  # of an epoch without a checkpoint
    found = decide("pets", *flags, "--epochs", "3", "--resume", run / "checkpoint.pth",
                   "--output_dir", tmp_path / "more")
    best = max(rows, key=lambda row: row["test_acc1"])
    start = found.decided.start
    assert not found.problems and start.rows == rows
    assert (start.best["epoch"], start.best["acc1"]) == (best["epoch"], best["test_acc1"])


def test_a_download_that_fails_or_is_not_worth_it_ends_in_one_line(flags, tmp_path):
    flags += ["--data-set", "cifar10", "--data-path", tmp_path / "cifar"]
    for words, says in ((["--model", "no_such"], "--model no_such"), ([], "cannot download")):
        failed = fork("pets", *flags, *words, https_proxy="http://127.0.0.1:9")
        assert says in error_of(failed) and not (tmp_path / "cifar").exists()
