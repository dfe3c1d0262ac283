"""convert_to_deit.py against small checkpoints of the kinds that people have."""
import argparse
import os
import re
import subprocess
import sys
import zipfile
from unittest import mock

import numpy
import pytest
import torch

import generate
from conftest import error_of
from convert_to_deit import SAFE_AND_MAPPED, load, main, recognise
from launches import ROOT

SCALARS = [numpy.float64(3e-4), numpy.float32(1), numpy.int64(7), numpy.bool_(True)]
LEARNED = torch.ones(1, 197, 64)  # a position embedding that is not MoCo v3's


def encoder(prefix="", depth=2):
    state = generate.encoder_state(64, depth)
    state.update({"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)})
    return {prefix + name: tensor for name, tensor in state.items()}


def without_head(state):
    return {name: tensor for name, tensor in state.items() if "head." not in name}


def renamed(state, old, new):
    return {re.sub(old, new, name): tensor for name, tensor in state.items()}


def status_of(source, target, *flags):
    """Convert; return the exit status, and print what Python prints at the end."""
    try:
        main(["--input", str(source), "--output", str(target), *flags])
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
        return 1
    return 0


def run(folder, content, *flags):
    """Save the content, or bytes, and convert them; the exit status and the path of the output."""
    if isinstance(content, bytes):
        (folder / "input.pth").write_bytes(content)
    else:
        torch.save(content, str(folder / "input.pth"))
    output = folder / "output.pth"
    return status_of(folder / "input.pth", output, *flags), output


def refusal(capfd, status, folder):
    """The one line of a refused conversion, which left nothing behind."""
    out, err = capfd.readouterr()
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not [name for name in os.listdir(str(folder)) if name.endswith((".tmp", "output.pth"))]
    return err


def assert_same(expected, path):
    """The file has exactly those tensors: names, types, shapes and bits."""
    content = load(str(path))
    found, wanted = ({name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
                      for name, tensor in tensors.items()}
                     for tensors in (content["model"], expected))
    assert list(content) == ["model"] and found == wanted


@pytest.mark.parametrize("prefix, form", [
    ("module.", "zip"), ("", "compressed"), ("_orig_mod.module.", "legacy"),
    ("module._orig_mod.", "not mapped")])
def test_moco_checkpoint_is_converted_bit_for_bit(tmp_path, capfd, monkeypatch, prefix, form):
    path, start = tmp_path / "input.pth", f"{prefix}base_encoder."
    content = generate.moco_checkpoint(path, width=64, depth=2, prefix=prefix)
    content["state_dict"][start + "norm.bias"] = torch.tensor([3.4e38, -0.0, 1 / 3, 1e-40] * 16)
    torch.save(content, str(path), _use_new_zipfile_serialization=form != "legacy")
    if form == "compressed":  # torch itself would map it into memory and give wrong numbers
        with zipfile.ZipFile(path) as stored:
            members = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, member in members.items():
                packed.writestr(name, member)
    if form == "not mapped" and SAFE_AND_MAPPED:  # as on some network file systems
        monkeypatch.setattr(torch.UntypedStorage, "from_file", mock.Mock(
            side_effect=RuntimeError("unable to mmap 9 bytes: No such device (19)")))
    assert status_of(path, tmp_path / "output.pth") == 0
    out, err = capfd.readouterr()
    assert err == "" and "epoch 300" in out and "30 tensors" in out and "No model of DeiT" in out
    encoder = {name[len(start):]: tensor for name, tensor in content["state_dict"].items()
               if name.startswith(start)}
    assert_same(without_head(encoder), tmp_path / "output.pth")


@pytest.mark.parametrize("content, words", [
    ({"state_dict": encoder("module."), "optimizer": None, "epoch": 90}, "epoch 90"),
    (encoder(), "position embedding"),
    ({"state_dict": renamed(encoder("base_encoder."), r"blocks\.1\.", "blocks.1._orig_mod.")},
     "pre-training"),
    (dict(encoder("base_encoder."), **{"base_encoder.pos_embed": LEARNED}), "pre-training"),
    (dict(encoder(), pos_embed=encoder()["pos_embed"].half()), "position embedding"),
    pytest.param({"state_dict": encoder("base_encoder."), "args": argparse.Namespace(of=SCALARS),
                  "epoch": SCALARS[2]}, "epoch 7", marks=pytest.mark.skipif(
        not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"),
        reason="torch before 2.6")),
], ids=["linear probe", "bare", "compiled blocks", "another table", "half precision",
        "harmless extras"])
def test_other_files_with_moco_weights(tmp_path, capfd, content, words):
    status, output = run(tmp_path, content)
    assert status == 0 and words in capfd.readouterr().out
    weights = without_head(content.get("state_dict", content))
    assert_same(renamed(weights, r"_orig_mod\.|^module\.|^base_encoder\.", ""), output)


def test_safetensors(tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        status, _ = run(tmp_path, b"\x02\0\0\0\0\0\0\0{}")
    assert "pip install safetensors" in refusal(capfd, status, tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")
    whole = safetensors.save(encoder())
    assert "download it again" in refusal(capfd, run(tmp_path, whole[:-1])[0], tmp_path)
    for load_file in (safetensors.load_file, mock.Mock(side_effect=OSError("no mmap"))):
        monkeypatch.setattr("safetensors.torch.load_file", load_file)
        status, output = run(tmp_path, whole)
        assert status == 0
        assert_same(without_head(safetensors.load(whole)), output)
        assert output.stat().st_size < 1.1 * len(whole)  # not each tensor with the whole file


def test_misnamed_layers_of_vit_large_are_renamed(tmp_path, capfd):
    state = encoder(depth=24)
    wrong = state
    for layer in ("13.norm1", "13.mlp.fc1", "14.norm2", "14.mlp.fc2"):
        wrong = renamed(wrong, re.escape(f"{layer}."), f"{layer[:-1]}{layer[:2]}.")
    status, output = run(tmp_path, wrong)
    assert status == 0 and "blocks.13.mlp.fc13" in capfd.readouterr().out
    assert_same(without_head(state), output)


@pytest.mark.parametrize("title, width, depth, model", [
    ("ViT-Tiny", 192, 12, "deit_tiny_patch16_224"),
    ("ViT-Small", 384, 12, "moco_v3_vit_small_patch16_224"),
    ("ViT-Base", 768, 12, "deit_base_patch16_224"),
    ("ViT-Large", 1024, 24, "vit_large_patch16_224"),
])
def test_the_model_is_named_for_any_input_size(title, width, depth, model):
    shapes = {name: [size * width // 64 if size % 64 == 0 else size for size in tensor.shape]
              for name, tensor in generate.encoder_state(64, depth).items()}
    for positions in (197, 577):
        shapes["pos_embed"] = (1, positions, width)
        found = recognise({name: torch.zeros(()).expand(*shape) for name, shape in shapes.items()})
        assert found == (f"{title} (width {width}, depth {depth})", model, "")


MOCO = without_head(encoder("base_encoder."))


@pytest.mark.parametrize("content, words", [
    ({"model": without_head(encoder())}, "converted already --resume"),
    ({"model": encoder(), "optimizer": {}, "epoch": 3}, "fine-tuning run --resume"),
    ({"model": dict(encoder(), pos_embed=LEARNED)}, "learned supervised"),
    (dict(encoder(), pos_embed=encoder()["pos_embed"].roll(32, -1)), "learned supervised"),
    (dict(encoder("my.base_encoder."), **{"my.base_encoder.pos_embed": LEARNED}), "supervised"),
    (dict(encoder(depth=24), **{"blocks.13.norm13.weight": torch.ones(64)}), "blocks.13.norm13"),
    ({"state_dict": {"module.base_encoder.layer1.0.conv1.weight": torch.ones(1)}}, "ResNet"),
    ({"epoch": 3}, "base_encoder cls_token"),
    ([torch.ones(1)], "list"),
    ({"state_dict": {**MOCO, **encoder("module.base_encoder.")}}, "one module.base_encoder."),
    (renamed(MOCO, "blocks.1.norm1", "blocks.1.norm13"),
     "blocks.1.norm1.weight missing blocks.1.norm13.weight"),
    ({**MOCO, "base_encoder.patch_embed.proj.weight": torch.ones(64, 3, 32, 32)},
     "patch_embed.proj.weight (64, 3, 32, 32) (64, 3, 16, 16)"),
    ({**MOCO, "base_encoder.pos_embed": torch.ones(1, 198, 64)}, "pos_embed (1, 198, 64)"),
    ({**MOCO, "base_encoder.norm.bias": torch.full((64,), float("nan")).half()}, "norm.bias NaN"),
    ({**MOCO, "base_encoder.norm.bias": torch.full((64,), float("inf")).half()}, "norm.bias NaN"),
    (b"", "empty download it again"),
    (b"<!DOCTYPE html><p>404", "<!DOCTYPE html> download it again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs download it again"),
])
def test_what_is_no_moco_vit_is_refused_with_its_reason(tmp_path, capfd, content, words):
    line = refusal(capfd, run(tmp_path, content)[0], tmp_path)
    assert str(tmp_path / "input.pth") in line
    for word in words.split():
        assert word in line


def test_damage_is_refused(tmp_path, capfd):
    """A file that was cut short, and one bit in the pickle or in a tensor, also in unused ones."""
    state = generate.moco_checkpoint(tmp_path / "input.pth", width=64, depth=2)["state_dict"]
    whole = (tmp_path / "input.pth").read_bytes()
    damaged = [whole[:int(part * len(whole))] for part in (0.01, 0.2, 0.5, 0.8)]
    tensors = [state[f"module.{encoder}.blocks.1.mlp.fc1.weight"].numpy().tobytes()
               for encoder in ("base_encoder", "momentum_encoder")]
    for content in (b"state_dict", *tensors):  # a bit between the zip file's members is harmless
        position = whole.index(content) + len(content) // 2
        flipped = bytes([whole[position] ^ 4])
        damaged.append(whole[:position] + flipped + whole[position + 1:])
    for each in damaged:
        line = refusal(capfd, run(tmp_path, each)[0], tmp_path)
        assert "damaged" in line and "download it again" in line


@pytest.mark.skipif(not SAFE_AND_MAPPED, reason="torch before 2.1")
def test_what_can_run_code_is_loaded_only_if_it_is_trusted(tmp_path, capfd):
    content = {"state_dict": MOCO, "extra": tmp_path}
    line = refusal(capfd, run(tmp_path, content)[0], tmp_path)
    assert "PosixPath" in line and "--trust" in line
    status, output = run(tmp_path, content, "--trust")
    assert status == 0
    assert_same(renamed(MOCO, r"base_encoder\.", ""), output)


@pytest.mark.parametrize("function, change, words", [
    ("os.fsync", mock.Mock(side_effect=OSError(5, "broken disk")), "broken disk"),
    ("os.fsync", mock.Mock(side_effect=KeyboardInterrupt()), "interrupted"),
    ("zipfile.ZipFile.testzip", lambda _: "data/0", "other bytes")])
def test_a_failed_write_keeps_the_old_file(tmp_path, capfd, monkeypatch, function, change, words):
    torch.save(MOCO, str(tmp_path / "input.pth"))
    (tmp_path / "output.pth").write_text("old")
    monkeypatch.setattr(function, change)
    for name in ("output.pth", "new/deep/output.pth"):
        assert status_of(tmp_path / "input.pth", tmp_path / name) == 1
        err = capfd.readouterr().err
        assert words in err and err.count("\n") == 1
    assert (tmp_path / "output.pth").read_text() == "old"
    assert sorted(os.listdir(str(tmp_path))) == ["input.pth", "output.pth"]


def test_a_link_is_followed_and_the_folder_is_made(tmp_path):
    (tmp_path / "output.pth").symlink_to(tmp_path / "new" / "model.pth")
    status, output = run(tmp_path, MOCO)
    assert status == 0 and output.is_symlink()
    assert_same(renamed(MOCO, r"base_encoder\.", ""), tmp_path / "new" / "model.pth")


@pytest.mark.parametrize("source, target, words", [
    ("~/none.pth", "~/out.pth", "none.pth No such file"),
    ("~/pipe", "~/out.pth", "pipe"), ("~/in.pth", "~/folder", "folder"),
    ("~/in.pth", "~/new/", "folder"), ("~/in.pth", "~/in.pth", "same file"),
    ("~/in.pth", "~/in.pth/out.pth", "not written"),
])
def test_wrong_paths(tmp_path, capfd, monkeypatch, source, target, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(MOCO, str(tmp_path / "in.pth"))
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "folder").mkdir()
    line = refusal(capfd, status_of(source, target), tmp_path)
    assert str(tmp_path) in line and all(word in line for word in words.split())


def test_without_torch_there_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = subprocess.run([sys.executable, str(ROOT / "convert_to_deit.py")], capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert "install" in error_of(done, status=1)
