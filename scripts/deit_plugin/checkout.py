"""The DeiT checkout: where it is, and its ``main`` module with our data sets."""
import importlib
import os
import sys
from pathlib import Path

from . import versions
from .errors import UserError, one_line

BUNDLE = Path(__file__).resolve().parent.parent.parent


def import_main():
    """DeiT's ``main`` module with our ``datasets``, patched for newer torch and timm."""
    folder = find()
    versions.check_numpy()
    versions.quieten_age()
    versions.restore_pil_interp()
    sys.path.insert(0, str(BUNDLE))
    _import("convert_to_deit", f"the bundle in {BUNDLE}")
    datasets = _import("datasets", f"the bundle in {BUNDLE}")
    if not hasattr(datasets, "DATA_SETS"):
        raise UserError(f"datasets was imported from {datasets.__file__}, which is not the "
                        "bundle's: copy the bundle's datasets.py over DeiT's, or use the bundle "
                        "from its own folder with DEIT_DIR; and unset PYTHONPATH")
    sys.path.insert(0, str(folder))
    main = _import("main", f"DeiT in {folder}")
    versions.skip_pretrained_cfg(main)
    return main


def find():
    """The folder of DeiT: ``DEIT_DIR``, or else the one this bundle was copied into."""
    named = os.environ.get("DEIT_DIR")
    folder = Path(named).expanduser().resolve() if named else BUNDLE
    if all((folder / name).is_file() for name in ("main.py", "engine.py", "utils.py")):
        return folder
    searched = f"DEIT_DIR={named}" if named else f"DEIT_DIR is not set, and {BUNDLE}"
    raise UserError(f"{searched} is no DeiT checkout, with main.py, engine.py and utils.py: git "
                    "clone https://github.com/facebookresearch/deit && export DEIT_DIR=$PWD/deit")


def _import(name, whose):
    try:
        return importlib.import_module(name)
    except Exception as error:  # versions that do not fit can make it raise anything
        raise UserError(f"cannot import {name} of {whose} with {versions.found()}: "
                        f"{type(error).__name__}: {one_line(error)}; README.md has the versions "
                        f"that work, and {sys.executable} -m pip install -r requirements.txt "
                        "installs them") from error
