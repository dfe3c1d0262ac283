"""The command line: DeiT's option names, types and defaults, as tables."""
import argparse

from era import ERA, HEAD, SINCE_2021

INTS = {
    "--batch-size": 64, "--epochs": 300, "--input-size": 224,
    "--warmup-epochs": 5, "--cooldown-epochs": 10, "--patience-epochs": 10,
    "--recount": 1, "--seed": 0, "--start_epoch": 0, "--num_workers": 10, "--world_size": 1,
}
FLOATS = {
    "--drop": 0.0, "--drop-path": 0.1, "--model-ema-decay": 0.99996,
    "--opt-eps": 1e-8, "--clip-grad": None, "--momentum": 0.9, "--weight-decay": 0.05,
    "--lr": 5e-4, "--lr-noise-pct": 0.67, "--lr-noise-std": 1.0, "--warmup-lr": 1e-6,
    "--min-lr": 1e-5, "--decay-epochs": 30, "--decay-rate": 0.1,
    "--color-jitter": 0.3 if HEAD else 0.4, "--smoothing": 0.1, "--reprob": 0.25,
    "--mixup": 0.8, "--cutmix": 1.0, "--mixup-prob": 1.0, "--mixup-switch-prob": 0.5,
}
STRINGS = {
    "--model": "deit_base_patch16_224", "--opt": "adamw", "--sched": "cosine",
    "--aa": "rand-m9-mstd0.5-inc1", "--train-interpolation": "bicubic",
    "--remode": "pixel", "--mixup-mode": "batch",
    "--data-set": "IMNET", "--inat-category": "name",
    "--data-path": f"/datasets01{'' if SINCE_2021 else '_101'}/imagenet_full_size/061417/",
    "--output_dir": "", "--device": "cuda", "--resume": "", "--dist_url": "env://",
}
FLOAT_LISTS = ["--opt-betas", "--lr-noise", "--cutmix-minmax"]
SWITCHES = ["--model-ema-force-cpu", "--resplit", "--eval"]
ON_BY_DEFAULT = ["model-ema", "repeated-aug", "pin-mem"]
ALIASES = {"--decay-rate": ["--dr"]}
CHOICES = {
    "--data-set": ["CIFAR", "IMNET", "INAT", "INAT19"],
    "--inat-category": ["kingdom", "phylum", "class", "order",
                        "supercategory", "family", "genus", "name"],
    "--distillation-type": ["none", "soft", "hard"],
}

if ERA == "2020":
    FLOATS["--drop-block"] = None
else:
    STRINGS.update({"--finetune": "", "--distillation-type": "none"})
    SWITCHES.append("--dist-eval")
if HEAD:
    FLOATS["--eval-crop-ratio"] = 0.875
    SWITCHES += ["--bce-loss", "--unscale-lr", "--ThreeAugment", "--src", "--cosub",
                 "--attn-only", "--distributed"]
    ON_BY_DEFAULT.append("train-mode")


def get_args_parser():
    parser = argparse.ArgumentParser("miniature DeiT", add_help=False)
    for kind, table in ((int, INTS), (float, FLOATS), (str, STRINGS)):
        for flag, default in table.items():
            parser.add_argument(flag, *ALIASES.get(flag, []), type=kind, default=default,
                                choices=CHOICES.get(flag))
    for flag in FLOAT_LISTS:
        parser.add_argument(flag, type=float, nargs="+")
    for flag in SWITCHES:
        parser.add_argument(flag, action="store_true")
    for name in ON_BY_DEFAULT:
        dest = name.replace("-", "_")
        parser.add_argument(f"--{name}", action="store_true", default=True)
        parser.add_argument(f"--no-{name}", action="store_false", dest=dest)
    return parser
