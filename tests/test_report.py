"""report.py on made-up folders: its tables, its notes, its pictures."""
import csv
import json
import os
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from conftest import error_of
from launches import SCRIPTS, environment, fork_script
from reports import classes, runs, table
from reports.runs import Group, LoggedRun


def epoch_line(epoch, accuracy=None, per_class=None):
    """A line of log.txt; with an evaluation if an accuracy is given."""
    row = {"epoch": epoch, "train_lr": 3e-4, "train_loss": 2 / (epoch + 1), "train_seconds": 60.0}
    if accuracy is not None:
        row.update(test_acc1=accuracy, test_loss=1 - accuracy / 100, test_seconds=3.0)
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


def report(*arguments, cwd, without=("torch", "matplotlib"), encoding="utf-8"):
    """Run report.py to its end, where some modules cannot be imported."""
    def change():
        os.chdir(cwd)
        sys.modules.update(dict.fromkeys(without))
        sys.stdout.reconfigure(encoding=encoding)

    return fork_script(SCRIPTS / "report.py", *arguments, variables=environment(), before=change)


def table_of(folder):
    """The rows for all runs below a folder, without a process."""
    header, *rows = table.rows_of(runs.groups_of(runs.find_runs([folder])[0]))
    return [dict(zip(header, row)) for row in rows]


def test_table_without_torch_and_matplotlib_on_a_terminal_without_unicode(tmp_path):
    make_run(tmp_path / "out" / "a,b")
    make_run(tmp_path / "out" / "deep" / "é", seed=1)
    assert "absent" in error_of(report("absent", cwd=tmp_path), status=1)
    done = report("out", "out/a,b", "absent", "--csv", "t.csv", cwd=tmp_path, encoding="ascii")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        row, = csv.DictReader(file)  # a run that is found twice counts once
    assert (row["folders"], row["seeds"]) == ("out/a,b, out/deep/é", "0, 1")
    shown = next(line for line in done.stdout.splitlines() if "out/a,b" in line)
    assert all(row[name] in shown for name in row if name not in ("folders", "± last", "± best"))
    assert "MoCo v3's authors" in done.stdout and "not run here" in done.stdout
    assert done.stdout.count("pip install matplotlib") == 1
    assert "absent: not a run" in done.stdout and not list(tmp_path.rglob("*.png"))
    assert "--csv" in error_of(report(".", "--csv", tmp_path, cwd=tmp_path), status=1)


NAMES = ("data set", "epochs", "best %", "last %", "95 % from", "95 % to", "per class %",
         "published %", "vs. published", "training time")


@pytest.mark.parametrize("options, row, note", [
    ({}, "pets|4 of 4|90.00|89.50|81.53|94.27|88.00|93.2|-3.70|0:04:09", ""),
    ({"not_comparable": "no recipe launched it"},
     "pets|4 of 4|90.00|89.50|81.53|94.27|88.00|-|-|0:04:09", "one: not compared with"),
    ({"data_set": "folder", "published": None, "not_comparable": "nothing was published"},
     "folder|4 of 4|90.00|89.50|81.53|94.27|88.00|-|-|0:04:09", ""),
    ({"parent": {"path": "/b.pth"}, "not_comparable": "it continues"},
     "pets|4 of 4|90.00|89.50|81.53|94.27|88.00|-|-|0:04:09", "not counted among seeds"),
    ({"hold_out": 0.2, "published": None, "not_comparable": "nothing was published"},
     "pets, held-out|4 of 4|90.00|89.50|81.53|94.27|88.00|-|-|0:04:09", ""),
    ({"log": epoch_line(0, 100.0)},
     "pets|1 of 4|100.00|100.00|95.95|100.00|-|93.2|-|0:01:03", ""),
    ({"log": epoch_line(0, 80.0) + "\0\0\n[1]\n{}\n" + epoch_line(1, 70.0)[:30]},
     "pets|1 of 4|80.00|80.00|70.64|86.93|-|93.2|-|0:01:03", ""),
    ({"log": '{"epoch": 0, "test_acc1": 0.0, "test_loss": Infinity, "train_loss": NaN}'},
     "pets|1 of 4|0.00|0.00|0.00|4.05|-|93.2|-|-", ""),
    ({"log": epoch_line(0)}, "pets|1 of 4|-|-|-|-|-|93.2|-|0:01:00", ""),
    ({"log": ""}, "pets|0 of 4|-|-|-|-|-|93.2|-|-", ""),
], ids=["recipe", "no recipe", "own images", "continued", "held out", "unfinished", "damaged",
        "not finite", "not evaluated", "empty"])
def test_only_a_whole_finished_run_of_the_recipe_is_compared(options, row, note, tmp_path):
    """The intervals are those of scipy.stats.binomtest on 91 images, method="wilson"."""
    folder = make_run(tmp_path / "one", **options)
    (found,) = table_of(tmp_path)
    assert "|".join(found[name] for name in NAMES) == row
    notes = "\n".join(table.notes_on([LoggedRun(folder)])).replace(f"{tmp_path}/", "")
    assert note in notes and found["images"] == "91"
    assert ("not compared" in notes) == ("not_comparable" in options and "published" not in options)


def test_a_log_alone_as_plain_deit_leaves_it(tmp_path):
    (make_run(tmp_path / "one") / "run.json").unlink()
    (row,) = table_of(tmp_path)
    assert "|".join(row[name] for name in NAMES) == "-|4 of -|90.00|89.50|-|-|88.00|-|-|0:04:09"


def test_a_log_that_two_runs_appended_to_is_the_last_one(tmp_path):
    """As plain DeiT does; where a run goes on, it repeats epochs, and the later ones count."""
    first = "".join(epoch_line(epoch, 99.0) for epoch in range(3))
    make_run(tmp_path / "one", first + epoch_line(0, 50.0) + epoch_line(1, 60.0))
    make_run(tmp_path / "two", first + epoch_line(2, 70.0) + epoch_line(3, 80.0), lr=0.1)
    found, _ = runs.find_runs([tmp_path])
    assert [(run.done, run.best, run.last) for run in found] == [(2, 60, 60), (4, 99, 80)]
    assert "one, " in table.notes_on(found)[0] and "repeats epochs" in table.notes_on(found)[0]


def test_seeds_are_one_row_and_what_varies_are_columns(tmp_path):
    lasts = [89.5, 91.0, 88.25]
    for seed, last in enumerate(lasts):
        make_run(tmp_path / f"a{seed}", seed=seed, best=92.0 + seed, last=last, weight_decay=0.1)
    make_run(tmp_path / "rate", lr=0.1, last=91.5, smoothing=0.1)
    make_run(tmp_path / "child", seed=7, parent={"path": "/b.pth"}, weight_decay=0.1)
    make_run(tmp_path / "started", log=epoch_line(0, 10.0), seed=9, weight_decay=0.1)
    make_run(tmp_path / "second", seed=1, last=70.0, weight_decay=0.2)
    make_run(tmp_path / "again", seed=1, last=60.0, weight_decay=0.1)
    make_run(tmp_path / "held", hold_out=0.2, last=99.0, weight_decay=0.1)
    make_run(tmp_path / "flowers", data_set="flowers", weight_decay=0.3, smoothing=0.2)
    rows = {row["folders"].replace(f"{tmp_path}/", ""): row for row in table_of(tmp_path)}
    group = rows["a0, a1, a2"]
    assert list(group)[0] == "weight decay" and group["weight decay"] == "0.1"
    assert not {"lr", "smoothing"} & set(group) and group["seeds"] == "0, 1, 2"
    assert group["last %"] == f"{numpy.mean(lasts):.2f}"
    assert group["± last"] == f"{numpy.std(lasts, ddof=1):.2f}"
    assert (group["best %"], group["± best"]) == ("93.00", "1.00")
    assert group["vs. published"] == f"{numpy.mean(lasts) - 93.2:+.2f}"
    assert group["training time"] == "0:04:09"  # of one run
    assert rows["held"]["data set"] == "pets, held-out"
    pets = [name for name, row in rows.items() if row["data set"] == "pets"]
    assert pets == ["rate", "a0, a1, a2", "child", "second", "again", "started"]
    assert [name for name in rows if name not in pets] in (list(rows)[:2], list(rows)[-2:])


def test_of_equal_accuracies_the_lower_loss_comes_first_and_no_accuracy_last(tmp_path):
    """Such as that of the run on all images, which --eval-freq 0 never evaluated."""
    for rate, loss in ((0.1, 0.5), (0.2, 0.3), (0.3, 0.4)):
        row = {"epoch": 0, "test_acc1": 90.0, "test_loss": loss}
        make_run(tmp_path / f"rate{rate}", json.dumps(row), lr=rate, hold_out=0.2)
    make_run(tmp_path / "all", epoch_line(0), lr=0.2)
    assert [row["folders"].rpartition("/")[2] for row in table_of(tmp_path)] == [
        "rate0.2", "rate0.3", "rate0.1", "all"]


def test_the_curve_of_seeds_is_their_mean(tmp_path):
    group = Group([LoggedRun(make_run(tmp_path / f"{last}", last=last)) for last in (80.0, 90.0)])
    epochs, means, deviations = group.curve("test_acc1")
    assert (epochs, means) == ([1, 3, 4], [50.0, 90.0, 85.0])
    assert deviations == pytest.approx([0, 0, numpy.std([80, 90], ddof=1)])


def test_one_picture_of_all_runs(tmp_path):
    """Of more than ten, with odd names; and of one without evaluation, under a foreign MPLBACKEND.

    Jupyter sets that variable.
    """
    pytest.importorskip("matplotlib.figure")
    make_run(tmp_path / "out" / "going", epoch_line(0, 10.0), data_set="flowers")
    make_run(tmp_path / "out" / "$x_$", "")
    for number in range(24):
        make_run(tmp_path / "out" / f"run{number}", lr=number // 2, seed=number)
    options = {"cwd": tmp_path, "without": ("torch",)}
    done = report("out", "--output", "here.svg", **options)
    assert "grey: 8 with lower" in (tmp_path / "here.svg").read_text(), done.stderr
    make_run(tmp_path / "alone", epoch_line(0))
    shown = subprocess.run([sys.executable, SCRIPTS / "report.py", "alone"], cwd=tmp_path,
                           stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "MPLBACKEND": "no_such_backend"}).stdout
    assert "picture: alone/report.png" in shown
    with Image.open(str(tmp_path / "alone" / "report.png")) as image:
        image.load()
        assert image.format == "PNG" and 1300 <= image.width <= 2600
    line = error_of(report("alone", "--output", "here.no_such_format", **options), status=1)
    assert "here.no_such_format" in line


LABELS_AND_PREDICTED = [("None", "001"), ("None", "001"), ("None", "NA"), ("None", "None"),
                        *[("001", "001")] * 4, ('"é, $x$"', "NA")]
PREDICTIONS = "image,label,predicted,probability,label_probability\n" + "".join(
    f"a.jpg,{label},{predicted},0.5,0.5\n" for label, predicted in LABELS_AND_PREDICTED)


def test_every_class_and_what_it_is_taken_for(tmp_path):
    """Their names are text; a class that is only predicted has no row."""
    run = make_run(tmp_path / "run", last=500 / 9)
    (run / "predictions.csv").write_text(PREDICTIONS, encoding="utf-8")
    done = report("run", "--classes", "--csv", "t.csv", cwd=tmp_path)
    assert done.returncode == 0 and "55.56 % of 9 images" in done.stdout, done.stderr
    assert "warning" not in done.stdout and "matplotlib" in done.stdout
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            classes.HEADER, ["é, $x$", "1", "0.00", "NA", "1"], ["None", "4", "25.00", "001", "2"],
            ["001", "4", "100.00", "-", "0"]]
    found = classes.read(run / "predictions.csv")
    assert found.classes == ["001", "NA", "None", "é, $x$"]
    assert found.counts == [[4, 0, 0, 0], [0, 0, 0, 0], [2, 1, 1, 0], [0, 1, 0, 0]]
    (run / "log.txt").write_text(epoch_line(0, 40.0))  # it was killed, and goes on from there
    done = report("run/predictions.csv", "--classes", cwd=tmp_path)
    assert "warning" in done.stdout and "40.00 %" in done.stdout


def test_the_confusion_matrix(tmp_path):
    pytest.importorskip("matplotlib.figure")
    (tmp_path / "mine.csv").write_text(PREDICTIONS, encoding="utf-8")
    done = report("mine.csv", "--classes", cwd=tmp_path, without=("torch",))
    assert done.returncode == 0 and "picture: mine.png" in done.stdout, done.stderr
    with Image.open(str(tmp_path / "mine.png")) as image:
        blue = numpy.array(image.convert("RGB")).astype(int)
    assert ((blue[:, :, 2] > 90) & (blue[:, :, 0] < 30)).sum() > 1000  # a class without an error


@pytest.mark.parametrize("content, says", [
    (None, "No such file"), (b"a,b\n1,2\n", "columns"), (b"PK\3\4\xff", "pass the"),
    (b"image,label,predicted\n", "no rows"), (b"image,label,predicted\n1,2\n", "incomplete")])
def test_what_is_not_a_table_of_predictions_is_named(content, says, tmp_path):
    if content is not None:
        (tmp_path / "predictions.csv").write_bytes(content)
    line = error_of(report(".", "--classes", cwd=tmp_path), status=1)
    assert "predictions.csv" in line and says in line
