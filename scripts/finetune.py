#!/usr/bin/env python3
"""What each process of a run executes: DeiT's main(args), patched by the package deit_plugin."""
import sys

from deit_plugin import checkout, errors, versions


def main():
    """Fine-tune, with DeiT's flags and ours on the command line."""
    errors.die_with_launcher()
    folder = checkout.find()
    versions.check()
    versions.quieten_age()
    versions.restore_pil_interp()
    deit = checkout.import_main(folder)
    versions.skip_pretrained_cfg(deit)
    run(deit, sys.argv[1:])


def run(deit, arguments):
    """Run DeiT's ``main(args)`` with a Run in the place of its functions."""
    import datasets  # ours, as import_main has made sure
    from deit_plugin import check, cpu, models, options, output  # noqa: F401 (models: for timm)
    from deit_plugin.run import Run

    args = options.parse(deit, datasets.DATA_SETS, arguments)
    if args.device == "cpu":
        cpu.patch(deit)
    if args.check:
        return check.report(deit, args)
    options.check_gpus(args)
    folder = output.RunFolder(args, options.rank())
    folder.claim()
    start = folder.find_start(args)
    args.start_epoch = start.epoch
    if start.continues and start.epoch >= args.epochs:
        if not folder.contains(start.path):
            raise errors.UserError(f"--resume {start.path} has all {args.epochs} epochs: pass more "
                                   "--epochs to go on from it")
        if options.rank() == 0:
            print(f"{start.path} has all {args.epochs} epochs: nothing left to train")
        return None
    folder.begin(start.epoch, args.overwrite)
    this_run = Run(deit, args, folder, start)
    this_run.stand_in()
    deit.main(args)
    return this_run.finish()


if __name__ == "__main__":
    errors.guard(main)
