"""The DeiT checkout: where it is, and the names in it that the adaptations hold on to."""
import importlib
import os
import sys
from pathlib import Path

import versions
from failures import Refusal

BUNDLE = Path(__file__).resolve().parent.parent
OUR_MODULES = ("datasets", "oxford_flowers_dataset", "oxford_pets_dataset")

# Every DeiT commit from December 2020 (1d38fa4) to HEAD (7e160fe) has these.
SEAMS = {
    "main": ("get_args_parser", "main", "build_dataset", "create_model", "create_optimizer",
             "create_scheduler", "get_state_dict", "train_one_epoch", "evaluate", "utils"),
    "utils": ("save_on_master", "init_distributed_mode", "setup_for_distributed", "SmoothedValue",
              "MetricLogger"),
}


def find():
    """The folder of the DeiT checkout: ``DEIT_DIR``, or the one this bundle was copied into.

    Raises Refusal if there is none, or if both are there and differ.
    """
    named = os.environ.get("DEIT_DIR")
    copied_into = BUNDLE if _is_checkout(BUNDLE) else None
    if not named:
        if copied_into is None:
            raise Refusal(f"no DeiT found: {BUNDLE} is no DeiT checkout and DEIT_DIR is not set; "
                          "git clone https://github.com/facebookresearch/deit and "
                          "export DEIT_DIR=.../deit")
        return copied_into
    folder = Path(named).expanduser().resolve()
    if not _is_checkout(folder):
        raise Refusal(f"DEIT_DIR={named} is no DeiT checkout (main.py, engine.py, utils.py): set "
                      "it to what git clone https://github.com/facebookresearch/deit made")
    if copied_into not in (None, folder):
        raise Refusal(f"DEIT_DIR={named}, but this bundle lies in another DeiT checkout, "
                      f"{copied_into}: unset DEIT_DIR or use that checkout's scripts")
    return folder


def _is_checkout(folder):
    return all((folder / name).is_file() for name in ("main.py", "engine.py", "utils.py"))


def import_main(folder):
    """Import DeiT's ``main`` with our ``datasets``; return the module.

    Raises Refusal if a module of DeiT's or of ours cannot be imported, if another package took
    the name ``datasets``, or if a seam is gone.
    """
    sys.path[:0] = [str(BUNDLE)] + ([str(folder)] if folder != BUNDLE else [])
    for name in OUR_MODULES:
        _import_ours(name)
    main = _import("main", f"DeiT in {folder}")
    for module, names in SEAMS.items():
        holder = main if module == "main" else getattr(main, module)
        missing = [name for name in names if not hasattr(holder, name)]
        if missing:
            raise Refusal(f"DeiT in {folder} has no {module}.{missing[0]}: known to work are its "
                          "commits from 1d38fa4 (December 2020) to 7e160fe (March 2024)")
    return main


def _import_ours(name):
    module = _import(name, f"the bundle in {BUNDLE}")
    found = getattr(module, "__file__", None)
    if not found or Path(found).resolve() != BUNDLE / f"{name}.py":
        raise Refusal(f"{name} was found at {found}, not at {BUNDLE / name}.py: "
                      "another package of that name is loaded first; unset PYTHONPATH, or start "
                      "Python without it")
    if name == "datasets" and not hasattr(module, "DATA_SETS"):
        raise Refusal(f"{found} is DeiT's own: copy the bundle's datasets.py over it, or run the "
                      "bundle from its own folder with DEIT_DIR")


def _import(name, whose):
    try:
        return importlib.import_module(name)
    except Exception as error:  # versions too new for it can make it raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refusal(f"cannot import {name} of {whose} with {versions.found()}: {reason} "
                      "(README.md has the versions that work)") from error
