"""Write small made-up data in the formats, and with the quirks, of the real files.

Every function is deterministic for a seed. A class shows as two colours in stripes of its own
direction and width, under noise, so a small model learns it in a few epochs.
"""

import argparse
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
# What a process must have in its environment to read the CIFAR files made here.
ANY_CIFAR = {"PYTHONPATH": str(Path(__file__).resolve().parent / "any_cifar")}


def picture(label, rng, size=(80, 64)):
    """One image of class `label`: uint8, (height, width, 3)."""
    style = np.random.default_rng(1000 + label)
    colours = style.uniform(0, 255, (2, 3))
    angle, cycles = style.uniform(0, np.pi), style.uniform(2, 6)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    phase = cycles * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform()
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * phase)[..., None]
    pixels = stripes * colours[0] + (1 - stripes) * colours[1]
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


def flowers(folder, classes=102, train_per_class=2, test_per_class=1, size=(80, 64), seed=0):
    """Oxford Flowers-102: jpg/, imagelabels.mat and setid.mat, using the first `classes` labels."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "jpg").mkdir(parents=True, exist_ok=True)
    labels = rng.permutation(np.repeat(np.arange(classes), train_per_class + test_per_class))
    train, test = [], []
    for label in range(classes):
        ids = np.flatnonzero(labels == label) + 1
        train.extend(ids[:train_per_class])
        test.extend(ids[train_per_class:])
    for number, label in enumerate(labels, start=1):
        image = Image.fromarray(picture(label, rng, size))
        image.save(folder / "jpg" / f"image_{number:05d}.jpg", quality=90)
    splits = {"trnid": train[0::2], "valid": train[1::2], "tstid": test}
    splits = {name: np.array([ids], np.uint16) for name, ids in splits.items()}
    scipy.io.savemat(folder / "setid.mat", splits, do_compression=True)
    labels = {"labels": (labels + 1).astype(np.uint8)[None]}
    scipy.io.savemat(folder / "imagelabels.mat", labels, do_compression=True)


def pets(folder, classes=37, train_per_class=2, test_per_class=1, size=(80, 64), seed=0):
    """Oxford-IIIT Pets: images/ and annotations/, with stray files and formats posing as .jpg."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    lines = {"trainval": [], "test": []}
    for label in range(classes):
        cat = label % 3 == 0
        breed = f"Cat_breed{label + 1}" if cat else f"dog_breed{label + 1}"
        for number in range(1, train_per_class + test_per_class + 1):
            image = Image.fromarray(picture(label, rng, size))
            image.save(folder / "images" / f"{breed}_{number}.jpg", quality=90)
            split = "trainval" if number <= train_per_class else "test"
            lines[split].append(f"{breed}_{number} {label + 1} {1 if cat else 2} {label + 1}\n")
    for split, of_split in lines.items():
        (folder / "annotations" / f"{split}.txt").write_text("".join(of_split))
    _pets_quirks(folder, lines)


def _pets_quirks(folder, lines):
    """A PNG with alpha and a palette GIF named .jpg; files that belong to no split."""
    images = [folder / "images" / f"{line.split()[0]}.jpg" for line in lines["trainval"]]
    for image, mode, form in zip(images, ("RGBA", "P"), ("PNG", "GIF")):
        Image.open(image).convert(mode).save(image, format=form)
    (folder / "images" / "stray.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    (folder / "annotations" / "._trimaps").write_bytes(b"\0\5\x16\7")
    comments = "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n#SPECIES: 1:Cat 2:Dog\n"
    everything = comments + "".join(lines["trainval"] + lines["test"])
    (folder / "annotations" / "list.txt").write_text(everything)


def cifar(folder, name="cifar10", train=500, test=100, seed=0, archive=None):
    """CIFAR as torchvision reads it, `train` and `test` images in all; `archive`: also a .tar.gz.

    Their md5 is not the official one: torchvision reads them only in a process that was started
    with ANY_CIFAR in its environment. Returns the folder of the batches.
    """
    rng, base = np.random.default_rng(seed), Path(folder) / CIFAR_FOLDERS[name]
    base.mkdir(parents=True, exist_ok=True)
    if name == "cifar10":
        parts = {f"data_batch_{i + 1}": len(range(i, train, 5)) for i in range(5)}
        parts["test_batch"] = test
        meta = "batches.meta", "label_names"
    else:
        parts = {"train": train, "test": test}
        meta = "meta", "fine_label_names"
    for part, count in parts.items():
        _pickle(base / part, _cifar_batch(name, count, rng))
    _pickle(base / meta[0], {meta[1]: [f"class {i}" for i in range(CIFAR_CLASSES[name])]})
    if archive is not None:
        with tarfile.open(str(archive), "w:gz") as tar:
            tar.add(str(base), arcname=base.name)
    return base


def _cifar_batch(name, count, rng):
    labels = rng.permutation(np.arange(count) % CIFAR_CLASSES[name])
    images = np.array([picture(label, rng, (32, 32)) for label in labels], np.uint8)
    data = images.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).reshape(-1, 3072).copy()
    return {"data": data, "labels" if name == "cifar10" else "fine_labels": labels.tolist()}


def _pickle(path, value):
    # NumPy's module under the name that every version can read, as in the official files.
    path.write_bytes(pickle.dumps(value, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core."))


def sin_cos_table(width, side):
    """MoCo v3's fixed position embedding, (1, 1 + side * side, width); zeros for the class token.

    A quarter of the width each: sine and cosine of the row, sine and cosine of the column.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    row = angles.repeat_interleave(side, dim=0)
    column = angles.repeat(side, 1)
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


def encoder_state(width=192, depth=12, seed=0):
    """A fresh ViT encoder's tensors by name: patch 16, 224 x 224 input, no head."""
    rng = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return torch.randn(shape, generator=rng).clamp_(-2, 2) * 0.02

    def norm(name):
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    def linear(name, outputs, inputs):
        return {f"{name}.weight": weight(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}

    state = {"cls_token": weight(1, 1, width), "pos_embed": sin_cos_table(width, 14)}
    state["patch_embed.proj.weight"] = weight(width, 3, 16, 16)
    state["patch_embed.proj.bias"] = torch.zeros(width)
    for block in (f"blocks.{i}" for i in range(depth)):
        state.update(norm(f"{block}.norm1"))
        state.update(linear(f"{block}.attn.qkv", 3 * width, width))
        state.update(linear(f"{block}.attn.proj", width, width))
        state.update(norm(f"{block}.norm2"))
        state.update(linear(f"{block}.mlp.fc1", 4 * width, width))
        state.update(linear(f"{block}.mlp.fc2", width, 4 * width))
    state.update(norm("norm"))
    return state


def mlp_state(sizes, seed=0):
    """Linear layers without bias, each with batch norm, ReLU between: MoCo v3's heads."""
    rng, state = torch.Generator().manual_seed(seed), {}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        linear, norm = f"{3 * layer}", f"{3 * layer + 1}"
        state[f"{linear}.weight"] = torch.randn(outputs, inputs, generator=rng) * inputs**-0.5
        if layer < len(sizes) - 2:
            state[f"{norm}.weight"] = torch.ones(outputs)
            state[f"{norm}.bias"] = torch.zeros(outputs)
        state[f"{norm}.running_mean"] = torch.zeros(outputs)
        state[f"{norm}.running_var"] = torch.ones(outputs)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1000)
    return state


def moco_checkpoint(
    path, width=192, depth=12, seed=0, mlp_dim=64, dim=32, prefix="module.", arch="vit_small"
):
    """What MoCo v3's training script saves after its last epoch. Returns it, too."""
    state = {}
    for number, encoder in enumerate(("base_encoder", "momentum_encoder")):
        # The momentum encoder lags behind, so its numbers differ.
        tensors = encoder_state(width, depth, seed + number)
        for name, tensor in mlp_state((width, mlp_dim, mlp_dim, dim), seed + number).items():
            tensors[f"head.{name}"] = tensor
        state.update({f"{prefix}{encoder}.{name}": tensor for name, tensor in tensors.items()})
    for name, tensor in mlp_state((dim, mlp_dim, dim), seed).items():
        state[f"{prefix}predictor.{name}"] = tensor
    checkpoint = {
        "epoch": 300,
        "arch": arch,
        "state_dict": state,
        "optimizer": _adamw_state(state),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                   "growth_interval": 2000, "_growth_tracker": 0},
    }
    torch.save(checkpoint, str(path))
    return checkpoint


def _adamw_state(state):
    trained = [
        tensor for name, tensor in state.items()
        if name.endswith(("weight", "bias", "cls_token")) and "momentum_encoder" not in name
    ]
    moments = {
        number: {"step": 1000, "exp_avg": torch.zeros_like(tensor),
                 "exp_avg_sq": torch.zeros_like(tensor)}
        for number, tensor in enumerate(trained)
    }
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1,
             "amsgrad": False, "params": list(moments)}
    return {"state": moments, "param_groups": [group]}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", metavar="WHAT")
    commands.required = True
    for what, classes in (("flowers", 102), ("pets", 37)):
        command = commands.add_parser(what, help=f"an Oxford {what.title()} folder")
        command.add_argument("--classes", type=int, default=classes, metavar="N",
                             help=f"use only the first N of the {classes} classes")
        command.add_argument("--train-per-class", type=int, default=2, metavar="N",
                             help="train images of each class (default: %(default)s)")
        command.add_argument("--test-per-class", type=int, default=1, metavar="N",
                             help="test images of each class (default: %(default)s)")
        command.add_argument("--size", type=int, nargs=2, default=(80, 64),
                             metavar=("WIDTH", "HEIGHT"), help="of an image (default: 80 64)")
    for what in CIFAR_CLASSES:
        command = commands.add_parser(what, help="a folder with the set's pickled batches")
        command.add_argument("--train", type=int, default=500, metavar="N",
                             help="train images in all (default: %(default)s)")
        command.add_argument("--test", type=int, default=100, metavar="N",
                             help="test images in all (default: %(default)s)")
        command.add_argument("--archive", metavar="FILE", help="pack the folder as .tar.gz, too")
    command = commands.add_parser("checkpoint", help="a MoCo v3 checkpoint of an untrained ViT")
    command.add_argument("--width", type=int, default=192, metavar="N",
                         help="embedding size of the encoder (default: %(default)s)")
    command.add_argument("--depth", type=int, default=12, metavar="N",
                         help="number of blocks (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("out", metavar="OUT", help="folder (or checkpoint file) to write")
        command.add_argument("--seed", type=int, default=0, metavar="N",
                             help="of everything random (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    options = vars(parse_args(argv))
    what, out = options.pop("what"), options.pop("out")
    if what in CIFAR_CLASSES:
        cifar(out, what, **options)
    else:
        {"flowers": flowers, "pets": pets, "checkpoint": moco_checkpoint}[what](out, **options)


if __name__ == "__main__":
    sys.exit(main())
