#!/usr/bin/env python3
"""Evaluate frozen features of pretrained or fine-tuned weights: k nearest neighbours, and logistic
regression. Nothing else is trained.

    python scripts/features.py --resume moco-v3-vit-b.pth --data-set pets --data-path data/pets

Features: the class token after the last norm, float32, of each image as evaluation sees it.

kNN as in DINO (eval_knn.py): features of length 1, cosine similarity, each neighbour votes for its
class with exp(similarity / 0.07).

Logistic regression as in SimCLR, BYOL and Kornblith et al. (2019): L-BFGS on the sum of the
cross-entropies + weight decay / 2 x |W|^2 over all train images, the bias not penalised (scikit-
learn's C is 1 / weight decay). Of 45 weight decays, from 1e-6 to 1e5 in equal ratios, the best on
held-out train images is taken: 20 % of each class, as with --hold-out 0.2, or Flowers' official val
set; of equal accuracies that with the lower loss. Each fit starts from the one before.
"""
import argparse
import json
import os
import sys
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # L-BFGS adds short vectors: see SMALL

from deit_plugin import deit, errors  # noqa: E402

NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07
CHUNK = 2**27  # float32 numbers that are computed at once: 0.5 GB
# Multiplications of a fit's step. Below, threads only wait for each other: beside other processes
# on 2 cores, 45 fits to 96 images of 5 classes took 26 s with two threads, and 1.5 s with one.
SMALL = 10**8
MOST_ITERATIONS = 200  # of one fit, which begins where its neighbour has ended
# What data.load and the transforms of ImageNet read, besides the flags below.
FIXED = {"eval": False, "eval_freq": 1, "reprob": 0.0, "remode": "pixel", "recount": 1, "aa": "",
         "color_jitter": None, "train_interpolation": "bicubic"}


class Split(NamedTuple):
    """Features of a part of the data."""

    features: Any  # (n, width), float32
    labels: Any  # (n,), int64
    names: List[Any]


def main() -> None:
    """Evaluate, print, and write what was asked for."""
    args = parse()
    deit.silence_known_warnings()
    import torch

    from deit_plugin import data, provenance

    check_outputs(args)
    model, args.input_size = load_model(args)
    images = data.load(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    splits = [extract(model, split, device, args, what) for split, what in (
        (images.train, "train image"), (images.test, "test image"))]
    validation = validation_of(images.train, args)
    if args.save:
        save(args.save, *splits)
    train, test = (Split(split.features.to(device), split.labels.to(device), split.names)
                   for split in splits)
    classes = len(images.classes)
    found = {
        "data_set": args.data_set, "hold_out": args.hold_out, "train_images": len(train.names),
        "test_images": len(test.names), "weights": provenance.of_weights(args.resume),
        "model": args.model, "input_size": args.input_size, "features": train.features.shape[1],
        "knn": dict(nearest_neighbours(train, test, classes)),
        "logistic": logistic_regression(train, test, validation, classes),
        "versions": provenance.versions()}
    if args.output:
        write(args.output, lambda file: file.write(json.dumps(found, indent=1).encode()))


def parse() -> Namespace:
    """The command line, with what else data.load reads."""
    parser = argparse.ArgumentParser(
        description="Evaluate frozen features: k nearest neighbours, and logistic regression.")
    parser.add_argument("--resume", required=True, type=os.path.expanduser, metavar="CHECKPOINT",
                        help="converted weights, or a checkpoint of a run")
    parser.add_argument("--data-set", required=True, help="as for fine-tuning")
    parser.add_argument("--data-path", required=True, type=os.path.expanduser, metavar="FOLDER")
    parser.add_argument("--download", action="store_true", help="download missing data")
    parser.add_argument("--hold-out", type=float, default=0.0, metavar="SHARE",
                        help="evaluate on this share of the train images; open no test image")
    parser.add_argument("--test-split", action="store_true",
                        help="evaluate on test/ of folders that also have a val/")
    parser.add_argument("--model", default="", help="default: what the weights fit")
    parser.add_argument("--input-size", type=int, default=0, metavar="PIXELS",
                        help="default: that of the weights")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N")
    parser.add_argument("--output", default="", type=os.path.expanduser, metavar="FILE",
                        help="write the results as JSON")
    parser.add_argument("--save", default="", type=os.path.expanduser, metavar="FILE.npz",
                        help="write features, labels and names of all images")
    parser.add_argument("--trust", action="store_true",
                        help="load a checkpoint that contains more than tensors and plain values; "
                             "this runs the code in it")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_workers < 0 or not 0 <= args.hold_out <= 0.99:
        parser.error("--batch-size must be 1 or more, --num_workers 0 or more, --hold-out 0 to "
                     "0.99")
    if args.input_size % 16:
        parser.error(f"--input-size {args.input_size}: must be a multiple of 16, the patch size")
    return Namespace(**{**FIXED, **vars(args)})


def check_outputs(args: Namespace) -> None:
    """Raise UserError for what would be found out only after the work, or an unknown data set."""
    import convert_to_deit
    from datasets import DATA_SETS

    if args.data_set not in DATA_SETS:
        raise errors.UserError(f"--data-set {args.data_set}: choose from {', '.join(DATA_SETS)}")
    for flag, path in (("--output", args.output), ("--save", args.save)):
        try:
            if path:
                convert_to_deit.check_output(path, "--resume", args.resume)
        except OSError as error:
            raise errors.UserError(f"{flag} {path}: {error.strerror or error}") from error


def load_model(args: Namespace) -> Tuple[Any, int]:
    """The model without a classifier, and its input size; sets ``args.model``. Raises UserError."""
    import convert_to_deit
    from deit_plugin import weights

    state = weights.read(args.resume, args.trust)
    tensors = {name: tensor for name, tensor in state["model"].items() if name not in weights.HEAD}
    settings, fits = state.get("settings", {}), convert_to_deit.recognise(tensors)
    args.model = args.model or settings.get("model") or fits.model or ""
    if not args.model:
        raise errors.UserError(f"{args.resume}: {fits.title} fits no model that is known here "
                               f"({fits.problem}): pass --model")
    patches = tensors["pos_embed"].shape[1] - 1 if "pos_embed" in tensors else 196
    size = args.input_size or settings.get("input_size") or 16 * round(patches ** 0.5)
    model = weights.create(args.model, size, weights.make, num_classes=0)
    weights.load_into(model, tensors, args.resume, args.model)
    print(f"{args.resume}: {args.model}, {size} x {size} pixels", flush=True)
    return model, size


def extract(model: Any, dataset: Any, device: Any, args: Namespace, what: str) -> Split:
    """Compute the features of all images, as evaluation sees them."""
    import torch
    from torch.utils.data import DataLoader

    from datasets import build_transform
    from deit_plugin import data, loaders
    from deit_plugin.narrator import follow

    dataset.transform = build_transform(False, args)
    loader = DataLoader(dataset, args.batch_size, **loaders.in_workers(args.num_workers))
    features, labels = [], []
    with torch.no_grad():
        batches = follow(loader, len(loader), what + " batch", args.batch_size, progress)
        for images, its_labels in batches:
            found = model.forward_features(images.to(device))
            # From timm 0.6 on, all tokens (B, N, width); before, the class token (B, width).
            features.append((found if found.dim() == 2 else found[:, 0]).float().cpu())
            labels.append(its_labels)
    return Split(torch.cat(features), torch.cat(labels), data.names_of(dataset, args.data_path))


def progress(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def validation_of(dataset: Any, args: Namespace) -> List[int]:
    """Indices of the train images on which the weight decay is chosen. Raises UserError."""
    from deit_plugin import data

    if hasattr(dataset, "validation") and not args.hold_out:  # Flowers' official val set
        return list(dataset.validation)
    dataset.transform = None
    _, held_out = data.split(dataset, 0.2, None)
    return held_out.indices


def accuracies(predicted: Any, labels: Any, classes: int) -> Dict[str, float]:
    """Accuracy, and the mean of the accuracies of the classes that have images, in %."""
    import torch

    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    images = torch.bincount(labels, minlength=classes).double()
    present = images > 0
    return {"acc1": 100 * (hits.sum() / images.sum()).item(),
            "acc_per_class": 100 * (hits[present] / images[present]).mean().item()}


def nearest_neighbours(train: Split, test: Split, classes: int
                       ) -> Iterator[Tuple[str, Dict[str, float]]]:
    """For each number of neighbours, the accuracies of kNN."""
    import torch
    from torch.nn.functional import normalize

    wanted = [k for k in NEIGHBOURS if k <= len(train.labels)] or [len(train.labels)]
    bank, predicted = normalize(train.features, dim=1), {k: [] for k in wanted}
    for chunk in normalize(test.features, dim=1).split(max(1, CHUNK // len(bank))):
        similarity, nearest = (chunk @ bank.T).topk(wanted[-1], dim=1)
        votes = (similarity / TEMPERATURE).exp()
        for k in wanted:
            sums = torch.zeros(len(chunk), classes, device=chunk.device)
            sums.scatter_add_(1, train.labels[nearest[:, :k]], votes[:, :k])
            predicted[k].append(sums.argmax(dim=1))
    for k in wanted:
        found = accuracies(torch.cat(predicted[k]), test.labels, classes)
        progress(f"kNN, k = {k}: {found['acc1']:.2f} %, mean per class "
                 f"{found['acc_per_class']:.2f} %")
        yield str(k), found


def logistic_regression(train: Split, test: Split, validation: List[int], classes: int
                        ) -> Dict[str, float]:
    """Choose the weight decay, fit to all train images, and evaluate."""
    import numpy
    import torch

    if train.features.numel() * classes < SMALL:
        torch.set_num_threads(1)
    held_out = torch.zeros(len(train.labels), dtype=torch.bool, device=train.labels.device)
    held_out[validation] = True
    kept = (train.features[~held_out], train.labels[~held_out])
    asked = (train.features[held_out], train.labels[held_out])
    weights, best = None, (-1.0, 0.0, 0.0, None)
    for decay in map(float, numpy.logspace(5, -6, 45)):
        weights = fit(*kept, decay, classes, weights)
        logits = predict(asked[0], weights)
        accuracy = accuracies(logits.argmax(dim=1), asked[1], classes)["acc1"]
        loss = torch.nn.functional.cross_entropy(logits, asked[1]).item()
        if (accuracy, -loss) > best[:2]:
            best = accuracy, -loss, decay, weights
    accuracy, _, decay, weights = best
    progress(f"logistic regression: chose weight decay {decay:.3g}, which has {accuracy:.2f} % on "
             f"{len(asked[1])} of the train images")
    weights = fit(train.features, train.labels, decay, classes, weights)
    found = accuracies(predict(test.features, weights).argmax(dim=1), test.labels, classes)
    progress(f"logistic regression: {found['acc1']:.2f} %, mean per class "
             f"{found['acc_per_class']:.2f} %")
    return {"weight_decay": decay, "held_out_acc1": accuracy, **found}


def fit(features: Any, labels: Any, decay: float, classes: int, start: Any) -> Any:
    """Weights and bias, (classes, width + 1) in float32, by L-BFGS from ``start`` or from 0."""
    import numpy
    import torch
    from scipy.optimize import minimize
    from torch.nn.functional import cross_entropy

    shape, rows = (classes, features.shape[1] + 1), max(1, CHUNK // classes)

    def loss_and_gradient(flat: Any) -> Tuple[float, Any]:
        weights = torch.tensor(flat.reshape(shape), dtype=torch.float32, device=features.device)
        weights.requires_grad_()
        loss = decay / 2 * weights.detach()[:, :-1].double().square().sum().item()
        for some, its_labels in zip(features.split(rows), labels.split(rows)):
            logits = some @ weights[:, :-1].T + weights[:, -1]
            part = cross_entropy(logits, its_labels, reduction="sum")
            part.backward()
            loss += part.item()
        gradient = weights.grad
        gradient[:, :-1] += decay * weights.detach()[:, :-1]
        return loss, gradient.double().cpu().numpy().ravel()

    begin = numpy.zeros(shape) if start is None else start.double().cpu().numpy()
    found = minimize(loss_and_gradient, begin.ravel(), jac=True, method="L-BFGS-B",
                     options={"maxiter": MOST_ITERATIONS})
    return torch.tensor(found.x.reshape(shape), dtype=torch.float32, device=features.device)


def predict(features: Any, weights: Any) -> Any:
    """The logits (n, classes)."""
    return features @ weights[:, :-1].T + weights[:, -1]


def save(path: str, train: Split, test: Split) -> None:
    """Write both splits as an .npz file, complete or not at all."""
    import numpy

    arrays = {f"{name}_{what}": numpy.asarray(array) for name, split in (
        ("train", train), ("test", test)) for what, array in split._asdict().items()}
    write(path, lambda file: numpy.savez(file, **arrays))


def write(path: str, fill: Callable) -> None:
    """Write a file, complete or not at all, and say so."""
    from convert_to_deit import atomic_write

    with atomic_write(path) as file:
        fill(file)
    progress(f"written: {path}")


if __name__ == "__main__":
    errors.guard(main)
