"""What is decided, once, before any process trains; and that the checkpoint is all that counts."""
import json
import os
import re
import shutil
from argparse import Namespace

import pytest
import torch

from conftest import error_of, log_of, saved, train
from deit_plugin import provenance, weights
from deit_plugin.job import Job, Start, for_deit, read, write
from launches import fork, kill_itself, launch


def test_all_problems_are_named_in_one_answer_by_one_process(flags, tmp_path):
    counter = tmp_path / "sitecustomize.py"  # Python imports it at its start
    counter.write_text(f"open({str(tmp_path / 'started')!r}, 'a').write('x')")
    done = launch("pets", *flags, "--data-path", "/no/data", "--model", "no_such", "--mixup", "-1",
                  "--decay-rate", "0.5", "--output_dir", __file__, processes=8, NNODES="0",
                  PYTHONPATH=tmp_path)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and len(lines) == 6, done.stderr
    for words in ("/no/data", "--model no_such", "--mixup -1", "--decay-rate has no effect",
                  f"--output_dir {__file__}", "NNODES=0"):
        assert len([line for line in lines if line.startswith("error: ") and words in line]) == 1
    assert (tmp_path / "started").read_text() == "x"


def start(**changed):
    known = {"path": "a.pth", "mark": [1, 2], "continues": False, "epoch": 0, "has_head": False,
             "parent": None, "origin": {"path": "a.pth", "crc32": "0", "is_moco_v3": True},
             "rows": [], "best": None, "launches": []}
    return Start(**{**known, **changed})


def job(data_set="pets", hold_out=0.0, settings=None, published=None, **of_start):
    args = Namespace(data_set=data_set, hold_out=hold_out, lr=0.1 + 0.2, opt_betas=[0.9, 0.999])
    return Job(args, settings or {"lr": 0.1}, published, None, ["a", "\udce9"], start(**of_start),
               {"started": "now"})


RECIPE = {"published": {"lr": 0.1}}


@pytest.mark.parametrize("options, accuracy, reason", [
    (RECIPE, 93.2, None), ({**RECIPE, "data_set": "cifar100"}, 90.5, None),
    ({"published": {"lr": 0.2}}, 93.2, "--lr 0.1 (published: 0.2)"), ({}, 93.2, "no recipe"),
    ({**RECIPE, "parent": {"path": "b.pth"}}, 93.2, "continues another"),
    ({**RECIPE, "origin": {"is_moco_v3": False}}, 93.2, "other weights"),
    ({**RECIPE, "hold_out": 0.2}, None, "nothing was published"),
    ({"data_set": "folder"}, None, "nothing was published"),
])
def test_only_the_recipe_from_moco_v3_s_weights_is_comparable(options, accuracy, reason):
    decided = job(**options)
    assert decided.published_accuracy == accuracy
    assert reason in decided.not_comparable if reason else decided.not_comparable is None


def test_a_worker_reads_the_job_that_was_decided(tmp_path):
    decided = job(rows=[{"epoch": 0, "test_acc1": 1 / 3}], best={"epoch": 0, "acc1": 1 / 3})
    write(decided, str(tmp_path))
    decided.args.rank = 3
    assert read(str(tmp_path), rank=3) == decided


@pytest.mark.parametrize("unscale, rate", [(False, 1.2), (True, 0.3)])
def test_the_rate_that_deit_scales_counts_accumulated_batches(unscale, rate):
    decided = job()
    decided.args.accum_iter, decided.args.lr, decided.args.unscale_lr = 4, 0.3, unscale
    assert for_deit(decided).lr == pytest.approx(rate) and decided.args.lr == 0.3


def test_a_checksum_of_weights_is_of_their_values(tmp_path):
    """Not only of names and sizes, nor of the file's own name."""
    found = []
    for folder, value in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        path = tmp_path / folder / "weights.pth"
        path.parent.mkdir()
        torch.save({"model": {"norm.bias": torch.full((8,), value)}}, path)
        found.append(provenance.of_weights(str(path))["crc32"])
    assert found[0] == found[2] != found[1]
    (tmp_path / "a" / "weights.pth").rename(tmp_path / "moved.pth")
    assert provenance.of_weights(str(tmp_path / "moved.pth"))["crc32"] == found[0]


def test_a_checkpoint_that_is_replaced_while_workers_start_is_refused(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"model": {"module.b": torch.ones(3)}}, path)
    mark = weights.mark_of(path)
    assert list(weights.read_again(path, mark, trust=False)["model"]) == ["b"]
    torch.save({"model": {"module.b": torch.zeros(3)}}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(OSError, match="a.pth was replaced"):
        weights.read_again(path, mark, trust=False)


def test_data_are_known_by_names_and_labels(data, flags, tmp_path):
    """Of equal numbers, in swapped or renamed folders; a folder that was moved is the same."""
    own, run = shutil.copytree(data / "folder", tmp_path / "own"), tmp_path / "run"
    for name in ("train/ant/14.png", "val/ant/1.png"):  # as many as of the other classes
        (own / name).unlink(missing_ok=True)
    flags += ["--data-set", "folder", "--data-path", own, "--epochs", "1"]
    train("pets", *flags)
    own.rename(tmp_path / "moved")
    assert "nothing left" in train("pets", *flags, "--data-path", tmp_path / "moved").stdout
    (tmp_path / "moved").rename(own)
    for split in ("train", "val"):
        (own / split / "bee").rename(own / "other")
        (own / split / "cow").rename(own / split / "bee")
        (own / "other").rename(own / split / "cow")
    line = error_of(fork("pets", *flags))
    assert "names and labels of the train images" in line and "there: " in line
    again = [*flags, "--output_dir", tmp_path / "again"]
    train("pets", *again)
    settings = [json.loads((path / "run.json").read_text())["settings"]
                for path in (run, tmp_path / "again")]
    differ = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differ and all("checksum" in name for name in differ)
    image = next((own / "train" / "ant").iterdir())
    image.rename(image.with_name("renamed.png"))
    assert "train images" in error_of(fork("pets", *again))


def kill_before_the_best_has_its_name():
    from deit_plugin.run_folder import RunFolder

    RunFolder.name_best = lambda self: kill_itself()


def test_a_kill_between_two_checkpoints_leaves_no_best_of_another_epoch(flags, tmp_path):
    run = tmp_path / "run"
    train("pets", *flags, "--epochs", "2", "--eval-freq", "1")
    best = log_of(run)[saved(run / "best_checkpoint.pth")["epoch"]]
    flags = [*flags, "--output_dir", tmp_path / "killed"]
    assert fork("pets", *flags, before=kill_before_the_best_has_its_name).returncode == 137
    assert not (tmp_path / "killed" / "best_checkpoint.pth").exists()
    train("pets", *flags)
    checkpoint = saved(tmp_path / "killed" / "best_checkpoint.pth")
    assert checkpoint["best"] == {"epoch": best["epoch"], "acc1": best["test_acc1"]}
    assert checkpoint["epoch"] == best["epoch"]


def test_a_run_goes_on_without_its_log_and_its_notes(flags, tmp_path):
    """The next evaluation is not the best because nothing is known of those before."""
    run = tmp_path / "run"
    train("pets", *flags, "--epochs", "1")
    state = saved(run / "checkpoint.pth")
    state["best"]["acc1"] = 101.0
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        torch.save(state, tmp_path / name)
        os.replace(tmp_path / name, run / name)
    for name in ("log.txt", "run.json"):
        (run / name).unlink()
    more = ["--epochs", "2", "--resume", run / "checkpoint.pth", "--output_dir", tmp_path / "more"]
    done = train("pets", *flags, *more)
    assert "(best accuracy 101.00 %)" in done.stdout and "101.00 % after epoch 1" in done.stdout
    assert saved(tmp_path / "more" / "best_checkpoint.pth")["epoch"] == 0
    assert [row["epoch"] for row in log_of(tmp_path / "more")] == [0, 1]


def test_a_run_of_an_earlier_version_goes_on_with_its_log(flags, tmp_path):
    run, parts = tmp_path / "run", ("rows", "best")
    train("pets", *flags, "--epochs", "2", "--lr", "0.05", "--warmup-epochs", "0")
    rows = log_of(run)
    best = max(rows, key=lambda row: row["test_acc1"])
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        state = saved(run / name)
        settings = {key: value for key, value in state["settings"].items()
                    if "checksum" not in key}
        state = {key: value for key, value in state.items() if key not in parts}
        torch.save({**state, "settings": settings}, tmp_path / name)
        os.replace(tmp_path / name, run / name)
    with open(run / "log.txt", "a") as log:
        log.write('{"epoch": 2, "test_acc1": 99}\n{"epo')  # of an epoch without a checkpoint
    more = ["--epochs", "3", "--resume", run / "checkpoint.pth", "--output_dir", tmp_path / "more",
            "--lr", "0.05", "--warmup-epochs", "0"]
    said = train("pets", *flags, *more).stdout
    assert log_of(tmp_path / "more")[:2] == rows
    best_so_far = float(re.search(r"best accuracy ([\d.]+) %", said)[1])
    assert best_so_far == pytest.approx(
        max(best["test_acc1"], log_of(tmp_path / "more")[2]["test_acc1"]), abs=0.01)




def test_nothing_is_downloaded_for_a_launch_that_cannot_work(flags, tmp_path):
    flags += ["--data-set", "cifar10", "--data-path", tmp_path / "cifar"]
    wrong = fork("pets", *flags, "--model", "no_such", https_proxy="http://127.0.0.1:9")
    assert "--model no_such" in error_of(wrong) and not (tmp_path / "cifar").exists()


def test_a_run_whose_last_epoch_was_the_best_gets_its_best_checkpoint(flags, tmp_path):
    """Also if it was killed between the two names; and no file of --output_dir is a --resume."""
    run = tmp_path / "run"
    flags += ["--epochs", "1"]
    assert fork("pets", *flags, before=kill_before_the_best_has_its_name).returncode == 137
    assert not (run / "best_checkpoint.pth").exists()
    assert "nothing left" in train("pets", *flags).stdout
    assert saved(run / "best_checkpoint.pth")["epoch"] == 0
    (run / "checkpoint.pth").unlink()
    flags += ["--resume", run / "best_checkpoint.pth", "--epochs", "2"]
    assert "file of --output_dir" in error_of(fork("pets", *flags))
