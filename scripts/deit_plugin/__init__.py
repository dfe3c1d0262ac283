"""The adaptation of facebookresearch/deit: nothing of its files is edited, only patched in memory.

``finetune.py`` runs this in each process. DeiT's ``main`` module is imported with our ``datasets``,
the names that newer torch and timm have lost are put back, and in ``main``'s namespace the methods
of one ``Run`` take the place of the DeiT functions they are named after. Then DeiT's own
``main(args)`` trains, in its own order.

    versions.py     patches for newer torch and timm
    checkout.py     finds DeiT and imports its main, patched
    cpu.py          patches for a machine without a GPU
    options.py      DeiT's flags and ours; which of them differ from the published recipe
    weights.py      pretrained weights into a model: exactly the head may be missing
    output.py       --output_dir: what to continue, log.txt, checkpoints
    loaders.py      data workers that last; each test image once
    accumulation.py --accum-iter
    evaluation.py   top-1, top-5 and loss over all processes
    run.py          class Run
    check.py        --check
    launcher.py     torch's launcher
    errors.py       UserError, and how a process ends

Imports go one way, and errors.py is everybody's. Whatever a user can mend raises its UserError.
"""
