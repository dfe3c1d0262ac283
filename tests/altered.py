"""finetune.py after the lines of Python in $ALTERED, by which a test takes out or breaks a part."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import finetune  # noqa: E402
from deit_plugin import errors  # noqa: E402

if __name__ == "__main__":
    exec(os.environ["ALTERED"])
    errors.guard(finetune.main)
