"""The journey: real launches of the recipes, in the miniature DeiT or in the one at DEIT_DIR."""
import shutil
import subprocess

import pytest
import torch

import generate
from conftest import (
    DEIT,
    DEPTH,
    ERAS,
    ROOT,
    WIDTH,
    environment,
    launch,
    launch_instead,
    log_of,
    refusal_of,
    saved,
    train,
)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("recipe", ["cifar10", "pets", "flowers"])
def test_first_epoch_is_that_of_the_published_modules(recipe, era, data, checkpoint, tmp_path):
    # The published flowers modules ignore --reprob; at 0 both ways are the same.
    flags = ["--resume", checkpoint, "--data-path", data / recipe, "--epochs", "1",
             "--reprob", "0", "--input-size", "224"]
    train(recipe, *flags, "--output_dir", tmp_path / "ours", era=era)
    published = launch_instead("published.py", recipe, *flags, "--output_dir",
                               tmp_path / "published", era=era,
                               without=["--eval-freq", "--save-freq"])
    assert published.returncode == 0, published.stderr
    ours, theirs = log_of(tmp_path / "ours")[0], log_of(tmp_path / "published")[0]
    assert ours["train_loss"] == theirs["train_loss"]
    assert ours["train_lr"] == theirs["train_lr"]


@pytest.mark.parametrize("era", ERAS)
def test_weight_average_starts_from_the_checkpoint(era, data, checkpoint, tmp_path):
    train("pets", "--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path,
          "--epochs", "1", era=era)
    start = saved(checkpoint)["model"]
    average = saved(tmp_path / "checkpoint.pth")["model_ema"]
    for name, value in start.items():
        if name == "pos_embed":  # resampled to the input size of these tests
            continue
        assert torch.allclose(average[name], value, atol=1e-6), name


def test_epochs_without_evaluation_claim_no_accuracy_and_train_the_same(data, checkpoint,
                                                                        tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "flowers", "--epochs", "4"]
    every = train("flowers", *flags, "--output_dir", tmp_path / "every")
    third = train("flowers", *flags, "--eval-freq", "3", "--output_dir", tmp_path / "third")
    claims = ["test_acc1" in row for row in log_of(tmp_path / "third")]
    assert claims == [False, False, True, True]
    assert third.stdout.count("Accuracy of the network") == 2
    assert third.stdout.count("Max accuracy") == 2
    assert every.stdout.count("Accuracy of the network") == 4
    losses = [[row["train_loss"] for row in log_of(tmp_path / name)] for name in ("every", "third")]
    assert losses[0] == losses[1]


def test_evaluation_counts_every_image_once_for_any_number_of_processes(data, checkpoint, tmp_path):
    train("pets", "--resume", checkpoint, "--data-path", data / "pets", "--epochs", "1",
          "--lr", "1e-2", "--output_dir", tmp_path)
    lines = set()
    for processes in (1, 2, 3):
        done = train("pets", "--eval", "--resume", tmp_path / "checkpoint.pth",
                     "--data-path", data / "pets", processes=processes)
        lines.update(line for line in done.stdout.splitlines() if line.startswith("* Acc@1"))
    assert len(lines) == 1
    assert log_of(tmp_path)[0]["test_acc1"] == pytest.approx(
        float(lines.pop().split()[2]), abs=5e-4)


WRONG = {
    "unconverted": lambda f: generate.moco_checkpoint(f, width=WIDTH, depth=DEPTH),
    "wider": lambda f: torch.save({"model": encoder(WIDTH * 2, DEPTH)}, f),
    "deeper": lambda f: torch.save({"model": encoder(WIDTH, DEPTH + 1)}, f),
    "leftover": lambda f: torch.save({"model": {**encoder(WIDTH, DEPTH), "x": torch.ones(1)}}, f),
    "half a head": lambda f: torch.save(
        {"model": {**encoder(WIDTH, DEPTH), "head.bias": torch.ones(37)}}, f),
    "other classes": lambda f: torch.save(
        {"model": {**encoder(WIDTH, DEPTH), "head.weight": torch.ones(1000, WIDTH),
                   "head.bias": torch.ones(1000)}}, f),
    "text": lambda f: f.write_text("no checkpoint"),
    "empty": lambda f: f.write_bytes(b""),
}
SAYS = {"unconverted": "convert_to_deit.py", "wider": "--model", "deeper": "left over",
        "leftover": "left over, the first is 'x'", "half a head": "head.weight",
        "other classes": "of 1000 classes, not of 37", "text": "cannot be read",
        "empty": "cannot be read"}


def encoder(width, depth):
    """What converting a checkpoint of that shape gives."""
    return {name: torch.as_tensor(value) for name, value in
            generate.encoder_state(width=width, depth=depth).items() if "head" not in name}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_checkpoint_is_refused_in_one_line(kind, data, tmp_path):
    path = tmp_path / "wrong.pth"
    WRONG[kind](path)
    line = refusal_of(launch("pets", "--resume", path, "--data-path", data / "pets",
                           "--output_dir", tmp_path / "out"))
    assert str(path) in line and SAYS[kind] in line
    assert not list((tmp_path / "out").glob("*.pth"))


def test_vit_small_needs_its_twelve_heads(data, tmp_path):
    path = tmp_path / "small.pth"
    torch.save({"model": encoder(384, 12)}, path)
    flags = ["--resume", path, "--data-path", data / "pets", "--epochs", "1"]
    line = refusal_of(launch("pets", *flags, "--model", "deit_small_patch16_224"))
    assert "12 heads" in line and "--model moco_v3_vit_small_patch16_224" in line
    train("pets", *flags, "--model", "moco_v3_vit_small_patch16_224", processes=1)


@pytest.mark.parametrize("flags, says", [
    (["--data-set", "imagenet"], "invalid choice"),
    (["--data-path", "/nowhere"], "/nowhere"),
    (["--batch-size", "400"], "no full batch"),
    (["--input-size", "100"], "multiple of 16"),
    (["--model", "no_such_model"], "no_such_model"),
    (["--resume", "/nowhere.pth"], "/nowhere.pth"),
    (["--device", "cuda"], "--device cpu"),
    (["--eval", "--resume", ""], "--eval needs --resume"),
])
def test_user_errors_end_in_one_line(flags, says, data, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert says in refusal_of(launch("pets", "--data-path", data / "pets", *flags))


@pytest.mark.parametrize("variables, says", [
    ({"DEIT_DIR": None}, "DEIT_DIR"),
    ({"DEIT_DIR": "/nowhere"}, "/nowhere"),
    ({"PYTHON": "/no/python"}, "/no/python"),
])
def test_missing_tools_are_named(variables, says):
    done = launch("pets", **variables)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_copied_into_a_checkout_with_another_package_named_datasets(data, checkpoint, tmp_path):
    checkout = tmp_path / "deit"
    shutil.copytree(DEIT, checkout, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for name in ("datasets.py", "oxford_flowers_dataset.py", "oxford_pets_dataset.py"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    other = tmp_path / "site" / "datasets"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong datasets')")
    done = train("flowers", "--resume", checkpoint, "--data-path", data / "flowers",
                 "--epochs", "1", scripts=checkout / "scripts", DEIT_DIR=None,
                 PYTHONPATH=str(tmp_path / "site"))
    assert "on flowers" in done.stdout


@pytest.mark.parametrize("recipe, differs", [
    ("cifar10", "--weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.8 --cutmix 1"),
    ("cifar100", "--weight-decay 0.1 --reprob 0.0 --drop-path 0.1 --mixup 0.5 --cutmix 1"),
    ("flowers", "--weight-decay 0.3 --reprob 0.25 --drop-path 0.1 --mixup 0 --cutmix 0 "
                "--save-freq 10"),
    ("pets", "--weight-decay 0.1 --reprob 0 --drop-path 0 --mixup 0.8 --cutmix 0 --save-freq 10"),
])
def test_dry_run_prints_the_recipe_so_that_it_can_be_pasted(recipe, differs, tmp_path):
    odd = tmp_path / "a b'c"
    script = ROOT / "scripts" / f"{recipe}.sh"
    printed = subprocess.run(
        [script, "--dry-run", "--output_dir", odd], stdout=subprocess.PIPE, check=True,
        text=True, env=environment(8, PYTHON="echo")).stdout
    shared = ("--model deit_base_patch16_224 --batch-size 128 --epochs 100 --lr 3e-4 "
              "--warmup-epochs 3 --no-pin-mem --no-repeated-aug --eval-freq 10")
    for part in (shared, f"--data-set {recipe} {differs}", "--nproc_per_node 8"):
        assert part in printed
    pasted = subprocess.run(printed, shell=True, stdout=subprocess.PIPE, check=True,
                            text=True).stdout
    assert pasted.rstrip("\n").endswith(f"--output_dir {odd}")


def test_help_explains_without_a_deit():
    done = subprocess.run([ROOT / "scripts" / "pets.sh", "--help"], stdout=subprocess.PIPE,
                          text=True, env=environment(DEIT_DIR=None), check=True)
    for word in ("DEIT_DIR", "NPROC_PER_NODE", "--dry-run", "--resume"):
        assert word in done.stdout

