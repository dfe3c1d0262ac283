"""report.py as a process on made-up folders: its table, its notes, its picture."""
import json
import subprocess
import sys

import pytest
from PIL import Image

from conftest import error_of
from launches import ROOT


def epoch_line(epoch, accuracy=None):
    """A line of log.txt; with an evaluation if an accuracy is given."""
    row = {"epoch": epoch, "train_lr": 3e-4, "train_loss": 2 / (epoch + 1), "train_seconds": 60.0}
    if accuracy is not None:
        row.update(test_acc1=accuracy, test_loss=1 - accuracy / 100)
    return json.dumps(row) + "\n"


def make_run(folder, log=None, data_set="pets", differs=()):
    """A finished run of 4 epochs with 90 % as its best, or one with another log."""
    folder.mkdir(parents=True)
    finished = "".join(map(epoch_line, range(4), (50.0, None, 90.0, 89.5)))
    (folder / "log.txt").write_text(finished if log is None else log)
    (folder / "run.json").write_text(json.dumps({
        "settings": {"data_set": data_set, "epochs": 4}, "differs": differs}))
    return folder


def report(*arguments, cwd, without=("torch", "matplotlib")):
    """Run report.py to its end, in a Python in which some modules cannot be imported."""
    code = (f"import runpy, sys; sys.modules.update(dict.fromkeys({without})); del sys.argv[0]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code, ROOT / "scripts/report.py", *arguments],
                          cwd=cwd, capture_output=True, text=True, timeout=120)


def row_of(done, name):
    """The cells of a run after its name, numbers only split by spaces."""
    assert done.returncode == 0, done.stderr
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [name])


def test_table_without_torch_and_matplotlib(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two")
    assert "absent" in error_of(report("absent", cwd=tmp_path), status=1)
    done = report("one", "two", "absent", cwd=tmp_path)
    for name in ("one", "two"):
        assert row_of(done, name) == ["pets", "4", "of", "4", "90.00", "89.50", "93.2", "-3.20",
                                      "0:04:00"]
    assert "MoCo v3's authors" in done.stdout and "not run here" in done.stdout
    assert done.stdout.count("pip install matplotlib") == 1 and done.stderr == ""
    assert "absent: not a run" in done.stdout and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("options, row, note", [
    ({"differs": ["--epochs 4 (published: 100)", "no --resume"]},
     "pets 4 of 4 90.00 89.50 93.2 - 0:04:00", "--epochs 4 (published: 100), no --resume"),
    ({"data_set": "folder", "differs": ["--data-set folder"]},
     "folder 4 of 4 90.00 89.50 - - 0:04:00", "--data-set folder"),
    ({"log": epoch_line(0, 90.0)}, "pets 1 of 4 90.00 90.00 93.2 - 0:01:00", ""),
    ({"log": epoch_line(0, 80.0) + "\0\0\n" + epoch_line(1, 70.0)[:30]},
     "pets 1 of 4 80.00 80.00 93.2 - 0:01:00", ""),
    ({"log": epoch_line(0)}, "pets 1 of 4 - - 93.2 - 0:01:00", ""),
    ({"log": ""}, "pets 0 of 4 - - 93.2 - -", ""),
], ids=["other settings", "own images", "unfinished", "damaged", "not evaluated", "empty"])
def test_only_a_whole_finished_run_of_the_recipe_is_compared(options, row, note, tmp_path):
    make_run(tmp_path / "one", **options)
    done = report("one", cwd=tmp_path)
    assert row_of(done, "one") == row.split() and note in done.stdout


def test_a_log_alone_as_plain_deit_leaves_it(tmp_path):
    (make_run(tmp_path / "one") / "run.json").unlink()
    done = report("one", cwd=tmp_path)
    assert row_of(done, "one") == ["-", "4", "of", "-", "90.00", "89.50", "-", "-", "0:04:00"]
    assert "no run.json" in done.stdout


def test_one_picture_of_all_runs(tmp_path):
    """Also of one without epochs."""
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "going", epoch_line(0, 10.0), data_set="flowers")
    make_run(tmp_path / "starting", "")
    (tmp_path / "starting" / "report.png").mkdir()
    options = {"cwd": tmp_path, "without": ("torch",)}
    assert report("going", "starting", **options).returncode == 0
    with Image.open(str(tmp_path / "going" / "report.png")) as image:
        image.load()
        assert image.format == "PNG" and 1300 <= image.width <= 2600
    failed = report("starting", "going", **options)
    assert "starting/report.png" in error_of(failed, status=1) and "1 of 4" in failed.stdout
