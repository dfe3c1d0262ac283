"""What only GPUs show, by tests/gpu on all of them; here on the CPU, with two processes, in small.

How signals end a launch, or one rank, is in test_crash.py and test_errors.py, which tests/gpu also
runs. Two runs on a GPU are not equal bit for bit, so losses are compared within the noise of three.
"""
import csv
import itertools
import math
import os
import re
import shutil
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import generate
import launches
from conftest import log_of, rates_of, saved
from launches import GPUS
from test_resume import assert_identical
from underway import end_of, kill_all, processes_of, running, wait_for_epochs

pytestmark, needs_gpus = pytest.mark.slow, pytest.mark.skipif(not GPUS, reason="needs a GPU")
ALL, LONG = GPUS or 2, ["--epochs", "5000"]  # processes; longer than any test
# Python imports this at its start; each rank then calls functions of this file, to be changed.
SITE = """
import os, sys
if "RANK" in os.environ:
    sys.path.extend({paths})
    import test_gpu
    for name, *arguments in map(str.split, {changes}):
        getattr(test_gpu, name)(*arguments)
"""
PATHS = [str(path) for path in (launches.TESTS, launches.ROOT, launches.SCRIPTS)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """49 test images, which no number of processes divides."""
    folder = tmp_path_factory.mktemp("photos")
    generate.flowers(folder, 7, 16 * ALL, 7, size=(300, 250) if GPUS else (80, 64))
    return folder


@pytest.fixture
def start(photos, checkpoint, tmp_path):
    """start(name, ...): a launch into tmp_path / name, each rank of which makes the ``changes``."""
    def start(name, *flags, changes=(), **variables):
        site = tmp_path / f"{name}-site".replace("/", "-")
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE.format(paths=PATHS, changes=[*changes]))
        size = ["--input-size", "224", "--batch-size", "16"] if GPUS else []
        return running("flowers", "--data-path", photos, "--resume", checkpoint, "--epochs", "4",
                       "--warmup-epochs", "0", "--lr", "2e-3", "--mixup", "0.8", "--cutmix", "1",
                       "--drop-path", "0.3", "--num_workers", "1", *size, "--output_dir",
                       tmp_path / name, *flags, PYTHONPATH=site, MARK=tmp_path / f"{name}-mark",
                       **variables)

    return start


@pytest.fixture
def run(start):
    """run(name, ...): the same to its end, and whether it ``fails``. This is not conftest's run."""
    def run(*flags, fails=False, **options):
        with start(*flags, **options) as launched:
            done = end_of(launched, timeout=900)
        assert fails == bool(done.returncode) and "sitecustomize" not in done.stderr, done.stderr
        return done

    return run


def losses(folder):
    return [row["train_loss"] for row in log_of(folder)]


# Changes of a rank


def each_batch(change):
    from deit_plugin.accumulation import Loader

    iterate, numbers = Loader.__iter__, itertools.count(1)
    Loader.__iter__ = lambda loader: (
        change(next(numbers), batch[0]) or batch for batch in iterate(loader))


def leave_out_seeding():
    from deit_plugin import loaders

    loaders._seed_cpu = lambda *key: 0


def kill_at_second_save():
    saves = itertools.count(1)
    launches.after_saving(lambda: next(saves) == 2 and launches.kill_itself())()


def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    each_batch(lambda *_: setattr(torch.backends.cudnn, "benchmark", False))  # which DeiT sets


def fail(how, rank):
    def fail_at_the_third(number, images):
        if number == 3 and os.environ["RANK"] == rank:
            Path(os.environ["MARK"]).touch()
            if how == "memory" and not GPUS:
                raise RuntimeError("CUDA out of memory")
            images.mul_(torch.zeros(1 << 50, device="cuda") if how == "memory" else math.nan)

    each_batch(fail_at_the_third)


def give_up_after(seconds):
    init, patience = torch.distributed.init_process_group, timedelta(seconds=int(seconds))
    torch.distributed.init_process_group = lambda *words, **options: init(
        *words, timeout=patience, **options)


def scaler_class():
    from timm.utils import NativeScaler

    return type(NativeScaler()._scaler)


def unscaled():
    scaler_class()._enabled = property(lambda _: False, lambda *_: None)


def note_scale(overflow=0):
    """Note the scale of each loss; the last rank's loss of that number overflows."""
    kind, numbers, mark = scaler_class(), itertools.count(1), "{MARK}-{RANK}".format(**os.environ)
    scale = kind.scale

    def scale_and_note(scaler, loss):
        with open(mark, "a") as notes:
            notes.write(f"{scaler.get_scale()}\n")
        is_it = next(numbers) == int(overflow) and int(os.environ["RANK"]) == ALL - 1
        return scale(scaler, loss * math.inf if is_it else loss)

    kind.scale = scale_and_note


# Checks. What they print is shown by tests/gpu.


def test_killed_after_a_later_checkpoint_and_resumed_within_the_noise(run, tmp_path):
    """Out of which it is with wrong seeds."""
    a, b, c = (run(name) and losses(tmp_path / name) for name in "abc")
    noise = max(max(epoch) - min(epoch) for epoch in zip(a, b, c))
    run("killed", changes=["kill_at_second_save"], fails=True)
    shutil.copytree(tmp_path / "killed", tmp_path / "wrong")
    assert "resumed: epoch 3 of 4 comes next" in run("killed").stdout
    run("wrong", changes=["leave_out_seeding"])
    found, wrong = (max(abs(one - other) for one, other in zip(a, losses(tmp_path / name)))
                    for name in ("killed", "wrong"))
    print(f"loss {found:.1e}, noise {noise:.1e}, wrong seeds {wrong:.1e}")
    assert found <= max(3 * noise, 1e-3 if GPUS else 1e-6) < wrong
    whole, parts = tmp_path / "a", tmp_path / "killed"
    assert rates_of(whole) == rates_of(parts)
    assert (saved(whole / "checkpoint.pth")["scaler"]
            == saved(parts / "checkpoint.pth")["scaler"])


def test_deterministic_and_resumed_bit_for_bit(run, tmp_path):
    options = {"changes": ["deterministic"], "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    run("whole", **options)
    run("parts", **{**options, "changes": ["deterministic", "kill_at_second_save"]}, fails=True)
    run("parts", **options)
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_all_processes_and_one_that_accumulates_train_the_same(run, tmp_path):
    """Without augmentation and loss scale: not all would skip the same steps."""
    generate.images(tmp_path / "plain", train=16 * ALL)
    ends = []
    for processes, parts in ((1, 1), (1, 4), (ALL, 1), (ALL, 2)):
        name = f"{processes}-{parts}"
        run(name, "--data-set", "folder", "--data-path", tmp_path / "plain", "--mixup", "0",
            "--cutmix", "0", "--drop-path", "0", "--reprob", "0", "--opt", "sgd", "--lr", "0.5",
            "--batch-size", 8 * ALL // processes // parts, "--accum-iter", parts,
            processes=processes, changes=["unscaled"])
        ends.append(losses(tmp_path / name)[-1])
    print(*ends)
    assert max(ends) / min(ends) - 1 < (1e-2 if GPUS else 1e-5)


def test_evaluation_in_unequal_shares(run, tmp_path):
    run("run", "--epochs", "2")
    own, tables = tmp_path / "run" / "checkpoint.pth", []
    for processes in (1, ALL):
        run("none", "--eval", "--resume", own, "--predictions", tmp_path / "csv",
            processes=processes)
        tables.append(list(csv.reader((tmp_path / "csv").open())))
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    assert len(tables[0]) == 50 and sum(a[2] != b[2] for a, b in zip(*tables)) <= 1


@pytest.mark.parametrize("rank", sorted({0, ALL - 1}))
@pytest.mark.parametrize("how, says", [("memory", "--batch-size"), ("nan", "not finite")])
def test_a_rank_that_fails_is_named_soon_and_leaves_nothing(how, says, rank, run, tmp_path):
    done = run("run", *LONG, processes=ALL, changes=[f"fail {how} {rank}"], fails=True)
    assert (tmp_path / "run-mark").exists(), done.stderr
    seconds = time.time() - (tmp_path / "run-mark").stat().st_mtime
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    print(f"{seconds:.1f} s")
    assert len(lines) == 1 and says in lines[0] and seconds < 30, done.stderr
    assert not processes_of(tmp_path / "run")


@pytest.mark.skipif(GPUS == 1, reason="needs 2 GPUs")
def test_of_two_machines_one_goes_down(start, tmp_path):
    """Under NCCL the other waits for its timeout, which is short here."""
    gpus, half = [*map(str, range(ALL))], ALL // 2
    nodes = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launches.free_port(),
             "processes": half, "changes": ["give_up_after 30"]}
    (tmp_path / "link").symlink_to(tmp_path)  # tells their processes apart
    with start("run", *LONG, NODE_RANK=0, CUDA_VISIBLE_DEVICES=",".join(gpus[:half]), **nodes
               ) as first, start("link/run", *LONG, NODE_RANK=1, CUDA_VISIBLE_DEVICES=",".join(
                   gpus[half:]), **nodes) as second:
        wait_for_epochs(tmp_path / "run")
        kill_all(second, tmp_path / "link")
        began = time.monotonic()
        done = end_of(first, timeout=120)
    print(f"{time.monotonic() - began:.1f} s", done.stderr)
    assert done.returncode and not processes_of(tmp_path)


@needs_gpus
def test_each_rank_uses_its_own_gpu_and_no_other_process_uses_any(start, tmp_path):
    with start("run", *LONG, processes=ALL) as launched:
        wait_for_epochs(tmp_path / "run")
        listed = subprocess.check_output(["nvidia-smi", "--query-compute-apps=pid,gpu_uuid",
                                          "--format=csv,noheader"], text=True)
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])
                   for pid in (launched.pid, *processes_of(tmp_path))}
    used = [(parents[int(pid)], gpu) for pid, gpu in re.findall(r"(\d+), (\S+)", listed)
            if int(pid) in parents]
    if not used:
        pytest.skip("nvidia-smi shows none of our processes, as in some containers")
    assert len(used) == ALL == len(set(used)) and {parent for parent, _ in used} == {launched.pid}


@needs_gpus
def test_an_overflow_of_one_rank_that_accumulates_halves_the_scale_of_all(run, tmp_path):
    """And resuming keeps it."""
    noted = []
    for changes in (["note_scale 5", "kill_at_second_save"], ["note_scale"]):
        run("run", "--accum-iter", "2", "--batch-size", "4", processes=ALL, changes=changes,
            fails="kill_at_second_save" in changes)
        noted.append([[*map(float, path.read_text().split())] for path in sorted(
            tmp_path.glob("run-mark-*"))])
    before, after = noted
    ends = min(map(len, before))  # ranks are killed at different moments
    print(before[0][:8])
    assert before[0][4] == 2 * before[0][6] and all(each[:ends] == before[0][:ends]
                                                    for each in before)
    assert {later[len(each)] for each, later in zip(before, after)} == {before[0][ends - 1]}


@pytest.mark.parametrize("way", ["here", "here, --pin-mem", "DeiT alone"])
def test_speed_of_the_recipe(way, checkpoint, tmp_path):
    """DeiT's own lines show seconds per step and the wait for data."""
    flags = ["--resume", checkpoint, "--input-size", "224"]
    if GPUS:
        flags = ["--resume", tmp_path / "w", "--num_workers", os.cpu_count() // ALL]
        torch.save({"model": generate.encoder_state(768, 12)}, tmp_path / "w")
    classes, size = (102, (600, 500)) if GPUS else (2, (80, 64))
    generate.flowers(tmp_path / "data", classes, 20, 10, size=size)
    words = launches.command("flowers", *flags, "--data-path", tmp_path / "data", "--epochs", "3",
                             "--eval-freq", "1", "--save-freq", "1", "--verbose", "--output_dir",
                             tmp_path / "run", *["--pin-mem"] * ("pin" in way), small=not GPUS)
    words, used = launches.as_published(words, ALL) if way == "DeiT alone" else words, []
    with open(tmp_path / "out", "w") as out:
        began, launched = time.monotonic(), subprocess.Popen(
            words, stdout=out, stderr=out, env=launches.environment(processes=ALL))
        while launched.poll() is None:
            free = re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]
            used.append((-int(free) / 1e6, shutil.disk_usage("/dev/shm").used / 1e9))
            time.sleep(0.2)
    text = (tmp_path / "out").read_text()
    assert launched.returncode == 0, text
    figures = {name: re.findall(pattern, text)[-1:] for name, pattern in (
        ("s/step", r"Epoch: \[2\] Total time: .*\((.*) s / it\)"), ("wait, s", r"data: ([\d.]+)"),
        ("evaluation", r"Test: Total time: (\S+)"), ("GPU MB", r"max mem: (\d+)"))}
    host, shared = (max(each) - each[0] for each in zip(*used))
    print(f"{way}: {time.monotonic() - began:.0f} s, {figures}, host {host:.1f} GB, /dev/shm "
          f"{shared:.2f} GB, seconds by epoch", [(row.get("train_seconds"), row.get("test_seconds"))
                                                 for row in log_of(tmp_path / "run")])
