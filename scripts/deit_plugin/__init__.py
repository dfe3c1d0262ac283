"""The adaptation of facebookresearch/deit, whose files are not edited, only patched in memory.

``finetune.py`` runs this in each process. It imports DeiT's ``main`` module with our ``datasets``,
restores names that newer torch and timm have dropped, and replaces functions in ``main``'s
namespace by the methods of one ``Run`` that are named after them. Then DeiT's own ``main(args)``
trains, in its own order, which the docstring of ``Run`` lists.

The launch and its surroundings
    launcher.py     torch's launcher, with one error line instead of its tracebacks
    surroundings.py guards against what shells, clusters and earlier launches left behind
    gpus.py         counts this machine's GPUs
    errors.py       UserError, and how a process ends
    checkout.py     finds DeiT and imports its main
    versions.py     patches for newer torch, timm and Pillow
    cpu.py          patches for a machine without a GPU

What is to be trained, from what, on what
    options.py      DeiT's flags and ours -> args and Plan
    output.py       --output_dir: Start (what a run starts from), log.txt, run.json, checkpoints
    weights.py      loads pretrained weights into a model; makes a finished model from a checkpoint
    data.py         the train images and those to evaluate on; hold_out.py: --hold-out
    elsewhere.py    suggests where missing data may lie
    recipe.py       the settings of the run, compared with the published recipe
    provenance.py   versions, commits, machines and checksums, for run.json
    check.py        --check

Training
    run.py          class Run, the methods that replace DeiT's functions
    loaders.py      persistent data workers; random numbers; each test image in one process only
    accumulation.py --accum-iter: four stand-ins for arguments of DeiT's train_one_epoch
    evaluation.py   accuracies and loss over all processes; predictions
    machines.py     lets the processes compare what they were launched with
    narrator.py     what a run prints; progress.py: a line every half minute; words.py: its words

Imports are acyclic, and every module may import errors.py. Mistakes that a user can fix raise
errors.UserError. Importing this package puts the bundle's folder in front of sys.path, so that
``datasets`` is ours and not another module or package of that name.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
