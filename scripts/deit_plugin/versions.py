"""What newer torch and timm need to run DeiT, which was written for torch 1.7 and timm 0.3.2.

Each patch does nothing on versions that do not need it.
"""
import importlib
import inspect
import os
import sys
import warnings

from .errors import UserError

NEEDED = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "scipy": "scipy",
          "PIL": "Pillow"}


def check():
    """Raise UserError for a Python or package that is missing or does not fit."""
    if sys.version_info < (3, 8):  # noqa: UP036 (it is said to those who have it)
        raise UserError(f"Python {sys.version.split()[0]} is too old: 3.8 or newer is needed")
    for name, package in NEEDED.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported by {sys.executable} ({error}): "
                            f"pip install {package}") from error
    import numpy
    import torch

    try:
        torch.from_numpy(numpy.zeros(1))
    except RuntimeError as error:  # torch before 2.3 with NumPy 2
        raise UserError(f"torch {torch.__version__} cannot use numpy {numpy.__version__}: "
                        "pip install 'numpy<2'") from error


def found():
    """The versions of what a run stands on, as 'torch 2.15.0, torchvision ...'."""
    return ", ".join(f"{name} {importlib.import_module(name).__version__}"
                     for name in ("torch", "torchvision", "timm"))


def restore_pil_interp():
    """Give ``timm.data.transforms`` its ``_pil_interp`` back, which DeiT HEAD imports.

    Needed from timm 0.5.4 on, where ``str_to_pil_interp`` took its place.
    """
    from timm.data import transforms

    if not hasattr(transforms, "_pil_interp") and hasattr(transforms, "str_to_pil_interp"):
        transforms._pil_interp = transforms.str_to_pil_interp


def skip_pretrained_cfg(main):
    """Make DeiT's models without timm's ``pretrained_cfg`` argument, which they do not take.

    Needed from timm 0.6 on (where ``create_model`` has it). As ``create_model`` does, arguments
    that are None are left out.
    """
    from timm.models import create_model, model_entrypoint

    if "pretrained_cfg" not in inspect.signature(create_model).parameters:
        return

    def create(model_name, **kwargs):
        given = {name: value for name, value in kwargs.items() if value is not None}
        return model_entrypoint(model_name)(**given)

    main.create_model = create


# What DeiT's age makes newer versions say: (category, start of the message, why it is harmless).
AGE_WARNINGS = (
    (FutureWarning, r"Importing from timm\.models\.", "timm 0.9 moved registry and layers"),
    (UserWarning, r"Overwriting \w+ in registry", "timm 0.9: DeiT's models replace timm's"),
    (FutureWarning, r"`torch\.cuda\.amp\.", "torch 2.4 renamed autocast and GradScaler"),
    (DeprecationWarning, r"`torch\.cuda\.amp\.", "the same, as later versions say it"),
)


def quieten_age():
    """Drop warnings that come from DeiT's age alone; rank 0 shows others, each in one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for category, message, _ in AGE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
