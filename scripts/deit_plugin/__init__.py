"""The adaptation of facebookresearch/deit, whose files are not edited, only patched in memory.

``finetune.py`` runs this in each process. It imports DeiT's ``main`` module with our ``datasets``,
restores names that newer torch and timm have dropped, and replaces functions in ``main``'s
namespace by the methods of one ``Run`` that are named after them. Then DeiT's own ``main(args)``
trains, in its own order, which the docstring of ``Run`` lists.

    checkout.py     finds DeiT and imports its main, patched
    versions.py     patches for newer torch and timm
    cpu.py          patches for a machine without a GPU
    options.py      DeiT's flags and ours -> args and Plan; what differs from the published recipe
    data.py         the train and test images of a run
    elsewhere.py    where data that are missing may be instead
    output.py       --output_dir: what a run starts from, log.txt, checkpoints
    weights.py      pretrained weights into a model: exactly the head may be missing
    loaders.py      persistent data workers; each test image once
    accumulation.py --accum-iter: four stand-ins for DeiT's train_one_epoch
    evaluation.py   top-1, top-5 and loss over all processes
    run.py          class Run
    check.py        --check
    launcher.py     torch's launcher
    errors.py       UserError, and how a process ends
    words.py        settings and numbers in words

Imports are acyclic, and every module may import errors.py. Mistakes that a user can fix raise
errors.UserError.
"""
