"""What people's own folders of photos contain, and what becomes of it."""
import csv
import os
import shutil
import struct
import subprocess
import unicodedata
from argparse import Namespace

import numpy
import pytest
from PIL import Image, ImageOps

import datasets
from conftest import saved, train
from deit_plugin import evaluation, job, narrator
from deit_plugin.data import Data
from launches import run_code

RAMP = numpy.linspace(0, 1, 256).reshape(16, 16)


def images_of(root, is_train=True):
    args = Namespace(data_set="folder", data_path=str(root), input_size=32)
    return datasets.build_dataset(is_train, args)[0]


@pytest.mark.parametrize("name, pixels", [
    ("grey.png", (RAMP * 65535).round().astype("uint16")),
    ("grey.tif", (RAMP * 65535).round().astype("uint16")),
    ("float.tif", RAMP.astype("float32")),
    ("grey8.png", (RAMP * 255).round().astype("uint8")),
])
def test_16_bits_and_floats_are_scaled(tmp_path, name, pixels):
    Image.fromarray(pixels).save(str(tmp_path / name))
    image = datasets.load_photo(str(tmp_path / name))
    pixels = numpy.asarray(image)
    assert image.mode == "RGB" and (pixels[..., :1] == pixels).all()
    assert abs(pixels[..., 0].astype(float) - RAMP * 255).max() <= 0.51


@pytest.mark.parametrize("make, says", [
    (Image.fromarray((RAMP * 2).astype("float32")).save, "0.0 to 2.0, not 0 to 1"),
    (Image.fromarray((RAMP - 1).astype("float32")).save, "-1.0 to 0.0, not 0 to 1"),
    (Image.fromarray((RAMP * numpy.nan).astype("float32")).save, "nan to nan, not 0 to 1"),
    (Image.new("L", (3000, 2000)).save, r"is too large \(6 megapixels.* scale it down"),
    (os.mkdir, "is a folder, a pipe or a device"),
    (lambda path: open(path, "w").close(), "it is empty"),
], ids=["above 1", "below 0", "nan", "large", "folder", "empty"])
def test_what_cannot_be_shown_is_named(make, says, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000000)
    path = str(tmp_path / "a.tif")
    make(path)
    with pytest.raises(OSError, match=f"{path} .*{says}"):
        datasets.read_image(datasets.load_photo, path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path, mode):
    pixels = numpy.zeros((8, 8, 4), "uint8")
    pixels[:, :4] = 40, 40, 40, 255
    image = Image.fromarray(pixels)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(str(tmp_path / "a.png"))
    found = numpy.asarray(datasets.load_photo(str(tmp_path / "a.png")))
    assert (found[:, :4] == 40).all() and (found[:, 4:] == 255).all()


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
def test_orientation_is_applied(orientation, tmp_path):
    rng, path = numpy.random.RandomState(0), tmp_path / "a.png"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(rng.randint(0, 256, (5, 7, 3)).astype("uint8")).save(str(path), exif=exif)
    with Image.open(str(path)) as file:
        expected = ImageOps.exif_transpose(file).convert("RGB").tobytes()
    assert datasets.load_photo(str(path)).tobytes() == expected


TEXT_AS_RESOLUTION = struct.pack("<2sHI H HHIHH HHI4s I", b"II", 42, 8, 2, 274, 3, 1, 6, 0,
                                 282, 2, 4, b"abc", 0)


@pytest.mark.parametrize("exif, size", [(TEXT_AS_RESOLUTION, (2, 4)), (b"damaged", (4, 2))],
                         ids=["orientation 6 and a wrong tag", "damaged"])
def test_wrong_metadata_refuse_no_photo(exif, size, tmp_path):
    """Pillow's exif_transpose fails for both."""
    Image.new("RGB", (4, 2)).save(str(tmp_path / "a.png"), exif=exif)
    assert datasets.load_photo(str(tmp_path / "a.png")).size == size


def test_whatever_pillow_opens_is_used_but_hidden_files_and_copies_are_not(own, tmp_path):
    photo, bee = tmp_path / "outside" / "j.jpg", own / "train" / "bee"
    photo.parent.mkdir()
    Image.new("RGB", (9, 9)).save(str(photo))
    (bee / "link").symlink_to(photo.parent)
    (bee / "circle.jpg").symlink_to("circle.jpg")
    before = len(images_of(own))
    used = ("a.jfif", "b.png", "c", "deep/d.JPG")
    hidden = (".e.jpg", "@eaDir/g.jpg", ".ipynb_checkpoints/h.jpg", "../__MACOSX/i.jpg")
    copies = ("a.png~", "a.NEF", "a.jpg.part")
    for name in (*used, *hidden, *copies):
        (bee / name).parent.mkdir(exist_ok=True)
        shutil.copy(photo, bee / name)
    # Of the last one, Pillow knows only the header.
    for name, content in (("notes", b"none"), ("movie.mp4", b"\0" * 99),
                          ("features.h5", b"\x89HDF\r\n\x1a\n" + bytes(100))):
        (bee / name).write_bytes(content)
    os.mkfifo(str(bee / "k.jpg"))  # to open it would take forever
    found = images_of(own)
    assert found.classes == ["ant", "bee", "cow"] and len(found) == before + len(used)
    names = {os.path.relpath(path, bee) for path, _ in found.samples}
    assert {*used, "link/j.jpg"} < names
    assert found.left_out == dict.fromkeys(
        ["without an ending", "not a regular file", ".mp4", ".h5", ".png~", ".NEF", ".part"], 1)


def test_a_folder_that_contains_itself_is_entered_once(own):
    """Also over another folder, and a link to the folder above."""
    ant, store, other = own / "train" / "ant", own.parent / "store", own.parent / "other"
    before = len(images_of(own))
    ant.rename(store)
    other.mkdir()
    shutil.copy(next(store.glob("*.png")), other / "new.png")
    for link, target in ((ant, store), (store / "ant", store),  # the same `ln -s` typed twice
                         (store / "up", ".."), (store / "over", other), (other / "back", store)):
        link.symlink_to(target)
    found = images_of(own)
    assert len(found) == before + 1  # new.png, once
    assert found.left_out == {"link to a folder that it is in": 3}


def test_names_that_look_the_same_are_written_so_that_they_look_different():
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert job.unequal(["bee", nfc], ["bee", nfd], "here", "there") == (
        "only here: 'caf\\xe9'; only there: 'cafe\\u0301'")
    assert datasets.first_five(map(str, range(300))) == "0, 1, 2, 3, 4 and 295 more"


def test_odd_names_are_written_in_one_way_that_reads_back(tmp_path):
    """By --predictions as by predict.py, whose standard output has the same error handler."""
    names = [os.fsdecode(b"n\xff.png"), "café, noir.png", 'a "b".png']
    images = Namespace(samples=[(os.path.join(tmp_path, name), 0) for name in names],
                       targets=[0] * 3, classes=["a,b"])
    evaluation.write_predictions(str(tmp_path / "a.csv"), [[0, 0.5, 0.5]] * 3, Data(None, images),
                                 Namespace(data_path=str(tmp_path)))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["n\\udcff.png", *names[1:]]
    assert {row["predicted"] for row in rows} == {"a,b"}
    code = f"from deit_plugin import errors; errors.guard(lambda: print({names[0]!r}))"
    assert run_code(code, stdout=subprocess.PIPE).stdout == "n\\udcff.png\n"


def test_training_on_all_photos(own, flags, decide, refusal, tmp_path):
    """Without val/, both ways to train are named; one of them evaluates nothing."""
    shutil.rmtree(own / "val")
    (own / "train" / "ant" / "notes.txt").write_text("none")
    flags += ["--data-set", "folder", "--data-path", own]
    line = refusal("pets", *flags)
    assert "--hold-out 0.2" in line and "--eval-freq 0" in line
    held = decide("pets", *flags, "--hold-out", "0.2")
    # Counted once, though both parts come from train/.
    assert "images: 1 .txt" in narrator.describe(held.decided, held.data)
    flags += ["--eval-freq", "0"]
    assert "leave one out" in refusal("pets", *flags, "--hold-out", "0.2")
    said = train("pets", *flags).stdout
    assert "43 train images, 3 classes" in said and "accuracy" not in said.partition("Epoch")[2]
    assert "without evaluation" in said and "predict.py" in said
    checkpoint, = (tmp_path / "run").glob("*.pth")
    assert saved(checkpoint)["best"] is None
    checked = train("pets", *flags, "--check").stdout
    assert checked.endswith("ready\n") and "all 43 can be decoded" in checked
