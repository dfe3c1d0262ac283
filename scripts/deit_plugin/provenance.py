"""What was run: versions, commits, machines and the file that training began with."""
import json
import os
import platform
import re
import socket
import subprocess
import sys
import zipfile
import zlib
from argparse import Namespace
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.distributed

from . import deit

LONGEST = 2**16
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "PIL")
DECISIVE = PACKAGES[:3]  # other versions of these train another model


def of_launch(command: str) -> Dict[str, Any]:
    """Facts about this launch, for run.json."""
    return {
        "started": now(), "ended": None,
        "command": command,
        "versions": versions(), "packages": packages(),
        "deit": {**of_checkout(deit.folder(), "main.py"), "crc32": of_deit()},
        "bundle": {**of_checkout(deit.BUNDLE, "scripts/finetune.py"), "crc32": of_bundle()},
    }


def versions() -> Dict[str, Any]:
    """Those of Python and of the packages that a run uses."""
    return {"python": platform.python_version(), "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(), **{
                name: getattr(import_module(name), "__version__", None) for name in PACKAGES}}


def packages() -> List[str]:
    """All installed packages, as pip writes them."""
    return sorted({f"{package.metadata['Name']}=={package.version}"
                   for package in metadata.distributions()})


def of_bundle() -> str:
    """Checksum of this bundle's own Python files, which may have been copied without their git."""
    own = [deit.BUNDLE / f"{name}.py" for name in deit.OURS]
    return _of_files([*deit.BUNDLE.glob("scripts/**/*.py"), *own])


def of_deit() -> str:
    """Checksum of DeiT's own Python files, of those that ``deit.import_main`` has imported."""
    return _of_files([path for path in deit.folder().glob("*.py")
                      if path.stem in sys.modules and path.stem not in deit.OURS])


def _of_files(paths: List[Path]) -> str:
    content = repr(sorted((path.name, path.read_bytes()) for path in paths))
    return f"{zlib.crc32(content.encode()):08x}"


def decisive(launch: Dict[str, Any]) -> Dict[str, Any]:
    """What of ``of_launch`` must be the same on all machines, by name."""
    return {"checksum of this bundle's code": launch["bundle"]["crc32"],
            "checksum of DeiT's code": launch["deit"]["crc32"],
            # without the build, as in 2.6.0+cu124
            **{f"version of {name}": str(launch["versions"][name]).split("+")[0]
               for name in DECISIVE}}


def of_process(args: Namespace) -> Dict[str, str]:
    """The host and the device of this process."""
    if args.device == "cuda":
        device = torch.cuda.get_device_name(torch.cuda.current_device())
    else:
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        device = cpu[1] if cpu else platform.machine()
    return {"host": socket.gethostname(), "device": device}


def in_words(places: List[Dict[str, Any]]) -> List[str]:
    """Each machine's host and device, and its versions where not all machines have the same.

    places: what ``of_process`` and ``versions`` return, for each rank.
    """
    differ = [name for name in places[0] if name not in ("host", "device")
              and any(place[name] != places[0][name] for place in places)]
    return sorted({", ".join([f"{place['host']}: {place['device']}",
                              *(f"{name} {place[name]}" for name in differ)])
                   for place in places})


def of_everyone(facts: Dict[str, Any], device: str) -> List[Dict[str, Any]]:
    """The ``facts`` of every rank; they must be serialisable as JSON, in LONGEST characters."""
    text = json.dumps(facts).ljust(LONGEST).encode()
    # all_gather_object of torch 1.7.1 would use the rank as the number of a GPU of this machine.
    own = torch.tensor([*text], device=device)
    everyone = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [json.loads(bytes(its.tolist())) for its in everyone]


def of_checkout(folder: Path, file: str) -> Dict[str, Any]:
    """Commit of the git checkout that tracks ``file``, and whether tracked files were modified.

    The commit is None without git, or if the file was copied into another checkout.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", file) is not None
    return {"folder": str(folder),
            "commit": _git(folder, "rev-parse", "HEAD") if tracked else None,
            "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
            if tracked else None}


def _git(folder: Path, *words: str) -> Optional[str]:
    try:
        return subprocess.run(["git", "-C", str(folder), *words], check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def of_weights(path: str) -> Dict[str, str]:
    """Path and checksum of a checkpoint file. A file that was moved or renamed keeps its checksum.

    A zip file, as torch writes it, has checksums of its members at its end, so it is not read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = repr([(member.filename, member.file_size, member.CRC)
                            for member in archive.infolist()]).encode()
    else:
        content = Path(path).read_bytes()
    return {"path": os.path.realpath(path), "crc32": f"{zlib.crc32(content):08x}"}


def now() -> str:
    """The time of day, with its time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
