"""README's commands, as they stand there."""
import re
import shutil
import subprocess
import sys

import pytest

from launches import DEIT, ROOT, environment

README = (ROOT / "README.md").read_text()


def block(heading, language="bash"):
    """The first code block of that language below a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.search(f"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the bundle, with the miniature DeiT or DEIT_DIR's, where the smoke test has run."""
    folder = tmp_path_factory.mktemp("bundle")
    for name in ("scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
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


def test_the_smoke_test_learns_and_its_result_can_be_used(folder):
    image = next((folder / "data" / "smoke" / "jpg").glob("*.jpg"))
    shutil.copy(image, folder / "cat.jpg")
    (folder / "photos").mkdir()
    shutil.copy(image, folder / "photos")
    commands = block("Use the result").replace("out/pets", "out/smoke")
    predict, export = commands.splitlines()
    run(folder, predict)
    label = (folder / "labels.csv").read_text().splitlines()[1].split(",")[1]
    snippet = block("Use the result", "python").replace("out/pets", "out/smoke")
    printed = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True,
                             text=True, env=environment(DEIT_DIR=DEIT))
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
    known = subprocess.run(["bash", ROOT / "scripts" / "pets.sh", "--all-flags"],
                           capture_output=True, text=True, env=environment(DEIT_DIR=DEIT)).stdout
    known += (ROOT / "scripts" / "launch.sh").read_text() + "".join(
        path.read_text() for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("*.py"),
                                      ROOT / "tests" / "generate.py"])
    foreign = {"--gpus-per-node", "--cpus-per-task"}  # sbatch's
    for flag in set(re.findall(r"(?<![-\w])--[a-z][-\w]+", README)) - foreign:
        assert flag in known, flag


def test_the_table_of_recipes_is_what_the_scripts_pass():
    rows = re.findall(r"\| `scripts/(\w+)\.sh` \| (.*?) \| [\d.]+ % \|", README)
    assert len(rows) == 5
    for recipe, cells in rows:
        script = (ROOT / "scripts" / f"{recipe}.sh").read_text()
        for flag, value in zip(("weight-decay", "reprob", "drop-path", "mixup", "cutmix"),
                               cells.split(" | ")):
            passed = re.search(rf"--{flag} (\S+)", script)
            if recipe != "imagenet":  # whose values are DeiT's defaults
                assert float(passed[1]) == float(value), (recipe, flag)
