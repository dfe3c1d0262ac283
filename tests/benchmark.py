"""Measure the bundle against the published way, side by side, and print one table.

Every figure is a median of runs of each way in turn on this machine: what counts is the ratio.
DEIT_DIR names the DeiT to train with; without it, the miniature is used.
"""
import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

import conftest
import generate

PHOTO = (750, 500)  # pixels; near the usual size of a Flowers image
AS_PUBLISHED = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["state_dict"]
prefix = "module.base_encoder."
torch.save({"model": {name[len(prefix):]: value for name, value in state.items()
                      if name.startswith(prefix) and not name.startswith(prefix + "head")}},
           sys.argv[2])
"""
FLOOR = "import shutil, sys, torch; shutil.copyfile(sys.argv[1], sys.argv[2])"
# Between the benchmark and what it measures, since a process inherits its parent's peak memory.
WATCH = """
import os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9)
sys.exit(1 if status else 0)
"""


def main():
    """Run the parts asked for; print a line for each figure as it comes."""
    parts = {"converter": converter, "run": run}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(parts), metavar="PART",
                        help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N",
                        help="runs of which the median counts (default: 5)")
    args = parser.parse_args()
    deit = "the miniature DeiT" if conftest.REAL_DEIT is None else f"DeiT in {conftest.REAL_DEIT}"
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
          f"timm {timm.__version__}, {deit}\n\n"
          "| measured | published | here | published / here |\n| --- | --- | --- | --- |")
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), args.repeats)


def line(what, theirs, ours, unit):
    """A line of the table: two medians and their ratio."""
    theirs, ours = statistics.median(theirs), statistics.median(ours)
    print(f"| {what} | {theirs:.3g} {unit} | {ours:.3g} {unit} | {theirs / ours:.2f} |", flush=True)


def convert(source, target):
    """What converts on the command line, after Python's name."""
    return [conftest.ROOT / "convert_to_deit.py", "--input", source, "--output", target]


def converter(folder, repeats):
    """ViT-Base with the optimizer's state, as MoCo v3 saves it."""
    source, target, copied = (folder / name for name in ("moco-v3.pth.tar", "out.pth", "copied"))
    generate.moco_checkpoint(source, width=768, depth=12, mlp_dim=4096, dim=256)
    subprocess.run([sys.executable, *convert(source, copied)], stdout=subprocess.DEVNULL)
    ways = {"here": convert(source, target), "published": ["-c", AS_PUBLISHED, source, target],
            "floor": ["-c", FLOOR, copied, target]}
    seconds, memory = {way: [] for way in ways}, {way: [] for way in ways}
    for _ in range(repeats):
        for way, arguments in ways.items():
            os.sync()
            source.read_bytes()  # each way finds it in the system's memory, as if just downloaded
            watched = [sys.executable, "-S", "-c", WATCH, sys.executable, *arguments]
            done = subprocess.run(watched, stdout=subprocess.PIPE, text=True, check=True)
            for figures, figure in zip((seconds, memory), done.stdout.split()):
                figures[way].append(float(figure))
            target.unlink()  # to free an old one takes longer than to write a new one
    line(f"converter, ViT-Base, {source.stat().st_size / 1e9:.2f} GB", seconds["published"],
         seconds["here"], "s")
    line("its peak memory", memory["published"], memory["here"], "GB")
    line("the floor, to import torch and copy what comes out, against it", seconds["floor"],
         seconds["here"], "s")


def run(folder, repeats):
    """A run shaped like Flowers: an epoch is one step, and evaluation sees more than training."""
    generate.flowers(folder / "data", classes=16, test_per_class=12, size=PHOTO)
    line("a run shaped like Flowers: 20 epochs, 32 train and 192 test images",
         *train(folder, repeats), "s")


def train(folder, repeats):
    """Seconds of the published way and of ours, in turn."""
    generate.moco_checkpoint(folder / "moco-v3.pth.tar")
    subprocess.run([sys.executable, *convert(folder / "moco-v3.pth.tar", folder / "converted.pth")],
                   check=True, stdout=subprocess.DEVNULL)
    ours = conftest.command(
        "flowers", "--model", "deit_tiny_patch16_224", "--input-size", "224", "--batch-size", "16",
        "--epochs", "20", "--resume", folder / "converted.pth", "--data-path", folder / "data",
        "--output_dir", folder / "out", "--num_workers", "10", "--eval-freq", "10",
        "--save-freq", "10", "--overwrite")
    environment = conftest.environment(processes=2)
    complete = subprocess.run([*ours, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True,
                              env=environment).stdout
    published = str(conftest.ROOT / "tests" / "published.py")  # it ignores our flags
    theirs = [published if word.endswith("/finetune.py") else word
              for word in shlex.split(complete)]
    seconds = [], []
    for _ in range(repeats):
        for command, measured in zip((theirs, ours), seconds):
            began = time.perf_counter()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=True)
            measured.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
