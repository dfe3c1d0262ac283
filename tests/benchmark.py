"""Measure the converter against the published way, side by side, and print one table.

Every figure is a median of runs of each way in turn on this machine: what counts is the ratio.
"""
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
AS_PUBLISHED = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["state_dict"]
prefix = "module.base_encoder."
torch.save({"model": {name[len(prefix):]: value for name, value in state.items()
                      if name.startswith(prefix) and not name.startswith(prefix + "head")}},
           sys.argv[2])
"""
FLOOR = "import shutil, sys, torch; shutil.copyfile(sys.argv[1], sys.argv[2])"


def main():
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n"
          "\n| measured | published | here | published / here |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        converter(Path(folder))


def measure(ways, output, repeats):
    """Median seconds of each way, a command line that writes into ``output``; and its peak GB.

    A process inherits its parent's peak, so this one must not grow large.
    """
    figures = {way: [] for way in ways}
    for _ in range(repeats):
        for way, words in ways.items():
            shutil.rmtree(output, ignore_errors=True)  # to free old files takes time, too
            output.mkdir()
            os.sync()
            began = time.perf_counter()
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            figures[way].append((time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9))
            assert status == 0, words
    return {way: list(map(statistics.median, zip(*rows))) for way, rows in figures.items()}


def line(what, theirs, ours, unit):
    """A line of the table: two medians and their ratio."""
    print(f"| {what} | {theirs:.3g} {unit} | {ours:.3g} {unit} | {theirs / ours:.2f} |", flush=True)


def converter(folder):
    """ViT-Base with the optimizer's state, as MoCo v3 saves it."""
    source, target, copied = folder / "moco-v3.pth.tar", folder / "out" / "pth", folder / "copied"
    subprocess.run([sys.executable, TESTS / "generate.py", "checkpoint", source, "--width", "768",
                    "--mlp-dim", "4096", "--dim", "256"], check=True)
    convert = [sys.executable, TESTS.parent / "convert_to_deit.py", "--input", source, "--output"]
    subprocess.run([*convert, copied], stdout=subprocess.DEVNULL, check=True)
    python = [sys.executable, "-c"]
    figures = measure({"here": [*convert, target],
                       "published": [*python, AS_PUBLISHED, source, target],
                       "floor": [*python, FLOOR, copied, target]}, folder / "out", repeats=9)
    (theirs, their_peak), (ours, our_peak) = figures["published"], figures["here"]
    line(f"converter, ViT-Base, {source.stat().st_size / 1e9:.2f} GB", theirs, ours, "s")
    line("its peak memory", their_peak, our_peak, "GB")
    line("the floor, to import torch and copy what comes out, against it", figures["floor"][0],
         ours, "s")


if __name__ == "__main__":
    main()
