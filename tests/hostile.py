"""Small valid files, the code that reads them, and what it may make of them once they are damaged.

It may use them, and what comes of it is right; or refuse them in one line that names one. Either
way no code of theirs runs, nothing is left behind, and time and memory are bounded.
"""

import argparse
import contextlib
import functools
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import scipy.io  # noqa: E402  found, like the next, through the paths set above
import torch  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

import convert_to_deit  # noqa: E402
import datasets  # noqa: E402
import failures  # noqa: E402
import generate  # noqa: E402
import harmless_load  # noqa: E402
import mutations  # noqa: E402
import versions  # noqa: E402
import weights  # noqa: E402

SECONDS, MEMORY = 20, 2**30  # what a case may take
LINE = 1000  # what a refusal may be long, in characters
HOUSEKEEPING = {datasets.MARKER, ".download.lock"}
CIFAR = "cifar-10-batches-py"


class Refused(Exception):
    """A file was refused; the text is what the user reads."""


# Checkpoints

SIZE = dict(width=8, depth=1)


def make_moco(folder, zipped):
    save(generate.moco_checkpoint(folder / "in.pth", mlp_dim=8, dim=4, **SIZE), folder, zipped)


def make_converted(folder, zipped):
    save({"model": generate.encoder_state(**SIZE)}, folder, zipped)


def make_finetuned(folder, zipped):
    model = generate.encoder_state(**SIZE)
    model.update({"head.weight": torch.zeros(3, 8), "head.bias": torch.zeros(3)})
    save({"model": model, "model_ema": model, "optimizer": generate._adamw_state(model),
          "lr_scheduler": {"base_values": [1e-3]}, "scaler": {"scale": 65536.0}, "epoch": 3,
          "max_accuracy": 12.5, "args": argparse.Namespace(lr=1e-3)}, folder, zipped)


def save(checkpoint, folder, zipped):
    torch.save(checkpoint, str(folder / "in.pth"), _use_new_zipfile_serialization=zipped)


def damage_checkpoint(folder, marker, rng):
    path = folder / "in.pth"
    content = path.read_bytes()
    zipped, kind = content.startswith(b"PK"), rng.choice(["bytes", "value", "format", "format"])
    if kind == "value":
        save(mutations.in_value(read_plainly(path), rng), folder, zipped)
    elif kind == "bytes":
        path.write_bytes(mutations.in_bytes(content, rng))
    else:
        in_format = mutations.in_zip if zipped else mutations.in_pickle
        path.write_bytes(in_format(content, rng, marker))


def convert(folder):
    source, target = folder / "in.pth", folder / "out.pth"
    code = convert_to_deit.main(["--input", str(source), "--output", str(target)])
    said = (folder.parent / "said").read_text()
    if code == 1 and said.startswith("error: ") and said.endswith("\n"):
        raise Refused(said[:-1])
    assert code == 0 and said.count("\n") == 2, f"it ended with {code} and said {said!r}"
    check_converted(read_plainly(source)["state_dict"], read_plainly(target))
    target.unlink()
    return "converted"


def check_converted(state_dict, written):
    base = re.compile(r"(module\.)?base_encoder\.(?!head\.)")
    wanted = {base.sub("", name): tensor for name, tensor in state_dict.items()
              if base.match(name)}
    assert list(written) == ["model"] and list(written["model"]) == list(wanted)
    for name, tensor in written["model"].items():
        assert same(tensor, wanted[name]), f"{name} differs"


def fine_tune(folder):
    path = str(folder / "in.pth")
    model = VisionTransformer(embed_dim=8, depth=1, num_heads=2, num_classes=3, qkv_bias=True)
    try:
        weights.load(model, weights.read(path)["model"], path, "deit_tiny_patch16_224")
    except failures.Refusal as refusal:
        raise Refused(str(refusal)) from refusal
    loaded = model.state_dict()
    for name, tensor in read_plainly(path)["model"].items():
        resampled = name == "pos_embed" and tensor.shape != loaded[name].shape
        assert resampled or same(tensor.to(loaded[name].dtype), loaded[name]), f"{name} differs"
    return "loaded"


def read_plainly(path):
    """The checkpoint, read without mapping it into memory if that can be."""
    if not hasattr(torch.serialization, "add_safe_globals"):
        return harmless_load.load(str(path))
    with contextlib.suppress(RuntimeError):
        return torch.load(str(path), "cpu", weights_only=True)
    # To mapping, some damage to what a zip file says of its members is no hindrance.
    return torch.load(str(path), "cpu", weights_only=True, mmap=True)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


# Data sets

def make_flowers(folder):
    generate.flowers(folder, classes=3, size=(20, 16))


def make_pets(folder):
    generate.pets(folder, classes=3, size=(20, 16))
    shutil.copy(str(folder / "images" / "dog_breed2_1.jpg"), str(folder / "outside.jpg"))


def make_cifar(folder):
    generate.cifar(folder, train=5, test=2)


def damage_flowers(folder, marker, rng):
    path = folder / rng.choice(["setid.mat", "imagelabels.mat"])
    if rng.random() < 0.3:
        found = scipy.io.loadmat(str(path))
        variables = {name: value for name, value in found.items() if name[0] != "_"}
        variables[rng.choice(list(variables))] = rng.choice(mutations.ODD_ARRAYS)
        scipy.io.savemat(str(path), variables, do_compression=rng.random() < 0.5)
    else:
        damage = rng.choice([mutations.in_bytes, mutations.in_mat, mutations.in_mat])
        path.write_bytes(damage(path.read_bytes(), rng))


def damage_pets(folder, marker, rng):
    path = folder / "annotations" / rng.choice(["trainval.txt", "test.txt"])
    damage = rng.choice([mutations.in_bytes, mutations.in_list, mutations.in_list])
    content = damage(path.read_bytes(), rng)
    path.write_bytes(content.replace(b"OUTSIDE", str(folder / "outside").encode()))


def damage_cifar(folder, marker, rng):
    path = rng.choice(sorted((folder / CIFAR).iterdir()))
    content, kind = path.read_bytes(), rng.choice(["bytes", "value", "pickle", "pickle"])
    if kind == "bytes":
        content = mutations.in_bytes(content, rng)
    elif kind == "value":
        value = mutations.in_value(pickle.loads(content, encoding="latin1"), rng)
        content = pickle.dumps(value, rng.randrange(5))
    else:
        content = mutations.in_pickle(content, rng, marker)
    path.write_bytes(content)


def build(name, folder):
    args = argparse.Namespace(data_set=name, data_path=str(folder), input_size=32)
    for is_train in (True, False):
        try:
            dataset, classes = datasets.build_dataset(is_train, args)
        except (OSError, ValueError) as error:
            raise Refused(str(error)) from error
        assert len(dataset) and 0 <= min(dataset.targets) <= max(dataset.targets) < classes
        for index in (0, len(dataset) - 1):
            assert dataset[index][0].shape == (3, 32, 32) and type(dataset[index][1]) is int
        for image in getattr(dataset, "names", ()):
            path = Path(os.path.realpath(os.path.join(dataset.image_folder, image)))
            assert path.parent == Path(dataset.image_folder), f"{path} is outside the folder"
    return "built"


# Cases, each in a process of its own

class Target(NamedTuple):
    make: Callable  # (folder): write valid files
    damage: Callable  # (folder, marker, rng): damage one of them
    use: Callable  # (folder): hand them to the code under test, check what comes of it, say it


TARGETS = {
    f"{name} {'zip' if zipped else 'legacy'}":
        Target(functools.partial(make, zipped=zipped), damage_checkpoint, use)
    for name, make, use in (("MoCo", make_moco, convert), ("converted", make_converted, fine_tune),
                            ("fine-tuned", make_finetuned, fine_tune))
    for zipped in (True, False)
}
TARGETS["flowers"] = Target(make_flowers, damage_flowers, functools.partial(build, "flowers"))
TARGETS["pets"] = Target(make_pets, damage_pets, functools.partial(build, "pets"))
TARGETS["cifar10"] = Target(make_cifar, damage_cifar, functools.partial(build, "cifar10"))
GOOD = ("converted", "loaded", "built", "refused")


class Workshop:
    """Makes cases in a temporary folder and runs them."""

    def __init__(self, folder):
        versions.trust_namespace()
        self.valid, self.case = folder / "valid", folder / "case"
        self.said, self.marker = folder / "said", str(folder / "ran")
        for name, target in TARGETS.items():
            (self.valid / name).mkdir(parents=True)
            target.make(self.valid / name)

    def run(self, name, damage):
        """Verdict, seconds and growth in bytes once `damage(folder, marker)` was done to files."""
        shutil.rmtree(str(self.case), ignore_errors=True)
        shutil.copytree(str(self.valid / name), str(self.case))
        damage(self.case, self.marker)
        result = isolated(functools.partial(self._judge, TARGETS[name].use), self.said)
        shutil.rmtree(self.marker, ignore_errors=True)
        return result

    def _judge(self, use):
        """What came of using the files of the case; raises if it is not as it should be."""
        torch.set_num_threads(1)  # more do not survive the fork
        before = self._files()
        try:
            outcome = use(self.case)
        except Refused as refused:
            line, outcome = str(refused), "refused"
            assert line.isprintable() and len(line) < LINE and f"{self.case}/" in line, repr(line)
        assert not os.path.exists(self.marker), "code of the file ran"
        assert self._files() == before, f"it left {self._files() - before}"
        return outcome

    def _files(self):
        return {path for path in self.case.rglob("*") if path.name not in HOUSEKEEPING}


@contextlib.contextmanager
def workshop():
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Workshop(Path(os.path.realpath(folder)))


def isolated(function, said, seconds=SECONDS, memory=MEMORY):
    """What a function returns in a forked process, or how that ended; seconds; growth in bytes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(function, said, writing)
    os.close(writing)
    status, lasted, growth = watch(child, seconds, memory)
    with os.fdopen(reading, errors="replace") as pipe:
        verdict = pipe.read()
    if growth > memory:
        verdict = f"took more than {memory / 2**30:.1f} GiB"
    elif lasted > seconds:
        verdict = f"took more than {seconds} s"
    elif status:
        verdict = f"ended by signal {status & 127}"
    return verdict, lasted, growth


def run_child(function, said, writing):
    """Tell through the pipe what the function returns; its output goes to the file `said`."""
    verdict = "did not return"
    try:
        with open(said, "w", buffering=1) as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                verdict = function()
    except BaseException:
        verdict = traceback.format_exc()
    finally:
        os.write(writing, verdict[-9999:].encode(errors="replace"))
        os._exit(0)


def watch(child, seconds, memory):
    """Exit status, seconds and growth in bytes of a child, killed if it exceeds the limits."""
    begin, growth, inherited = time.monotonic(), 0, own_memory(os.getpid())
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        lasted = time.monotonic() - begin
        if done:
            return status, lasted, growth
        growth = max(growth, own_memory(child) - inherited)
        if lasted > seconds or growth > memory:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def own_memory(process):
    """Bytes of memory that a process has, without what it maps of files."""
    resident, shared = Path(f"/proc/{process}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
