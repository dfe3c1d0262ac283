"""Each patch is needed where its docstring says, and only there; what does not fit is named."""
import shutil

import pytest

from conftest import DEIT, TIMM, error_of, fork

IS_HEAD = (DEIT / "augment.py").exists()

# Patch: whether this stack needs it, and what is said without it.
PATCHES = {
    "versions.restore_pil_interp": (TIMM >= (0, 5, 4) and IS_HEAD, "_pil_interp"),
    "versions.skip_pretrained_cfg": (TIMM >= (0, 6), "pretrained_cfg"),
    "versions.quieten_age": (TIMM >= (0, 9), "registry"),
    "cpu.use_gloo": (True, "cuda"),
    "cpu.sum_meters_on_cpu": (True, "cuda"),
    "cpu.wait_for_no_gpu": (True, "cuda"),
    "cpu.wrap_without_device_ids": (True, "DistributedDataParallel"),
    "cpu.keep_mixup_targets_on_cpu": (TIMM < (0, 5), "cuda"),
    "cpu.quieten_missing_gpu": (True, "CUDA is not available"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patch_is_needed_where_it_says_and_only_there(name, flags):
    needed, says = PATCHES[name]
    module, function = name.split(".")
    without = (f"from deit_plugin import {module}\n"
               f"assert callable({name}); {name} = lambda *_: None")
    done = fork("pets", *flags, "--epochs", "1", script="altered.py", ALTERED=without)
    noted = says.lower() in done.stderr.lower()
    assert noted if needed else done.returncode == 0 and not noted, done.stderr


@pytest.mark.parametrize("file, before, after, says", [
    ("engine.py", "import utils", "import no_such_module", "no_such_module"),
    ("models.py", "import timm", "from timm import gone", "with torch"),
])
def test_a_deit_that_does_not_fit_is_named_in_one_line(file, before, after, says, flags, tmp_path):
    shutil.copytree(DEIT, tmp_path / "deit", ignore=shutil.ignore_patterns(".git", "__pycache__"))
    changed = tmp_path / "deit" / file
    changed.write_text(changed.read_text().replace(before, after, 1))
    assert says in error_of(fork("pets", *flags, DEIT_DIR=str(tmp_path / "deit")))
