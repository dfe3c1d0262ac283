#!/usr/bin/env python3
"""What each process of a run executes: DeiT's main(args), patched by the package deit_plugin."""
import os
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from deit_plugin import checkout, errors, surroundings  # noqa: E402


def stand_in_for_launcher() -> None:
    """Set the variables that a launcher would set for one process, as for a debugger.

    Under --check, WORLD_SIZE tells the number of processes of the launch to come.
    """
    if not os.environ.get("RANK") and "--check" not in sys.argv:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))


def main() -> None:
    """Fine-tune, with DeiT's flags and ours on the command line."""
    errors.die_with_launcher()
    surroundings.use_short_temporary_folder()
    stand_in_for_launcher()
    deit = checkout.import_main()
    import datasets  # ours, as import_main has made sure
    from deit_plugin import check, cpu, data, gpus, options, output
    from deit_plugin.run import Run

    args, plan = options.parse(deit, datasets.DATA_SETS, sys.argv[1:])
    if args.device == "cpu":
        cpu.patch(deit)
    if plan.check:
        sys.exit(check.check(deit, args, plan))
    gpus.describe(args.device, int(os.environ.get("NPROC_PER_NODE") or 1))
    folder = output.RunFolder(args.output_dir)
    if not args.eval:
        folder.check()
    start = output.find_start(args, plan)
    run = Run(deit, args, plan, data.load(args), folder, start)
    if start.epoch < args.epochs:
        run.run_deit()
    elif args.rank == 0:
        print(f"{start.path} has all {args.epochs} epochs: nothing left to train; for more, pass "
              "it to --resume, with more --epochs and another --output_dir")


if __name__ == "__main__":
    errors.guard(main)
