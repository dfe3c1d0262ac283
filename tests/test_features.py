"""Frozen features, a kept classifier, layer decay, and the data sets without a recipe."""
import csv
import functools
import json
import shutil
from argparse import Namespace

import numpy
import pytest
import scipy.io
import timm
import torch
import torchvision
from torchvision import transforms

import datasets
import generate
import published
from conftest import ERAS, error_of, log_of, saved, train
from deit_plugin.data import load
from features import Split, fit, logistic_regression, nearest_neighbours, predict
from launches import FORK, MODEL, SCRIPTS, WIDTH, environment, fork, fork_script
from test_convert import status_of

HAS_LAYER_DECAY = int(timm.__version__.split(".")[0]) > 0 or int(timm.__version__.split(".")[1]) > 5


def features(*arguments):
    """Without a DeiT."""
    return fork_script(SCRIPTS / "features.py", *arguments, variables=environment(DEIT_DIR=None))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Converted weights of a ViT-Tiny for 48 pixels, and the same model of timm's."""
    path, state = tmp_path_factory.mktemp("tiny") / "a b.pth", generate.encoder_state()
    state["pos_embed"] = generate.sin_cos_table(192, 3)
    torch.save({"model": state}, path)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=48, embed_dim=192, depth=12, num_heads=3, num_classes=0, qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    model.load_state_dict(state)
    return path, model.eval()


@torch.no_grad()
def features_by_timm(model, is_train, root):
    """Features (n, width) and labels (n,) of Pets, by published modules."""
    args = Namespace(data_set="pets", data_path=root, input_size=48)
    dataset, _ = published.build_dataset(is_train, args)
    dataset.transform = published.transform_of(False, args)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))))
    return model(torch.stack(images)).numpy().astype(float), numpy.array(labels)


def neighbours_by_numpy(train, labels, test, k):
    train, test = (x / numpy.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similarity, predicted = test @ train.T, []
    for row in similarity:
        votes = numpy.zeros(37)
        for index in numpy.argsort(-row)[:k]:
            votes[labels[index]] += numpy.exp(row[index] / 0.07)
        predicted.append(votes.argmax())
    return numpy.array(predicted)


def logistic_by_torch(x, labels, decay):
    """Weights (37, width) and bias (37,), by another optimizer."""
    w, b = (torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((37, x.shape[1]), (37,)))
    optimizer = torch.optim.LBFGS([w, b], max_iter=1000, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = torch.from_numpy(x) @ w.T + b
        value = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels),
                                                  reduction="sum") + decay / 2 * (w ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach().numpy(), b.detach().numpy()


def logistic_by_us(x, labels, decay):
    return fit(torch.tensor(x).float(), torch.tensor(labels), decay, 37, None).numpy()


def choose_decay():
    """The weight decay for classes that are far apart, where most are right on all images."""
    labels = numpy.arange(60) % 3
    x = 3 * numpy.eye(5)[labels] + numpy.random.RandomState(0).randn(60, 5) / 10
    split = Split(torch.tensor(x).float(), torch.tensor(labels), list(labels))
    return logistic_regression(split, split, list(range(12)), 3)["weight_decay"]


def forked(function, *arguments):
    """Its result. Once autograd has run in a process, torch 1.7 forks no launch from there."""
    with FORK.Pool(1) as pool:
        return pool.apply(function, arguments)


def test_neighbours_vote_by_their_similarity():
    """In features without any order, where other weights would decide otherwise."""
    rng = numpy.random.RandomState(0)
    (x, labels), (y, asked) = ((rng.randn(n, 8), rng.randint(0, 5, n)) for n in (100, 300))
    train, test = (Split(torch.tensor(their).float(), torch.tensor(its), []) for their, its in (
        (x, labels), (y, asked)))
    for k, found in nearest_neighbours(train, test, 5):
        hits = neighbours_by_numpy(x, labels, y, int(k)) == asked
        assert found["acc1"] == pytest.approx(100 * hits.mean()), k


def test_of_equally_good_weight_decays_the_one_with_the_lower_loss_is_chosen():
    assert forked(choose_decay) < 0.1


def test_features_knn_and_logistic_regression_beside_independent_ones(tiny, data, tmp_path):
    path, model = tiny
    done = features("--resume", path, "--data-set", "pets", "--data-path", data / "pets",
                    "--output", tmp_path / "new" / "a.json", "--save", tmp_path / "a.npz",
                    "--batch-size", "5", "--num_workers", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    arrays = numpy.load(str(tmp_path / "a.npz"))
    (x, labels), (y, asked) = (features_by_timm(model, is_train, data / "pets")
                               for is_train in (True, False))
    assert numpy.allclose(arrays["train_features"], x, atol=1e-4)
    assert numpy.allclose(arrays["test_features"], y, atol=1e-4)
    assert (arrays["test_labels"] == asked).all() and arrays["train_features"].dtype == "float32"
    assert str(arrays["test_names"][0]).startswith("images/")
    assert (found["train_images"], found["test_images"], found["features"]) == (49, 21, 192)
    assert found["weights"]["path"] == str(path) and "torch" in found["versions"]
    assert sorted(found["knn"]) == ["10", "20"]  # of 49 train images
    for k in (10, 20):
        hits = neighbours_by_numpy(x, labels, y, k) == asked
        assert abs(found["knn"][str(k)]["acc1"] - 100 * hits.mean()) < 100 / 21 + 0.01
        assert f"kNN, k = {k}: {found['knn'][str(k)]['acc1']:.2f} %" in done.stdout
    logistic = found["logistic"]
    w, b = forked(logistic_by_torch, x, labels, logistic["weight_decay"])
    hits = (y @ w.T + b).argmax(axis=1) == asked
    assert logistic["acc1"] == pytest.approx(100 * hits.mean(), abs=1)
    per_class = [hits[asked == label].mean() for label in set(asked)]
    assert logistic["acc_per_class"] == pytest.approx(100 * numpy.mean(per_class), abs=1)
    w, b = forked(logistic_by_torch, x, labels, 1.0)
    fitted = torch.from_numpy(forked(logistic_by_us, x, labels, 1.0))
    assert torch.allclose(predict(torch.tensor(y).float(), fitted).double().softmax(dim=1),
                          torch.from_numpy(y @ w.T + b).softmax(dim=1), atol=5e-3)
    assert 0 <= logistic["held_out_acc1"] <= 100 and 1e-6 <= logistic["weight_decay"] <= 1e5


def test_features_on_held_out_images_open_no_test_image(tiny, data, tmp_path):
    flowers = shutil.copytree(data / "flowers", tmp_path / "flowers")
    splits = scipy.io.loadmat(str(flowers / "setid.mat"))
    flags = ["--resume", tiny[0], "--data-set", "flowers", "--data-path", flowers]
    official = features(*flags, "--output", tmp_path / "a.json")  # chooses on the official val set
    assert f"on {splits['valid'].size} of the train images" in official.stdout, official.stderr
    for number in splits["tstid"][0]:
        (flowers / "jpg" / f"image_{number:05d}.jpg").unlink()
    done = features(*flags, "--hold-out", "0.2", "--output", tmp_path / "b.json")
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["train_images"], found["test_images"]) == (42, 7), done.stderr
    for wrong, says in (([], "is missing"), (["--output", tiny[0]], "same file as --resume"),
                        (["--data-set", "nope"], "choose from"), (["--model", "nope"], "nope"),
                        (["--model", "deit_small_patch16_224"], "deit_tiny_patch16_224"),
                        (["--resume", "/no/file"], "/no/file")):
        assert says in error_of(features(*flags, *wrong))


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A linear probe as MoCo v3 publishes it, on three classes; the path."""
    state, rng = generate.encoder_state(WIDTH, 2 if WIDTH == 64 else 12), torch.Generator()
    rng.manual_seed(0)
    state.update({"head.weight": torch.randn(3, WIDTH, generator=rng),
                  "head.bias": torch.randn(3, generator=rng)})
    path = tmp_path_factory.mktemp("probe") / "linear.pth.tar"
    torch.save({"epoch": 90, "arch": "vit", "state_dict": {
        f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def test_a_kept_classifier_predicts_what_timm_s_model_predicts(probe, data, tmp_path, capfd):
    converted, table = tmp_path / "kept.pth", tmp_path / "predictions.csv"
    assert status_of(probe, tmp_path / "without.pth") == 0
    assert "classifier of 3 classes was left out" in capfd.readouterr().out
    assert "head.weight" not in saved(tmp_path / "without.pth")["model"]
    convert = ["--input", probe, "--output", converted, "--keep-head"]
    done = fork_script(SCRIPTS.parent / "convert_to_deit.py", *convert, variables=environment())
    assert "classifier of 3 classes was kept" in done.stdout, done.stderr
    flags = ["--data-set", "folder", "--data-path", data / "folder", "--resume", converted,
             "--model", MODEL, "--input-size", "224"]
    train("imagenet", "--eval", *flags, "--predictions", table)
    state = saved(converted)["model"]
    model = timm.models.vision_transformer.VisionTransformer(
        embed_dim=WIDTH, depth=len({name.split(".")[1] for name in state if "blocks" in name}),
        num_heads=2 if WIDTH == 64 else 3, num_classes=3, qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    model.load_state_dict(state)
    images = torchvision.datasets.ImageFolder(str(data / "folder" / "val"), transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), *published.NORMALISED]))
    with torch.no_grad():
        logits = model.eval()(torch.stack([image for image, _ in images]))
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [images.classes[i] for i in logits.argmax(dim=1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        logits.softmax(dim=1).max(dim=1).values.tolist(), abs=1e-5)
    refused = fork("imagenet", *flags, "--output_dir", tmp_path / "run")
    assert "--keep-head" in error_of(refused) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pre_training_head_is_never_kept(layers, tmp_path):
    generate.moco_checkpoint(tmp_path / "moco.pth", width=64, depth=2)
    if layers == 1:  # which looks like a classifier
        state = generate.encoder_state(64, 2)
        state.update({"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)})
        torch.save({"state_dict": {f"module.base_encoder.{name}": state[name] for name in state}},
                   tmp_path / "moco.pth")
    done = fork_script(SCRIPTS.parent / "convert_to_deit.py", "--input", tmp_path / "moco.pth",
                       "--output", tmp_path / "a.pth", "--keep-head", variables=environment())
    assert done.returncode == 1 and "no classifier to keep" in done.stderr
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("era", ERAS)
def test_layer_decay_acts_or_is_refused(era, flags, tmp_path):
    done = fork("pets", *flags, "--layer-decay", "0.5", "--lr", "0.64", "--warmup-epochs", "0",
                "--epochs", "1", era=era)
    if not HAS_LAYER_DECAY:
        assert "timm>=0.6" in error_of(done)
    elif "wrapped model" in done.stderr:
        assert era in (None, "2020") and "--layer-decay 0.5" in error_of(done)
        assert not (tmp_path / "run").exists()
    else:
        assert done.returncode == 0 and era != "2020", done.stderr
        assert log_of(tmp_path / "run")[0]["train_lr"] == pytest.approx(0.64 * 8 / 512)
        state = saved(tmp_path / "run" / "checkpoint.pth")
        scales = {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
        assert {1, 0.5, 0.25} <= scales and state["settings"]["layer_decay"] == 0.5


def listed_data(folder):
    """Two classes of each data set in torchvision's own layout: 8 train and 4 test images."""
    rng = numpy.random.default_rng(0)

    def images(*names):
        for number, name in enumerate(names):
            generate.write_picture(folder / name, number % 2, rng)

    def text(name, content):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    food = {part: {name: [f"{name}/{part}{i}" for i in range(number)] for name in ("pie", "soup")}
            for part, number in (("train", 4), ("test", 2))}
    for part, classes in food.items():
        text(f"food101/food-101/meta/{part}.json", json.dumps(classes))
        images(*(f"food101/food-101/images/{path}.jpg" for paths in classes.values()
                 for path in paths))
    root = "aircraft/fgvc-aircraft-2013b/data/"
    text(root + "variants.txt", "747 100\nA380\n")
    for part, number in (("trainval", 8), ("test", 4)):
        images(*(f"{root}images/{part}{i}.jpg" for i in range(number)))
        text(f"{root}images_variant_{part}.txt", "".join(
            f"{part}{i} {('747 100', 'A380')[i % 2]}\n" for i in range(number)))
    for part in ("train", "val", "test"):
        names = [f"{('dots', 'lines')[i % 2]}/{part}{i}.jpg" for i in range(4)]
        images(*(f"dtd/dtd/dtd/images/{name}" for name in names))
        text(f"dtd/dtd/dtd/labels/{part}1.txt", "".join(f"{name}\n" for name in names))
    cars = folder / "cars" / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    scipy.io.savemat(str(cars / "devkit" / "cars_meta.mat"), {
        "class_names": numpy.array(["Audi", "BMW"], dtype=object)})
    for part, number, path in (("train", 8, "devkit/cars_train_annos.mat"),
                               ("test", 4, "cars_test_annos_withlabels.mat")):
        images(*(f"cars/stanford_cars/cars_{part}/{i}.jpg" for i in range(number)))
        rows = numpy.array([(f"{i}.jpg", i % 2 + 1) for i in range(number)],
                           dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(str(cars / path), {"annotations": rows})
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
            theirs = [getattr(torchvision.datasets, kind)(str(folder / name), part)
                      for part in its_parts]
            labels = [label for each in theirs for _, label in each]
            assert (split.classes, split.targets) == (list(theirs[0].classes), labels)
            for (image, label), index in zip(theirs[0], range(3)):
                split.transform = None
                ours, its_label = split[index]
                assert (ours.tobytes(), its_label) == (image.tobytes(), label)
        args.hold_out = 0.2
        assert [len(split) for split in load(args)] == [6, 2]
        with pytest.raises(FileNotFoundError) as error:
            datasets.build_dataset(True, Namespace(**{**vars(args), "data_path": "/nowhere"}))
        assert "/nowhere/" in str(error.value)
        assert ("--download" in str(error.value)) == (name != "cars")
    done = train("pets", *flags, "--data-set", "cars", "--data-path", folder / "cars",
                 "--batch-size", "4", "--epochs", "1")
    assert "8 train and 4 test images" in done.stdout and "no recipe was published" in done.stdout


def test_torchvision_that_lacks_a_data_set_is_named(flags, monkeypatch):
    row = datasets._torchvision("NoSuchSet", ("train",), ("a",), False)
    with pytest.raises(ValueError, match="NoSuchSet needs torchvision 0.12"):
        row.missing("/a", "train")
