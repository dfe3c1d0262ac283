"""report.py as a process on made-up folders: its table, its notes, its pictures."""
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).resolve().parent.parent / "scripts" / "report.py"
WHOLE = {"cifar10": (50000, 10000), "flowers": (2040, 6149), "pets": (3680, 3669)}


def epoch_line(epoch, accuracy=None, **other):
    """A line of log.txt; with an evaluation if an accuracy is given."""
    row = {"epoch": epoch, "train_lr": 3e-4, "train_loss": 2 / (epoch + 1), "train_seconds": 60.0}
    if accuracy is not None:
        row.update(test_acc1=accuracy, test_loss=1 - accuracy / 100, test_seconds=5.0)
    return json.dumps({**row, **other}) + "\n"


def make_run(folder, log=None, data_set="pets", differs=(), images=None, about=None):
    """A finished run of 4 epochs with 90 % as its best, or one with another log or run.json."""
    folder.mkdir(parents=True)
    accuracies = (50.0, None, 90.0, 89.5)
    (folder / "log.txt").write_text(
        "".join(map(epoch_line, range(4), accuracies)) if log is None else log)
    train, test = images or WHOLE.get(data_set, (20, 10))
    (folder / "run.json").write_text(about if about is not None else json.dumps({
        "settings": {"data_set": data_set, "epochs": 4, "model": "deit_base_patch16_224"},
        "differs": differs, "train_images": train, "test_images": test}))
    return folder


def report(*arguments, cwd, **variables):
    """Run report.py to its end."""
    return subprocess.run([sys.executable, str(REPORT), *map(str, arguments)], cwd=str(cwd),
                          env={**os.environ, **variables}, capture_output=True, text=True,
                          timeout=120)


@pytest.fixture
def bare(tmp_path):
    """The environment of a Python in which torch and matplotlib cannot be imported."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise RuntimeError('torch was imported')")
    (hidden / "matplotlib.py").write_text("raise ImportError('hidden')")
    return {"PYTHONPATH": str(hidden)}


def row_of(done, name):
    """The cells of a run after its name, numbers only split by spaces."""
    assert done.returncode == 0, done.stderr
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [name])


def test_table_without_torch_and_matplotlib(tmp_path, bare):
    names = ["pets", "b", "c", "d", "e"]
    for name in names:
        make_run(tmp_path / name)
    done = report(*names, cwd=tmp_path, **bare)
    assert all(row_of(done, name)[1:4] == ["4", "of", "4"] for name in names)
    assert row_of(done, "pets") == ["pets", "4", "of", "4", "90.00", "89.50", "93.2", "-3.20",
                                    "0:04:15"]
    assert "MoCo v3's authors" in done.stdout and "not run here" in done.stdout
    missing = [line for line in done.stdout.splitlines() if "pip install matplotlib" in line]
    assert len(missing) == 1 and done.stderr == ""
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("options, note", [
    ({"differs": ["--epochs 4 (published: 100)", "no --resume"]},
     "settings differ from the published recipe: --epochs 4 (published: 100), no --resume"),
    ({"images": (64, 3669)}, "64 of 3680 train images"),
    ({"images": (3680, 30)}, "30 of 3669 test images"),
    ({"log": epoch_line(0, 90.0)}, ""),
    ({"data_set": "folder"}, ""),
], ids=["settings", "train", "test", "unfinished", "folder"])
def test_only_a_whole_finished_run_of_the_recipe_is_compared(options, note, tmp_path, bare):
    make_run(tmp_path / "one", **options)
    done = report("one", cwd=tmp_path, **bare)
    assert row_of(done, "one")[-5] == "90.00" and row_of(done, "one")[-2] == "-"
    assert note in done.stdout
    assert ("published recipe:" in done.stdout) == ("differs" in options)
    assert ("train images" in done.stdout) == ("images" in options)


@pytest.mark.parametrize("log, epochs, best, note", [
    (epoch_line(0, 80.0) + epoch_line(1, 70.0)[:30], "1", "80.00", "the last line is damaged"),
    (epoch_line(0, 80.0) + "\0\0\n" + epoch_line(1, 70.0), "2", "80.00", "line 2 is damaged"),
    (epoch_line(0, 60.0) + epoch_line(1, 99.0) + epoch_line(2, 99.0) + epoch_line(1, 70.0),
     "2", "70.00", ""),
    (epoch_line(0) + epoch_line(1, float("nan")), "2", "-", ""),
    ("", "0", "-", ""),
], ids=["half line", "zeros", "trained again", "not evaluated", "empty"])
def test_running_and_crashed_runs(log, epochs, best, note, tmp_path, bare):
    make_run(tmp_path / "one", log)
    done = report("one", cwd=tmp_path, **bare)
    assert row_of(done, "one")[1:5] == [epochs, "of", "4", best]
    assert note in done.stdout and ("damaged" in done.stdout) == bool(note)


@pytest.mark.parametrize("damaged", [None, "", "[]", '{"settings": 1}'])
def test_without_run_json_settings_are_unknown(damaged, tmp_path, bare):
    run = make_run(tmp_path / "one", epoch_line(0, 90.0).replace("train_seconds", "other"),
                   about=damaged or "")
    if damaged is None:
        (run / "run.json").unlink()
    done = report("one", cwd=tmp_path, **bare)
    assert row_of(done, "one") == ["-", "1", "90.00", "90.00", "-", "-", ">0:00:05"]
    assert "unknown" in done.stdout and ("damaged" in done.stdout) == (damaged is not None)


def test_what_is_no_run_is_named_and_skipped(tmp_path, bare):
    make_run(tmp_path / "one")
    (tmp_path / "data").mkdir()
    done = report("data", "one", "absent", cwd=tmp_path, **bare)
    assert row_of(done, "one") and "data: not a run" in done.stdout
    done = report("data", "absent", cwd=tmp_path, **bare)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "data: not a run" in done.stderr and "absent: not a run" in done.stderr


def size_of(png):
    """Width and height in pixels of a PNG, which must be whole."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_pictures(tmp_path):
    """A name that matplotlib would misread, a run without epochs, a folder in a picture's place."""
    pytest.importorskip("matplotlib")
    odd = make_run(tmp_path / "_$odd^$name", epoch_line(0, 10.0), data_set="flowers")
    last = make_run(tmp_path / "last")
    (last / "report.png").mkdir()
    make_run(tmp_path / "starting", "")
    done = report(odd.name, "starting", "last", "--output", "new/folder", cwd=tmp_path)
    assert done.returncode == 2 and "4 of 4" in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(Path("last", "report.png")) in done.stderr
    assert sorted(path.name for path in last.iterdir()) == ["log.txt", "report.png", "run.json"]
    pictures = [tmp_path / "new/folder/comparison.png", odd / "report.png"]
    assert sorted(tmp_path.rglob("*.png")) == sorted([*pictures, last / "report.png"])
    assert all(1300 <= size_of(picture)[0] <= 2600 for picture in pictures)
    assert len({picture.read_bytes() for picture in pictures}) == 2
