"""Each patch is needed where its docstring says, and only there."""
import re

import pytest
import timm

from conftest import DEIT, fork

TIMM = tuple(map(int, re.findall(r"\d+", timm.__version__)[:3]))
IS_HEAD = (DEIT / "augment.py").exists()

# Patch: whether this stack needs it, and what is said without it.
PATCHES = [
    ("versions.restore_pil_interp", TIMM >= (0, 5, 4) and IS_HEAD, "_pil_interp"),
    ("versions.skip_pretrained_cfg", TIMM >= (0, 6), "pretrained_cfg"),
    ("versions.quieten_age", TIMM >= (0, 9), "registry"),
    ("cpu.use_gloo", True, "cuda"),
    ("cpu.sum_meters_on_cpu", True, "cuda"),
    ("cpu.wait_for_no_gpu", True, "cuda"),
    ("cpu.wrap_without_device_ids", True, "DistributedDataParallel"),
    ("cpu.keep_mixup_targets_on_cpu", TIMM < (0, 5), "cuda"),
    ("versions.quieten_age", True, "CUDA is not available"),
]


@pytest.mark.parametrize("name, needed, says", PATCHES)
def test_patch_is_needed_where_it_says_and_only_there(name, needed, says, flags):
    without = (f"from deit_plugin import {name.split('.')[0]}\n"
               f"assert callable({name}); {name} = lambda *_: None")
    done = fork("pets", *flags, "--epochs", "1", altered=without)
    noted = says.lower() in done.stderr.lower()
    assert noted if needed else done.returncode == 0 and not noted, done.stderr
