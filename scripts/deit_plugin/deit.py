"""The DeiT checkout, and what it needs to run here: newer torch, timm and Pillow, or no GPU.

DeiT was written for torch 1.7 and timm 0.3.2. Each patch has no effect where it is not needed.
"""
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, one_line

BUNDLE = Path(__file__).resolve().parent.parent.parent
# Modules of which DeiT's folder may have its own, or a copy from another time.
OURS = ("convert_to_deit", "datasets", "oxford_flowers_dataset", "oxford_pets_dataset")


def folder() -> Path:
    """The folder ``DEIT_DIR``, or else the one that this bundle was copied into."""
    return Path(os.environ.get("DEIT_DIR") or BUNDLE).expanduser().resolve()


def import_main() -> ModuleType:
    """DeiT's ``main`` module with our ``datasets``, patched for newer torch, timm and Pillow.

    Raises UserError if DeiT is not there or cannot be imported.
    """
    checkout, named = folder(), os.environ.get("DEIT_DIR", "")
    if not all((checkout / name).is_file() for name in ("main.py", "engine.py", "utils.py")):
        raise UserError(f"DEIT_DIR={named or '(not set)'}: {checkout} is not a DeiT checkout: "
                        "main.py, engine.py or utils.py is missing; type git clone "
                        "https://github.com/facebookresearch/deit && export DEIT_DIR=$PWD/deit")
    silence_known_warnings()
    try:
        restore_pil_interp()
        restore_posterize()
        import torch

        torch.zeros(1).numpy()  # fails if torch and NumPy do not fit together
        import convert_to_deit  # noqa: F401 (so that a missing copy is reported here)
        from datasets import DATA_SETS  # noqa: F401 (fails if it is DeiT's datasets.py)

        # DeiT's folder goes first, since the bundle may lie beside another main.py or utils.py.
        sys.path.insert(0, str(checkout))
        import main

        _require_modules_of(checkout)
    except UserError:
        raise
    except Exception as error:  # versions that do not fit can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "timm"):
            raise  # it is not installed here: errors.guard says what to do
        raise UserError(f"cannot import DeiT from {checkout} with the bundle in {BUNDLE}: "
                        f"{type(error).__name__}: {one_line(error)}; activate the environment "
                        f"that has the requirements, or type {sys.executable} -m pip install -r "
                        "requirements.txt (torch before 2.3 needs 'numpy<2'); copy all files that "
                        "README.md names, datasets.py too"
                        ) from error
    skip_pretrained_cfg(main)
    return main


def _require_modules_of(checkout: Path) -> None:
    """Raise UserError if a module of DeiT's was imported from elsewhere."""
    for path in checkout.glob("*.py"):
        file = getattr(sys.modules.get(path.stem), "__file__", None)
        if file and path.stem not in OURS and Path(file).resolve() != path.resolve():
            raise UserError(f"DeiT's module {path.stem} was imported from {file} instead of "
                            f"{path}: rename that file, or take its folder out of PYTHONPATH")


# Newer torch, timm and Pillow


def restore_pil_interp() -> None:
    """Give ``timm.data.transforms`` its ``_pil_interp`` back, which DeiT HEAD imports.

    Needed with timm 0.5.4 or newer, where ``str_to_pil_interp`` took its place.
    """
    from timm.data import transforms

    if not hasattr(transforms, "_pil_interp") and hasattr(transforms, "str_to_pil_interp"):
        transforms._pil_interp = transforms.str_to_pil_interp


def restore_posterize() -> None:
    """Let Pillow's ``posterize`` keep 0 bits again, as timm's RandAugment asks it to: all black.

    Needed with Pillow 13 or newer, which refuses that, for the recipe of ImageNet.
    """
    from PIL import ImageOps

    posterize = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else image.point(
        [0] * 256 * len(image.getbands()))


def skip_pretrained_cfg(main: Any) -> None:
    """Make DeiT's models without timm's ``pretrained_cfg`` argument, which they do not take.

    Needed with timm 0.6 or newer, whose ``create_model`` passes it.
    """
    main.create_model = make_model


def make_model(name: str, **kwargs: Any) -> Any:
    """A model that is registered with timm; arguments that are None are left out, as in timm."""
    from timm.models import model_entrypoint

    return model_entrypoint(name)(**{key: value for key, value in kwargs.items()
                                     if value is not None})


def silence_known_warnings() -> None:
    """Drop warnings about DeiT's age or a missing GPU; rank 0 shows others, one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.simplefilter("ignore", FutureWarning)  # timm's modules, torch's mixed precision
    warnings.simplefilter("ignore", DeprecationWarning)
    # DeiT's models replace timm's; torch after 2.6 says on GPUs which one a barrier uses; DeiT's
    # default of 10 data workers is more than small machines have cores.
    warnings.filterwarnings("ignore", message=r"Overwriting \w+ in registry|barrier\(\): using|"
                            "This DataLoader will create|.*CUDA is not available|"
                            ".*Found no NVIDIA driver")
    if (os.environ.get("RANK") or "0") != "0":
        warnings.simplefilter("ignore")


# No GPU


def run_on_cpu(main: Any) -> None:
    """Make DeiT, which expects GPUs, run on the CPU, with one or several processes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mixed precision would use a GPU that is there
    use_gloo()
    sum_meters_on_cpu(main)
    wait_for_no_gpu()
    wrap_without_device_ids()
    keep_mixup_targets_on_cpu()


def use_gloo() -> None:
    """DeiT's ``init_distributed_mode`` knows only nccl, and selects a GPU for each process."""
    import torch

    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **rest: init("gloo", **rest)
    torch.cuda.set_device = lambda device: None


def sum_meters_on_cpu(main: Any) -> None:
    """DeiT's ``SmoothedValue`` sums over processes in a tensor on cuda."""
    import torch

    def sum_over_processes(meter):
        if torch.distributed.is_initialized():
            sums = torch.tensor([meter.count, meter.total], dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            meter.count, meter.total = int(sums[0]), sums[1].item()

    main.utils.SmoothedValue.synchronize_between_processes = sum_over_processes


def wait_for_no_gpu() -> None:
    """DeiT's ``engine`` calls ``torch.cuda.synchronize`` after every step."""
    import torch

    torch.cuda.synchronize = lambda device=None: None


def wrap_without_device_ids() -> None:
    """DeiT passes ``device_ids``, which torch refuses for a model on the CPU."""
    import torch

    class DistributedDataParallelOnCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, **kwargs):
            super().__init__(module, **kwargs)

    torch.nn.parallel.DistributedDataParallel = DistributedDataParallelOnCpu


def keep_mixup_targets_on_cpu() -> None:
    """Mixup puts its targets on cuda up to timm 0.4.12; later ones follow the batch."""
    from timm.data import mixup

    *others, device = mixup.mixup_target.__defaults__
    if device == "cuda":
        mixup.mixup_target.__defaults__ = (*others, "cpu")
