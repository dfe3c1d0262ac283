#!/usr/bin/env python3
"""One process of a run: trains the job that finetune.py has written. It reads no flag.

torch's launcher starts it as `worker.py FOLDER` for each process, and tells it its rank. It refuses
only what nobody could know before: that another machine was launched differently, for example.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # scripts/

from deit_plugin import deit, errors  # noqa: E402


def main() -> None:
    """Train the job in the folder that the command line names."""
    errors.die_with_launcher()
    deit_main = deit.import_main()
    from deit_plugin import data, job
    from deit_plugin.run import Run

    folder = sys.argv[1]
    decided = job.read(folder, int(os.environ["RANK"]))
    if decided.args.device == "cpu":
        deit.run_on_cpu(deit_main)
    Run(deit_main, decided, data.read(folder)).run_deit()


if __name__ == "__main__":
    errors.guard(main)
