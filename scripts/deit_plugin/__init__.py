"""The adaptation of facebookresearch/deit, whose files are not edited, only patched in memory.

On each machine, ``finetune.py`` decides once what a launch does, and refuses what cannot work.
torch's launcher then starts ``worker.py`` for each process. It imports DeiT's ``main`` module with
our ``datasets``, and replaces functions in its namespace by the methods of one ``Run`` that are
named after them. Then DeiT's own ``main(args)`` trains, in its own order, which the docstring of
``Run`` lists.

Deciding
    flags.py        the table of all flags, DeiT's and ours, and their parser
    data.py         the train images and those to evaluate on; --hold-out
    job.py          Job: all that a run depends on; its settings, and how they differ from others
    run_folder.py   --output_dir: what a run starts from, and what it leaves there
    launcher.py     the machines, and torch's launcher
    check.py        --check

Training
    worker.py       one process of a run
    run.py          class Run, the methods that replace DeiT's functions
    loaders.py      persistent data workers; random numbers; each test image in one process only
    accumulation.py --accum-iter: four stand-ins for arguments of DeiT's train_one_epoch

Both
    deit.py         finds and imports DeiT; patches for newer torch, timm, Pillow, and for no GPU
    weights.py      loads pretrained weights into a model; makes a finished model from a checkpoint
    evaluation.py   accuracies and loss over all processes; predictions
    narrator.py     what a run prints
    provenance.py   versions, commits, checksums, and what the processes of a run are
    errors.py       UserError, and how a process ends

Imports are acyclic, and every module may import errors.py. Mistakes that a user can fix raise
errors.UserError. Importing this package puts the bundle's folder in front of sys.path, so that
``datasets`` is ours and not another module or package of that name.
"""
import sys
from pathlib import Path

_BUNDLE = Path(__file__).resolve().parent.parent.parent
_other = getattr(sys.modules.get("datasets"), "__file__", None)
if _other and Path(_other).resolve().parent != _BUNDLE:
    raise ImportError(f"another module named datasets was imported before, {_other}: start a new "
                      "Python for this bundle")
sys.path.insert(0, str(_BUNDLE))
