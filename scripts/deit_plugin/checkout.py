"""The DeiT checkout: where it is, and its ``main`` module with our data sets."""
import importlib
import os
import sys
from pathlib import Path

from . import versions
from .errors import UserError, one_line

BUNDLE = Path(__file__).resolve().parent.parent.parent
CLONE = "git clone https://github.com/facebookresearch/deit"

# What is patched in DeiT: every commit from 1d38fa4 (December 2020) to 7e160fe (HEAD) has these.
PATCHED = {
    "main": ("get_args_parser", "main", "build_dataset", "create_model", "create_optimizer",
             "create_scheduler", "get_state_dict", "train_one_epoch", "evaluate", "utils"),
    "utils": ("save_on_master", "init_distributed_mode", "setup_for_distributed", "SmoothedValue",
              "MetricLogger"),
}


def find():
    """The folder of the DeiT checkout: ``DEIT_DIR``, or else the one this bundle was copied into.

    Raises UserError if there is none.
    """
    named = os.environ.get("DEIT_DIR")
    folder = Path(named).expanduser().resolve() if named else BUNDLE
    if all((folder / name).is_file() for name in ("main.py", "engine.py", "utils.py")):
        return folder
    if named:
        raise UserError(f"DEIT_DIR={named} is not a DeiT checkout, with main.py, engine.py and "
                        f"utils.py: set it to the folder that {CLONE} made")
    raise UserError(f"no DeiT found: {BUNDLE} is not a DeiT checkout and DEIT_DIR is not set: "
                    f"{CLONE} && export DEIT_DIR=$PWD/deit")


def import_main(folder):
    """Import DeiT's ``main`` with our ``datasets``; return the module.

    Raises UserError if a module of DeiT's or ours cannot be imported, if another took the name
    ``datasets``, or if something to patch is not there.
    """
    sys.path.insert(0, str(BUNDLE))
    _import("convert_to_deit", f"the bundle in {BUNDLE}")
    datasets = _import("datasets", f"the bundle in {BUNDLE}")
    if not hasattr(datasets, "DATA_SETS"):
        raise UserError(f"datasets was imported from {datasets.__file__}, which is not the "
                        "bundle's: copy the bundle's datasets.py over DeiT's, or use the bundle "
                        "from its own folder with DEIT_DIR; and unset PYTHONPATH")
    sys.path.insert(0, str(folder))
    main = _import("main", f"DeiT in {folder}")
    for module, names in PATCHED.items():
        owner = main if module == "main" else getattr(main, module)
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise UserError(f"DeiT in {folder} has no {module}.{missing[0]}: its commits from "
                            "1d38fa4 (December 2020) to 7e160fe (March 2024) are known to work")
    return main


def _import(name, whose):
    try:
        return importlib.import_module(name)
    except Exception as error:  # versions that do not fit can make it raise anything
        raise UserError(f"cannot import {name} of {whose} with {versions.found()}: "
                        f"{type(error).__name__}: {one_line(error)} (README.md has the versions "
                        "that work)") from error
