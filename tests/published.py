"""The published way, re-created: DeiT with the edits that MoCo v3's instructions ask for.

Data sets without checks, torchvision's own transforms, ``--resume`` with ``strict=False`` after
the weight average was made, no standing in for any function of DeiT's. What DeiT needs on newer
versions and without a GPU is taken from the bundle. Run as ``finetune.py`` is; flags that DeiT
does not have are left out.
"""
import argparse
import sys
import types
from pathlib import Path

import scipy.io
import torch
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from deit_plugin import checkout, cpu, versions  # noqa: E402

CLASSES = {"cifar10": 10, "cifar100": 100, "flowers": 102, "pets": 37}


def transform_for(is_train, size):
    """The published transform, by torchvision alone."""
    if is_train:
        steps = [transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0)),
                 transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(int((256 / 224) * size)), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(
        IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


class Images(torch.utils.data.Dataset):
    """Images by path, opened when asked for."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(Image.open(path).convert("RGB")), label


def flowers(root, is_train):
    """(path, label) of each image."""
    labels = scipy.io.loadmat(str(root / "imagelabels.mat"))["labels"][0]
    splits = scipy.io.loadmat(str(root / "setid.mat"))
    names = ("trnid", "valid") if is_train else ("tstid",)
    ids = [int(number) for name in names for number in splits[name][0]]
    return [(root / "jpg" / f"image_{number:05d}.jpg", int(labels[number - 1]) - 1)
            for number in ids]


def pets(root, is_train):
    """(path, label) of each image."""
    lines = (root / "annotations" / ("trainval.txt" if is_train else "test.txt")).read_text()
    fields = [line.split() for line in lines.splitlines()]
    return [(root / "images" / f"{name}.jpg", int(label) - 1) for name, label, *_ in fields]


def build_dataset(is_train, args):
    """The data set and its number of classes."""
    transform, root = transform_for(is_train, args.input_size), Path(args.data_path)
    if args.data_set.startswith("cifar"):
        dataset = getattr(torchvision.datasets, args.data_set.upper())(root, is_train, transform)
    else:
        samples = flowers if args.data_set == "flowers" else pets
        dataset = Images(samples(root, is_train), transform)
    return dataset, CLASSES[args.data_set]


def main():
    """DeiT's main program, as edited by hand."""
    versions.quieten_age()
    versions.restore_pil_interp()
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].build_dataset = build_dataset
    sys.path.insert(0, str(checkout.find()))
    import main as deit_main

    versions.skip_pretrained_cfg(deit_main)
    parser = argparse.ArgumentParser(parents=[deit_main.get_args_parser()],
                                     conflict_handler="resolve")
    parser.add_argument("--data-set", choices=sorted(CLASSES))
    args, _ = parser.parse_known_args()
    if args.device == "cpu":
        cpu.patch(deit_main)
    strict = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, **_: strict(self, state, strict=False)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    deit_main.main(args)


if __name__ == "__main__":
    main()
