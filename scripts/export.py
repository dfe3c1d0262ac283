#!/usr/bin/env python3
"""Write a fine-tuned model in timm's own layout, with its classes and its preprocessing.

    python scripts/export.py --resume out/birds/best_checkpoint.pth --output birds/

Then timm.create_model("local-dir:/path/of/birds", pretrained=True) makes it, anywhere.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import deit, errors  # noqa: E402

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names that timm looks for
MARK = "checkpoint_crc32"  # in config.json: which checkpoint was exported, and that we wrote it


def main() -> None:
    """Export the model. Raises UserError."""
    parser = argparse.ArgumentParser(description="Write a fine-tuned model in timm's own layout.")
    parser.add_argument("--resume", required=True, type=os.path.expanduser, metavar="CHECKPOINT",
                        help="best_checkpoint.pth of a run, or its checkpoint.pth")
    parser.add_argument("--output", required=True, type=os.path.expanduser, metavar="FOLDER",
                        help="folder for model.safetensors and config.json")
    parser.add_argument("--trust", action="store_true",
                        help="load a checkpoint that contains more than tensors and plain values; "
                             "this runs the code in it")
    args = parser.parse_args()
    deit.silence_known_warnings()
    import timm

    try:
        from timm.models._hub import load_model_config_from_path  # noqa: F401
    except ImportError:
        raise errors.UserError(f"timm {timm.__version__} cannot load a model from a folder: type "
                               f"{sys.executable} -m pip install 'timm>=1.0.16'") from None
    from deit_plugin import provenance, weights

    check_output(args.output, args.resume)
    finished = weights.finished(args.resume, args.trust)
    name, model_args = timm_model(finished.settings)
    model = timm.create_model(name, num_classes=len(finished.classes), **model_args)
    model.load_state_dict(finished.model.state_dict())
    kept = ("architecture", "fixed_input_size", "first_conv", "classifier", "num_classes")
    model.pretrained_cfg = {**{key: model.pretrained_cfg[key] for key in kept},
                            **preprocessing(finished)}
    write(args.output, model, model_args, {
        "label_names": finished.classes, MARK: provenance.of_weights(args.resume)["crc32"]})
    print(f"{args.output}: {name} with {len(finished.classes)} classes\nUse it with "
          f'timm.create_model("local-dir:{os.path.abspath(args.output)}", pretrained=True)')


def check_output(folder: str, checkpoint: str) -> None:
    """Raise UserError if the export cannot be written, or would replace files from elsewhere."""
    import convert_to_deit

    if os.path.exists(folder) and not os.path.isdir(folder):
        raise errors.UserError(f"--output {folder} is a file: pass a folder")
    paths = [os.path.join(folder, name) for name in (WEIGHTS, CONFIG)]
    for path in paths:
        try:
            convert_to_deit.check_output(path, "--resume", checkpoint)
        except OSError as error:
            raise errors.UserError(f"--output {folder}: {path} cannot be written: {error}"
                                   ) from error
    for path in filter(os.path.exists, paths):
        if not is_export(folder):
            raise errors.UserError(f"--output {folder}: {path} does not belong to an export of "
                                   "this version: pass a new folder, or delete that file")


def is_export(folder: str) -> bool:
    """Whether the config.json in the folder is one of ours."""
    try:
        return MARK in json.loads(Path(folder, CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def write(folder: str, model: Any, model_args: Dict[str, Any], facts: Dict[str, Any]) -> None:
    """Write both files. Raises OSError if the disk fails; both are then as before.

    timm itself would write in place, readable for this user only, and end a full disk in a
    traceback.
    """
    from safetensors.torch import save
    from timm.models._hub import save_config_for_hf

    from convert_to_deit import atomic_write, flush_to_disk

    with atomic_write(os.path.join(folder, WEIGHTS)) as weights:
        weights.write(save(model.state_dict()))
        flush_to_disk(weights)  # whatever can fail has been done when config.json is replaced
        with atomic_write(os.path.join(folder, CONFIG)) as config:
            save_config_for_hf(model, config.name, facts, model_args)


def timm_model(settings: Dict[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """timm's name and arguments for the model of a run. Raises UserError if timm has none."""
    from timm.models import is_model, model_entrypoint

    from deit_plugin import weights

    name, size, arguments = settings["model"], settings["input_size"], {}
    if name == "moco_v3_vit_small_patch16_224":
        name, arguments = "vit_small_patch16_224", {"num_heads": 12}
    elif not is_model(name) or not model_entrypoint(name).__module__.startswith("timm."):
        raise errors.UserError(f"--model {name} is DeiT's own, so timm could not load the export: "
                               "use the checkpoint with scripts/predict.py")
    if size != weights.implied_input_size(name):
        arguments["img_size"] = size
    return name, arguments


def preprocessing(finished: Any) -> Dict[str, Any]:
    """What timm needs to know to make the same transform as that of ``finished``."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    size, resize = finished.settings["input_size"], finished.transform.transforms[0]
    if not hasattr(resize, "interpolation"):
        raise errors.UserError(f"--input-size {size} on ImageNet is not resized, which timm cannot "
                               "express: use the checkpoint with scripts/predict.py")
    crop = size / resize.size
    if math.floor(size / crop) != resize.size:  # timm resizes to this size
        crop = size / (resize.size + 0.5)
    return {"input_size": (3, size, size), "crop_pct": crop, "crop_mode": "center",
            "interpolation": resize.interpolation.value, "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD}


if __name__ == "__main__":
    errors.guard(main)
