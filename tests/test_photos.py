"""What people's own folders of photos contain, and what becomes of it."""
import csv
import os
import shutil
import subprocess
import sys
import unicodedata
from argparse import Namespace

import numpy
import pytest
from PIL import Image, ImageOps

import datasets
import generate
from conftest import saved, train
from deit_plugin import evaluation, job, narrator, provenance, weights
from deit_plugin.data import Data
from launches import ROOT, SCRIPTS, environment, fork_script


def folders(root):
    args = Namespace(data_set="folder", data_path=str(root), input_size=32, reprob=0.0,
                     num_workers=1)
    return Data(*(datasets.build_dataset(is_train, args)[0] for is_train in (True, False))), args


@pytest.fixture
def own(data, tmp_path):
    return shutil.copytree(data / "folder", tmp_path / "own")


def test_a_folder_that_contains_itself_is_entered_once(own):
    """Also over another folder, and a link to the folder above."""
    before = len(folders(own)[0].train)
    store = own.parent / "store"
    (own / "train" / "ant").rename(store)
    (own / "train" / "ant").symlink_to(store)
    (store / "ant").symlink_to(store)  # the same `ln -s` typed twice
    (store / "up").symlink_to("..")
    other = own.parent / "other"
    other.mkdir()
    (other / "back").symlink_to(store)
    shutil.copy(next(store.glob("*.png")), other / "new.png")
    (store / "over").symlink_to(other)
    images, left_out = datasets.list_images(str(own / "train" / "ant"), datasets.can_open)
    assert len(images) == len(list(store.glob("*.png"))) + 1  # new.png, once
    assert left_out == {"link to a folder that it is in": 3}
    (store / "over").unlink()
    assert len(folders(own)[0].train) == before


def test_photos_of_an_iphone_alone_say_what_to_install(own):
    (own / "val" / "ant" / "only.heic").write_bytes(b"\x00" * 50)
    for path in (own / "val" / "ant").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"1 \.heic; convert HEIC to JPEG, or .* pillow-heif"):
        folders(own)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
def test_orientation_is_applied_whatever_else_exif_says(orientation, tmp_path):
    rng, path = numpy.random.RandomState(0), tmp_path / "a.png"
    image = Image.fromarray(rng.randint(0, 256, (5, 7, 3)).astype("uint8"))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(str(path), exif=exif)
    with Image.open(str(path)) as file:
        expected = ImageOps.exif_transpose(file).convert("RGB").tobytes()
    assert datasets.load_photo(str(path)).tobytes() == expected


def test_a_wrong_tag_refuses_no_photo(tmp_path, monkeypatch):
    """As a resolution that is text: Pillow cannot write it again, which exif_transpose wants."""
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[274] = 6
    Image.new("RGB", (4, 2)).save(str(path), exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", None)
    assert datasets.load_photo(str(path)).size == (2, 4)
    monkeypatch.setattr(Image.Exif, "get", None)
    assert datasets.load_photo(str(path)).size == (4, 2)


def test_a_photo_that_is_too_large_says_so(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Image.new("L", (3000, 2000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000000)
    with pytest.raises(OSError, match=r"a\.png is too large \(6 megapixels.* scale it down"):
        datasets.read_image(datasets.load_photo, path)


def test_names_that_look_the_same_look_different_in_messages(own):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    text = job.unequal(["bee", names[0]], ["bee", names[1]], "here", "there")
    assert text == "only here: 'caf\\xe9'; only there: 'cafe\\u0301'"
    assert job.unequal(["ant"], ["ant "], "here", "there") == "only here: 'ant'; only there: 'ant '"
    assert job.unequal(["ant"], ["ape"], "here", "there") == "only here: ant; only there: ape"
    (own / "val" / "ant").rename(own / "val" / "ant ")
    with pytest.raises(ValueError, match="only val/ has 'ant '"):
        folders(own)


def test_a_module_of_the_same_name_that_was_imported_before_is_named(tmp_path):
    """As Hugging Face's datasets in a notebook; that one still works afterwards."""
    (tmp_path / "datasets.py").write_text("name = 'theirs'")
    code = (f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import datasets\n"
            f"sys.path.insert(0, {str(SCRIPTS)!r}); before = list(sys.path)\n"
            "try:\n    from deit_plugin.weights import finished\n"
            "except ImportError as error:\n    print(error)\n"
            "assert sys.path == before and datasets.name == 'theirs'; import datasets\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "datasets.py") in done.stdout and "new Python" in done.stdout


@pytest.mark.parametrize("script", ["convert_to_deit.py", *(f"scripts/{name}.py" for name in (
    "predict", "export", "features", "report"))])
def test_neither_warnings_as_errors_nor_missing_docstrings_matter(script):
    done = subprocess.run([sys.executable, "-W", "error", "-OO", ROOT / script, "--help"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_odd_names_are_written_in_one_way_that_reads_back(tmp_path):
    """By --predictions as by predict.py, whose standard output has the same error handler."""
    names = [os.fsdecode(b"n\xff.png"), "café, noir.png", 'a "b".png']
    images = Namespace(samples=[(os.path.join(tmp_path, name), 0) for name in names],
                       targets=[0] * 3, classes=["a,b"])
    args = Namespace(data_path=str(tmp_path))
    evaluation.write_predictions(str(tmp_path / "a.csv"), [[0, 0.5, 0.5]] * 3, Data(None, images),
                                 args)
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["n\\udcff.png", *names[1:]]
    assert {row["predicted"] for row in rows} == {"a,b"}
    code = (f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); from deit_plugin import errors\n"
            f"errors.guard(lambda: print({names[0]!r}))")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert done.stdout == b"n\\udcff.png\n"


@pytest.fixture
def model(tmp_path):
    """The path of a finished model for Pets."""
    generate.finished_model(tmp_path / "a.pth", "ab", 32, data_set="pets")
    return tmp_path / "a.pth"


@pytest.mark.parametrize("shares, shown", [(True, 0), (False, 1)])
def test_progress_shares_no_terminal_with_rows(shares, shown, model, data):
    def connect():
        for name in ("stdout", "stderr") if shares else ("stderr",):
            setattr(sys, name, os.fdopen(os.dup(its), "w"))

    ours, its = os.openpty()
    done = fork_script(SCRIPTS / "predict.py", "--resume", model, "--num_workers", "0",
                       data / "folder" / "val" / "ant", variables=environment(), before=connect)
    os.write(its, b"end")
    assert done.returncode == 0 and os.read(ours, 10000).count(b"2 of 2 images") == shown


def test_a_model_of_prepared_images_sees_photos_upright(model, tmp_path):
    """As from a phone, by predict.py and README's example, with a model of Pets."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGBA", (4, 2)).save(str(tmp_path / "a.png"), exif=exif)
    image = weights.finished(str(model)).loader(str(tmp_path / "a.png"))
    assert image.size == (2, 4) and image.getpixel((0, 0)) == (255, 255, 255)


def test_training_on_all_photos(own, flags, decide, refusal, tmp_path):
    """Without val/, both ways to train are named; one of them evaluates nothing."""
    shutil.rmtree(own / "val")
    (own / "train" / "ant" / "notes.txt").write_text("none")
    flags += ["--data-set", "folder", "--data-path", own]
    line = refusal("pets", *flags)
    assert "--hold-out 0.2" in line and "--eval-freq 0" in line
    (own / "Val").mkdir()  # a better advice
    assert f"rename {own}/Val to {own}/val" in refusal("pets", *flags)
    held = decide("pets", *flags, "--hold-out", "0.2")
    # Counted once, though both parts come from train/.
    assert "images: 1 .txt" in narrator.describe(held.decided, held.data)
    flags += ["--eval-freq", "0"]
    assert "leave one out" in refusal("pets", *flags, "--hold-out", "0.2")
    said = train("pets", *flags).stdout
    assert "43 train images, 3 classes" in said and "accuracy" not in said.partition("Epoch")[2]
    assert "without evaluation" in said and "predict.py" in said and "best_checkpoint" not in said
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["checkpoint.pth"]
    state = saved(tmp_path / "run" / "checkpoint.pth")
    assert state["best"] is None and len(state["rows"]) == 2
    assert "nothing left" in train("pets", *flags).stdout
    checked = train("pets", *flags, "--check").stdout
    assert checked.endswith("ready\n") and "all 43 can be decoded" in checked


@pytest.mark.parametrize("reprob, more", [("0.25", "random erasing acts here"), ("0", "")])
def test_flowers_with_and_without_random_erasing_is_the_recipe(reprob, more, data, flags, decide):
    found = decide("flowers", *flags, "--data-path", data / "flowers", "--reprob", reprob)
    said = narrator.describe(found.decided, found.data)
    assert not any("--reprob" in text for text in found.decided.differs) and more in said


def test_what_ran_is_known_without_git():
    facts = provenance.of_launch("scripts/pets.sh")
    assert len(facts["bundle"]["crc32"]) == 8 and facts["bundle"]["crc32"] == provenance.of_bundle()
    assert any(package.startswith("torch==") for package in facts["packages"])
    assert {"CUDA", "cuDNN", "timm"} <= facts["versions"].keys()
