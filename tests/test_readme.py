"""README's commands, as they stand there."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import copy_bundle
from launches import DEIT, ROOT, SCRIPTS, TESTS, environment, fork, fork_script, launch

README = (ROOT / "README.md").read_text()


def block(heading, language="bash"):
    """The first code block of that language below a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.search(f"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the bundle, with the miniature DeiT or DEIT_DIR's, where the smoke test has run."""
    folder = copy_bundle(tmp_path_factory.mktemp("bundle"), "tests")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    done = run(folder, block("Quick start"))
    accuracies = [float(text) for text in re.findall(r"test accuracy ([\d.]+) %", done.stdout)]
    assert len(accuracies) == 3 and accuracies[-1] > 50, done.stdout
    return folder


def run(folder, commands):
    path = f"{folder / 'bin'}:{environment()['PATH']}"
    done = subprocess.run(["bash", "-euc", commands], cwd=folder, capture_output=True, text=True,
                          env=environment(PATH=path, NPROC_PER_NODE=None, DEIT_DIR=DEIT))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_smoke_test_learns_and_its_result_can_be_used(folder, monkeypatch):
    image = next((folder / "data" / "smoke" / "jpg").glob("*.jpg"))
    shutil.copy(image, folder / "cat.jpg")
    (folder / "photos").mkdir()
    shutil.copy(image, folder / "photos")
    predict, _ = block("Use the result").splitlines()  # the other is in test_use.py
    run(folder, predict.replace("out/pets", "out/smoke"))
    label = (folder / "labels.csv").read_text().splitlines()[1].split(",")[1]
    snippet = block("Use the result", "python").replace("out/pets", "out/smoke")
    (folder / "snippet.py").write_text(snippet)
    monkeypatch.chdir(folder)
    printed = fork_script("snippet.py", variables=environment())
    assert printed.stdout.split() == [label], printed.stderr
    evaluate = re.search(r"\*\*Evaluate:\*\* `(.*?)`", README)[1].replace("pets", "smoke").replace(
        "smoke.sh", "pets.sh")
    assert "test accuracy" in run(folder, f"{evaluate} --device cpu --num_workers 0").stdout


@pytest.mark.slow
def test_the_demo(folder):
    done = run(folder, "PYTHON=$PWD/bin/python DEMO_DIR=demo bash scripts/demo.sh")
    assert "12 of 12" in done.stdout and "Result (chance is 5 %)" in done.stdout


def test_every_link_and_flag_in_readme_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    known = "".join(path.read_text() for path in (
        *ROOT.glob("scripts/*.py"), *ROOT.glob("*.py"), TESTS / "generate.py",
        SCRIPTS / "launch.sh"))
    listed = fork("pets", "--all-flags").stdout
    assert "--model-ema-decay" in listed and "--accum-iter" in listed
    foreign = {"--gpus-per-node", "--cpus-per-task"}  # sbatch's
    for flag in set(re.findall(r"(?<![-\w])--[a-z][-\w]+", README)) - foreign:
        assert flag in known + listed, flag


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100", "flowers", "pets", "imagenet"])
def test_dry_run_prints_the_recipe_of_the_table_so_that_it_can_be_pasted(recipe, tmp_path):
    assert os.access(SCRIPTS / f"{recipe}.sh", os.X_OK)
    odd = tmp_path / "a b'c"
    printed = launch(recipe, "--dry-run", "--output_dir", odd, processes=8, PYTHON="echo").stdout
    row = re.search(rf"\| `scripts/{recipe}\.sh` \| (.*?) \| [\d.]+ % \|", README)[1].split(" | ")
    if recipe == "imagenet":  # whose row has DeiT's defaults
        flags = "--epochs 150 --your-flags"
    else:
        flags = ("--epochs 100 --lr 3e-4 --warmup-epochs 3 --no-pin-mem --no-repeated-aug "
                 "--eval-freq 10 --weight-decay {} --reprob {} --drop-path {} --mixup {} "
                 "--cutmix {} ").format(*(rf"{value}(\.0)?" for value in row))
    for part in (f"--batch-size 128 --data-set {recipe} {flags}", "--nproc_per_node 8",
                 "--model deit_base_patch16_224"):
        assert re.search(part, printed)
    pasted = subprocess.run(printed, shell=True, stdout=subprocess.PIPE, check=True, text=True)
    assert pasted.stdout.rstrip("\n").endswith(f"--output_dir {odd}")
