"""The commands of README.md and scripts/README.md, as they stand there."""
import os
import re
import shlex
import shutil
import subprocess

import pytest

import arguments as mini_deit
import launches
from conftest import copy_bundle, train
from deit_plugin.flags import parse, parser_for
from launches import ROOT, SCRIPTS, TESTS, environment

PARSER = parser_for(mini_deit)
README = (ROOT / "README.md").read_text()
BOTH = {ROOT: README, SCRIPTS: (SCRIPTS / "README.md").read_text()}


def blocks(heading, language="bash", text=README):
    """The code blocks of that language below a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(f"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the bundle where the smoke test has run, but only to its first evaluation."""
    folder = copy_bundle(tmp_path_factory.mktemp("bundle"), "tests")
    printed = run(folder, blocks("Quick start")[0].replace("--epochs 6", "--epochs 2"))
    accuracy, = re.findall(r"; test accuracy ([\d.]+) %", printed)
    assert float(accuracy) > 50, printed
    return folder


def run(folder, commands):
    """Have bash read the commands, and fork each Python that it starts; what the last prints."""
    def prepare():
        os.chdir(folder)
        launches.fork_workers_in_place_of_torch()

    shown = folder / "shown"
    shown.write_text("")
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$NPROC_PER_NODE" "$@" >> shown; echo >> shown\n')
    python.chmod(0o755)
    path = f"{folder}:{environment()['PATH']}"
    subprocess.run(["bash", "-euc", commands], cwd=folder, check=True,
                   env=environment(PATH=path, PYTHON=python, NPROC_PER_NODE=None))
    for line in shown.read_text().splitlines():
        processes, script, *words = line.split("\t")[:-1]
        done = launches.fork_script(folder / script, *words, before=prepare,
                                    variables=environment(NPROC_PER_NODE=processes or None))
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_smoke_test_learns_and_its_result_can_be_used(folder):
    image = next((folder / "data" / "smoke" / "jpg").glob("*.jpg"))
    shutil.copy(image, folder / "cat.jpg")
    (folder / "photos").mkdir()
    shutil.copy(image, folder / "photos")
    predict, _ = blocks("Use the result")[0].splitlines()  # the export is in test_use.py
    label = run(folder, predict.replace("out/pets", "out/smoke")).splitlines()[1].split(",")[1]
    snippet, = blocks("predict.py", "python", BOTH[SCRIPTS])
    (folder / "snippet.py").write_text(snippet.replace("out/pets", "out/smoke"))
    assert run(folder, "python snippet.py").split() == [label]
    evaluate = re.search(r"\*\*Evaluate:\*\* `(.*?)`", README)[1].replace("pets", "smoke").replace(
        "smoke.sh", "pets.sh")
    assert "test accuracy" in run(folder, f"{evaluate} --device cpu --num_workers 0")


@pytest.mark.slow
def test_the_demo(folder):
    done = subprocess.run(["bash", "scripts/demo.sh"], cwd=folder, capture_output=True, text=True,
                          env=environment(DEMO_DIR="demo"))
    assert "12 of 12" in done.stdout and "Result (chance is 5 %)" in done.stdout, done.stderr


def test_every_link_and_flag_in_readme_exists():
    for folder, text in BOTH.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, heading = target.partition("#")
            assert (folder / path).exists(), target
            if heading:
                headings = re.findall("^## (.*)$", BOTH[SCRIPTS], re.MULTILINE)
                assert heading in [line.lower().replace(" ", "-").replace(".", "")
                                   for line in headings], target
    known = "".join(path.read_text() for path in (
        *ROOT.glob("scripts/*.py"), *ROOT.glob("*.py"), TESTS / "generate.py"))
    listed = launches.fork("pets", "--all-flags").stdout
    assert "--model-ema-decay" in listed and "--accum-iter" in listed
    foreign = {"--gpus-per-node", "--cpus-per-task", "--nodes", "--array", "--gpus", "--partition",
               "--account", "--time"}  # sbatch's
    for flag in set(re.findall(r"(?<![-\w])--[a-z][-\w]+", "".join(BOTH.values()))) - foreign:
        assert flag in known + listed, flag


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100", "flowers", "pets", "imagenet"])
def test_a_recipe_has_the_flags_of_the_table(recipe):
    assert os.access(SCRIPTS / f"{recipe}.sh", os.X_OK)
    row = re.search(rf"\| `scripts/{recipe}\.sh` \| (.*?) \| [\d.]+ % \|", README)[1].split(" | ")
    _, *words = launches.run_by_shell(["bash", SCRIPTS / f"{recipe}.sh"]).stdout.splitlines()
    args = parse(PARSER, words).recipe_args
    expected = {"data_set": recipe, "model": "deit_base_patch16_224", "batch_size": 128}
    table = ("weight_decay", "reprob", "drop_path", "mixup", "cutmix")
    expected.update(zip(table, map(float, row)))
    if recipe == "imagenet":  # in all else DeiT's defaults
        expected["epochs"] = 150
        defaults = vars(PARSER.parse_args([]))
        assert {**defaults, **expected} == vars(args)
    else:
        expected.update(epochs=100, lr=3e-4, warmup_epochs=3, pin_mem=False, repeated_aug=False,
                        eval_freq=10)
    assert {name: getattr(args, name) for name in expected} == expected


def test_dry_run_prints_torch_s_command_and_every_flag_and_writes_nothing(checkpoint, flags,
                                                                              tmp_path):
    odd = tmp_path / "a b'c"
    shown = train("pets", *flags, "--no-model-ema", "--output_dir", odd, "--dry-run",
                  processes=2).stdout
    torch_runs, main_gets = (shlex.split(line) for line in shown.splitlines()[1::2])
    assert "--nproc_per_node 2" in " ".join(torch_runs) and torch_runs[-2].endswith("worker.py")
    args = PARSER.parse_args(main_gets[1:])
    assert (args.output_dir, args.resume) == (str(odd), str(checkpoint))
    assert (args.model_ema, args.repeated_aug, args.lr) == (False, False, 3e-4)
    assert not odd.exists()
