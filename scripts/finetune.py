#!/usr/bin/env python3
"""What each process of a run executes: DeiT's main(args), patched by the package deit_plugin."""
import sys

from deit_plugin import checkout, errors


def main():
    """Fine-tune, with DeiT's flags and ours on the command line."""
    errors.die_with_launcher()
    deit = checkout.import_main()
    import datasets  # ours, as import_main has made sure
    from deit_plugin import check, cpu, options, output
    from deit_plugin.run import Run

    args = options.parse(deit, datasets.DATA_SETS, sys.argv[1:])
    if args.device == "cpu":
        cpu.patch(deit)
    if args.check:
        sys.exit(check.report(deit, args))
    options.check_gpus(args)
    folder = output.RunFolder(args)
    if args.rank == 0 and not args.eval:
        folder.claim()
    start = folder.find_start(args)
    if start.epoch < args.epochs:
        Run(deit, args, folder, start).train()
    elif args.rank == 0:
        print(f"{start.path} has all {args.epochs} epochs: nothing left to train; for more, pass "
              "it to --resume, with more --epochs and another --output_dir")


if __name__ == "__main__":
    errors.guard(main)
