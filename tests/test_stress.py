"""stress.py in short; what it found once; and that it would find what it looks for."""

import contextlib
import os
import pickle
import re
import signal
import time

import pytest
import torch

import convert_to_deit
import datasets
import harmless_load
import hostile
import mutations
import oxford_flowers_dataset
import oxford_pets_dataset
import stress
import weights


@pytest.fixture(scope="module")
def shop():
    with hostile.workshop() as shop:
        yield shop


def test_damaged_files_are_used_rightly_or_refused(capsys):
    assert stress.main(["fuzz", "--count", "180"]) == 0
    out = capsys.readouterr().out
    assert "180 in all, 0 failed" in out
    assert {"converted", "loaded", "built"} <= set(re.split(r"\W", out))
    assert stress.main(["fuzz", "--only", "7"]) == 0
    assert "1 in all, 0 failed" in capsys.readouterr().out


def test_races_download_once(capsys):
    assert stress.main(["race", "--times", "2"]) == 0
    assert "8 in all, 0 failed" in capsys.readouterr().out


# Damages that were not borne once

def in_file(file, change):
    """A damage: the content of a file, changed."""
    def damage(folder, marker):
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    return damage


def in_tensors(change):
    """A damage: some tensors of a checkpoint, changed, in the same format."""
    def damage(folder, marker):
        zipped = (folder / "in.pth").read_bytes().startswith(b"PK")
        checkpoint = hostile.read_plainly(folder / "in.pth")
        name = "state_dict" if "state_dict" in checkpoint else "model"
        tensors = dict(checkpoint[name], **change(checkpoint[name]))
        hostile.save(dict(checkpoint, **{name: tensors}), folder, zipped)
    return damage


def in_member(part, change):
    """A change of a zip file: the first member with a part in its name has its content changed."""
    def changed(content):
        contents = mutations.members(content)
        index = [part in name for name, _ in contents].index(True)
        contents[index] = contents[index][0], change(contents[index][1])
        return mutations.zipped(contents)
    return changed


def bomb(part):
    def change(content):
        contents = mutations.members(content)
        return mutations.with_bomb(contents, [part in name for name, _ in contents].index(True))
    return in_file("in.pth", change)


def with_gap(content):
    """A pickle that wants an object to be known as number 268435455."""
    start = mutations.instructions(content)[-9][0]
    return content[:start] + b"r\xff\xff\xff\x0f" + content[start:]


def expand(tokens):
    """Let one number stand for all of a position embedding."""
    return in_tensors(lambda tensors: {name: torch.zeros(1, 1, 1).expand(1, tokens, 384)
                                       for name in tensors if name.endswith("pos_embed")})


def bias(change):
    """Let the last bias be another."""
    return in_tensors(lambda tensors: {"norm.bias": change(tensors["norm.bias"])})


def position(*shape):
    """Let the position embedding have another shape."""
    return in_tensors(lambda tensors: {"pos_embed": torch.zeros(shape)})


def quantize(tensor):
    if not hasattr(torch, "quantize_per_tensor"):
        pytest.skip("this torch has no quantized tensors any more")
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


def with_class(content):
    """A pickle that asks for a class with a long name."""
    start = mutations.instructions(content)[-9][0]
    return content[:start] + b"c" + b"x" * 5000 + b"\ny\n0" + content[start:]


def compress(content):
    return mutations.zipped(mutations.members(content), 8)


def of_no_kind(content):
    """A MATLAB file whose numbers are of kind 10, which there is not."""
    return content[:128] + b"".join(mutations.with_number(variable, 56, 4, 10)
                                    for variable in mutations.unpacked(content[128:]))


def as_announced(content):
    return pickle.dumps({"data": mutations.Announced(600_000), "labels": [0] * 600_000})


BATCH, LIST = f"{hostile.CIFAR}/test_batch", "annotations/test.txt"
BORNE = [
    ("MoCo zip", bomb("/data/"), "refused"), ("converted zip", bomb("/data/"), "refused"),
    ("MoCo zip", bomb("data.pkl"), "refused"), ("converted zip", bomb("data.pkl"), "refused"),
    *((target, in_file("in.pth", in_member("/data/", lambda old: old[:-4])), "refused")
      for target in ("MoCo zip", "converted zip")),
    *((target, in_file("in.pth", lambda content: content.replace(b"/data/", b"/dada/", 1)),
       "refused") for target in ("MoCo zip", "converted zip")),
    ("fine-tuned zip", in_file("in.pth", compress), "loaded"),
    ("MoCo legacy", in_file("in.pth", with_gap), "converted"),
    ("fine-tuned legacy", in_file("in.pth", with_gap), "loaded"),
    ("MoCo zip", expand(3 * 10**6), "refused"), ("converted zip", expand(10**9), "refused"),
    ("converted legacy", bias(torch.Tensor.to_sparse), "refused"),
    ("converted legacy", bias(quantize), "refused"),
    ("converted zip", position(), "refused"), ("converted zip", position(384), "refused"),
    ("converted zip", position(1, 0, 8), "refused"),
    ("converted zip", position(1, 0, 384), "refused"),
    ("converted zip", in_tensors(lambda tensors: {"cls_token": torch.tensor(0)}), "refused"),
    ("MoCo legacy", in_file("in.pth", with_class), "refused"),
    ("converted zip", in_tensors(lambda tensors: {"a\nb": torch.zeros(1)}), "refused"),
    ("converted legacy", in_tensors(lambda tensors: {"x" * 5000: 1}), "refused"),
    ("MoCo zip", in_tensors(lambda tensors: {"x" * 5000: 1}), "refused"),
    ("pets", in_file(LIST, lambda content: b"dog\0 2 2 2\n" + content), "refused"),
    ("pets", in_file(LIST, lambda content: b"x" * 2000 + b" 2 2 2\n" + content), "refused"),
    ("flowers", in_file("imagelabels.mat", lambda content: content[:128] + mutations.mat_bomb()),
     "refused"),
    ("flowers", in_file("setid.mat", of_no_kind), "refused"),
    ("cifar10", in_file(BATCH, with_gap), "built"),
    ("cifar10", in_file(BATCH, as_announced), "refused"),
]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("target, damage, outcome", BORNE, ids=range(len(BORNE)))
def test_damage_that_was_not_borne_once(shop, target, damage, outcome):
    assert shop.run(target, damage)[0] == outcome


def test_a_number_for_a_name_is_refused(shop):
    def damage(folder, marker):
        hostile.save({"model": {7: torch.zeros(1)}}, folder, zipped=True)

    assert shop.run("converted zip", damage)[0] == "refused"


# What the judge must not let pass

def no_damage(folder, marker):
    """Valid files."""


def a_call(folder, marker):
    """A pickle that makes the marker, in the place of the file or of what is pickled in it."""
    call = pickle.dumps(Call(marker), 2)
    path = folder / (BATCH if (folder / hostile.CIFAR).exists() else "in.pth")
    content = path.read_bytes()
    path.write_bytes(in_member("data.pkl", lambda old: call)(content)
                     if content.startswith(b"PK") else call)


class Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def load_without_care(path, **_):
    with contextlib.suppress(TypeError):  # of torch that does not know weights_only
        return torch.load(path, weights_only=False)
    return torch.load(path)


def leave_a_file(model, path, write=convert_to_deit.write_checkpoint):
    with open(path + ".part", "w"):
        return write(model, path)


def fail(*_):
    raise KeyError("unexpected")


SABOTAGE = [
    ("MoCo zip", convert_to_deit, "_load_tensors", load_without_care, a_call, "code"),
    ("converted zip", harmless_load, "load", load_without_care, a_call, "code"),
    ("fine-tuned legacy", harmless_load, "load", load_without_care, a_call, "code"),
    ("cifar10", datasets, "ArrayUnpickler", pickle.Unpickler, a_call, "code"),
    ("MoCo zip", convert_to_deit, "write_checkpoint", leave_a_file, no_damage, "it left"),
    ("MoCo zip", convert_to_deit, "_without_surplus", torch.neg, no_damage, "differs"),
    ("MoCo zip", convert_to_deit, "summarize", fail, no_damage, "KeyError"),
    ("MoCo zip", convert_to_deit, "summarize", lambda *_: "one line", no_damage, "one line"),
    ("converted zip", weights, "load", lambda *_: True, no_damage, "differs"),
    ("converted zip", weights, "_check_kind", fail, no_damage, "KeyError"),
]


@pytest.mark.parametrize("target, module, name, wrong, damage, word", SABOTAGE,
                         ids=range(len(SABOTAGE)))
def test_sabotage_is_found(shop, monkeypatch, target, module, name, wrong, damage, word):
    assert shop.run(target, damage)[0] in hostile.GOOD
    monkeypatch.setattr(module, name, wrong)
    verdict = shop.run(target, damage)[0]
    assert verdict not in hostile.GOOD and word in verdict


def test_an_image_outside_is_found(shop, monkeypatch):
    damage = in_file(LIST, lambda content: b"../outside 2 2 2\n" + content)
    assert shop.run("pets", damage)[0] == "refused"
    careless = re.compile(r"(\S+) (\d+) \d+ \d+")
    monkeypatch.setattr(oxford_pets_dataset, "SPLIT_LINE", careless)
    monkeypatch.setattr(oxford_flowers_dataset.LabelledImages, "_check_images", lambda *_: None)
    assert "outside" in shop.run("pets", damage)[0]


@pytest.mark.parametrize("text", ["", "no path", "two\nlines in {}/in.pth", "\x1b[31m{}/in.pth",
                                  "{}/in.pth" + "!" * 1000])
def test_a_refusal_that_is_no_clear_line_is_found(shop, monkeypatch, text):
    def refuse(path):
        raise hostile.failures.Refusal(text.format(shop.case))

    assert shop.run("converted zip", no_damage)[0] == "loaded"
    monkeypatch.setattr(weights, "read", refuse)
    assert "AssertionError" in shop.run("converted zip", no_damage)[0]


def hang():
    time.sleep(60)


def grow():
    return str(len(bytearray(2**30)))


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("wrong, verdict", [
    (hang, "took more than 2 s"), (grow, "took more than 0.1 GiB"), (crash, "ended by signal 9")])
def test_limits(tmp_path, wrong, verdict):
    assert hostile.isolated(wrong, tmp_path / "said", seconds=2, memory=2**27)[0] == verdict


@pytest.mark.parametrize("scenario", [stress.Race.one_disk, stress.Race.two_nodes])
def test_a_race_without_a_lock_is_found(monkeypatch, scenario):
    monkeypatch.setattr(oxford_flowers_dataset, "exclusive", lambda _: contextlib.nullcontext())
    with stress.raceway() as (server, wanted, disks), pytest.raises(AssertionError):
        scenario(stress.Race(server, wanted, disks), None)
