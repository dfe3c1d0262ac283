"""report.py as a user runs it, on the folders of made-up runs."""
import json
import os
import re
import struct
import subprocess
import sys

import pytest

from conftest import ROOT, refusal_of

BASE = {"data_set": "pets", "model": "deit_base_patch16_224", "epochs": 4, "input_size": 224}
PETS = {"training images": 3680, "test images": 3669}


def line(epoch, **values):
    row = {"train_lr": 3e-4, "train_loss": 2.0 - 0.1 * epoch, "epoch": epoch, "n_parameters": 9}
    return json.dumps({**row, **values}) + "\n"


def evaluated(epoch, accuracy):
    return line(epoch, test_loss=1.0, test_acc1=accuracy, test_acc5=99.0)


FINISHED = line(0) + evaluated(1, 93.456) + line(2) + evaluated(3, 92.0)


def make_run(folder, log=FINISHED, seconds=(1800, 1800, 3600, 65), **about):
    """A run's folder; ``about`` is what its run.json holds besides the recipe's and images'."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(log)
    about = {"recipe": BASE, **PETS, "seconds": list(seconds), **about}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def report(*arguments, cwd, **variables):
    return subprocess.run([sys.executable, ROOT / "scripts" / "report.py", *arguments], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, **variables})


def rows_of(done):
    """The cells of the table, by the name of the run."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.split("\n\n")[0].splitlines()
    table = [re.split(" {2,}", line.strip()) for line in lines]
    return {run: cells for run, *cells in table}


def test_table_says_how_far_each_run_came(tmp_path):
    make_run(tmp_path / "finished")
    make_run(tmp_path / "crashed", evaluated(0, 50.0) + line(1) + '{"train_lr": 0.0002, "trai')
    make_run(tmp_path / "starting", "", seconds=())
    (tmp_path / "starting" / "log.txt").unlink()
    make_run(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "run.json").unlink()
    (tmp_path / "data").mkdir()
    done = report("finished", "crashed", "starting", "elsewhere", "data", "--no-pictures",
                  cwd=tmp_path)
    rows = rows_of(done)
    assert rows["finished"] == ["pets", "4 of 4", "93.46", "92.00", "93.2", "+0.26", "2:01:05"]
    assert rows["crashed"] == ["pets", "2 of 4", "50.00", "50.00", "93.2", "-43.20", "1:00:00"]
    assert rows["starting"] == ["pets", "0 of 4", "-", "-", "93.2", "-", "-"]
    assert rows["elsewhere"] == ["-", "4", "93.46", "92.00", "-", "-", "-"]
    assert "crashed: lines of log.txt that are not whole and do not count: 1" in done.stdout
    assert "elsewhere: there is no run.json" in done.stdout
    assert "data: not a run (log.txt: No such file or directory)" in done.stdout
    assert list(tmp_path.rglob("*.png")) == []


def test_a_figure_that_does_not_compare_is_said(tmp_path):
    make_run(tmp_path / "part", **{"training images": 64, "test images": 3669})
    make_run(tmp_path / "small", recipe={**BASE, "model": "deit_small", "data_set": "flowers"},
             **{"training images": 2040, "test images": 6149})
    make_run(tmp_path / "timed-late", seconds=(60, 5))
    done = report("part", "small", "timed-late", "--no-pictures", cwd=tmp_path)
    rows = rows_of(done)
    assert rows["part"][4:6] == ["93.2", "-"]
    assert "part: not the whole data set, so no distance: 64 of 3680 training" in done.stdout
    assert rows["small"][4:6] == ["97.7", "-4.24"]
    assert "small: not the published recipe: model deit_small (published: deit_b" in done.stdout
    assert rows["timed-late"][6] == ">0:01:05"


def test_epochs_that_were_trained_again_count_once(tmp_path):
    make_run(tmp_path / "run", evaluated(0, 99.0) + evaluated(1, 98.0) + evaluated(0, 10.0))
    assert rows_of(report("run", "--no-pictures", cwd=tmp_path))["run"][1:4] == [
        "1 of 4", "10.00", "10.00"]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"recipe": 1}', '{"recipe": {"model": 1}}',
                                     '{"recipe": {}, "seconds": ["long"]}'])
def test_damaged_run_json_is_said(damaged, tmp_path):
    (make_run(tmp_path / "run") / "run.json").write_text(damaged)
    done = report("run", "--no-pictures", cwd=tmp_path)
    assert rows_of(done)["run"] == ["-", "4", "93.46", "92.00", "-", "-", "-"]
    assert "run: run.json is damaged" in done.stdout


def test_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "notes.txt").write_text("none")
    line = refusal_of(report("data", "notes.txt", "absent", cwd=tmp_path))
    assert "no run found" in line
    assert all(f"{name}: not a run" in line for name in ("data", "notes.txt", "absent"))


def test_missing_matplotlib_is_asked_for_by_name(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden')")
    done = report("run", cwd=tmp_path, PYTHONPATH=str(tmp_path / "hidden"))
    assert done.returncode == 0
    assert "4 of 4" in done.stdout
    assert done.stderr == ("no pictures: they need matplotlib (hidden): "
                           "pip install -r requirements-report.txt\n")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """The environment of a matplotlib that has looked for its fonts, which it says."""
    pytest.importorskip("matplotlib")
    known = {"MPLCONFIGDIR": str(tmp_path_factory.mktemp("matplotlib"))}
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], check=True,
                   env={**os.environ, **known})
    return known


def size_of(png):
    """Width and height in pixels of a PNG, which must be whole."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_pictures_of_all_kinds_of_runs(tmp_path, fonts):
    out = tmp_path / "out"
    make_run(out / ("a-long-name-" * 12))
    make_run(out / "_$one^$epoch", evaluated(0, 100.0))
    make_run(out / "not-evaluated", line(0) + line(1, train_loss=float("nan")))
    make_run(out / "starting", "")
    many = "".join(evaluated(epoch, epoch / 2) for epoch in range(100))
    for number in range(6):
        make_run(out / f"many-{number}", many, recipe={**BASE, "data_set": "cifar10"})
    runs = sorted(folder for folder in out.iterdir() if folder.name != "starting")
    done = report(*sorted(out.iterdir()), "--output", "figures", cwd=tmp_path, **fonts)
    assert (done.returncode, done.stderr) == (0, "")  # no warning of matplotlib either
    pictures = [run / "report.png" for run in runs] + [tmp_path / "figures" / "comparison.png"]
    assert sorted(tmp_path.rglob("*.png")) == sorted(pictures)
    for picture in pictures:
        width, height = size_of(picture)
        assert width == 1920 and 1000 < height < 1920
    assert "picture: figures/comparison.png" in done.stdout
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_alone_is_compared_with_none(tmp_path, fonts):
    make_run(tmp_path / "run")
    assert report("run", cwd=tmp_path, **fonts).returncode == 0
    assert [path.name for path in tmp_path.rglob("*.png")] == ["report.png"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, fonts):
    picture = make_run(tmp_path / "run") / "report.png"
    picture.write_text("the last one")
    full_disk = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (20000, 20000))"
    (tmp_path / "sitecustomize.py").write_text(full_disk)
    done = report("run", cwd=tmp_path, PYTHONPATH=str(tmp_path), **fonts)
    assert "cannot write run/report.png (File too large)" in refusal_of(done)
    assert picture.read_text() == "the last one"
    assert sorted(path.name for path in picture.parent.iterdir()) == [
        "log.txt", "report.png", "run.json"]
