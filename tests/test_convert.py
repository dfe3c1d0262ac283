"""convert_to_deit.py against small checkpoints shaped as MoCo v3's main_moco.py saves them."""

import argparse
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import convert_to_deit  # noqa: E402
from convert_to_deit import VIT_SMALL_MODEL, ConversionError, convert, main  # noqa: E402

SCRIPT = ROOT / "convert_to_deit.py"
CAN_MAP = convert_to_deit._can_map()


def vit(width=64, depth=2, tokens=197, patch=16, conv_stem=False):
    """Names and shapes of a MoCo v3 ViT without its head, in the order of its state_dict."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    if conv_stem:
        channels = [3] + [width * 2**stage // 8 for stage in range(4)]
        for stage in range(4):
            shapes[f"patch_embed.proj.{3 * stage}.weight"] = (
                channels[stage + 1], channels[stage], 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"patch_embed.proj.{3 * stage + 1}.{name}"] = (channels[stage + 1],)
            shapes[f"patch_embed.proj.{3 * stage + 1}.num_batches_tracked"] = ()
        shapes["patch_embed.proj.12.weight"] = (width, channels[4], 1, 1)
        shapes["patch_embed.proj.12.bias"] = (width,)
    else:
        shapes["patch_embed.proj.weight"] = (width, 3, patch, patch)
        shapes["patch_embed.proj.bias"] = (width,)
    for block in range(depth):
        layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
                  "norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for layer, shape in layers.items():
            shapes[f"blocks.{block}.{layer}.weight"] = shape
            shapes[f"blocks.{block}.{layer}.bias"] = shape[:1]
    shapes.update({"norm.weight": (width,), "norm.bias": (width,)})
    return shapes


def mlp(layers, last_bn_affine=False):
    """Names and shapes of a MoCo v3 projector or predictor: linear, norm, ReLU, ..."""
    shapes = {}
    for index, (inputs, outputs) in enumerate(layers):
        shapes[f"{3 * index}.weight"] = (outputs, inputs)
        affine = ("weight", "bias") if index < len(layers) - 1 or last_bn_affine else ()
        for name in affine + ("running_mean", "running_var"):
            shapes[f"{3 * index + 1}.{name}"] = (outputs,)
        shapes[f"{3 * index + 1}.num_batches_tracked"] = ()
    return shapes


def moco_state_dict(prefix="module.", width=64, **options):
    generator = torch.Generator().manual_seed(0)
    encoder = dict(vit(width, **options))
    encoder.update({f"head.{name}": shape for name, shape in
                    mlp([(width, 32), (32, 32), (32, 8)]).items()})
    shapes = OrderedDict()
    for part in ("base_encoder", "momentum_encoder"):
        shapes.update({f"{prefix}{part}.{name}": shape for name, shape in encoder.items()})
    shapes.update({f"{prefix}predictor.{name}": shape for name, shape in
                   mlp([(8, 32), (32, 8)]).items()})
    return OrderedDict(
        (name, torch.tensor(7) if name.endswith("num_batches_tracked") else
         torch.randn(shape, generator=generator)) for name, shape in shapes.items())


def checkpoint(state_dict=None, **options):
    state_dict = moco_state_dict(**options) if state_dict is None else state_dict
    moments = {index: {"step": 3, "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)}
               for index in range(4)}
    group = {"lr": 1.5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1,
             "amsgrad": False, "params": list(range(4))}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state_dict,
            "optimizer": {"state": moments, "param_groups": [group]},
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                       "growth_interval": 2000, "_growth_tracker": 10**10}}


def save(path, value, zipped=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, str(path), _use_new_zipfile_serialization=zipped)
    return path


def load(path):
    safe = {"weights_only": True} if CAN_MAP else {}
    return torch.load(str(path), map_location="cpu", **safe)


def bits(tensor):
    """dtype, shape and values such that NaN equals itself and 0.0 differs from -0.0."""
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # lossless, for numpy
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def expected(state_dict, prefix):
    """The published rule, written anew: keep base_encoder, drop its head, strip the prefix."""
    start = prefix + "base_encoder."
    return [(name[len(start):], tensor) for name, tensor in state_dict.items()
            if name.startswith(start) and name[len(start):].split(".")[0] != "head"]


def assert_same(pairs, model):
    assert [name for name, _ in pairs] == list(model)
    for name, tensor in pairs:
        assert tensor.dtype == model[name].dtype, name
        assert bits(tensor) == bits(model[name]), name


def run_cli(*arguments, **options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)],
                          capture_output=True, text=True, **options)


def assert_refused(capfd, source, target, *words):
    """main() ends with 1, nothing on stdout, one line with words on stderr, and writes nothing."""
    folder = Path(target).parent
    before = sorted(os.listdir(folder)) if folder.is_dir() else None
    assert main(["--input", str(source), "--output", str(target)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err
    if before is not None:
        assert sorted(os.listdir(folder)) == before


# What comes out


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_round_trip_is_bit_for_bit(tmp_path, capfd, prefix, zipped):
    state_dict = moco_state_dict(prefix)
    source = save(tmp_path / "moco.pth.tar", checkpoint(state_dict), zipped)
    target = tmp_path / "new" / "folder" / "deit.pth"
    assert main(["--input", str(source), "--output", str(target)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "width 64, depth 2" in out and "epoch 300" in out and "30 tensors" in out
    written = load(target)
    assert list(written) == ["model"]
    assert_same(expected(state_dict, prefix), written["model"])
    assert os.listdir(target.parent) == ["deit.pth"]
    assert target.read_bytes()[:2] == b"PK"  # the format of torch 1.6 and later


def test_a_wrong_map_fails_the_comparison():
    state_dict = moco_state_dict()
    wrong = expected(state_dict, "module.")
    first, second = (index for index, (name, _) in enumerate(wrong) if "norm1.weight" in name)
    wrong[first], wrong[second] = ((wrong[first][0], wrong[second][1]),
                                   (wrong[second][0], wrong[first][1]))
    assert_same(expected(state_dict, "module."), convert(state_dict))
    with pytest.raises(AssertionError):
        assert_same(wrong, convert(state_dict))


def test_vit_base_has_150_tensors_and_fits_deit_base():
    model = convert(moco_state_dict(width=8, depth=12))
    assert len(model) == 150
    assert list(model) == list(vit(depth=12))
    base = OrderedDict((name, torch.zeros(()).expand(shape))
                       for name, shape in vit(width=768, depth=12).items())
    architecture, advice = convert_to_deit.describe(base)
    assert architecture == "ViT-Base (width 768, depth 12)"
    assert "--model deit_base_patch16_224 " in advice
    assert "85,798,656 parameters" in convert_to_deit.summarize(base, 300, 343_200_000)


@pytest.mark.parametrize("options, architecture, words", [
    (dict(width=384, depth=12), "ViT-Small", [f"--model {VIT_SMALL_MODEL} (12 heads", "has 6"]),
    (dict(width=192, depth=12), "ViT-Tiny", ["--model deit_tiny_patch16_224 (3 heads"]),
    (dict(width=768, depth=11, conv_stem=True), "ViT-Base with a convolutional stem", ["no such"]),
    (dict(width=384, depth=11, conv_stem=True), "ViT-Small with a convolutional stem", ["no such"]),
    (dict(width=768, depth=24), "ViT (width 768, depth 24)", ["no such"]),
    (dict(width=100, depth=12), "ViT (width 100, depth 12)", ["no such"]),
    (dict(width=768, depth=12, patch=32, tokens=50), "ViT-Base", ["no such", "patch size 32"]),
    (dict(width=768, depth=12, tokens=577), "ViT-Base", ["deit_base_patch16_224 --input-size 384"]),
    (dict(width=768, depth=12, tokens=198), "ViT-Base", ["no such", "198 tokens"]),
    (dict(width=768, depth=12, tokens=0), "ViT-Base", ["no such"]),
])
def test_architecture_and_fit(options, architecture, words):
    model = {name: torch.zeros(()).expand(shape) for name, shape in vit(**options).items()}
    found, advice = convert_to_deit.describe(model)
    assert found.startswith(architecture)
    for word in words:
        assert word in advice


def test_convolutional_stem_converts(tmp_path, capfd):
    state_dict = moco_state_dict(conv_stem=True)
    source = save(tmp_path / "moco.pth", checkpoint(state_dict))
    assert main(["--input", str(source), "--output", str(tmp_path / "deit.pth")]) == 0
    assert "DeiT has no such model" in capfd.readouterr().out
    assert_same(expected(state_dict, "module."), load(tmp_path / "deit.pth")["model"])


def test_convert_is_pure_and_shares_memory():
    state_dict = moco_state_dict()
    before = [(name, tensor, bits(tensor)) for name, tensor in state_dict.items()]
    model = convert(state_dict)
    assert [(name, tensor, bits(tensor)) for name, tensor in state_dict.items()] == before
    for name, tensor in model.items():
        assert tensor.data_ptr() == state_dict["module.base_encoder." + name].data_ptr()
    assert type(model) is OrderedDict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.bool])
def test_dtypes_and_odd_values_are_kept(tmp_path, capfd, dtype):
    state_dict = moco_state_dict()
    odd = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-40] + [1.0] * 58)
    odd = odd if dtype.is_floating_point else torch.arange(64)
    state_dict["module.base_encoder.norm.bias"] = odd.to(dtype)
    source = save(tmp_path / "moco.pth", checkpoint(state_dict))
    assert main(["--input", str(source), "--output", str(tmp_path / "deit.pth")]) == 0
    assert_same(expected(state_dict, "module."), load(tmp_path / "deit.pth")["model"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_do_not_drag_their_storage_along(tmp_path, capfd, zipped):
    state_dict = moco_state_dict()
    everything = torch.randn(4_000_000)
    state_dict["module.base_encoder.norm.bias"] = everything[1000:1064]
    state_dict["module.base_encoder.norm.weight"] = everything[::2][:64]
    state_dict["module.base_encoder.blocks.0.attn.proj.weight"] = torch.randn(64, 64).t()
    state_dict["module.predictor.0.weight"] = everything
    source = save(tmp_path / "moco.pth", checkpoint(state_dict), zipped)
    assert main(["--input", str(source), "--output", str(tmp_path / "deit.pth")]) == 0
    assert_same(expected(state_dict, "module."), load(tmp_path / "deit.pth")["model"])
    assert (tmp_path / "deit.pth").stat().st_size < 2_000_000


def test_gradients_and_parameters_become_plain_tensors(tmp_path, capfd):
    state_dict = moco_state_dict()
    name = "module.base_encoder.norm.bias"
    state_dict[name] = torch.nn.Parameter(state_dict[name])
    source = save(tmp_path / "moco.pth", checkpoint(state_dict))
    assert main(["--input", str(source), "--output", str(tmp_path / "deit.pth")]) == 0
    bias = load(tmp_path / "deit.pth")["model"]["norm.bias"]
    assert type(bias) is torch.Tensor and not bias.requires_grad


def test_a_compressed_zip_is_read_rightly(tmp_path, capfd):
    state_dict = moco_state_dict()
    source = save(tmp_path / "stored.pth", checkpoint(state_dict))
    with zipfile.ZipFile(str(source)) as stored, \
            zipfile.ZipFile(str(tmp_path / "moco.pth"), "w", zipfile.ZIP_DEFLATED) as compressed:
        for entry in stored.namelist():
            compressed.writestr(entry, stored.read(entry))
    arguments = ["--input", str(tmp_path / "moco.pth"), "--output", str(tmp_path / "deit.pth")]
    assert main(arguments) == 0
    assert_same(expected(state_dict, "module."), load(tmp_path / "deit.pth")["model"])


@pytest.mark.parametrize("epoch, shown", [(0, "epoch 0"), (None, "unknown"), ("x\ny", "unknown"),
                                          pytest.param(10**5000, "unknown", id="huge")])
def test_odd_epochs(tmp_path, capfd, epoch, shown):
    source = save(tmp_path / "moco.pth", dict(checkpoint(), epoch=epoch))
    code = main(["--input", str(source), "--output", str(tmp_path / "deit.pth")])
    assert code == 1 or shown in capfd.readouterr().out  # some torch refuse huge numbers


# The command


def test_command_line(tmp_path):
    state_dict = moco_state_dict()
    save(tmp_path / "moco.pth.tar", checkpoint(state_dict))
    result = run_cli("--input", "moco.pth.tar", "--output", "deit.pth", cwd=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 2
    assert_same(expected(state_dict, "module."), load(tmp_path / "deit.pth")["model"])
    assert sorted(os.listdir(tmp_path)) == ["deit.pth", "moco.pth.tar"]
    again = run_cli("--input", tmp_path / "deit.pth", "--output", tmp_path / "twice.pth")
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "converted already" in again.stderr and "--resume" in again.stderr


def test_both_arguments_are_required(tmp_path):
    result = run_cli("--input", "a")
    assert result.returncode == 2 and "--output" in result.stderr


def test_without_torch_there_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    (tmp_path / "moco.pth").write_bytes(b"PK")
    result = run_cli("--input", tmp_path / "moco.pth", "--output", tmp_path / "deit.pth",
                     env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "no torch here" in result.stderr and "install" in result.stderr


@pytest.mark.parametrize("name", ["with space.pth", "new\nline.pth", "naïve.pth", "-dash.pth"])
def test_odd_file_names(tmp_path, capfd, name):
    source = save(tmp_path / "moco.pth", checkpoint())
    os.rename(str(source), str(tmp_path / name))
    assert main([f"--input={tmp_path / name}", f"--output={tmp_path / ('out ' + name)}"]) == 0
    capfd.readouterr()
    assert_refused(capfd, tmp_path / ("no " + name), tmp_path / "x.pth", "no such file")


# What is refused


def classifier(names):
    return {"module." + name: torch.zeros(2, 2) for name in names}


def with_entry(name, value):
    state_dict = moco_state_dict()
    state_dict[name] = value
    return checkpoint(state_dict)


def without_entry(name):
    state_dict = moco_state_dict()
    del state_dict[name]
    return checkpoint(state_dict)


class Command:
    """Pickles as a call of os.system that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


BASE = "module.base_encoder."
RESNET = {BASE + "conv1.weight": torch.zeros(4, 3, 7, 7), BASE + "layer1.0.bn1.bias": torch.ones(4)}
DEIT = {name: torch.zeros(1) for name in vit()}
REFUSED = {
    "tensor": (torch.zeros(3), "holds only a Tensor"),
    "list": ([1, 2], "holds only a list"),
    "empty": ({}, "no state_dict"),
    "bare state_dict": (moco_state_dict(), "no state_dict"),
    "model of something": ({"model": 3}, "no state_dict"),
    "state_dict is a list": ({"state_dict": [1]}, "no dict but a list"),
    "state_dict is empty": ({"state_dict": {}}, "no base_encoder"),
    "numbers as names": ({"state_dict": {1: torch.zeros(1)}}, "not a string"),
    "text as tensor": (with_entry(BASE + "norm.bias", "text"), "not a dense tensor"),
    "None as tensor": (with_entry("module.predictor.0.weight", None), "not a dense tensor"),
    "complex": (with_entry(BASE + "norm.bias", torch.zeros(64, dtype=torch.double)
                           .to(torch.complex128) if CAN_MAP else 1j), ""),
    "sparse": (with_entry(BASE + "norm.bias", torch.ones(64).to_sparse() if CAN_MAP else 1), ""),
    "converted": ({"model": DEIT}, "converted already"),
    "released DeiT": ({"model": dict(DEIT, **{"head.weight": torch.zeros(1)})}, "needs no conv"),
    "fine-tuned DeiT": ({"model": DEIT, "optimizer": {}, "epoch": 3}, "needs no conversion"),
    "DeiT with arguments": ({"model": DEIT, "args": argparse.Namespace(lr=1)}, "no conversion"),
    "linear probe, ViT": (checkpoint(classifier(["cls_token", "head.weight"])), "linear probe"),
    "linear probe, ResNet": (checkpoint(classifier(["conv1.weight", "fc.weight"])), "linear probe"),
    "supervised": (checkpoint({"head.weight": torch.zeros(1)}), "supervised"),
    "MoCo v2": (checkpoint({"module.encoder_q.conv1.weight": torch.zeros(1)}), "no base_encoder"),
    "ResNet": (checkpoint(RESNET), "ResNet"),
    "mixed prefixes": (with_entry("base_encoder.x", torch.zeros(1)), "begin with 'module.'"),
    "only a head": (checkpoint({BASE + "head.0.weight": torch.zeros(1)}), "no vision transformer"),
    "no pos_embed": (without_entry(BASE + "pos_embed"), "pos_embed"),
    "no patch_embed": (without_entry(BASE + "patch_embed.proj.weight"), "patch_embed.proj.weight"),
    "flat pos_embed": (with_entry(BASE + "pos_embed", torch.zeros(64)), "3 dimensions"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoints(tmp_path, capfd, case, zipped):
    value, word = REFUSED[case]
    source = save(tmp_path / "in.pth", value, zipped)
    assert_refused(capfd, source, tmp_path / "out.pth", repr(str(source)), "; ", word)
    (tmp_path / "out.pth").write_bytes(b"what was here")
    assert_refused(capfd, source, tmp_path / "out.pth", word)
    assert (tmp_path / "out.pth").read_bytes() == b"what was here"


@pytest.mark.parametrize("content", [
    b"", b"text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), b"PK\x03\x04", b"PK",
    b"\x80", b"\x80\x02.", b"\x80\x02}q\x00.", pickle.dumps({"state_dict": {}}, 2),
    bytes(random.Random(0).getrandbits(8) for _ in range(5000))])
def test_refused_files(tmp_path, capfd, content):
    (tmp_path / "in.pth").write_bytes(content)
    assert_refused(capfd, tmp_path / "in.pth", tmp_path / "out.pth", "no PyTorch checkpoint", "; ")


def test_refused_zip_of_something_else(tmp_path, capfd):
    with zipfile.ZipFile(str(tmp_path / "in.pth"), "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_refused(capfd, tmp_path / "in.pth", tmp_path / "out.pth", "no PyTorch checkpoint")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_refused_truncated(tmp_path, capfd, share, zipped):
    content = save(tmp_path / "in.pth", checkpoint(), zipped).read_bytes()
    (tmp_path / "in.pth").write_bytes(content[:int(len(content) * share)])
    assert_refused(capfd, tmp_path / "in.pth", tmp_path / "out.pth", "damaged", "again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "state_dict", "value"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, capfd, place, zipped):
    command = Command(tmp_path / "ran")
    value = {"top": command, "state_dict": {"state_dict": command},
             "value": with_entry(BASE + "norm.bias", command)}[place]
    source = save(tmp_path / "in.pth", value, zipped)
    assert_refused(capfd, source, tmp_path / "out.pth", "posix.system")
    assert not (tmp_path / "ran").exists()
    load_without_care(source)
    assert (tmp_path / "ran").exists()  # so the file above was a real threat


def load_without_care(path):
    torch.load(str(path), **({"weights_only": False} if CAN_MAP else {}))


def test_refused_paths(tmp_path, capfd):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("kept")
    os.symlink(str(source), str(tmp_path / "symlink.pth"))
    os.link(str(source), str(tmp_path / "hardlink.pth"))
    os.mkfifo(str(tmp_path / "fifo"))
    content = source.read_bytes()
    for wrong, words in {"none.pth": "no such file", "folder": "not a regular file",
                         "fifo": "not a regular file"}.items():
        assert_refused(capfd, tmp_path / wrong, tmp_path / "out.pth", "--input", words)
    for wrong, words in {"folder": "a folder", "moco.pth": "the same file", "fifo": "not a regular",
                         "symlink.pth": "the same file", "hardlink.pth": "the same file",
                         "./folder/../moco.pth": "the same file", "folder/": "a folder",
                         "moco.pth/out.pth": "not written", "new/": "a folder"}.items():
        assert_refused(capfd, source, f"{tmp_path}/{wrong}", "--output", words)
    assert_refused(capfd, source, "/dev/null", "not a regular file")
    assert_refused(capfd, source, "", "a folder")
    assert source.read_bytes() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_refused_permissions(tmp_path, capfd):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(capfd, source, tmp_path / "locked" / "out.pth", "ermission")
    source.chmod(0)
    assert_refused(capfd, source, tmp_path / "out.pth", "ermission")


# Whole or not at all


def test_output_replaces_what_was_there_and_follows_links(tmp_path, capfd):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "real.pth").write_bytes(b"old")
    os.symlink("real.pth", str(tmp_path / "link.pth"))
    assert main(["--input", str(source), "--output", str(tmp_path / "link.pth")]) == 0
    assert (tmp_path / "link.pth").is_symlink()
    assert list(load(tmp_path / "real.pth")) == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real.pth").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("limit", [1, 10_000, 400_000])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, limit):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deit.pth").write_bytes(b"old")
    result = run_cli(
        "--input", source, "--output", tmp_path / "out" / "deit.pth",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 1, result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert os.listdir(tmp_path / "out") == ["deit.pth"]
    assert (tmp_path / "out" / "deit.pth").read_bytes() == b"old"


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "convert_to_deit.check_written"])
@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError("no space"), 1)])
def test_an_interruption_leaves_nothing(tmp_path, capfd, monkeypatch, step, error, code):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "deit.pth").write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(step, fail)
    assert main(["--input", str(source), "--output", str(tmp_path / "deit.pth")]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["deit.pth", "moco.pth"]
    assert (tmp_path / "deit.pth").read_bytes() == b"old"


def test_a_kill_leaves_the_old_output(tmp_path):
    source = save(tmp_path / "moco.pth", checkpoint())
    (tmp_path / "deit.pth").write_bytes(b"old")
    stall = ("import convert_to_deit, os, sys, time\n"
             "os.fsync = lambda _: (print('stalled', flush=True), time.sleep(600))\n"
             "convert_to_deit.main(sys.argv[1:])\n")
    process = subprocess.Popen(
        [sys.executable, "-c", stall, "--input", str(source), "--output",
         str(tmp_path / "deit.pth")], cwd=str(ROOT), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stalled\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert process.stdout.read() == ""
    assert (tmp_path / "deit.pth").read_bytes() == b"old"
    rest = set(os.listdir(tmp_path)) - {"moco.pth", "deit.pth"}
    assert all(re.fullmatch(r"\.convert-\w+\.tmp", name) for name in rest)


def swap_names(model):
    return OrderedDict(zip(reversed(list(model)), model.values()))


def reorder(model):
    return OrderedDict(reversed(list(model.items())))


def change(name, value):
    return lambda model: OrderedDict(model, **{name: value(model[name])})


@pytest.mark.parametrize("wrong", [
    swap_names, reorder, lambda model: OrderedDict(list(model.items())[1:]),
    change("norm.bias", lambda tensor: -tensor), change("norm.bias", torch.Tensor.double),
    change("norm.bias", lambda tensor: tensor[:32]), change("cls_token", lambda t: t.view(1, -1)),
    change("blocks.1.mlp.fc2.weight", lambda tensor: tensor + torch.eye(64, 256) * 1e-6)])
def test_the_check_finds_what_is_wrong(tmp_path, wrong):
    model = convert(moco_state_dict())
    model["norm.bias"] = torch.zeros(64)
    model["norm.weight"] = torch.full((64,), float("nan"))
    convert_to_deit.check_written(model, str(save(tmp_path / "right", {"model": model})))
    with pytest.raises(OSError):
        convert_to_deit.check_written(model, str(save(tmp_path / "wrong", {"model": wrong(model)})))
    with pytest.raises(OSError):
        extra = save(tmp_path / "extra", {"model": model, "epoch": 1})
        convert_to_deit.check_written(model, str(extra))


def test_a_disk_that_alters_bytes_is_noticed(tmp_path, capfd, monkeypatch):
    state_dict = moco_state_dict()
    source = save(tmp_path / "moco.pth", checkpoint(state_dict))
    needle = state_dict[BASE + "norm.bias"].numpy().tobytes()

    class Disk(convert_to_deit.PostponingFile):
        def write(self, data):
            return super().write(bytes(data).replace(needle, bytes(len(needle))))

    monkeypatch.setattr(convert_to_deit, "PostponingFile", Disk)
    assert_refused(capfd, source, tmp_path / "deit.pth", "not written")


# Hostile bytes


def mutations(count):
    """Yield (name, bytes) of damaged checkpoints, always the same ones."""
    chance = random.Random(0)
    for index in range(count):
        zipped = index % 2 == 0
        content = bytearray(FUZZED[zipped])
        kind = chance.choice(["flip", "flip", "pickle", "pickle", "cut", "fill", "drop"])
        start = chance.randrange(len(content))
        if kind == "flip":
            for _ in range(chance.randrange(1, 20)):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif kind == "pickle":  # the names and sizes, which come first in both formats
            for _ in range(chance.randrange(1, 4)):
                content[chance.randrange(4000)] = chance.randrange(256)
        elif kind == "cut":
            del content[start:]
        elif kind == "fill":
            content[start:start + 500] = bytes(len(content[start:start + 500]))
        else:
            del content[start:start + chance.randrange(1, 200)]
        yield f"{index} {kind} {'zip' if zipped else 'legacy'}", bytes(content)


def odd_values(count):
    """Yield (name, value) of checkpoints with a wrong type or nesting somewhere."""
    chance = random.Random(1)
    values = [None, 3, -1.5, "text", b"bytes", [], {}, (), torch.zeros(0), torch.tensor(1),
              torch.zeros(2, 0, 3), {"state_dict": {}}, torch.zeros(1).expand(5, 5)]
    for index in range(count):
        value = checkpoint(depth=1, width=8, tokens=5, patch=2)
        where = value if index % 3 == 0 else value["state_dict"]
        key = chance.choice([*where, "", "module.base_encoder.", "base_encoder.x", 1, "model"])
        where[key] = chance.choice(values)
        if index % 5 == 0:
            value = chance.choice([value["state_dict"], [value], {"model": value},
                                   {"state_dict": value}])
        yield f"{index} {key}", value


FUZZED = {}


def test_damaged_checkpoints_convert_or_give_one_line(tmp_path, capfd):
    small = checkpoint(depth=1, width=8, tokens=5, patch=2)
    for zipped in (True, False):
        FUZZED[zipped] = save(tmp_path / "in.pth", small, zipped).read_bytes()
    outcomes = set()
    for name, content in mutations(160):
        (tmp_path / "in.pth").write_bytes(content)
        outcomes.add(convert_or_one_line(tmp_path, capfd, name))
    assert outcomes == {0, 1}


def test_odd_checkpoints_convert_or_give_one_line(tmp_path, capfd):
    outcomes = set()
    for index, (name, value) in enumerate(odd_values(100)):
        save(tmp_path / "in.pth", value, zipped=index % 2 == 0)
        outcomes.add(convert_or_one_line(tmp_path, capfd, name))
    assert outcomes == {0, 1}


def convert_or_one_line(folder, capfd, name):
    code = main(["--input", str(folder / "in.pth"), "--output", str(folder / "out.pth")])
    out, err = capfd.readouterr()
    if code == 0:
        assert err == "" and list(load(folder / "out.pth")) == ["model"], name
        (folder / "out.pth").unlink()
    else:
        assert code == 1 and out == "" and err.count("\n") == 1, (name, err)
    assert os.listdir(folder) == ["in.pth"], name
    return code


@pytest.mark.parametrize("wrong", [None, 3, [], {"x": 1}, {}, {None: torch.zeros(1)}])
def test_convert_raises_value_error(wrong):
    with pytest.raises(ValueError) as raised:
        convert(wrong)
    assert raised.type is ConversionError and "\n" not in str(raised.value)
