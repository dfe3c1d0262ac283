#!/usr/bin/env python3
"""What every process of a run executes: find DeiT, adapt it from outside, call its main(args)."""
import sys

import deit
import failures
import options
import versions


def main():
    """Fine-tune, with DeiT's flags and those of options.py on the command line."""
    failures.watch_launcher()
    try:
        deit_main = import_deit()
        import datasets  # ours, which deit.import_main has made sure of

        run(deit_main, options.parse(deit_main, datasets.DATA_SETS))
    except failures.Refusal as refusal:
        verdict = "\nverdict: not ready" if "--check" in sys.argv else ""
        raise failures.Refusal(f"{refusal}{verdict}") from refusal


def import_deit():
    """DeiT's ``main`` module, adapted to the versions that are here."""
    folder = deit.find()
    versions.check()
    versions.adapt_before_import()
    deit_main = deit.import_main(folder)
    versions.adapt(deit_main)
    return deit_main


def run(deit_main, args):
    """Run DeiT's ``main(args)`` with a Run in the place of its functions."""
    import check
    import cpu
    import moco_v3_vit  # noqa: F401  (registers its model with timm)
    from run import Run

    if args.device == "cpu":
        cpu.adapt(deit_main)
    this_run = Run(deit_main, args)
    if args.check:
        check.report(this_run)
        return
    this_run.prepare()
    if this_run.is_over:
        if this_run.rank == 0:
            print(f"{this_run.start_path} has all {args.epochs} epochs: nothing left to train")
        return
    this_run.stand_in()
    deit_main.main(args)
    this_run.finish()


if __name__ == "__main__":
    failures.guard(main)
