"""Each patch is needed where its docstring says, and only there."""
import re

import PIL
import pytest
import timm

from conftest import IS_HEAD
from launches import fork

TIMM, PILLOW = (tuple(map(int, re.findall(r"\d+", module.__version__)[:3]))
                for module in (timm, PIL))

# Patch: whether this stack needs it, and what the output without it shows, of the place that fails.
PATCHES = [
    ("versions.restore_pil_interp", TIMM >= (0, 5, 4) and IS_HEAD, "_pil_interp"),
    ("versions.restore_posterize", PILLOW >= (13,), "bits must be"),
    ("versions.skip_pretrained_cfg", TIMM >= (0, 6), "pretrained_cfg"),
    ("versions.silence_known_warnings", TIMM >= (0, 9), "in registry"),
    ("versions.silence_known_warnings", True, "CUDA is not available"),
    ("cpu.use_gloo", True, "in init_distributed_mode"),
    ("cpu.sum_meters_on_cpu", True, "in synchronize_between_processes"),
    ("cpu.wait_for_no_gpu", True, "torch.cuda.synchronize()"),
    ("cpu.wrap_without_device_ids", True, "DistributedDataParallel device_ids"),
    ("cpu.keep_mixup_targets_on_cpu", TIMM < (0, 5), "in mixup_target"),
]


@pytest.mark.parametrize("name, needed, shows", PATCHES)
def test_patch_is_needed_where_it_says_and_only_there(name, needed, shows, data, flags):
    recipe = "imagenet" if name == "versions.restore_posterize" else "pets"
    module, patch = name.split(".")

    def leave_out():
        import deit_plugin
        __import__(f"deit_plugin.{module}")
        assert callable(getattr(getattr(deit_plugin, module), patch))
        setattr(getattr(deit_plugin, module), patch, lambda *_: None)

    done = fork(recipe, *flags, "--data-path", data / recipe, "--epochs", "1", "--input-size", "48",
                before=leave_out)
    noted = shows in done.stderr
    assert noted if needed else done.returncode == 0 and not noted, done.stderr
