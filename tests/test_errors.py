"""What a user does wrong ends in one line that names it; and what works though it looks odd."""
import shutil
import subprocess

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import arguments as mini_deit
import generate
from conftest import error_of, log_of, train
from datasets import DATA_SETS
from deit_plugin import errors, options, recipe, weights
from deit_plugin.data import Data
from launches import ROOT, environment, fork, launch


@pytest.mark.parametrize("flags, says", [
    ("--epochs 0", "--epochs 0"), ("--num_workers -1", "--num_workers -1"),
    ("--drop-path 2", "--drop-path 2.0: must be 0 to 1"), ("--lr nan", "--lr nan"),
    ("--cutmix-minmax 0.2", "two numbers"),
    ("--input-size 100", "multiple of 16"), ("--start_epoch 5", "--start_epoch 5"),
    ("--remode no_such", "pixel"), ("--device CPU", "cuda"), ("--sched no_such", "cosine"),
    ("--batch-size 7 --cutmix 0", "must be even"), ("--batch-size 7 --mixup 0", "must be even"),
    ("--bce-loss --mixup 0 --cutmix 0", "--mixup or --cutmix"), ("--bce-loss", "--smoothing 0"),
    ("--finetune a.pth", "--resume"), ("--distillation-type hard", "--distillation-type"),
    ("--output-dir out", "did you mean --output_dir"), ("--dryrun", "--dry-run"),
    ("--sched step --decay-epochs 0", "--decay-epochs 0"), ("--eval-crop-ratio 0", "ratio 0.0"),
    ("--opt-betas 0.9", "two numbers"), ("--opt adahessian", "adahessian"),
    ("--resume https://a.b/c.pth", "wget"), ("--hold-out 1", "--hold-out 1"),
    ("--model vit_tiny_patch16_384", "--input-size 384"), ("--predictions a.csv", "--eval"),
    ("--epochs many", "many"), ("--data-set imagnet", "imagenet"),
    ("--data-path=", "--data-path is missing"), ("--output_dir=", "--output_dir is missing"),
])
def test_a_value_that_cannot_work_is_refused_in_one_line(flags, says):
    arguments = "--data-set pets --data-path pets --output_dir out " + flags
    with pytest.raises(errors.UserError) as refusal:
        options.parse(mini_deit, DATA_SETS, arguments.split())
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("flags, says", [
    ("--aa rand", "--aa has no effect on --data-set pets"), ("--color-jitter 0.4", "jitter has"),
    ("--train-interpolation random", "interpolation has"), ("--eval-crop-ratio 1", "ratio has"),
    ("--resplit", "--resplit has"), ("--inat-category x", "category has"),
    ("--dist-eval", "eval has"), ("--src", "--src has no effect without --ThreeAugment"),
    ("--mixup-mode elem", None), ("--mixup 0 --mixup-mode elem", "no effect without --mixup"),
    ("--ThreeAugment --src --color-jitter 0.1", None), ("--decay-rate 0.2", "--sched cosine"),
    ("--ThreeAugment --reprob 0.2", "--reprob has no effect with --ThreeAugment"),
    ("--reprob 0.2 --remode rand", None), ("--remode rand", "no effect with --reprob 0"),
])
def test_a_flag_without_effect_is_refused_if_the_user_gave_it(flags, says):
    recipe = "--data-set pets --reprob 0 --mixup 0.8 --cutmix 0 --aa of-the-recipe --your-flags"
    words = f"{recipe} --data-path pets --output_dir out {flags}".split()
    if says is None:
        args, plan = options.parse(mini_deit, DATA_SETS, words)
        assert "aa" not in plan.settings
        assert ("color_jitter" in plan.settings) == args.ThreeAugment
    else:
        with pytest.raises(errors.UserError, match=says):
            options.parse(mini_deit, DATA_SETS, words)


RECIPE = ("--data-set flowers --batch-size 128 --no-repeated-aug --your-flags --data-path flowers "
          "--output_dir out --resume a.pth ")


@pytest.mark.parametrize("processes, flags, steps, advice", [
    (8, "", 1, None), (1, "--accum-iter 8", 1, None), (4, "--accum-iter 2", 1, None),
    (8, "--batch-size 32 --accum-iter 4", 2, "--batch-size 128 --accum-iter 1 restores"),
    (16, "--batch-size 64", 2, None), (2, "--batch-size 8", 127, "--batch-size 128 --accum-iter 4"),
])
def test_equal_settings_mean_equal_steps(processes, flags, steps, advice, monkeypatch):
    """On the official numbers of images, 2040 and 6149; a step is 1024 images in all but one."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args, plan = options.parse(mini_deit, DATA_SETS, (RECIPE + flags).split())
    run = recipe.compare(args, plan, Data(range(2040), range(6149)))
    described = recipe.describe_batch(run, args, plan)
    assert f"; {steps} step" in described
    assert advice in described if advice else "restores" not in described
    named = [text for text in run.differs if "steps per epoch" in text]
    assert named == ([] if steps == 1 else [f"{steps} steps per epoch (published: 1)"])
    assert bool(run.differs) == (steps > 1)


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
        weights.fit(model, tensors, "a.pth", "some_model")
    assert says in str(refusal.value) and "a.pth" in str(refusal.value)
    assert "None" not in str(refusal.value)


@pytest.mark.parametrize("wrong, says", [
    (["--resume", ""], "--resume is missing"), (["--eval"], "no classifier head"),
    (["--opt", "no_such"], "--opt no_such"),
    (["--resume", "/nowhere.pth"], "/nowhere.pth"), (["--data-path", "/nowhere"], "/nowhere"),
    (["--model", "no_such_model"], "no_such_model"), (["--model", "resnet18"], "--model resnet18"),
    (["--batch-size", "400"], "no whole step"), (["--device", "cuda"], "--device cpu"),
    (["--output_dir", __file__], __file__), (["--data-path", "/"], "/annotations/trainval.txt"),
    (["--data-set", "imagenet", "--aa", "no_such"], "--aa no_such"),
    (["--data-set", "imagenet", "--train-interpolation", "no_such"], "no_such"),
    (["--output-dir", "x"], "did you mean --output_dir"),
])
def test_a_mistake_ends_in_one_line(wrong, says, flags):
    assert says in error_of(fork("pets", *flags, *wrong, CUDA_VISIBLE_DEVICES=""))


@pytest.mark.parametrize("variables, says", [
    ({"NPROC_PER_NODE": "abc"}, ["NPROC_PER_NODE=abc"]), ({"NNODES": "0"}, ["NNODES=0"]),
    ({"NNODES": "2", "NODE_RANK": "2"}, ["NODE_RANK=2: must be 0 to 1"]),
    ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, ["MASTER_PORT=b:"]),
    ({"PYTHON": "/no/python"}, ["/no/python"]), ({"DEIT_DIR": None}, ["DEIT_DIR", "git clone"]),
    ({"DEIT_DIR": "/nowhere"}, ["DEIT_DIR=/nowhere", "git clone"]),
])
def test_a_launch_that_cannot_start_says_why(variables, says):
    line = error_of(launch("pets", **variables))
    assert all(words in line for words in says)


def test_copied_into_a_checkout_with_another_package_named_datasets(flags, tmp_path):
    checkout, other = tmp_path / "deit", tmp_path / "site" / "datasets"
    shutil.copytree(environment()["DEIT_DIR"], checkout, ignore=shutil.ignore_patterns(".git"))
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong datasets')")
    options = {"scripts": checkout / "scripts", "PYTHONPATH": str(tmp_path / "site"),
               "DEIT_DIR": None}
    assert "convert_to_deit" in error_of(fork("pets", *flags, **options))  # was not copied
    shutil.copy(ROOT / "convert_to_deit.py", checkout)
    line = error_of(fork("pets", *flags, **options))
    assert "copy" in line and "datasets.py" in line
    for name in ("datasets.py", "oxford_flowers_dataset.py", "oxford_pets_dataset.py"):
        shutil.copy(ROOT / name, checkout)
    assert "on pets" in train("pets", *flags, **options).stdout
    (checkout / "models.py").write_text("from timm import gone")
    line = error_of(fork("pets", *flags, **options))
    assert "gone" in line and "requirements.txt" in line and str(checkout) in line


def test_a_bug_in_every_process_shows_one_traceback(flags, tmp_path):
    deit = tmp_path / "deit"
    shutil.copytree(environment()["DEIT_DIR"], deit, ignore=shutil.ignore_patterns(".git"))
    with open(deit / "engine.py", "a") as engine:
        engine.write("\n\ndef train_one_epoch(*_, **__):\n    raise RuntimeError('a bug')\n")
    done = launch("pets", *flags, processes=2, DEIT_DIR=str(deit))
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_links_tilde_and_a_cluster_s_variables(data, checkpoint, tmp_path):
    """In a real launch: links in odd places; what software of a cluster leaves behind."""
    (tmp_path / "bin").mkdir()
    for link, target in (("bin/pets.sh", ROOT / "scripts" / "pets.sh"), ("data", data / "pets"),
                         ("linked", ROOT / "scripts"), ("start.pth", checkpoint)):
        (tmp_path / link).symlink_to(target)
    flags = ["--resume=~/start.pth", "--data-path=~/data", "--output_dir=~/run"]
    done = launch("pets", *flags, scripts=tmp_path / "bin", MASTER_ADDR="192.0.2.1", RANK="3",
                  MASTER_PORT="29500", NODE_RANK="1", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "run")) == 2
    linked = train("pets", *flags, scripts=tmp_path / "linked", HOME=str(tmp_path))
    assert "nothing left" in linked.stdout


TRANSFER = ("--epochs 100 --lr 3e-4 --warmup-epochs 3 --no-pin-mem --no-repeated-aug "
            "--eval-freq 10 ")


@pytest.mark.parametrize("recipe, flags", [
    ("cifar10",
     TRANSFER + "--weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.8 --cutmix 1"),
    ("cifar100",
     TRANSFER + "--weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.5 --cutmix 1"),
    ("flowers",
     TRANSFER + "--weight-decay 0.3 --reprob 0.25 --drop-path 0.1 --mixup 0 --cutmix 0"),
    ("pets", TRANSFER + "--weight-decay 0.1 --reprob 0 --drop-path 0 --mixup 0.8 --cutmix 0"),
    ("imagenet", "--epochs 150 --your-flags --dry-run"),  # the rest are DeiT's defaults
])
def test_dry_run_prints_the_recipe_so_that_it_can_be_pasted(recipe, flags, tmp_path):
    odd = tmp_path / "a b'c"
    printed = launch(recipe, "--dry-run", "--output_dir", odd, processes=8, PYTHON="echo").stdout
    flags = flags.replace(" --dry-run", "")
    for part in (f"--batch-size 128 --data-set {recipe} {flags}", "--nproc_per_node 8",
                 "--model deit_base_patch16_224"):
        assert part in printed
    pasted = subprocess.run(printed, shell=True, stdout=subprocess.PIPE, check=True, text=True)
    assert pasted.stdout.rstrip("\n").endswith(f"--output_dir {odd}")


def test_help_explains_without_a_deit():
    done = launch("pets", "--help", DEIT_DIR=None, PYTHON=None)
    for word in ("DEIT_DIR", "NPROC_PER_NODE", "--dry-run", "--resume", "--accum-iter"):
        assert word in done.stdout
    listed = launch("pets", "--all-flags").stdout
    assert "--model-ema-decay" in listed and "--accum-iter" in listed


def test_check_says_ready_and_writes_nothing(flags, tmp_path):
    """With MoCo v3's ViT-Small, which has 12 heads where DeiT's has 6, saved by torch.compile."""
    small = tmp_path / "small.pth"
    state = generate.encoder_state(384, 12)
    torch.save({"model": {f"_orig_mod.{name}": state[name] for name in state}}, small)
    done = train("pets", *flags, "--check", "--resume", small, "--model",
                 "moco_v3_vit_small_patch16_224", "--batch-size", "2", "--accum-iter", "2",
                 processes=8)
    assert done.stdout.splitlines()[-1] == "ready"
    for word in ("all 70 can be decoded", "49 train and 21 test",
                 "32 = 8 processes x 2 images x 2 accumulated", "2 steps per epoch",
                 "0.0003 x 32 / 512", "--epochs 2 (published: 100)", str(small)):
        assert word in done.stdout
    assert "PROBLEM" not in done.stdout and not (tmp_path / "run").exists()
    assert "model: --opt none" in fork("pets", *flags, "--check", "--opt", "none").stdout


def test_check_of_own_images_names_what_makes_numbers_wrong(data, flags, tmp_path):
    own = shutil.copytree(data / "folder", tmp_path / "own")
    flags = [*flags, "--data-set", "folder", "--data-path", own, "--num_workers", "1", "--check"]
    good = train("pets", *flags)
    assert "class bee has 14 train images, class ant has 15" in good.stdout
    assert "ok       data worker: hands over a batch" in good.stdout
    assert "ok       duplicates: no image" in good.stdout and "warning" not in good.stdout
    shutil.copy(sorted((own / "train" / "ant").iterdir())[0], own / "val" / "bee" / "copy.png")
    (own / "train" / "cow" / "notes.txt").touch()
    for path in sorted((own / "train" / "bee").iterdir())[1:]:
        path.unlink()
    done = train("pets", *flags)
    assert "class bee has 1 train" in done.stdout and "fewer than two: bee" in done.stdout
    assert "val/bee/copy.png = train/ant/0.png" in done.stdout
    assert "left out" in done.stdout and "1 .txt" in done.stdout


def test_broken_images_are_named_by_a_run_and_by_check(data, flags, checkpoint, tmp_path):
    """--check counts every problem, and no consequence of one."""
    pets = shutil.copytree(data / "pets", tmp_path / "pets")
    broken = sorted((pets / "images").glob("*.jpg"))[7:10]
    for image in broken:
        image.write_bytes(image.read_bytes()[:150])
    for workers in ("0", "1"):
        line = error_of(fork("pets", *flags, "--data-path", pets, "--num_workers", workers), 1)
        assert any(str(image) in line for image in broken)
    generate.moco_checkpoint(tmp_path / "moco.pth", width=64, depth=2)
    done = fork("pets", *flags, "--data-path", pets, "--check", "--output_dir", checkpoint,
                "--resume", tmp_path / "moco.pth")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "not ready: 3 problems"
    assert done.stdout.count("PROBLEM") == 3 and "3 of 70" in done.stdout
    assert f"convert_to_deit.py --input {tmp_path / 'moco.pth'}" in done.stdout
    assert all(str(image) in done.stdout for image in broken)
    nothing = fork("pets", *flags, "--check", "--data-path", tmp_path / "gone")
    assert nothing.stdout.splitlines()[-1] == "not ready: 1 problem"
    few = fork("pets", *flags, "--check", "--repeated-aug", "--accum-iter", "8")
    assert "49 // 256 * 256 train images" in few.stdout and "8 (--accum-iter)" in few.stdout
    assert few.returncode == 2
