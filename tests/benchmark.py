"""Measure the bundle against the published way, side by side, and print one table.

Every figure is a median of interleaved runs on this machine: what counts is the ratio. The
published way is re-created in published.py and below; the tests hold both to the same results.
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

import torch

import conftest
import generate

PHOTO = (750, 500)  # pixels; near the usual size of a Flowers image
CONVERT_AS_PUBLISHED = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["state_dict"]
prefix = "module.base_encoder."
torch.save({"model": {name[len(prefix):]: value for name, value in state.items()
                      if name.startswith(prefix) and not name.startswith(prefix + "head")}},
           sys.argv[2])
"""
CONVERT_AT_BEST = """
import shutil, sys, torch
shutil.copyfile(sys.argv[1], sys.argv[2])
"""
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
    parts = {"converter": converter, "start": start, "run": run}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), metavar="PART",
                        help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N",
                        help="runs of which the median counts (default: 5)")
    args = parser.parse_args()
    if not set(args.parts) <= set(parts):
        parser.error(f"the parts are {', '.join(parts)}")
    print(machine(), "", sep="\n")
    print("| measured | published | here | published / here |\n| --- | --- | --- | --- |")
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), args.repeats)


def machine():
    """The machine and the versions, in a line."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((text.split(":")[1].strip() for text in cpus if text.startswith("model name")),
                 platform.processor())
    deit = "the miniature DeiT" if not conftest.REAL_DEIT else f"DeiT at {_commit()}"
    import timm

    return (f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, torch "
            f"{torch.__version__}, timm {timm.__version__}, {deit}")


def _commit():
    return subprocess.run(["git", "-C", conftest.REAL_DEIT, "rev-parse", "--short", "HEAD"],
                          stdout=subprocess.PIPE, text=True).stdout.strip()


def line(what, theirs, ours, unit):
    """A line of the table: two medians and their ratio."""
    theirs, ours = statistics.median(theirs), statistics.median(ours)
    print(f"| {what} | {theirs:.3g} {unit} | {ours:.3g} {unit} | {theirs / ours:.2f} |", flush=True)


# The converter


def converter(folder, repeats):
    """ViT-Base with the optimizer's state, as MoCo v3 saves it."""
    source, target = folder / "moco-v3.pth.tar", folder / "converted.pth"
    generate.moco_checkpoint(source, width=768, depth=12, mlp_dim=4096, dim=256)
    ours = [conftest.ROOT / "convert_to_deit.py", "--input", source, "--output", target]
    copied = folder / "what comes out"
    subprocess.run([sys.executable, *ours[:-1], copied], stdout=subprocess.DEVNULL, check=True)
    ways = {"ours": ours, "published": ["-c", CONVERT_AS_PUBLISHED, source, target],
            "floor": ["-c", CONVERT_AT_BEST, copied, target]}
    size = f"ViT-Base, {source.stat().st_size / 1e9:.2f} GB"
    measured = {way: [] for way in ways}
    for _ in range(repeats):
        for way, arguments in ways.items():
            source.read_bytes()  # each way finds it in the system's memory, as if just downloaded
            measured[way].append(_process(arguments))
            target.unlink()  # to free an old one takes longer than to write a new one
    seconds, memory = ({way: [run[index] for run in runs] for way, runs in measured.items()}
                       for index in (0, 1))
    line(f"converter, {size}", seconds["published"], seconds["ours"], "s")
    line("its peak memory", memory["published"], memory["ours"], "GB")
    floor, here = (statistics.median(seconds[way]) for way in ("floor", "ours"))
    print(f"| its floor: import torch, copy what comes out | floor: "
          f"{floor:.3g} s | {here:.3g} s | {here / floor:.2f} x the floor |", flush=True)


def _process(arguments):
    """Seconds and peak memory in GB of a Python process, with a disk that is at rest before."""
    os.sync()
    watched = [sys.executable, "-S", "-c", WATCH, sys.executable, *map(str, arguments)]
    done = subprocess.run(watched, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {shlex.join(map(str, arguments))[:200]} failed")
    return tuple(map(float, done.stdout.split()))


# Launches


def start(folder, repeats):
    """From the launch to the first step."""
    flags = _journey(folder, "pets", epochs=1, classes=8, train_per_class=8, test_per_class=1,
                     size=(80, 64))
    theirs, ours = ([], [])
    for _ in range(repeats):
        theirs.append(_until_first_step(_as_published("pets", flags)))
        ours.append(_until_first_step(conftest.command("pets", *flags)))
    line("start, from the launch to the first step", theirs, ours, "s")


def run(folder, repeats):
    """A run shaped like Flowers: an epoch is one step, and evaluation sees more than training."""
    flags = _journey(folder, "flowers", epochs=20, classes=16, train_per_class=2,
                     test_per_class=12, size=PHOTO)
    theirs, ours = ([], [])
    for _ in range(repeats):
        theirs.append(_seconds(_as_published("flowers", flags)))
        ours.append(_seconds(conftest.command("flowers", *flags)))
    line("a run shaped like Flowers: 20 epochs, 32 training and 192 test images", theirs, ours, "s")


def _journey(folder, recipe, epochs, **pictures):
    getattr(generate, recipe)(folder / recipe, **pictures)
    generate.moco_checkpoint(folder / "moco-v3.pth.tar")
    subprocess.run([sys.executable, conftest.ROOT / "convert_to_deit.py", "--input",
                    folder / "moco-v3.pth.tar", "--output", folder / "converted.pth"],
                   check=True, stdout=subprocess.DEVNULL)
    return ["--model", "deit_tiny_patch16_224", "--input-size", "224", "--batch-size", "16",
            "--epochs", epochs, "--resume", folder / "converted.pth", "--data-path",
            folder / recipe, "--output_dir", folder / "out", "--num_workers", "10",
            "--eval-freq", "10", "--save-freq", "10", "--overwrite"]


def _as_published(recipe, flags):
    """The published way to do the same; published.py takes our flags and ignores them."""
    return conftest.instead("published.py", conftest.command(recipe, *flags), processes=2)


def _seconds(command):
    began = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=conftest.environment(processes=2))
    return time.perf_counter() - began


def _until_first_step(command):
    began = time.perf_counter()
    with subprocess.Popen([str(part) for part in command], env=conftest.environment(processes=2),
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        seconds = next((time.perf_counter() - began for printed in process.stdout
                        if printed.startswith(b"Epoch: [0]")), None)
        process.stdout.read()
    return seconds


if __name__ == "__main__":
    main()
