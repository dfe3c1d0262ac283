"""The published procedure, re-implemented: DeiT with the edits that MoCo v3's instructions ask for.

Data sets without checks, torchvision's own transforms, ``--resume`` with ``strict=False`` after
the EMA was made, and no function of DeiT replaced. What DeiT needs on newer versions and without a
GPU comes from the bundle. It runs like ``finetune.py``; flags that DeiT does not have are ignored.
"""
import argparse
import os
import sys
import types
from pathlib import Path

import scipy.io
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from deit_plugin import deit  # noqa: E402


class Images(list):
    """Paths and labels; an image is opened when it is indexed."""

    def __getitem__(self, index):
        path, label = super().__getitem__(index)
        return self.transform(Image.open(path).convert("RGB")), int(label) - 1


def flowers(root, is_train):
    labels = scipy.io.loadmat(str(root / "imagelabels.mat"))["labels"][0]
    splits = scipy.io.loadmat(str(root / "setid.mat"))
    return Images([(root / "jpg" / f"image_{number:05d}.jpg", labels[number - 1])
                   for name in (("trnid", "valid") if is_train else ("tstid",))
                   for number in splits[name][0]])


def pets(root, is_train):
    lines = (root / "annotations" / ("trainval.txt" if is_train else "test.txt")).read_text()
    return Images([(root / "images" / f"{name}.jpg", label)
                   for name, label, *_ in map(str.split, lines.splitlines())])


def imagenet(root, is_train):
    return torchvision.datasets.ImageFolder(str(root / ("train" if is_train else "val")))


DATA_SETS = {"cifar10": (torchvision.datasets.CIFAR10, 10), "flowers": (flowers, 102),
             "cifar100": (torchvision.datasets.CIFAR100, 100), "pets": (pets, 37),
             "imagenet": (imagenet, 5)}  # as many classes as generate.py makes


NORMALISED = [transforms.ToTensor(),
              transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def transform_of(is_train, args):
    """MoCo v3's; for ImageNet DeiT's, by timm for training, and bicubic for evaluation."""
    size, is_imagenet = args.input_size, args.data_set == "imagenet"
    if is_train and is_imagenet:
        made = create_transform(
            input_size=size, is_training=True, color_jitter=args.color_jitter,
            auto_augment=args.aa, interpolation=args.train_interpolation, re_prob=args.reprob,
            re_mode=args.remode, re_count=args.recount)
        if size <= 32:
            made.transforms[0] = transforms.RandomCrop(size, padding=4)
        return made
    if is_train:
        steps = [transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0)),
                 transforms.RandomHorizontalFlip()]
    elif is_imagenet:
        resized = int(size / getattr(args, "eval_crop_ratio", 224 / 256))
        steps = [transforms.Resize(resized, interpolation=3), transforms.CenterCrop(size)]
        steps = steps if size > 32 else []
    else:
        steps = [transforms.Resize(int((256 / 224) * size)), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, *NORMALISED])


def build_dataset(is_train, args):
    make, classes = DATA_SETS[args.data_set]
    dataset = make(Path(args.data_path), is_train)
    dataset.transform = transform_of(is_train, args)
    return dataset, classes


def main():
    deit.restore_pil_interp()
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].build_dataset = build_dataset
    sys.path.insert(0, os.environ["DEIT_DIR"])
    import main as deit_main

    deit.skip_pretrained_cfg(deit_main)
    parser = argparse.ArgumentParser(parents=[deit_main.get_args_parser()],
                                     conflict_handler="resolve")
    parser.add_argument("--data-set", choices=sorted(DATA_SETS))
    args, _ = parser.parse_known_args()
    if args.device == "cpu":
        deit.run_on_cpu(deit_main)
    strict = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, **_: strict(self, state, strict=False)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    deit_main.main(args)


if __name__ == "__main__":
    main()
