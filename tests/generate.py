"""Write small made-up data in the formats, and with the quirks, of the real files.

Every function is deterministic. A class shows as two colours in stripes of its own direction and
width, under noise, so a small model learns it in a few epochs.
"""
import argparse
import pickle
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision.datasets import CIFAR10, CIFAR100


def picture(label, rng, size=(80, 64)):
    """One image of class ``label``: uint8, (height, width, 3)."""
    style = np.random.default_rng(1000 + label)
    colours = style.uniform(0, 255, (2, 3))
    angle, cycles = style.uniform(0, np.pi), style.uniform(2, 6)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    phase = cycles * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform()
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * phase)[..., None]
    pixels = stripes * colours[0] + (1 - stripes) * colours[1]
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


def write_picture(path, *arguments):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(*arguments)).save(str(path), quality=90)


def flowers(folder, classes=7, train_per_class=7, test_per_class=3, size=(80, 64)):
    """Oxford Flowers-102: jpg/, imagelabels.mat and setid.mat, using the first ``classes``."""
    folder, rng = Path(folder), np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(classes), train_per_class + test_per_class))
    train, test = [], []
    for label in range(classes):
        ids = np.flatnonzero(labels == label) + 1
        train.extend(ids[:train_per_class])
        test.extend(ids[train_per_class:])
    for number, label in enumerate(labels, start=1):
        write_picture(folder / "jpg" / f"image_{number:05d}.jpg", label, rng, size)
    splits = {"trnid": train[0::2], "valid": train[1::2], "tstid": test}
    splits = {name: np.array([ids], np.uint16) for name, ids in splits.items()}
    scipy.io.savemat(str(folder / "setid.mat"), splits, do_compression=True)
    labels = {"labels": (labels + 1).astype(np.uint8)[None]}
    scipy.io.savemat(str(folder / "imagelabels.mat"), labels, do_compression=True)


def pets(folder):
    """Oxford-IIIT Pets: images/ and annotations/, with files that are not what they seem."""
    folder, rng = Path(folder), np.random.default_rng(0)
    lines = {"trainval": "", "test": ""}
    for label in range(7):
        for number in range(1, 11):
            name = f"dog_breed{label + 1}_{number}"
            write_picture(folder / "images" / f"{name}.jpg", label, rng)
            lines["trainval" if number <= 7 else "test"] += f"{name} {label + 1} 2 {label + 1}\n"
    (folder / "annotations").mkdir(exist_ok=True)
    for split, of_split in lines.items():
        (folder / "annotations" / f"{split}.txt").write_text(of_split)
    for number, mode, form in ((1, "RGBA", "PNG"), (2, "P", "GIF")):
        path = folder / "images" / f"dog_breed1_{number}.jpg"
        Image.open(path).convert(mode).save(path, format=form)


def imagenet(folder):
    """ImageNet's folders: 5 classes, 270 train and 6 val images, enough for --repeated-aug."""
    rng = np.random.default_rng(0)
    for number in range(276):
        split, label = "train" if number < 270 else "val", number % 5
        write_picture(Path(folder, split, f"n{label:08}", f"{number}.JPEG"), label, rng)


def images(folder, train=43):
    """For --data-set folder: some train and 6 test images, which augmentation cannot change."""
    rng = np.random.default_rng(0)
    for number in range(train + 6):
        label = number % 3
        colour = rng.integers(0, 120, 3)
        colour[2 - label] += 100
        path = Path(folder, "train" if number < train else "val", ("ant", "bee", "cow")[label])
        path.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), tuple(map(int, colour))).save(path / f"{number}.png")


def cifar(folder, name):
    """CIFAR, 50 train and 21 test images, as torchvision reads it without its check of md5."""
    rng = np.random.default_rng(0)
    kind, classes, key = {"cifar10": (CIFAR10, 10, "labels"),
                          "cifar100": (CIFAR100, 100, "fine_labels")}[name]
    names = [f"class {number}" for number in range(classes)]
    contents = {kind.meta["filename"]: {kind.meta["key"]: names}}
    for parts, images in ((kind.train_list, 50), (kind.test_list, 21)):
        for part, _ in parts:
            labels = rng.permutation(np.arange(images // len(parts)) % classes)
            pixels = np.array([picture(label, rng, (32, 32)) for label in labels], np.uint8)
            rows = pixels.transpose(0, 3, 1, 2).reshape(-1, 3072).copy()
            contents[part] = {"data": rows, key: labels.tolist()}
    base = Path(folder, kind.base_folder)
    base.mkdir(parents=True, exist_ok=True)
    for part, content in contents.items():
        # NumPy's module under the name that every version can read, as in the official files.
        pickled = pickle.dumps(content, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core.")
        (base / part).write_bytes(pickled)


def sin_cos_table(width, side):
    """MoCo v3's fixed position embedding, (1, 1 + side * side, width); 0 for the class token."""
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    row = angles.repeat_interleave(side, dim=0)
    column = angles.repeat(side, 1)
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


def encoder_state(width=192, depth=12, seed=0):
    """A fresh ViT encoder's tensors by name: patch 16, 224 x 224 input, no head."""
    rng = torch.Generator().manual_seed(seed)
    vit = VisionTransformer(embed_dim=width, depth=depth, num_heads=2, qkv_bias=True, num_classes=0)
    state = dict(vit.state_dict())
    for name, tensor in state.items():
        if name == "pos_embed":
            state[name] = sin_cos_table(width, 14)
        elif tensor.dim() > 1:
            state[name] = torch.randn(tensor.shape, generator=rng).clamp_(-2, 2) * 0.02
        else:
            tensor.fill_(name.endswith("weight"))  # of a norm; a bias is 0
    return state


def moco_checkpoint(path, width=192, depth=12, mlp_dim=64, dim=32, prefix="module."):
    """What MoCo v3's training script saves after its last epoch. Returns it, too."""
    state = {}
    for seed, encoder in enumerate(("base_encoder", "momentum_encoder")):
        for name, tensor in encoder_state(width, depth, seed).items():
            state[f"{prefix}{encoder}.{name}"] = tensor
    for mlp, sizes in (("base_encoder.head", (width, mlp_dim, mlp_dim, dim)),
                       ("momentum_encoder.head", (width, mlp_dim, mlp_dim, dim)),
                       ("predictor", (dim, mlp_dim, dim))):
        for layer, shape in enumerate(zip(sizes[1:], sizes)):
            state[f"{prefix}{mlp}.{3 * layer}.weight"] = torch.ones(shape)
    trained = [tensor for name, tensor in state.items()
               if "momentum_encoder" not in name and not name.endswith("pos_embed")]
    moments = {number: {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
               for number, tensor in enumerate(trained)}
    checkpoint = {"epoch": 300, "arch": "vit_base", "state_dict": state,
                  "optimizer": {"state": moments, "param_groups": [{"params": list(moments)}]}}
    torch.save(checkpoint, str(path))
    return checkpoint


def finished_model(path, classes, size, width=192, head=None, **settings):
    """A checkpoint as a run leaves it, of ViT-Tiny or a wider model; returns its tensors."""
    state = encoder_state(width, 12)
    state.update({"head.weight": torch.ones(len(classes), width) if head is None else head,
                  "head.bias": torch.zeros(len(classes)),
                  "pos_embed": sin_cos_table(width, size // 16)})
    settings = {"model": "deit_tiny_patch16_224", "input_size": size, **settings}
    torch.save({"model": state, "settings": settings, "classes": list(classes)}, str(path))
    return state


def main():
    """The command line, for demo.sh and benchmark.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS)
    made = {"flowers": flowers, "checkpoint": moco_checkpoint}
    parser.add_argument("what", choices=made)
    parser.add_argument("out", help="folder (or checkpoint file) to write")
    for flag in ("--classes", "--train-per-class", "--test-per-class", "--width",
                 "--mlp-dim", "--dim"):
        parser.add_argument(flag, type=int, metavar="N")
    given = vars(parser.parse_args())
    made[given.pop("what")](given.pop("out"), **given)


if __name__ == "__main__":
    main()
