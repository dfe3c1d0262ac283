"""``--check``: all that a launch checks, and every image, without training; ends in a verdict."""
import os
import sys

import torch

import failures
import ports
from failures import Refusal
from oxford_flowers_dataset import one_line

BROKEN_SHOWN = 20


def report(run):
    """Check everything, say each outcome in a line, then the verdict; exit 2 if it is not ready."""
    problems = 0
    for what, check in [*run.checks(), ("port", check_port), ("images", lambda: decode(run))]:
        try:
            print(f"ok       {what}: {check()}", flush=True)
        except Refusal as refusal:
            problems += 1
            print(f"PROBLEM  {what}: {refusal}", flush=True)
    if problems:
        print(f"verdict: not ready, {problems} of the above to mend")
        sys.exit(failures.REFUSED)
    print("verdict: ready")


def check_port():
    """The port on which several machines, or the user's choice, would meet."""
    port = os.environ.get("MASTER_PORT")
    if not port:
        return "a free one is taken at launch"
    if os.environ.get("NODE_RANK", "0") == "0":
        ports.check(port)
    return port


def decode(run):
    """Decode every image of both splits, in the data workers; raises Refusal listing the broken."""
    parts = [dataset for dataset, _ in run.datasets.values()]
    if not parts:
        raise Refusal("not looked at, since there is no data set")
    images = torch.utils.data.ConcatDataset([Decoding(part) for part in parts])
    loader = torch.utils.data.DataLoader(images, batch_size=16, collate_fn=list,
                                         num_workers=run.args.num_workers,
                                         worker_init_fn=failures.die_with_parent)
    broken, done = [], 0
    for errors in loader:
        done += len(errors)
        broken += filter(None, errors)
        _show_progress(done, len(images))
    if broken:
        listed = broken[:BROKEN_SHOWN]
        if len(broken) > BROKEN_SHOWN:
            listed.append(f"and {len(broken) - BROKEN_SHOWN} more")
        heading = f"{len(broken)} of {len(images)} are broken:"
        raise Refusal("\n           ".join([heading, *listed]))
    return f"all {len(images)} can be decoded"


class Decoding(torch.utils.data.Dataset):
    """Of each image of a data set, what is wrong with it: '' or one line that names its file."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.dataset.transform = None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            self.dataset[index]
            return ""
        except Exception as error:  # whatever it is, the image cannot be trained on
            return one_line(error)


def _show_progress(done, total):
    if not sys.stderr.isatty():
        return
    bar = "#" * (40 * done // total)
    end = "\r\033[K" if done == total else ""
    sys.stderr.write(f"\rdecoding [{bar:40}] {done} of {total}{end}")
    sys.stderr.flush()
