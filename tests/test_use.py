"""What follows training: evaluation, predictions, labels for new images, an export; --hold-out."""
import csv
import json
import os
import re
import shutil
from argparse import Namespace

import numpy
import pytest
import timm
import torch
from PIL import Image

import generate
import published
from conftest import error_of, log_of, saved, train
from deit_plugin import data as run_data
from deit_plugin import evaluation
from deit_plugin.errors import UserError
from launches import SCRIPTS, environment, fill_the_disk, fork, fork_script, limit_file_size

UMASK = os.umask(0)
os.umask(UMASK)
TIMM_LOADS_FOLDERS = hasattr(getattr(timm.models, "_hub", None), "load_model_config_from_path")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A Pets run with ViT-Tiny, which needs no DeiT, that has learnt something."""
    folder = tmp_path_factory.mktemp("run")
    torch.save({"model": generate.encoder_state()}, folder / "converted.pth")
    train("pets", "--resume", folder / "converted.pth", "--data-path", data / "pets",
          "--output_dir", folder, "--model", "deit_tiny_patch16_224", "--input-size", "48",
          "--lr", "0.05", "--warmup-epochs", "0", "--epochs", "1", "--mixup", "0")
    return folder


@pytest.fixture(scope="module")
def logits(run, data):
    """The model's logits and the labels of the test images, computed without the bundle."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=48, embed_dim=192, depth=12, num_heads=3, num_classes=37, qkv_bias=True)
    model.load_state_dict(saved(run / "best_checkpoint.pth")["model"])
    args = Namespace(data_set="pets", data_path=data / "pets", input_size=48)
    dataset, _ = published.build_dataset(False, args)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))))
    with torch.no_grad():
        return model.eval()(torch.stack(images)).numpy().astype(float), numpy.array(labels)


def python(script, *arguments, **options):
    """Without a DeiT."""
    return fork_script(SCRIPTS / script, *arguments, variables=environment(DEIT_DIR=None),
                       **options)


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_an_evaluation_s_numbers(run, logits):
    """Top-1, top-5, mean per class and loss, against NumPy's."""
    scores, labels = logits
    ranks = (scores > scores[range(len(labels)), labels][:, None]).sum(axis=1)
    loss = numpy.log(numpy.exp(scores).sum(axis=1)) - scores[range(len(labels)), labels]
    per_class = [100 * (ranks[labels == label] == 0).mean() for label in set(labels)]
    row = log_of(run)[0]
    assert row["test_acc1"] == pytest.approx(100 * (ranks == 0).mean())
    assert row["test_acc5"] == pytest.approx(100 * (ranks < 5).mean())
    assert row["test_acc_per_class"] == pytest.approx(numpy.mean(per_class))
    assert row["test_loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert 0 < row["test_acc1"] < row["test_acc5"]


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_eval_says_and_writes_what_it_found(processes, run, data, logits, tmp_path):
    """It takes model, input size and data set from the checkpoint; the recipe may be any."""
    done = train("cifar10", "--eval", "--resume", run / "best_checkpoint.pth", "--data-path",
                 data / "pets", "--predictions", tmp_path / "a" / "b.csv", "--batch-size", "4",
                 processes=processes, small=False)
    row = log_of(run)[0]
    assert done.stdout.count(": test accuracy") == 1
    for name in ("test accuracy {test_acc1:.2f} %", "top-5 {test_acc5:.2f} %",
                 "mean per class {test_acc_per_class:.2f} %", "loss {test_loss:.4f} on 21 images"):
        assert name.format(**row) in done.stdout
    scores, labels = logits
    rows = rows_of((tmp_path / "a" / "b.csv").read_text())
    names = [line.split()[0] for line in
             (data / "pets" / "annotations" / "test.txt").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"images/{name}.jpg" for name in names]
    assert [row["label"] for row in rows] == [name.rpartition("_")[0] for name in names]
    classes = saved(run / "best_checkpoint.pth")["classes"]
    assert [row["predicted"] for row in rows] == [classes[i] for i in scores.argmax(axis=1)]
    probabilities = torch.from_numpy(scores).softmax(dim=1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        probabilities.max(dim=1).values.tolist(), abs=2e-6)
    assert [float(row["label_probability"]) for row in rows] == pytest.approx(
        probabilities[range(len(labels)), labels].tolist(), abs=2e-6)
    of_run = rows_of((run / "predictions.csv").read_text())  # of its last evaluation
    for name in ("image", "label", "predicted"):
        assert [row[name] for row in of_run] == [row[name] for row in rows]
    worst = done.stdout.partition("worst classes: ")[2].splitlines()[0].split(", ")
    right = {name: [row["predicted"] == name for row in rows if row["label"] == name]
             for name in {row["label"] for row in rows}}
    lowest = sorted(100 * numpy.mean(hits) for hits in right.values())[:5]
    assert [float(re.search(r"([\d.]+) % of 3", text)[1]) for text in worst] == pytest.approx(
        lowest, abs=0.01)


def test_predictions_that_cannot_be_written_are_refused_at_once(run, data, tmp_path):
    flags = ["--eval", "--resume", run / "best_checkpoint.pth", "--data-path", data / "pets"]
    refused = fork("pets", *flags, "--predictions", tmp_path, small=False)
    assert str(tmp_path) in error_of(refused) and "accuracy" not in refused.stdout


def test_predictions_replace_nothing_but_predictions(tmp_path):
    checkpoint, link, notes, pipe, own = (
        tmp_path / name for name in ("a.pth", "link.csv", "notes.csv", "pipe", "own.csv"))
    checkpoint.write_bytes(b"PK")
    link.symlink_to(checkpoint)
    notes.write_text("image,my label\n")
    os.mkfifo(str(pipe))
    own.write_text("image,label,predicted,probability\n")
    (tmp_path / "empty").touch()
    for path, says in ((checkpoint, "same file as --resume"), (link, "same file"), (pipe, "pipe"),
                       (notes, "not what --predictions writes"), (tmp_path, "folder"),
                       (own / "a.csv", str(own)), ("/dev/full", "device")):
        with pytest.raises(UserError, match=says) as refusal:
            evaluation.check_predictions(str(path), str(checkpoint))
        assert str(path) in str(refusal.value)
    for path in (own, tmp_path / "empty", tmp_path / "new" / "folder" / "a.csv"):
        evaluation.check_predictions(str(path), str(checkpoint))


def test_predict_labels_new_images(run, data, tmp_path):
    """The same as --eval; what cannot be read is named, and the others are labelled."""
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    images = sorted((data / "pets" / "images").glob("*_9.jpg"))
    for image in images:
        shutil.copy(image, photos / "deep")
    shutil.copy(images[0], photos / ".hidden.jpg")
    (photos / "broken.jpg").write_bytes(images[0].read_bytes()[:200])
    (photos / "notes.txt").write_text("none")
    os.mkfifo(str(photos / "pipe.jpg"))
    path = run / "best_checkpoint.pth"
    done = python("predict.py", "--resume", path, photos, "--batch-size", "3")
    assert done.returncode == 1 and str(photos / "broken.jpg") in done.stderr, done.stderr
    assert ".txt" in done.stderr and "1 not a regular file" in done.stderr
    assert "Traceback" not in done.stderr
    train("pets", "--eval", "--resume", path, "--data-path", data / "pets", "--predictions",
          tmp_path / "eval.csv", small=False)
    expected = {row["image"].rpartition("/")[2]: (row["predicted"], row["probability"])
                for row in rows_of((tmp_path / "eval.csv").read_text())}
    rows = rows_of(done.stdout)
    assert [row["image"] for row in rows] == [str(photos / "deep" / image.name)
                                              for image in images]
    for row in rows:
        assert (row["predicted"], row["probability"]) == expected[row["image"].rpartition("/")[2]]
    top = python("predict.py", "--resume", path, images[0], "--top", "3", "--num_workers", "0")
    probabilities = [float(row["probability"]) for row in rows_of(top.stdout)]
    assert len(probabilities) == 3 and probabilities == sorted(probabilities)[::-1]
    for wrong, says in ((["/nowhere"], "/nowhere"), ([tmp_path / "empty"], "no images"),
                        ([photos, "--top", "0"], "--top 0"), ([photos / "pipe.jpg"], "pipe")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        failed = python("predict.py", "--resume", path, *wrong)
        assert failed.returncode == 2 and says in failed.stderr.splitlines()[-1]
    assert "best_checkpoint.pth" in error_of(
        python("predict.py", "--resume", run / "converted.pth", photos))


def test_export_gives_the_same_logits_in_timm(run, data, tmp_path):
    out = tmp_path / "exported"
    done = python("export.py", "--resume", run / "best_checkpoint.pth", "--output", out)
    if not TIMM_LOADS_FOLDERS:
        assert "timm>=1.0.16" in error_of(done)
        return
    assert done.returncode == 0 and sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors"], done.stderr
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~UMASK}
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    path = data / "pets" / "images" / "dog_breed2_9.jpg"
    image = transform(Image.open(path).convert("RGB"))[None]
    shown = python("predict.py", "--resume", run / "best_checkpoint.pth", path).stdout
    with torch.no_grad():
        probability, label = model(image).softmax(dim=1).max(dim=1)
    names = json.loads((out / "config.json").read_text())["label_names"]
    assert rows_of(shown) == [{"image": str(path), "predicted": names[label],
                               "probability": f"{probability.item():.6f}"}]


@pytest.mark.skipif(not TIMM_LOADS_FOLDERS, reason="timm before 1.0.16")
def test_an_export_replaces_nothing_but_an_export(run, tmp_path):
    flags, out = ["--resume", run / "best_checkpoint.pth", "--output"], tmp_path / "new" / "out"
    for fails in (limit_file_size, fill_the_disk):
        line = error_of(python("export.py", *flags, out, before=fails), status=1)
        assert "model.safetensors" in line and not (tmp_path / "new").exists()
    for _ in range(2):
        assert python("export.py", *flags, out).returncode == 0
    (out / "config.json").write_text('{"architecture": "resnet50"}')
    before = (out / "model.safetensors").read_bytes()
    for left in (2, 1):
        line = error_of(python("export.py", *flags, out))
        assert "not belong to an export" in line and len(list(out.iterdir())) == left
        assert (out / "model.safetensors").read_bytes() == before
        (out / "config.json").unlink(missing_ok=True)
    os.mkfifo(str(out / "config.json"))
    assert "config.json" in error_of(python("export.py", *flags, out))


def test_a_vit_small_on_a_transparent_photo(tmp_path):
    """With MoCo v3's 12 heads, at 224 pixels: predict.py and the export, against timm."""
    state, rng = generate.encoder_state(384, 12), numpy.random.RandomState(0)
    state.update({"head.weight": torch.from_numpy(rng.randn(3, 384)).float() / 10,
                  "head.bias": torch.zeros(3)})
    settings = {"model": "moco_v3_vit_small_patch16_224", "input_size": 224, "data_set": "folder"}
    path, photo, out = (tmp_path / name for name in ("best.pth", "photo.png", "exported"))
    torch.save({"model": state, "settings": settings, "classes": ["a", "b", "c"]}, path)
    pixels = rng.randint(0, 256, (30, 40, 4)).astype("uint8")
    Image.fromarray(pixels, "RGBA").resize((400, 300)).save(photo)
    model = timm.models.vision_transformer.VisionTransformer(
        embed_dim=384, depth=12, num_heads=12, num_classes=3, qkv_bias=True)
    model.load_state_dict(state)
    white = Image.new("RGBA", (400, 300), "white")
    white.alpha_composite(Image.open(photo))
    args = Namespace(data_set="pets", input_size=224)
    image = published.transform_of(False, args)(white.convert("RGB"))
    with torch.no_grad():
        expected = model.eval()(image[None]).softmax(dim=1)[0]
    rows = rows_of(python("predict.py", "--resume", path, photo, "--top", "3").stdout)
    probabilities = {row["predicted"]: float(row["probability"]) for row in rows}
    assert [probabilities[name] for name in "abc"] == pytest.approx(expected.tolist(), abs=2e-6)
    if TIMM_LOADS_FOLDERS:
        assert python("export.py", "--resume", path, "--output", out).returncode == 0
        exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        config = timm.data.resolve_model_data_config(exported)
        image = timm.data.create_transform(**config)(white.convert("RGB"))
        with torch.no_grad():
            assert torch.allclose(exported(image[None]).softmax(dim=1)[0], expected, atol=1e-6)


@pytest.mark.parametrize("share, held_out", [(0.2, 7), (0.22, 14), (0.01, 7), (0.99, 42)])
def test_hold_out_takes_a_share_of_each_class(share, held_out):
    images = Namespace(targets=[number % 7 for number in range(49)], classes=list("abcdefg"),
                       samples=list(range(49)), transform="augment")
    parts = [run_data.split(images, share, "evaluate") for _ in range(2)]
    (kept, out), again = parts
    assert (kept.indices, out.indices) == (again[0].indices, again[1].indices)
    assert (kept.samples, out.samples) == (kept.indices, out.indices)
    with pytest.raises(UserError, match="samples"):
        run_data.split(Namespace(targets=[0, 0], classes=["a"], transform=None), share, None)
    assert sorted(kept.indices + out.indices) == list(range(49)) and len(out.indices) == held_out
    for part in (kept, out):
        assert numpy.ptp(numpy.bincount(part.targets)) == 0 and set(part.targets) == set(range(7))
        assert part.targets == [index % 7 for index in part.indices]
    kept.transform = "other"  # as DeiT HEAD does
    assert out.transform == "evaluate"
    with pytest.raises(UserError, match="class h has only one"):
        run_data.split(Namespace(targets=[0, 0, 1], classes=["g", "h"], samples=[]), share, None)


class Labels(list):
    """A list that counts how often NumPy reads it."""

    times = 0

    def __array__(self, *_, **__):
        self.times += 1
        return numpy.array(list(self))


def test_hold_out_does_not_read_all_labels_for_each_class():
    """With 4000 classes and 200,000 images, that took a minute."""
    labels = Labels(number % 100 for number in range(500))
    images = Namespace(targets=labels, classes=[*map(str, range(100))], samples=list(range(500)),
                       transform=None)
    kept, out = run_data.split(images, 0.2, None)
    assert (len(kept.samples), len(out.samples)) == (400, 100) and 0 < labels.times < 5


def test_a_held_out_run_never_looks_at_test_images(data, flags, tmp_path):
    flowers, run = shutil.copytree(data / "flowers", tmp_path / "flowers"), tmp_path / "run"
    import scipy.io

    for number in scipy.io.loadmat(str(flowers / "setid.mat"))["tstid"][0]:
        (flowers / "jpg" / f"image_{number:05d}.jpg").unlink()
    flags = [*flags, "--data-path", flowers]
    held = [*flags, "--hold-out", "0.2", "--lr", "0.05", "--warmup-epochs", "0"]
    check = train("flowers", *held, "--check")
    assert "49 of" not in check.stdout and "all 49 can be decoded" in check.stdout
    done = train("flowers", *held)
    assert "42 train and 7 held-out images" in done.stdout and "test accuracy" not in done.stdout
    assert done.stdout.count("held-out accuracy") == 3  # two evaluations, and the best
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["hold_out"] == 0.2 and settings["train images"] == 42
    line = error_of(fork("flowers", *held, "--hold-out", "0.3"))
    assert "--hold-out 0.3 (there: 0.2)" in line
    evaluate = ["--eval", "--resume", run / "checkpoint.pth", "--data-path", flowers]
    last = log_of(run)[-1]["test_acc1"]
    again = train("flowers", *evaluate, "--predictions", tmp_path / "p.csv", small=False)
    assert f"held-out accuracy {last:.2f} %" in again.stdout
    rows = rows_of((tmp_path / "p.csv").read_text())
    assert 100 * numpy.mean([row["label"] == row["predicted"] for row in rows]) == pytest.approx(
        last)
    assert "is missing" in error_of(fork("flowers", *evaluate, "--hold-out", "0",
                                         small=False))
    labels = scipy.io.loadmat(str(flowers / "setid.mat"))
    labels["trnid"] = labels["trnid"][:, ::-1]  # as many images, but others are held out
    scipy.io.savemat(str(flowers / "setid.mat"),
                     {name: value for name, value in labels.items() if name[0] != "_"})
    line = error_of(fork("flowers", *evaluate, small=False))
    assert "images to evaluate on" in line and "same data" in line
