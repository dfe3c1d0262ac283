"""The DeiT checkout: where it is, and its ``main`` module with our data sets."""
import importlib
import os
import sys
from pathlib import Path

from . import versions
from .errors import UserError, one_line

BUNDLE = Path(__file__).resolve().parent.parent.parent
OUR_MODULES = ("convert_to_deit", "oxford_flowers_dataset", "oxford_pets_dataset", "datasets")

# What is patched in DeiT: every commit from 1d38fa4 (December 2020) to 7e160fe (HEAD) has these.
PATCHED = {
    "main": ("get_args_parser", "main", "build_dataset", "create_model", "create_optimizer",
             "create_scheduler", "get_state_dict", "train_one_epoch", "evaluate", "utils"),
    "utils": ("save_on_master", "init_distributed_mode", "setup_for_distributed", "SmoothedValue",
              "MetricLogger"),
}
CLONE = "git clone https://github.com/facebookresearch/deit"


def find():
    """The folder of the DeiT checkout: ``DEIT_DIR``, or the one this bundle was copied into.

    Raises UserError if there is none, or if both are there and differ.
    """
    named = os.environ.get("DEIT_DIR")
    copied_into = BUNDLE if _is_checkout(BUNDLE) else None
    if not named:
        if copied_into is None:
            raise UserError(f"no DeiT found: {BUNDLE} is not a DeiT checkout and DEIT_DIR is not "
                            f"set: {CLONE} && export DEIT_DIR=$PWD/deit")
        return copied_into
    folder = Path(named).expanduser().resolve()
    if not _is_checkout(folder):
        raise UserError(f"DEIT_DIR={named} is not a DeiT checkout, with main.py, engine.py and "
                        f"utils.py: set it to the folder that {CLONE} made")
    if copied_into not in (None, folder):
        raise UserError(f"DEIT_DIR={named}, but this bundle lies in another DeiT checkout, "
                        f"{copied_into}: unset DEIT_DIR, or use that checkout's scripts")
    return folder


def _is_checkout(folder):
    return all((folder / name).is_file() for name in ("main.py", "engine.py", "utils.py"))


def import_main(folder):
    """Import DeiT's ``main`` with our ``datasets``; return the module.

    Raises UserError if a module of DeiT's or ours cannot be imported, if another package took the
    name ``datasets``, or if something to patch is not there.
    """
    sys.path[:0] = [str(BUNDLE)] + ([str(folder)] if folder != BUNDLE else [])
    for name in OUR_MODULES:
        _import_ours(name)
    main = _import("main", f"DeiT in {folder}")
    for module, names in PATCHED.items():
        owner = main if module == "main" else getattr(main, module)
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise UserError(f"DeiT in {folder} has no {module}.{missing[0]}: its commits from "
                            "1d38fa4 (December 2020) to 7e160fe (March 2024) are known to work")
    return main


def _import_ours(name):
    module = _import(name, f"the bundle in {BUNDLE}")
    found = getattr(module, "__file__", None)
    if not found or Path(found).resolve() != BUNDLE / f"{name}.py":
        raise UserError(f"{name} was imported from {found}, not from {BUNDLE / name}.py: another "
                        "package of that name comes first; unset PYTHONPATH")
    if name == "datasets" and not hasattr(module, "DATA_SETS"):
        raise UserError(f"{found} is DeiT's own: copy the bundle's datasets.py over it, or use the "
                        "bundle from its own folder with DEIT_DIR")


def _import(name, whose):
    try:
        return importlib.import_module(name)
    except Exception as error:  # versions that do not fit can make it raise anything
        raise UserError(f"cannot import {name} of {whose} with {versions.found()}: "
                        f"{type(error).__name__}: {one_line(error)} (README.md has the versions "
                        "that work)") from error
