#!/usr/bin/env python3
"""Many damaged files, and many processes at once: each must end as it should, every time."""

import argparse
import collections
import functools
import hashlib
import io
import random
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate  # noqa: E402  found, like the next, through the path set above
import hostile  # noqa: E402
import loopback  # noqa: E402
from hostile import datasets  # noqa: E402

# Hostile files

def fuzz(cases, seed):
    """Print the failures among the cases, and what came of all; return how many failed."""
    counts, slowest, largest = collections.Counter(), 0, 0
    with hostile.workshop() as shop:
        for case in cases:
            name = list(hostile.TARGETS)[case % len(hostile.TARGETS)]
            rng = random.Random(f"{seed} {case}")
            damage = functools.partial(hostile.TARGETS[name].damage, rng=rng)
            verdict, seconds, growth = shop.run(name, damage)
            slowest, largest = max(slowest, seconds), max(largest, growth)
            counts[name, verdict if verdict in hostile.GOOD else "FAILED"] += 1
            if verdict not in hostile.GOOD:
                print(f"case {case}, {name}: {verdict.strip().splitlines()[-1][:300]}\n"
                      f"  again: fuzz --seed {seed} --only {case}", flush=True)
    return tell(counts, f"slowest {slowest:.1f} s, largest {largest / 2**20:.0f} MiB")


def tell(counts, more):
    """Print the outcomes of each kind of trial; return how many failed."""
    for name in dict.fromkeys(name for name, _ in counts):
        print(f"{name:28}" + ", ".join(f"{count} {outcome}" for (kind, outcome), count
                                       in sorted(counts.items()) if kind == name))
    failed = sum(count for (_, outcome), count in counts.items() if outcome == "FAILED")
    print(f"{sum(counts.values())} in all, {failed} failed; {more}")
    return failed


# Races

class Race:
    """Processes that build CIFAR-10 at the same moment from a server that counts."""

    def __init__(self, server, wanted, folder, processes=8):
        self.server, self.wanted, self.folder, self.processes = server, wanted, folder, processes

    def start(self, *disks):
        """Processes that build the data set, on the disks in turn."""
        self.server.downloads.clear()
        return loopback.start([functools.partial(self._build, disks[i % len(disks)])
                               for i in range(self.processes)])

    def _build(self, disk):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress bars
            built = digests(disk)
        assert built == self.wanted

    def run(self, *disks):
        """Let them build, and check that each disk was downloaded to once."""
        codes = loopback.exit_codes(self.start(*disks))
        assert codes == [0] * self.processes, f"the processes ended with {codes}"
        assert len(self.server.downloads) == len(disks), f"downloads: {self.server.downloads}"
        self.check(*disks)

    def check(self, *disks):
        """Check that nothing but the data set is left."""
        for disk in disks:
            left = {path.name for path in disk.iterdir()} - hostile.HOUSEKEEPING
            assert left == {hostile.CIFAR}, f"on the disk are {left}"

    def one_disk(self, rng):
        """All share a folder that is not there yet."""
        self.run(self.folder / "disk")

    def two_nodes(self, rng):
        """Half of them have another disk."""
        self.run(self.folder / "node 0", self.folder / "node 1")

    def killed_half_way(self, rng):
        """All are killed while the first has half of the archive; the next ones recover."""
        disk, server = self.folder / "half", self.server
        for event in (server.stalled, server.resume):
            event.clear()
        server.stall = True
        children = self.start(disk)
        assert server.stalled.wait(60)
        time.sleep(0.1)
        loopback.kill(children)
        server.stall = False
        server.resume.set()
        assert not (disk / hostile.CIFAR).exists()
        self.run(disk)

    def killed_at_any_time(self, rng):
        """All are killed after a while, whatever they do then; the next ones recover."""
        disk = self.folder / "any"
        children = self.start(disk)
        time.sleep(rng.uniform(0, 0.3))
        loopback.kill(children)
        codes = loopback.exit_codes(self.start(disk))
        assert codes == [0] * self.processes, f"the processes ended with {codes}"
        assert len(self.server.downloads) <= 1, f"downloads: {self.server.downloads}"
        self.check(disk)


def digests(disk):
    """What tells the images and labels of both splits from all others."""
    found = []
    for is_train in (True, False):
        args = argparse.Namespace(data_set="cifar10", data_path=str(disk), input_size=32)
        dataset, _ = datasets.build_dataset(is_train, args)
        found.append(hashlib.md5(dataset.data.tobytes() + bytes(dataset.targets)).hexdigest())
    return found


@contextmanager
def raceway():
    """A temporary folder, and a server of CIFAR-10 that offers 50 and 20 images."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are fewer images than the official ones
        folder = Path(folder)
        for name in ("made", "served"):
            (folder / name).mkdir()
        archive = folder / "made" / "cifar-10-python.tar.gz"
        made = generate.cifar(folder / "made", "cifar10", 50, 20, archive=archive)
        with loopback.serving(folder / "served") as server, \
                loopback.offer(server, archive, datasets.CIFAR10, made):
            yield server, digests(folder / "made"), folder / "disks"


SCENARIOS = (Race.one_disk, Race.two_nodes, Race.killed_half_way, Race.killed_at_any_time)


def race(times, seed):
    """Run every scenario that many times; print what came of all, and return how many failed."""
    counts, rng, begin = collections.Counter(), random.Random(seed), time.monotonic()
    with raceway() as (server, wanted, disks):
        for _ in range(times):
            for scenario in SCENARIOS:
                name, outcome = scenario.__name__.replace("_", " "), "passed"
                try:
                    scenario(Race(server, wanted, disks), rng)
                except AssertionError as error:
                    outcome = "FAILED"
                    print(f"{name}: {error}", flush=True)
                counts[name, outcome] += 1
                shutil.rmtree(str(disks))
    return tell(counts, f"{time.monotonic() - begin:.0f} s")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", metavar="WHAT")
    commands.required = True
    command = commands.add_parser("fuzz", help="damaged checkpoints and data sets")
    command.add_argument("--count", type=int, default=1000, metavar="N",
                         help="how many (default: %(default)s)")
    command.add_argument("--only", type=int, metavar="CASE", help="this one")
    command = commands.add_parser("race", help="8 processes that build CIFAR-10 at once")
    command.add_argument("--times", type=int, default=50, metavar="N",
                         help="how often (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0, metavar="N",
                             help="of everything random (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.what == "race":
        failed = race(args.times, args.seed)
    else:
        failed = fuzz(range(args.count) if args.only is None else [args.only], args.seed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
