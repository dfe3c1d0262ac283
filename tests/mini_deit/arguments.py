"""Which DeiT this is, by MINI_DEIT_ERA; and its command line: option names, types and defaults."""
import argparse
import os

ERA = ("2020", "2021", "head").index(os.environ.get("MINI_DEIT_ERA", "head"))
SINCE_2021, HEAD = ERA >= 1, ERA == 2

DEFAULTS = {  # of the type that the option has
    "--batch-size": 64, "--epochs": 300, "--input-size": 224, "--seed": 0, "--start_epoch": 0,
    "--num_workers": 10, "--warmup-epochs": 5, "--cooldown-epochs": 10, "--patience-epochs": 10,
    "--recount": 1, "--lr": 5e-4, "--min-lr": 1e-5, "--warmup-lr": 1e-6, "--decay-epochs": 30.0,
    "--decay-rate": 0.1, "--lr-noise-pct": 0.67, "--lr-noise-std": 1.0, "--opt-eps": 1e-8,
    "--momentum": 0.9, "--weight-decay": 0.05, "--drop": 0.0, "--drop-path": 0.1,
    "--smoothing": 0.1, "--reprob": 0.25, "--mixup": 0.8, "--cutmix": 1.0,
    "--model-ema-decay": 0.99996, "--model": "deit_base_patch16_224", "--opt": "adamw",
    "--sched": "cosine", "--resume": "", "--remode": "pixel", "--data-set": "IMNET",
    "--data-path": "/datasets01/imagenet_full_size/", "--output_dir": "", "--device": "cuda",
    "--dist_url": "env://", "--aa": "rand-m9-mstd0.5-inc1", "--color-jitter": 0.4,
    "--train-interpolation": "bicubic", "--inat-category": "name", "--world_size": 1,
}


def get_args_parser():
    parser = argparse.ArgumentParser("miniature DeiT", add_help=False)
    for flag, default in DEFAULTS.items():
        parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--clip-grad", type=float)
    for flag in ("--opt-betas", "--lr-noise", "--cutmix-minmax"):
        parser.add_argument(flag, type=float, nargs="+")
    for name in ("model-ema", "repeated-aug", "pin-mem"):
        dest = name.replace("-", "_")
        parser.add_argument(f"--{name}", action="store_true", default=True)
        parser.add_argument(f"--no-{name}", action="store_false", dest=dest)
    for flag in ("--eval", "--resplit", "--model-ema-force-cpu"):
        parser.add_argument(flag, action="store_true")
    if SINCE_2021:
        parser.add_argument("--dist-eval", action="store_true")
        parser.add_argument("--finetune", default="")
        parser.add_argument("--distillation-type", choices=["none", "soft", "hard"], default="none")
    if HEAD:
        parser.set_defaults(color_jitter=0.3)
        parser.add_argument("--eval-crop-ratio", type=float, default=0.875)
        for flag in ("--bce-loss", "--ThreeAugment", "--src"):
            parser.add_argument(flag, action="store_true")
    return parser
