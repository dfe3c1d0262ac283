"""The DeiT checkout: where it is, and its ``main`` module with our data sets."""
import os
import sys
from pathlib import Path
from types import ModuleType

from . import versions
from .errors import UserError, one_line

BUNDLE = Path(__file__).resolve().parent.parent.parent
# Modules of which DeiT's folder may have its own, or a copy from another time.
OURS = ("convert_to_deit", "datasets", "oxford_flowers_dataset", "oxford_pets_dataset")


def deit_folder() -> Path:
    """The folder ``DEIT_DIR``, or else the one that this bundle was copied into."""
    return Path(os.environ.get("DEIT_DIR") or BUNDLE).expanduser().resolve()


def _require_modules_of(folder: Path) -> None:
    """Raise UserError if a module of DeiT's was imported from elsewhere."""
    for path in folder.glob("*.py"):
        file = getattr(sys.modules.get(path.stem), "__file__", None)
        if file and path.stem not in OURS and Path(file).resolve() != path.resolve():
            raise UserError(f"DeiT's module {path.stem} was imported from {file} instead of "
                            f"{path}: rename that file, or take its folder out of PYTHONPATH")


def import_main() -> ModuleType:
    """DeiT's ``main`` module with our ``datasets``, patched for newer torch and timm.

    Raises UserError if DeiT is not there or cannot be imported.
    """
    folder, named = deit_folder(), os.environ.get("DEIT_DIR", "")
    if not all((folder / name).is_file() for name in ("main.py", "engine.py", "utils.py")):
        raise UserError(f"DEIT_DIR={named or '(not set)'}: {folder} is not a DeiT checkout, since "
                        "main.py, engine.py or utils.py is missing; type git clone "
                        "https://github.com/facebookresearch/deit && export DEIT_DIR=$PWD/deit")
    versions.silence_known_warnings()
    try:
        versions.restore_pil_interp()
        versions.restore_posterize()
        import torch

        torch.zeros(1).numpy()  # fails if torch and NumPy do not fit together
        import convert_to_deit  # noqa: F401 (so that a missing copy is reported here)
        from datasets import DATA_SETS  # noqa: F401 (fails if it is DeiT's datasets.py)

        # DeiT's folder goes first, since the bundle may lie beside another main.py or utils.py.
        sys.path.insert(0, str(folder))
        import main

        _require_modules_of(folder)
    except UserError:
        raise
    except Exception as error:  # versions that do not fit can raise anything
        raise UserError(f"cannot import DeiT from {folder} with the bundle in {BUNDLE}: "
                        f"{type(error).__name__}: {one_line(error)}; copy all files that README.md "
                        f"names, datasets.py too; for versions that work, type {sys.executable} -m "
                        "pip install -r requirements.txt (torch before 2.3 needs 'numpy<2')"
                        ) from error
    versions.skip_pretrained_cfg(main)
    return main
