"""Frozen features, a kept classifier, layer decay, and the data sets without a recipe."""
import csv
import json
from argparse import Namespace

import numpy
import pytest
import scipy.io
import timm
import torch
import torchvision
from PIL import Image

import convert_to_deit
import datasets
import generate
import published
from conftest import ERAS, error_of, forked, log_of, saved, train, version_of, vit_of
from deit_plugin.data import load
from deit_plugin.errors import UserError
from features import (
    Split,
    check_outputs,
    fit,
    logistic_regression,
    nearest_neighbours,
    validation_of,
)
from launches import MODEL, SCRIPTS, WIDTH, environment, fork, fork_script


def unordered(images):
    """Features that tell nothing of 5 classes, so that other numbers would decide otherwise."""
    rng = numpy.random.RandomState(images)
    return Split(torch.tensor(rng.randn(images, 8)).float(),
                 torch.tensor(rng.randint(0, 5, images)), [])


def fitted(split, decay):
    """Weights (5, width) and biases (5,) of a logistic regression."""
    found = fit(split.features, split.labels, decay, 5, None).numpy().astype(float)
    return found[:, :-1], found[:, -1]


def test_neighbours_vote_by_their_similarity():
    train, test = unordered(100), unordered(300)
    bank, asked = (x / numpy.linalg.norm(x, axis=1, keepdims=True)
                   for x in (train.features.numpy(), test.features.numpy()))
    labels = test.labels.numpy()
    for k, found in nearest_neighbours(train, test, 5):
        predicted = []
        for similarity in asked @ bank.T:
            nearest = numpy.argsort(-similarity)[:int(k)]
            votes = numpy.exp(similarity[nearest] / 0.07)
            predicted.append(numpy.bincount(train.labels[nearest], votes, minlength=5).argmax())
        hits = 100 * (numpy.array(predicted) == labels)
        per_class = [hits[labels == label].mean() for label in range(5)]
        assert found == pytest.approx({"acc1": hits.mean(), "acc_per_class": numpy.mean(per_class)})


def test_a_fit_has_the_lowest_loss():
    """Where its gradient is 0. The loss: the cross-entropies + decay / 2 x |W|^2."""
    train, decay = unordered(100), 30.0
    weights, biases = forked(fitted, train, decay)
    x, logits = train.features.numpy(), train.features.numpy() @ weights.T + biases
    shares = numpy.exp(logits) / numpy.exp(logits).sum(axis=1, keepdims=True)
    residuals = shares - numpy.eye(5)[train.labels]
    assert abs(residuals.T @ x + decay * weights).max() < 0.1
    assert abs(residuals.sum(axis=0)).max() < 0.1


def test_of_equally_good_weight_decays_the_one_with_the_lower_loss_is_chosen():
    """One of 12 labels is wrong, so a small decay is as right as others, but too sure of itself."""
    labels = numpy.arange(60) % 3
    x = 3 * numpy.eye(5)[labels] + numpy.random.RandomState(0).randn(60, 5) / 10
    labels[0] = 1
    split = Split(torch.tensor(x).float(), torch.tensor(labels), list(labels))
    found = forked(logistic_regression, split, split, list(range(12)), 3)
    assert found["held_out_acc1"] == pytest.approx(100 * 11 / 12)
    assert 0.1 < found["weight_decay"] < 100


def test_the_last_fit_is_to_all_train_images():
    train, test = unordered(100), unordered(300)
    found = forked(logistic_regression, train, test, list(range(80)), 5)
    weights, biases = forked(fitted, train, found["weight_decay"])
    hits = (test.features.numpy() @ weights.T + biases).argmax(axis=1) == test.labels.numpy()
    assert found["acc1"] == pytest.approx(100 * hits.mean(), abs=0.5)


def test_features_of_held_out_images_and_what_comes_of_them(data, tmp_path):
    """Without a DeiT, and without a single test image; beside timm's features."""
    path, own = tmp_path / "a b.pth", tmp_path / "own"
    state = generate.encoder_state()
    state["pos_embed"] = generate.sin_cos_table(192, 3)  # of 48 pixels
    torch.save({"model": state}, path)
    for number, image in enumerate(sorted((data / "imagenet" / "train").glob("*/*"))):
        label = (int(image.parent.name[1:]) + (number % 4 == 0)) % 5  # so that not all are right
        (own / "train" / str(label)).mkdir(parents=True, exist_ok=True)
        (own / "train" / str(label) / image.name).symlink_to(image)
    done = fork_script(
        SCRIPTS / "features.py", "--resume", path, "--data-set", "imagenet", "--data-path", own,
        "--hold-out", "0.2", "--output", tmp_path / "new" / "a.json", "--save", tmp_path / "a.npz",
        "--num_workers", "1", variables=environment(DEIT_DIR=None))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    arrays = numpy.load(str(tmp_path / "a.npz"))
    assert (found["train_images"], found["test_images"], found["features"]) == (215, 55, 192)
    assert found["weights"]["path"] == str(path)
    model, splits = vit_of(state, 48, heads=3), []
    transform = published.transform_of(False, Namespace(data_set="imagenet", input_size=48))
    for part in ("train", "test"):
        x, labels, names = (arrays[f"{part}_{what}"] for what in Split._fields)
        images = [transform(Image.open(str(own / name)).convert("RGB")) for name in names]
        with torch.no_grad():
            assert numpy.allclose(x, model(torch.stack(images)).numpy(), atol=1e-4)
        assert labels.tolist() == [int(name.split("/")[1]) for name in names]
        splits.append(Split(torch.from_numpy(x), torch.from_numpy(labels), names))
    train, test = splits
    assert found["knn"] == dict(nearest_neighbours(train, test, 5))
    assert f"kNN, k = 10: {found['knn']['10']['acc1']:.2f} %" in done.stdout
    assert "on 43 of the train images" in done.stdout  # the weight decay was chosen


def test_the_weight_decay_is_chosen_on_flowers_official_val_set(data):
    args = Namespace(data_set="flowers", data_path=str(data / "flowers"), input_size=32,
                     hold_out=0.0)
    dataset, _ = datasets.build_dataset(True, args)
    numbers = [int(dataset.samples[index][0][-9:-4]) for index in validation_of(dataset, args)]
    official = scipy.io.loadmat(str(data / "flowers" / "setid.mat"))["valid"][0]
    assert sorted(numbers) == sorted(official)


def test_what_features_would_find_out_only_after_the_work(tmp_path):
    path = tmp_path / "a.pth"
    path.touch()
    good = {"data_set": "pets", "output": "", "save": "", "resume": str(path)}
    for wrong, says in (({"output": str(path)}, "same file as --resume"),
                        ({"data_set": "nope"}, "choose from")):
        with pytest.raises(UserError, match=says):
            check_outputs(Namespace(**{**good, **wrong}))


def test_a_kept_classifier_predicts_what_timm_s_model_predicts(data, tmp_path, capfd):
    """A linear probe as MoCo v3 publishes it, here on five classes."""
    probe, converted, table = (tmp_path / name for name in ("linear.pth.tar", "a.pth", "a.csv"))
    state, rng = generate.encoder_state(WIDTH, 2 if WIDTH == 64 else 12), torch.Generator()
    state.update({"head.weight": torch.randn(5, WIDTH, generator=rng.manual_seed(0)),
                  "head.bias": torch.randn(5, generator=rng)})
    torch.save({"epoch": 90, "arch": "vit", "state_dict": {
        f"module.{name}": tensor for name, tensor in state.items()}}, probe)
    convert = ["--input", str(probe), "--output", str(converted)]
    convert_to_deit.main(convert)
    assert "classifier of 5 classes was left out" in capfd.readouterr().out
    assert "head.weight" not in saved(converted)["model"]
    convert_to_deit.main([*convert, "--keep-head"])
    assert "classifier of 5 classes was kept" in capfd.readouterr().out
    flags = ["--data-path", data / "imagenet", "--resume", converted, "--model", MODEL,
             "--input-size", "224"]
    train("imagenet", "--eval", *flags, "--predictions", table)
    args = Namespace(data_set="imagenet", data_path=data / "imagenet", input_size=224)
    images, _ = published.build_dataset(False, args)
    with torch.no_grad():
        logits = vit_of(state, 224, heads=2 if WIDTH == 64 else 3)(
            torch.stack([image for image, _ in images]))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["predicted"] for row in rows] == [
        images.classes[label] for label in logits.argmax(dim=1)]
    refused = fork("imagenet", *flags, "--output_dir", tmp_path / "run")
    assert "--keep-head" in error_of(refused) and not (tmp_path / "run").exists()


def test_a_pre_training_head_is_never_kept(tmp_path):
    """Also if it looks like a classifier."""
    moco = generate.moco_checkpoint(tmp_path / "moco.pth", width=64, depth=2)
    state = {**generate.encoder_state(64, 2), "head.weight": torch.ones(10, 64),
             "head.bias": torch.ones(10)}
    for content in (moco, {f"module.base_encoder.{name}": state[name] for name in state}):
        with pytest.raises(convert_to_deit.CheckpointError, match="no classifier to keep"):
            convert_to_deit.convert(content, keep_head=True)


@pytest.mark.parametrize("era", ERAS)
def test_layer_decay_acts_or_is_refused(era, flags, tmp_path):
    done = fork("pets", *flags, "--layer-decay", "0.5", "--lr", "0.64", "--warmup-epochs", "0",
                "--epochs", "1", era=era)
    if version_of(timm) < (0, 6):
        assert "timm>=0.6" in error_of(done)
    elif "wrapped model" in done.stderr:
        assert era in (None, "2020") and "--layer-decay 0.5" in error_of(done)
        assert not (tmp_path / "run").exists()
    else:
        assert done.returncode == 0 and era != "2020", done.stderr
        assert log_of(tmp_path / "run")[0]["train_lr"] == pytest.approx(0.64 * 8 / 512)
        groups = saved(tmp_path / "run" / "checkpoint.pth")["optimizer"]["param_groups"]
        assert {1, 0.5, 0.25} <= {group["lr_scale"] for group in groups}


def listed_data(folder):
    """Two classes in torchvision's own layouts, with 4 images in each of their splits."""
    food, aircraft, dtd, cars = (folder / name for name in (
        "food101/food-101", "aircraft/fgvc-aircraft-2013b/data", "dtd/dtd/dtd",
        "cars/stanford_cars"))
    for its in (food / "meta", aircraft, dtd / "labels", cars / "devkit"):
        its.mkdir(parents=True)
    kinds, rng = ("a 1", "b"), numpy.random.default_rng(0)
    (aircraft / "variants.txt").write_text("a 1\nb\n")
    scipy.io.savemat(str(cars / "devkit" / "cars_meta.mat"), {
        "class_names": numpy.array(kinds, dtype=object)})
    for split, annotations in (("train", "devkit/cars_train_annos.mat"), ("trainval", "none.mat"),
                               ("val", "none.mat"), ("test", "cars_test_annos_withlabels.mat")):
        images = [(f"{split}{number}", number % 2) for number in range(4)]
        for name, label in images:
            for its in (food / "images" / kinds[label], aircraft / "images",
                        dtd / "images" / kinds[label], cars / f"cars_{split}"):
                generate.write_picture(its / f"{name}.jpg", label, rng)
        (food / "meta" / f"{split}.json").write_text(json.dumps({
            kind: [f"{kind}/{name}" for name, label in images if kinds[label] == kind]
            for kind in kinds}))
        (aircraft / f"images_variant_{split}.txt").write_text(
            "".join(f"{name} {kinds[label]}\n" for name, label in images))
        (dtd / "labels" / f"{split}1.txt").write_text(
            "".join(f"{kinds[label]}/{name}.jpg\n" for name, label in images))
        rows = numpy.array([(f"{name}.jpg", label + 1) for name, label in images],
                           dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(str(cars / annotations), {"annotations": rows})
    return folder


@pytest.mark.skipif(not hasattr(torchvision.datasets, "Food101"), reason="torchvision before 0.12")
def test_data_sets_of_torchvision(flags, tmp_path):
    """Their official splits, --hold-out, and a run that says that there is no recipe."""
    folder = listed_data(tmp_path / "listed")
    official = {"food101": ("Food101", ["train"]), "aircraft": ("FGVCAircraft", ["trainval"]),
                "dtd": ("DTD", ["train", "val"]), "cars": ("StanfordCars", ["train"])}
    for name, (kind, parts) in official.items():
        args = Namespace(data_set=name, data_path=str(folder / name), input_size=32, reprob=0.0,
                         hold_out=0.0, eval=False, eval_freq=1)
        for split, its_parts in zip(load(args), (parts, ["test"])):
            split.transform = None
            theirs = [getattr(torchvision.datasets, kind)(str(folder / name), part)
                      for part in its_parts]
            assert split.classes == list(theirs[0].classes)
            pixels = [[(image.tobytes(), label) for image, label in images]
                      for images in (split, torch.utils.data.ConcatDataset(theirs))]
            assert pixels[0] == pixels[1]
            assert split.targets == [label for _, label in pixels[0]]
        args.hold_out = 0.2
        assert [len(split) for split in load(args)] == [6, 2] if name == "dtd" else [2, 2]
        with pytest.raises(FileNotFoundError, match="/nowhere/") as error:
            datasets.build_dataset(True, Namespace(**{**vars(args), "data_path": "/nowhere"}))
        assert ("--download" in str(error.value)) == (name != "cars")
    done = train("pets", *flags, "--data-set", "cars", "--data-path", folder / "cars",
                 "--batch-size", "2", "--epochs", "1")
    assert "4 train and 4 test images" in done.stdout and "no recipe was published" in done.stdout


def test_torchvision_that_lacks_a_data_set_is_named():
    row = datasets._torchvision("NoSuchSet", ("train",), ("a",), False)
    with pytest.raises(ValueError, match="NoSuchSet needs torchvision 0.12"):
        row.missing("/a", "train")
