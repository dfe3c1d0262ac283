"""Each patch is needed where its docstring says, and only there; and what else stacks can break."""
import subprocess
import sys

import PIL
import pytest
import timm

from conftest import version_of
from launches import DEIT, ROOT, SCRIPTS, environment, fork, fork_script

TIMM, PILLOW = map(version_of, (timm, PIL))
IS_HEAD = (DEIT / "augment.py").exists()
# Patch: whether this stack needs it, and what the output without it shows, of the place that fails.
PATCHES = [
    ("restore_pil_interp", TIMM >= (0, 5, 4) and IS_HEAD, "_pil_interp"),
    ("restore_posterize", PILLOW >= (13,), "bits must be"),
    ("skip_pretrained_cfg", TIMM >= (0, 6), "pretrained_cfg"),
    ("silence_known_warnings", TIMM >= (0, 9), "in registry"),
    ("silence_known_warnings", True, "CUDA is not available"),
    ("use_gloo", True, "in init_distributed_mode"),
    ("sum_meters_on_cpu", True, "in synchronize_between_processes"),
    ("wait_for_no_gpu", True, "torch.cuda.synchronize()"),
    ("wrap_without_device_ids", True, "DistributedDataParallel device_ids"),
    ("keep_mixup_targets_on_cpu", TIMM < (0, 5), "in mixup_target"),
]


@pytest.mark.parametrize("name, needed, shows", PATCHES)
def test_patch_is_needed_where_it_says_and_only_there(name, needed, shows, data, flags):
    recipe = "imagenet" if name == "restore_posterize" else "pets"

    def leave_out():
        from deit_plugin import deit

        assert callable(getattr(deit, name))
        setattr(deit, name, lambda *_: None)

    done = fork(recipe, *flags, "--data-path", data / recipe, "--epochs", "1", "--input-size", "48",
                before=leave_out)
    noted = shows in done.stderr
    assert noted if needed else done.returncode == 0 and not noted, done.stderr


@pytest.mark.parametrize("script", ["convert_to_deit.py", *(f"scripts/{name}.py" for name in (
    "predict", "export", "features", "report"))])
def test_every_script_has_a_help(script):
    done = fork_script(ROOT / script, "--help", variables=environment())
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


OTHERS_WAIT = """
import os, sys, time
from argparse import Namespace
sys.path.insert(0, {scripts!r})
from deit_plugin import errors, launcher

if "RANK" in os.environ:
    errors.die_with_launcher()
    sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(60)
launcher.WORKER = __file__
sys.exit(launcher.launch(launcher.find_machines({{}}, 2), {folder!r}, Namespace(device="cpu"), ""))
"""


def test_a_rank_that_fails_ends_a_launch_whose_other_ranks_wait_for_it(tmp_path):
    """As under NCCL. torch 1.7.1's own launcher waits for rank 0 first."""
    script = tmp_path / "script.py"
    script.write_text(OTHERS_WAIT.format(scripts=str(SCRIPTS), folder=str(tmp_path)))
    assert subprocess.run([sys.executable, script], timeout=120).returncode == 3
