"""Each adaptation is needed where its docstring says, and only there; what is missing is named."""
import argparse
import shutil

import pytest
import timm
import torch

import versions
from conftest import DEIT, launch, launch_instead, refusal_of, saved

TIMM = versions.numbers(timm.__version__)
TORCH = versions.numbers(torch.__version__)
IS_HEAD = (DEIT / "augment.py").exists()

# Adaptation: whether this stack needs it, and what is said without it.
ADAPTATIONS = {
    "versions.restore_pil_interp": (TIMM >= (0, 5, 4) and IS_HEAD, "_pil_interp"),
    "versions.skip_pretrained_cfg": (TIMM >= (0, 6), "pretrained_cfg"),
    "versions.quieten_age": (TIMM >= (0, 9), "registry"),
    "versions.trust_namespace": (TORCH >= (2, 4), "cannot be read"),
    "cpu.use_gloo": (True, "cuda"),
    "cpu.sum_meters_on_cpu": (True, "cuda"),
    "cpu.wait_for_no_gpu": (True, "cuda"),
    "cpu.wrap_without_device_ids": (True, "DistributedDataParallel"),
    "cpu.keep_mixup_targets_on_cpu": (TIMM < (0, 5), "cuda"),
    "cpu.quieten_missing_gpu": (True, "CUDA is not available"),
}


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_adaptation_is_needed_where_it_says_and_only_there(name, data, checkpoint, tmp_path):
    needed, says = ADAPTATIONS[name]
    as_deit_saves = {**saved(checkpoint), "args": argparse.Namespace(lr=1e-3)}
    torch.save(as_deit_saves, tmp_path / "tuned.pth")
    done = launch_instead("without.py", "pets", "--resume", tmp_path / "tuned.pth", "--data-path",
                          data / "pets", "--epochs", "1", WITHOUT=name)
    noted = says.lower() in done.stderr.lower()
    assert noted if needed else done.returncode == 0 and not noted, done.stderr


def package(folder, name, content):
    """A folder for PYTHONPATH with a package of that name."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(content)
    return str(folder)


@pytest.mark.parametrize("name, content, says", [
    ("timm", "raise ImportError('none here')", "timm cannot be imported"),
    ("timm", "__version__ = '0.3.1'", "timm 0.3.1 is too old: 0.3.2 or newer is needed"),
    ("torchvision", "__version__ = '0.7.0+cpu'", "torchvision 0.7.0+cpu is too old: 0.8"),
    ("PIL", "__version__ = '5.0'", "Pillow 5.0 is too old: 6.0 or newer is needed"),
])
def test_what_is_missing_or_too_old_is_named_in_one_line(name, content, says, data, tmp_path):
    done = launch("pets", "--data-path", data / "pets", processes=1,
                  PYTHONPATH=package(tmp_path, name, content))
    assert says in refusal_of(done)


@pytest.mark.parametrize("file, before, after, says", [
    ("main.py", "def main(args)", "def other(args)", "has no main.main"),
    ("utils.py", "def save_on_master", "def other", "has no utils.save_on_master"),
    ("engine.py", "import utils", "import no_such_module", "cannot import main"),
    ("models.py", "import timm", "from timm import gone", "with torch"),
])
def test_a_deit_that_does_not_fit_is_named_in_one_line(file, before, after, says, data, tmp_path):
    shutil.copytree(DEIT, tmp_path / "deit", ignore=shutil.ignore_patterns(".git", "__pycache__"))
    changed = tmp_path / "deit" / file
    changed.write_text(changed.read_text().replace(before, after, 1))
    done = launch("pets", "--data-path", data / "pets", processes=1,
                  DEIT_DIR=str(tmp_path / "deit"))
    assert says in refusal_of(done)
