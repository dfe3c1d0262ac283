"""What follows training: evaluation, predictions, labels of new images, exports; held-out runs."""
import csv
import json
import os
import shutil
from argparse import Namespace

import numpy
import pytest
import scipy.io
import timm
import torch
from PIL import Image, ImageOps

import generate
import published
from conftest import error_of, log_of, rewrite, saved, train, version_of, vit_of
from deit_plugin import evaluation
from deit_plugin.errors import UserError
from launches import SCRIPTS, environment, fill_the_disk, fork_script

UMASK = os.umask(0)
os.umask(UMASK)
TIMM_LOADS_FOLDERS = version_of(timm) >= (1, 0, 16)


@pytest.fixture(scope="module")
def tiny(data, tmp_path_factory):
    """A Pets run with ViT-Tiny, which needs no DeiT, that has learnt something."""
    folder = tmp_path_factory.mktemp("run")
    torch.save({"model": generate.encoder_state()}, folder / "converted.pth")
    train("pets", "--resume", folder / "converted.pth", "--data-path", data / "pets",
          "--output_dir", folder, "--model", "deit_tiny_patch16_224", "--input-size", "48",
          "--lr", "0.05", "--warmup-epochs", "0", "--epochs", "1", "--mixup", "0")
    return folder


@pytest.fixture(scope="module")
def probabilities(tiny, data):
    """(images, classes), of the test images in their order; computed without the bundle."""
    model = vit_of(saved(tiny / "best_checkpoint.pth")["model"], 48, heads=3)
    dataset, _ = published.build_dataset(False, Namespace(
        data_set="pets", data_path=data / "pets", input_size=48))
    with torch.no_grad():
        images = torch.stack([dataset[index][0] for index in range(len(dataset))])
        return model(images).softmax(dim=1).numpy()


def without_deit(script, *arguments, **options):
    """Fork one of the scripts that need none."""
    return fork_script(SCRIPTS / script, *arguments, variables=environment(DEIT_DIR=None),
                       **options)


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_eval_says_and_writes_what_it_found(tiny, data, probabilities, tmp_path):
    """By two processes, of 11 and 10 images. Model, input size and data set are the checkpoint's.
    """
    done = train("cifar10", "--eval", "--resume", tiny / "best_checkpoint.pth", "--data-path",
                 data / "pets", "--predictions", tmp_path / "a" / "b.csv", "--batch-size", "4",
                 processes=2, small=False)
    stats = log_of(tiny)[0]
    assert done.stdout.count(": test accuracy") == done.stdout.count("worst classes: ") == 1
    for name in ("test accuracy {test_acc1:.2f} %", "top-5 {test_acc5:.2f} %",
                 "mean per class {test_acc_per_class:.2f} %", "loss {test_loss:.4f} on 21 images"):
        assert name.format(**stats) in done.stdout
    rows = rows_of((tmp_path / "a" / "b.csv").read_text())
    names = [line.split()[0] for line in
             (data / "pets" / "annotations" / "test.txt").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"images/{name}.jpg" for name in names]
    assert [row["label"] for row in rows] == [name.rpartition("_")[0] for name in names]
    classes = saved(tiny / "best_checkpoint.pth")["classes"]
    for row, of_image in zip(rows, probabilities):
        assert row["predicted"] == classes[of_image.argmax()]
        assert float(row["probability"]) == pytest.approx(of_image.max(), abs=2e-6)
        assert float(row["label_probability"]) == pytest.approx(
            of_image[classes.index(row["label"])], abs=2e-6)
    of_run = rows_of((tiny / "predictions.csv").read_text())  # of its last evaluation
    for name in ("image", "label", "predicted"):
        assert [row[name] for row in of_run] == [row[name] for row in rows]
    right = [row["predicted"] == row["label"] for row in rows]
    assert stats["test_acc1"] == pytest.approx(100 * numpy.mean(right))
    assert 0 < stats["test_acc1"] < stats["test_acc5"]


def test_eval_has_from_the_checkpoint_what_evaluation_depends_on(run, decide, data):
    settings = {"data_set": "imagenet", "eval_crop_ratio": 0.5, "input_size": 48}
    rewrite(run / "checkpoint.pth", lambda state: {
        **state, "settings": {**state["settings"], **settings}})
    args = decide("pets", "--eval", "--resume", run / "checkpoint.pth", "--data-path",
                  data / "imagenet", small=False).args
    assert settings.items() <= vars(args).items()


def test_predictions_replace_nothing_but_predictions(tiny, data, refusal, tmp_path):
    checkpoint, notes, own = (tmp_path / name for name in ("a.pth", "notes.csv", "own.csv"))
    checkpoint.write_bytes(b"PK")
    notes.write_text("image,my label\n")
    own.write_text("image,label,predicted,probability\n")  # of an earlier version
    for path, says in ((checkpoint, "same file as --resume"),
                       (notes, "not what --predictions writes")):
        with pytest.raises(UserError, match=f"{path}.* {says}"):
            evaluation.check_predictions(str(path), str(checkpoint))
    for path in (own, tmp_path / "new" / "folder" / "a.csv"):
        evaluation.check_predictions(str(path), str(checkpoint))
    evaluate = ["--eval", "--resume", tiny / "best_checkpoint.pth", "--data-path",
                data / "pets", "--predictions", tmp_path]
    assert f"{tmp_path}: it is a folder" in refusal("pets", *evaluate, small=False)


def test_predict_labels_new_images(tiny, data, tmp_path):
    """The same as an evaluation; what cannot be read is named, and the others are labelled."""
    photos, path = tmp_path / "photos", tiny / "best_checkpoint.pth"
    (photos / "deep").mkdir(parents=True)
    images = sorted((data / "pets" / "images").glob("*_9.jpg"))
    for image in images:
        shutil.copy(image, photos / "deep")
    shutil.copy(images[0], photos / ".hidden.jpg")
    (photos / "broken.jpg").write_bytes(images[0].read_bytes()[:200])
    (photos / "iphone.HEIC").write_bytes(b"none")  # a photo, unlike the next
    os.mkfifo(str(photos / "pipe.jpg"))
    done = without_deit("predict.py", "--resume", path, photos, "--batch-size", "3")
    assert done.returncode == 1 and str(photos / "broken.jpg") in done.stderr, done.stderr
    assert f"{photos / 'iphone.HEIC'} is not readable" in done.stderr
    assert "1 not a regular file" in done.stderr and "Traceback" not in done.stderr
    expected = {row["image"]: row for row in rows_of((tiny / "predictions.csv").read_text())}
    rows = rows_of(done.stdout)
    assert [row["image"] for row in rows] == [str(photos / "deep" / image.name)
                                              for image in images]
    for row, image in zip(rows, images):
        for name in ("predicted", "probability"):
            assert row[name] == expected[f"images/{image.name}"][name]
    (tmp_path / "empty").mkdir()
    for wrong, says in (([tmp_path / "empty"], "no images"), ([photos / "pipe.jpg"], "pipe"),
                        ([photos, "--resume", tiny / "converted.pth"], "best_checkpoint.pth")):
        assert says in error_of(without_deit("predict.py", "--resume", path, *wrong))


@pytest.mark.skipif(not TIMM_LOADS_FOLDERS, reason="timm before 1.0.16")
def test_an_export_replaces_nothing_but_an_export(tiny, tmp_path):
    flags, out = ["--resume", tiny / "best_checkpoint.pth", "--output"], tmp_path / "new" / "out"
    line = error_of(without_deit("export.py", *flags, out, before=fill_the_disk), status=1)
    assert "model.safetensors" in line and not (tmp_path / "new").exists()
    for _ in range(2):
        assert without_deit("export.py", *flags, out).returncode == 0
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors"), 0o666 & ~UMASK)
    (out / "config.json").write_text('{"architecture": "resnet50"}')
    before = (out / "model.safetensors").read_bytes()
    assert "not belong to an export" in error_of(without_deit("export.py", *flags, out))
    (out / "config.json").unlink()
    assert "not belong to an export" in error_of(without_deit("export.py", *flags, out))
    assert (out / "model.safetensors").read_bytes() == before and len(list(out.iterdir())) == 1


def test_a_vit_small_on_a_transparent_photo_on_its_side(tmp_path):
    """With MoCo v3's 12 heads, at 192 pixels: predict.py and the export, against timm. A model of
    Pets, whose own images need neither to be white behind nor to be turned.
    """
    path, photo, out = (tmp_path / name for name in ("best.pth", "photo.png", "exported"))
    rng = numpy.random.RandomState(0)
    state = generate.finished_model(
        path, "abc", 192, 384, torch.from_numpy(rng.randn(3, 384)).float() / 10,
        model="moco_v3_vit_small_patch16_224", data_set="pets")
    exif = Image.Exif()
    exif[274] = 6  # as a phone that was held upright
    pixels = rng.randint(0, 256, (30, 40, 4)).astype("uint8")
    Image.fromarray(pixels, "RGBA").resize((400, 300)).save(photo, exif=exif)
    white = Image.new("RGBA", (300, 400), "white")
    white.alpha_composite(ImageOps.exif_transpose(Image.open(photo)))
    transform = published.transform_of(False, Namespace(data_set="pets", input_size=192))
    with torch.no_grad():
        image = transform(white.convert("RGB"))
        expected = vit_of(state, 192, heads=12)(image[None]).softmax(dim=1)[0]
    rows = rows_of(without_deit("predict.py", "--resume", path, photo, "--top", "3").stdout)
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), abs=2e-6)
    assert rows[0]["predicted"] == "abc"[expected.argmax()]
    done = without_deit("export.py", "--resume", path, "--output", out)
    if not TIMM_LOADS_FOLDERS:
        assert "timm>=1.0.16" in error_of(done)
        return
    assert json.loads((out / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(exported)
    image = timm.data.create_transform(**config)(white.convert("RGB"))
    with torch.no_grad():
        assert torch.allclose(exported(image[None]).softmax(dim=1)[0], expected, atol=1e-6)


def test_a_held_out_run_never_looks_at_test_images(data, flags, refusal, tmp_path):
    flowers, run = shutil.copytree(data / "flowers", tmp_path / "flowers"), tmp_path / "run"
    lists = scipy.io.loadmat(str(flowers / "setid.mat"))
    for number in lists["tstid"][0]:
        (flowers / "jpg" / f"image_{number:05d}.jpg").unlink()
    done = train("flowers", *flags, "--data-path", flowers, "--hold-out", "0.2", "--lr", "0.05",
                 "--warmup-epochs", "0")
    assert "42 train and 7 held-out images" in done.stdout and "test accuracy" not in done.stdout
    assert done.stdout.count("held-out accuracy") == 3  # two evaluations, and the best
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["hold_out"] == 0.2 and settings["train images"] == 42
    evaluate = ["--eval", "--resume", run / "checkpoint.pth", "--data-path", flowers]
    again = train("flowers", *evaluate, small=False)
    assert f"held-out accuracy {log_of(run)[-1]['test_acc1']:.2f} %" in again.stdout
    assert "is missing" in refusal("flowers", *evaluate, "--hold-out", "0", small=False)
    lists["trnid"] = lists["trnid"][:, ::-1]  # as many images, but others are held out
    scipy.io.savemat(str(flowers / "setid.mat"),
                     {name: value for name, value in lists.items() if name[0] != "_"})
    line = refusal("flowers", *evaluate, small=False)
    assert "images to evaluate on" in line and "same data" in line
