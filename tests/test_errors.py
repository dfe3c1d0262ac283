"""What a user does wrong ends in one line that names it; and what works though it looks odd."""
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import arguments as mini_deit
import generate
from conftest import copy_bundle, copy_deit, error_of, log_of, train
from deit_plugin import errors, job, weights
from deit_plugin.data import Data
from deit_plugin.flags import complete, parse, parser_for, problems, without_effect
from launches import PAIR, SCRIPTS, command, environment, fork
from underway import end_of, processes_of, running, wait_for, wait_for_epochs

# As a recipe passes it: what stands before --your-flags is the recipe's.
PETS = ("--data-set pets --reprob 0 --mixup 0.8 --cutmix 0 --aa of-the-recipe --your-flags "
        "--data-path pets --output_dir out ")
FLOWERS = ("--data-set flowers --no-repeated-aug --your-flags --data-path flowers "
           "--output_dir out --resume a.pth ")
PARSER = parser_for(mini_deit)


def parsed(words, processes=1):
    """A flags.Given, and what is wrong with it."""
    given = parse(PARSER, words.split())
    given = given._replace(args=complete(given.args, processes))
    return given, problems(PARSER, given)


@pytest.mark.parametrize("words, says", [
    ("--epochs 0", "--epochs 0"), ("--lr nan", "--lr nan"),
    ("--drop-path 2", "--drop-path 2.0: must be 0 to 1"), ("--cutmix-minmax 0.2", "two numbers"),
    ("--input-size 100", "multiple of 16"), ("--finetune a.pth", "--resume"),
    ("--device CPU", "cuda"), ("--batch-size 7 --mixup 0 --cutmix 1", "must be even"),
    ("--bce-loss --mixup 0", "--mixup or --cutmix"), ("--bce-loss", "--smoothing 0"),
    ("--opt-betas 0.9", "two numbers"), ("--opt adahessian", "adahessian"),
    ("--model vit_tiny_patch16_384", "--input-size 384"), ("--predictions a.csv", "--eval"),
    ("--resume https://a.b/c.pth", "wget"), ("--data-set imagnet", "imagenet"),
    ("--data-path=", "--data-path is missing"), ("--output_dir=", "--output_dir is missing"),
    ("--test-split", "--test-split: needs --eval"),
    ("--eval --test-split --hold-out 0.2", "leave one out"),
    ("--aa rand", "--aa has no effect on --data-set pets"), ("--color-jitter 0.4", "jitter has no"),
    ("--data-set imagenet --color-jitter 0.4", "with --aa"),
    ("--resplit", "--resplit has no effect"), ("--src", "no effect without --ThreeAugment"),
    ("--mixup 0 --mixup-mode elem", "no effect without --mixup"),
    ("--remode rand", "--remode has no effect with --reprob 0"),
    ("--ThreeAugment --reprob 0.2", "--reprob has no effect with --ThreeAugment"),
])
def test_a_flag_that_cannot_work_or_has_no_effect_is_refused_in_one_line(words, says):
    try:
        _, found = parsed(PETS + words)
    except errors.UserError as error:  # argparse's
        found = error.args
    assert [text for text in found if says in text] and "\n" not in "".join(found)


@pytest.mark.parametrize("words", [
    "--mixup-mode elem", "--ThreeAugment --src --color-jitter 0.1", "--reprob 0.2 --remode rand"])
def test_a_flag_of_the_recipe_may_be_without_effect(words):
    given, found = parsed(PETS + words)
    assert not found and "aa" in without_effect(given.args)


class Images(list):
    """As many images as the official data set has, without names."""

    classes = ["one"]
    targets = property(lambda self: [0] * len(self))


@pytest.mark.parametrize("processes, words, steps", [
    (8, "", 1), (1, "--accum-iter 8", 1), (16, "--batch-size 64", 2), (2, "--batch-size 8", 127)])
def test_equal_settings_mean_equal_steps(processes, words, steps):
    """On the official numbers of images, 2040 and 6149; a step is 1024 images in all but one."""
    given, found = parsed(FLOWERS + words, processes)
    settings = job.settings_of(given.args, Data(Images(range(2040)), Images(range(6149))))
    differs = job.differing(settings, job.published_settings(given), "published")
    assert not found and settings["steps per epoch"] == steps
    named = [text for text in differs if "steps per epoch" in text]
    assert named == ([] if steps == 1 else [f"{steps} steps per epoch (published: 1)"])
    assert bool(differs) == (steps > 1)


@pytest.mark.parametrize("width, depth, more, says", [
    (128, 2, {}, "cls_token"), (64, 1, {}, "blocks.1."),
    (192, 12, {}, "--model deit_tiny_patch16_224"), (64, 2, {"extra": (1,)}, "extra"),
    (64, 2, {"head.bias": (37,)}, "head.weight"),
    (64, 2, {"head.weight": (9, 64), "head.bias": (9,)}, "head.weight"),
    (384, 2, {}, "12 heads"),  # which shows in no shape
])
def test_weights_that_do_not_fit_are_refused(width, depth, more, says):
    its_width, heads = (384, 6) if width == 384 else (64, 2)
    model = VisionTransformer(embed_dim=its_width, depth=2, num_heads=heads, qkv_bias=True,
                              num_classes=37)
    tensors = generate.encoder_state(width, depth)
    tensors.update((name, torch.ones(shape)) for name, shape in more.items())
    with pytest.raises(errors.UserError) as refusal:
        weights.load_into(model, tensors, "a.pth", "some_model")
    assert says in str(refusal.value) and "a.pth" in str(refusal.value)


@pytest.mark.parametrize("wrong, says", [
    ("--resume=", "--resume is missing"), ("--eval", "no classifier head"),
    ("--resume /nowhere.pth", "/nowhere.pth"), ("--data-path /", "/annotations/trainval.txt"),
    ("--opt no_such", "--opt no_such"), ("--model resnet18", "--model resnet18"),
    ("--repeated-aug --accum-iter 8", "no whole step.* 49 // 256 .* 8 .--accum-iter"),
    ("--learning-rate 1", "--all-flags"), ("--seed 1 photos", "in quotes"),
    ("--hold_out 0.1 --output-dir=x", "did you mean --hold-out and --output_dir"),
    ("--data-set imagenet --aa no_such", "--aa no_such"),
    ({"NPROC_PER_NODE": "abc"}, "NPROC_PER_NODE=abc"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "::1"}, "NODE_RANK=2: .* from 0 to 1"),
    ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "no host"}, "MASTER_ADDR=no host: .* known"),
    ({"DEIT_DIR": None}, "DEIT_DIR.*not set.*git clone"),
])
def test_a_mistake_ends_in_one_line_before_anything_is_written(wrong, says, refusal, flags,
                                                               tmp_path):
    """A wrong flag, or a variable of the environment."""
    words, variables = (wrong.split(), {}) if isinstance(wrong, str) else ([], wrong)
    assert re.search(says, refusal("pets", *flags, *words, CUDA_VISIBLE_DEVICES="", **variables))
    assert not list(tmp_path.iterdir())


def test_a_module_of_deit_s_that_was_imported_from_elsewhere(refusal, flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "engine", mock.Mock(__file__="/elsewhere/engine.py"))
    assert "engine was imported from /elsewhere/engine.py" in refusal("pets", *flags)


def test_another_module_named_datasets_that_was_imported_before_is_named(monkeypatch):
    """As Hugging Face's in a notebook."""
    monkeypatch.setitem(sys.modules, "datasets", mock.Mock(__file__="/site/datasets/__init__.py"))
    with pytest.raises(ImportError, match="/site/datasets/__init__.py: start a new Python"):
        runpy.run_path(str(SCRIPTS / "deit_plugin" / "__init__.py"))


def test_copied_into_a_checkout(flags, tmp_path):
    checkout = copy_bundle(copy_deit(tmp_path / "deit"))
    options = {"scripts": checkout / "scripts", "DEIT_DIR": None}
    train("pets", *flags, "--dry-run", **options)
    for module, content, missing in (("models", "from timm import gone", "gone"),
                                     ("datasets", "# DeiT's", "DATA_SETS")):
        (checkout / f"{module}.py").write_text(content)
        line = error_of(fork("pets", *flags, **options))
        assert missing in line and str(checkout) in line and "copy all files" in line


def test_beside_modules_that_are_named_as_ours_and_as_deit_s(flags, tmp_path):
    """In a project, where Hugging Face's datasets is installed."""
    project, installed = copy_bundle(tmp_path / "project"), tmp_path / "site-packages"
    for package in (project / "utils", installed / "datasets"):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('the wrong module')")
    shutil.copy(project / "utils" / "__init__.py", project / "main.py")
    train("pets", *flags, "--dry-run", scripts=project / "scripts", PYTHONPATH=installed)


def test_a_bug_in_every_process_shows_one_traceback(flags, tmp_path):
    deit = copy_deit(tmp_path / "deit")
    with open(deit / "engine.py", "a") as engine:
        engine.write("\n\ndef train_one_epoch(*_, **__):\n    raise RuntimeError('a bug')\n")
    done = fork("pets", *flags, processes=2, DEIT_DIR=deit)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_check_of_own_images_names_what_makes_numbers_wrong(own, flags, tmp_path):
    """First of good images, with MoCo v3's ViT-Small, saved by torch.compile, and no GPU yet."""
    small, state = tmp_path / "small.pth", generate.encoder_state(384, 12)
    torch.save({"model": {f"_orig_mod.{name}": state[name] for name in state}}, small)
    flags = [*flags, "--data-set", "folder", "--data-path", own, "--num_workers", "1", "--check"]
    good = train("pets", *flags, "--resume", small, "--model", "moco_v3_vit_small_patch16_224",
                 "--batch-size", "2", "--accum-iter", "2", "--device", "cuda", processes=8,
                 CUDA_VISIBLE_DEVICES="").stdout
    for words in ("not checked: no GPU on this machine; the launch needs 8", str(small),
                  "0.0003 x 32 / 512",
                  "32 = 8 processes x 2 images x 2 accumulated", "1 step", "all 49 can be decoded",
                  "class bee has 14 train images, class ant has 15", "duplicates: no image",
                  "ok       evaluation: a data worker hands over a batch"):
        assert words in good
    assert good.endswith("\nready\n") and "warning" not in good and "PROBLEM" not in good
    assert not (tmp_path / "run").exists()
    with Image.open(own / "train" / "ant" / "0.png") as image:
        image.save(own / "val" / "bee" / "copy.png", compress_level=1, dpi=(72, 72))
    (own / "train" / "cow" / "calf").mkdir()
    next((own / "train" / "cow").glob("*.png")).rename(own / "train" / "cow" / "calf" / "a.png")
    for name, scale in (("dark", 1), ("bright", 16)):  # of a camera of 12 bits
        pixels = numpy.linspace(0, 4095, 36).reshape(6, 6).astype("uint16")
        Image.fromarray(pixels * scale).save(own / "train" / "cow" / f"{name}.png")
    for path in sorted((own / "train" / "bee").iterdir())[1:]:
        path.unlink()
    said = train("pets", *flags).stdout
    assert "class bee has 1 train" in said and "fewer than two: bee" in said
    twins = "val/bee/copy.png = train/ant/0.png"
    assert f"too high: {twins}; 1 image in more than one class: {twins}" in said
    assert "in a class folder belong to that class: cow/calf" in said
    assert "1 image of 16 bits" in said and "dark.png" in said and "bright.png" not in said


def test_broken_images_are_named_by_a_run_and_by_check(data, flags, checkpoint, tmp_path):
    """--check counts every problem, and no consequence of one."""
    pets = shutil.copytree(data / "pets", tmp_path / "pets")
    broken = sorted((pets / "images").glob("*.jpg"))[7:10]
    for image in broken:
        image.write_bytes(image.read_bytes()[:150])
    for workers in ("0", "1"):
        line = error_of(fork("pets", *flags, "--data-path", pets, "--num_workers", workers), 1)
        assert any(str(image) in line for image in broken) and "--check" in line
    generate.moco_checkpoint(tmp_path / "moco.pth", width=64, depth=2)
    done = fork("pets", *flags, "--data-path", pets, "--check", "--output_dir", checkpoint,
                "--resume", tmp_path / "moco.pth")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "not ready: 3 problems"
    assert done.stdout.count("PROBLEM") == 3 and "3 of 70" in done.stdout
    assert f"convert_to_deit.py --input {tmp_path / 'moco.pth'}" in done.stdout
    assert all(str(image) in done.stdout for image in broken)


def test_odd_surroundings_change_nothing(data, checkpoint, refusal, tmp_path):
    """Links and a tilde; `nohup ... | head -1`; a job folder with a long path; and what Kubernetes,
    software of a cluster, and users of Python leave in the environment. SIGTERM ends every process.
    """
    run, long = tmp_path / "run", tmp_path / ("job" * 20) / "tmp"
    for folder in (long, tmp_path / "bin"):
        folder.mkdir(parents=True)
    for link, target in (("bin/pets.sh", SCRIPTS / "pets.sh"), ("linked", SCRIPTS),
                         ("data", data / "pets"), ("start.pth", checkpoint)):
        (tmp_path / link).symlink_to(target)
    flags = ["--resume=~/start.pth", "--data-path=~/data", "--epochs", "5000", "--output_dir"]
    odd = {"PET_MAX_RESTARTS": "3", "PET_RDZV_ENDPOINT": "192.0.2.1:1", "PET_NNODES": "2",
           "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "NODE_RANK": "1", "RANK": "3",
           "HOME": tmp_path, "TMPDIR": long, "PYTHONSAFEPATH": "1"}
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; processes inherit it
    with running("pets", *flags, run, "--num_workers", "1", processes=PAIR,
                 scripts=tmp_path / "bin", **odd) as launched:
        signal.signal(signal.SIGHUP, handler)
        launched.stdout.readline()
        launched.stdout.close()
        launched.stdout = None
        wait_for_epochs(run)
        processes = processes_of(tmp_path)
        assert len(processes) >= 2 * PAIR  # with data workers
        for process in (launched.pid, *processes):
            os.kill(process, signal.SIGHUP)
        wait_for_epochs(run, len(log_of(run)) + 3, seconds=60)
        assert "another run" in refusal("pets", *flags, run, HOME=tmp_path, NPROC_PER_NODE=PAIR)
        launched.terminate()
        wait_for(lambda: not processes_of(tmp_path), seconds=20)
        done = end_of(launched)
    assert done.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and done.stderr == ""
    done = fork("pets", *flags, "~/run", "--hold-out", "0.2", processes=PAIR,
                scripts=tmp_path / "linked", **odd)
    assert "--hold-out 0.2 (there: 0.0)" in error_of(done)  # about the same run


def test_help_without_exec_bits_or_a_deit_and_with_another_shell(tmp_path):
    scripts = shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for path in scripts.glob("*.sh"):
        path.chmod(0o644)
    done = subprocess.run(command("pets", "--help", scripts=scripts), capture_output=True,
                          text=True, env=environment(DEIT_DIR=None, PYTHON=None))
    for word in ("DEIT_DIR", "NPROC_PER_NODE", "--dry-run", "--resume", "--accum-iter"):
        assert word in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    if "bash" not in os.path.realpath("/bin/sh"):
        for name in ("pets.sh", "launch.sh", "demo.sh"):
            refused = subprocess.run(["sh", scripts / name], capture_output=True, text=True)
            assert "bash" in error_of(refused)
