"""What newer torch, timm and Pillow need to run DeiT, written for torch 1.7 and timm 0.3.2.

Each patch has no effect on versions that do not need it.
"""
import os
import warnings
from typing import Any


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
