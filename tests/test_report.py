"""report.py as a process on made-up folders: its table, its notes, its picture."""
import csv
import json
import os
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from conftest import error_of
from launches import ROOT
from report import LoggedRun


def epoch_line(epoch, accuracy=None, per_class=None):
    """A line of log.txt; with an evaluation if an accuracy is given."""
    row = {"epoch": epoch, "train_lr": 3e-4, "train_loss": 2 / (epoch + 1), "train_seconds": 60.0}
    if accuracy is not None:
        row.update(test_acc1=accuracy, test_loss=1 - accuracy / 100)
    if per_class is not None:
        row.update(test_acc_per_class=per_class)
    return json.dumps(row) + "\n"


def make_run(folder, log=None, best=90.0, last=89.5, published=93.2, not_comparable=None,
             parent=None, **settings):
    """A finished run of 4 epochs, or one with another log."""
    folder.mkdir(parents=True)
    finished = "".join([epoch_line(0, 50.0, 40.0), epoch_line(1), epoch_line(2, best),
                        epoch_line(3, last, 88.0)])
    (folder / "log.txt").write_text(finished if log is None else log)
    (folder / "run.json").write_text(json.dumps({
        "settings": {"data_set": "pets", "epochs": 4, "seed": 0, "hold_out": 0.0, "test images": 91,
                     **settings},
        "published_accuracy": published, "not_comparable": not_comparable, "parent": parent,
        "origin": {"path": "/a.pth", "crc32": "0"}}))
    return folder


def report(*arguments, cwd, without=("torch", "matplotlib"), **variables):
    """Run report.py to its end, in a Python in which some modules cannot be imported."""
    code = (f"import runpy, sys; sys.modules.update(dict.fromkeys({without})); del sys.argv[0]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code, ROOT / "scripts/report.py", *arguments],
                          cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **variables})


def row_of(done, name):
    """The cells of a run after its name, split by spaces."""
    assert done.returncode == 0, done.stderr
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [name])


FINISHED = ["pets", "4", "of", "4", "90.00", "89.50", "81.53-94.27",
            "88.00", "93.2", "-3.70", "0:04:00"]


def test_table_without_torch_and_matplotlib(tmp_path):
    make_run(tmp_path / "out" / "one")
    make_run(tmp_path / "out" / "deep" / "two")
    curve = LoggedRun(tmp_path / "out" / "one").curve("test_acc1")
    assert curve == ([1, 3, 4], [50.0, 90.0, 89.5])
    assert "absent" in error_of(report("absent", cwd=tmp_path), status=1)
    done = report("out", "out/one", "absent", cwd=tmp_path)
    for name in ("out/one", "out/deep/two"):
        assert row_of(done, name) == FINISHED
    assert done.stdout.count("out/one ") == 1  # though it was found twice
    assert "MoCo v3's authors" in done.stdout and "not run here" in done.stdout
    assert done.stdout.count("pip install matplotlib") == 1 and done.stderr == ""
    assert "absent: not a run" in done.stdout and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("options, row, note", [
    ({"not_comparable": "no recipe launched it"},
     "pets 4 of 4 90.00 89.50 81.53-94.27 88.00 93.2 - 0:04:00", "one: not compared, since no"),
    ({"data_set": "folder", "published": None, "not_comparable": "nothing was published"},
     "folder 4 of 4 90.00 89.50 81.53-94.27 88.00 - - 0:04:00", ""),
    ({"parent": {"path": "/b.pth"}, "not_comparable": "it continues"},
     "pets 4 of 4 90.00 89.50 81.53-94.27 88.00 93.2 - 0:04:00", "not counted among seeds"),
    ({"hold_out": 0.2, "published": None, "not_comparable": "nothing was published"},
     "pets, held-out 4 of 4 90.00 89.50 81.53-94.27 88.00 - - 0:04:00", ""),
    ({"log": epoch_line(0, 90.0)}, "pets 1 of 4 90.00 90.00 82.13-94.63 - 93.2 - 0:01:00", ""),
    ({"log": epoch_line(0, 80.0) + "\0\0\n[1]\n{}\n" + epoch_line(1, 70.0)[:30]},
     "pets 1 of 4 80.00 80.00 70.64-86.93 - 93.2 - 0:01:00", ""),
    ({"log": '{"epoch": 0, "test_acc1": "high", "train_seconds": [1]}'},
     "pets 1 of 4 - - - - 93.2 - -", ""),
    ({"log": epoch_line(0)}, "pets 1 of 4 - - - - 93.2 - 0:01:00", ""),
    ({"log": ""}, "pets 0 of 4 - - - - 93.2 - -", ""),
], ids=["no recipe", "own images", "continued", "held out", "unfinished", "damaged", "not ours",
        "not evaluated", "empty"])
def test_only_a_whole_finished_run_of_the_recipe_is_compared(options, row, note, tmp_path):
    make_run(tmp_path / "one", **options)
    done = report("one", cwd=tmp_path)
    assert row_of(done, "one") == row.split() and note in done.stdout
    assert ("not compared" in done.stdout) == ("93.2 -" in row and "not_comparable" in options)


@pytest.mark.parametrize("facts", ["", "[]", "{", '{"settings": 3, "differs": 4}', "[" * 100000])
def test_a_log_alone_as_plain_deit_leaves_it(facts, tmp_path):
    (make_run(tmp_path / "one") / "run.json").write_text(facts)
    row = "- 4 of - 90.00 89.50 - 88.00 - - 0:04:00"
    assert row_of(report("one", cwd=tmp_path), "one") == row.split()


def test_a_log_that_two_runs_appended_to_is_the_last_one(tmp_path):
    """As plain DeiT does; where a run goes on, it repeats epochs, and the later ones count."""
    first = "".join(epoch_line(epoch, 99.0) for epoch in range(3))
    make_run(tmp_path / "one", first + epoch_line(0, 50.0) + epoch_line(1, 60.0))
    make_run(tmp_path / "two", first + epoch_line(2, 70.0) + epoch_line(3, 80.0))
    done = report(".", cwd=tmp_path)
    assert row_of(done, "one")[:6] == ["pets", "2", "of", "4", "60.00", "60.00"]
    assert row_of(done, "two")[:6] == ["pets", "4", "of", "4", "99.00", "80.00"]
    assert "one, two: log.txt repeats epochs" in done.stdout


def test_the_table_on_a_terminal_without_unicode(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"é{seed}", seed=seed)
    done = report(".", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "2 seeds" in done.stdout, done.stderr


def test_the_interval_is_scipy_s(tmp_path):
    from scipy.stats import binomtest

    for right, images in ((45, 50), (0, 7), (7, 7), (3669, 3670)):
        log = epoch_line(0, 100 * right / images)
        run = LoggedRun(make_run(tmp_path / f"{right}", log, **{"test images": images}))
        low, high = binomtest(right, images).proportion_ci(method="wilson")
        assert [float(text) for text in run.interval().split("-")] == pytest.approx(
            [100 * low, 100 * high], abs=0.006)


def test_the_table_as_csv(tmp_path):
    """With names that have commas, and not over a folder."""
    make_run(tmp_path / "a,b", lr=0.1)
    make_run(tmp_path / "c", lr=0.2)
    done = report(".", "--csv", "t.csv", cwd=tmp_path)
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["a,b"]["last %"] == "89.50" and rows["c"]["lr"] == "0.2", done.stderr
    assert "--csv" in error_of(report(".", "--csv", tmp_path, cwd=tmp_path), status=1)


def test_seeds_are_a_group_and_what_varies_are_columns(tmp_path):
    lasts = [89.5, 91.0, 88.25]
    for seed, last in enumerate(lasts):
        make_run(tmp_path / f"a{seed}", seed=seed, best=92.0 + seed, last=last)
    make_run(tmp_path / "rate", lr=0.1)
    make_run(tmp_path / "child", seed=7, parent={"path": "/b.pth"})
    make_run(tmp_path / "started", log=epoch_line(0, 10.0), seed=9)
    make_run(tmp_path / "second", seed=1, last=70.0)
    make_run(tmp_path / "flowers", data_set="flowers", weight_decay=0.3)
    done = report(".", cwd=tmp_path)
    header = done.stdout.splitlines()[0]
    assert header.split()[-1] == "seed" and "weight" not in header and "lr" not in header
    assert row_of(done, "a2")[-1] == "2"
    group = next(line for line in done.stdout.splitlines() if line.startswith("3 seeds"))
    assert f"last {numpy.mean(lasts):.2f} ± {numpy.std(lasts, ddof=1):.2f} %" in group
    assert "best 93.00 ± 1.00 %" in group
    left_out = group.partition("left out")[2]
    assert "started" in left_out and "second" in left_out
    assert not any(name in group for name in ("rate", "flowers", "child"))


def test_one_picture_of_all_runs(tmp_path):
    """Also of more than ten, of one without epochs, with odd names, without a display."""
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "out" / "going", epoch_line(0, 10.0), data_set="flowers")
    make_run(tmp_path / "out" / "$x_$", "")
    options = {"cwd": tmp_path, "without": ("torch",), "MPLBACKEND": "no_such_backend"}
    done = report("out", **options)
    assert done.returncode == 0 and "picture: out/report.png" in done.stdout, done.stderr
    with Image.open(str(tmp_path / "out" / "report.png")) as image:
        image.load()
        assert image.format == "PNG" and 1300 <= image.width <= 2600
    for number in range(10):
        make_run(tmp_path / "out" / f"run{number}")
    done = report("out", "--output", "here.pdf", **options)
    assert "first 10 of 12 runs" in done.stdout and (tmp_path / "here.pdf").exists()
    for output in ("here.no_such_format", "/nowhere/a.png"):
        assert output in error_of(report("out/going", "--output", output, **options), status=1)
