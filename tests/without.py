"""finetune.py with one adaptation taken out: $WITHOUT is its module and name."""
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import failures  # noqa: E402
import finetune  # noqa: E402

if __name__ == "__main__":
    module, name = os.environ["WITHOUT"].split(".")
    adaptation = importlib.import_module(module)
    assert callable(getattr(adaptation, name))
    setattr(adaptation, name, lambda *_: None)
    failures.guard(finetune.main)
