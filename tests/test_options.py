"""The command line: what cannot work is refused in one line, before anything is started."""
import os
import re
import subprocess
import sys

import pytest
import torch

import options
from conftest import DEIT, REAL_DEIT, launch, log_of, refusal_of, saved, train
from failures import Refusal


@pytest.fixture(scope="module")
def parser_of_deit():
    """DeiT's main, of which the parser is all that counts here."""
    sys.path.insert(0, str(DEIT))
    try:
        import arguments
    except ImportError:
        pytest.skip("a real DeiT cannot be imported without the adaptations")
    finally:
        sys.path.remove(str(DEIT))
    return arguments


@pytest.mark.parametrize("flags, says", [
    ("--epochs 0", "--epochs 0: must be 1 or more"),
    ("--eval-freq 0", "--eval-freq 0"),
    ("--input-size 100", "multiple of 16"),
    ("--input-size 0", "--input-size 0: must be 16 or more"),
    ("--input-size -16", "--input-size -16"),
    ("--seed -1", "--seed -1"),
    ("--start_epoch 5", "--start_epoch 5"),
    ("--remode no_such", "const, rand, pixel"),
    ("--device CPU", "--device CPU: the choice is cuda and cpu"),
    ("--batch-size 7 --cutmix 0", "must be even"),
    ("--batch-size 7 --mixup 0", "must be even"),
    ("--bce-loss --mixup 0 --cutmix 0", "--bce-loss: needs --mixup or --cutmix"),
    ("--finetune a.pth --resume b.pth", "pass --resume"),
    ("--distillation-type hard", "--teacher-path"),
    ("--output-dir out", "unrecognized arguments: --output-dir out"),
    ("--epochs many", "invalid int value: 'many'"),
])
def test_what_cannot_work_is_refused_in_one_line(flags, says, parser_of_deit):
    with pytest.raises(Refusal) as refusal:
        options.parse(parser_of_deit, ["pets"], ["--data-set", "pets", *flags.split()])
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_one_gpu_for_all_processes_is_refused(parser_of_deit, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match="CUDA_VISIBLE_DEVICES"):
        options.parse(parser_of_deit, ["pets"], ["--data-set", "pets", "--device", "cuda:1"])


@pytest.mark.parametrize("flags, says", [
    (["--opt", "no_such"], "--opt no_such"),
    (["--sched", "no_such"], "--sched no_such"),
    (["--model", "resnet18", "--input-size", "32"], "--model resnet18: cannot be made"),
    (["--finetune", "/etc/passwd"], "/etc/passwd cannot be read as a checkpoint"),
])
def test_what_timm_or_deit_cannot_make_is_refused_in_one_line(flags, says, data):
    line = refusal_of(launch("pets", "--data-path", data / "pets", *flags, processes=1))
    assert says in line


@pytest.mark.parametrize("variables, says", [
    ({"NPROC_PER_NODE": "abc"}, "NPROC_PER_NODE=abc"),
    ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
    ({"NNODES": "two"}, "NNODES=two"),
    ({"NNODES": "two", "NODE_RANK": "first"}, "NNODES=two"),
    ({"NODE_RANK": "1"}, "NODE_RANK=1: must be 0 to 0, for NNODES=1 machines"),
])
def test_impossible_numbers_of_machines_are_refused(variables, says, data):
    assert says in refusal_of(launch("pets", "--data-path", data / "pets", **variables))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_a_cluster_s_variables_means_one_process(name, data, checkpoint, tmp_path):
    """As a cluster's software leaves them in the environment where nothing was launched."""
    flags = ["--resume", checkpoint, "--data-path", data / "pets", "--output_dir", tmp_path,
             "--epochs", "1"]
    dry = launch("pets", *flags, "--dry-run").stdout.split()
    script = next(number for number, part in enumerate(dry) if part.endswith("/finetune.py"))
    done = subprocess.run([sys.executable, *dry[script:]], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "DEIT_DIR": str(DEIT), name: "3"}, check=True)
    assert "1 process x 8 images" in done.stdout
    assert len(log_of(tmp_path)) == 1


def test_without_an_average_or_a_folder_a_run_still_tells_its_best(data, checkpoint, tmp_path):
    flags = ["--resume", checkpoint, "--data-path", data / "pets", "--lr", "5e-2", "--epochs", "4",
             "--warmup-epochs", "0", "--no-model-ema"]
    done = train("pets", *flags)
    best = max(map(float, re.findall(r"\* Acc@1 ([\d.]+)", done.stdout)))
    told = float(re.findall(r"Max accuracy: ([\d.]+)%", done.stdout)[-1])
    assert told == pytest.approx(best, abs=0.01) and best > 0
    train("pets", *flags, "--output_dir", tmp_path)
    assert saved(tmp_path / "checkpoint.pth")["model_ema"] is None


def test_a_run_of_finetune_continues_with_its_own_weights(data, checkpoint, tmp_path):
    """DeiT loads --finetune again, over what the continued run has learnt."""
    if REAL_DEIT and "--finetune" not in (DEIT / "main.py").read_text():
        pytest.skip("this DeiT has no --finetune")
    flags = ["--finetune", checkpoint, "--data-path", data / "pets", "--input-size", "224"]
    train("pets", *flags, "--output_dir", tmp_path)
    path = tmp_path / "checkpoint.pth"
    state = saved(path)
    learnt = {**state["model"], "norm.bias": torch.full_like(state["model"]["norm.bias"], 7)}
    torch.save({**state, "model": learnt, "epoch": 0}, tmp_path / "marked.pth")
    os.replace(tmp_path / "marked.pth", path)
    evaluated = [re.findall(r"\* Acc@1 .*", train("pets", "--eval", "--resume", path, *more).stdout)
                 for more in (flags[2:], flags)]
    assert len(evaluated[0]) == 1 and evaluated[0] == evaluated[1]
    done = train("pets", *flags, "--output_dir", tmp_path)
    assert "epoch 1 comes next" in done.stdout
    assert (saved(path)["model"]["norm.bias"] - 7).abs().max() < 0.2


def test_deit_s_own_way_to_continue(data, checkpoint, tmp_path):
    """--resume with the folder's own checkpoint; and --overwrite must not delete it."""
    flags = ["--data-path", data / "pets", "--output_dir", tmp_path, "--epochs", "3"]
    train("pets", *flags, "--resume", checkpoint)
    own = tmp_path / "checkpoint.pth"
    state = saved(own)
    torch.save({**state, "epoch": 1}, tmp_path / "earlier.pth")
    os.replace(tmp_path / "earlier.pth", own)
    done = train("pets", *flags, "--resume", own)
    assert "epoch 2 comes next" in done.stdout and len(log_of(tmp_path)) == 3
    refused = launch("pets", *flags, "--resume", own, "--overwrite")
    assert "--overwrite would delete" in refusal_of(refused) and own.exists()
    done = train("pets", "--data-path", data / "pets", "--output_dir", tmp_path / "new",
                 "--epochs", "3", "--resume", own)
    assert done.stdout.count(f"{own} has all 3 epochs: nothing left to train") == 1
