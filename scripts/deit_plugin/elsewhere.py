"""Where data that are missing may be instead: a level up, one or two down, or misspelt."""
import itertools
import os
import re
from pathlib import Path
from typing import Tuple

MOST_FOLDERS = 500  # not to search a whole disk for somebody who passed their home folder


def advice(layout: Tuple[str, ...], root: Path, missing: str) -> str:
    """What to pass or to rename, or "" if the data are nowhere near.

    layout: what ``root`` must contain, as patterns of ``glob``; missing: a path below ``root`` that
    does not exist.
    """
    if root.is_file():
        return f"{root} is a file: pass a folder"
    if root == root.parent:  # /
        return ""
    absent = [pattern for pattern in layout if not any(root.glob(pattern))]
    below = filter(_is_readable, itertools.chain(root.glob("*"), root.glob("*/*")))
    here = [root, *sorted(itertools.islice(below, MOST_FOLDERS))]
    above = [root.parent, *filter(_is_readable, sorted(root.parent.glob(_loose(root.name))))]
    for folder in here + above if absent else ():
        if folder != root and all(any(folder.glob(pattern)) for pattern in layout):
            return f"it is in {folder}: pass --data-path {folder}"
    changes = []
    for pattern in absent or [str(Path(missing).relative_to(root))]:
        places = sorted(path for folder in here for path in folder.glob(_loose(pattern)))
        if not places or any(root.glob(pattern)):  # it has appeared: another process downloads
            return ""
        place = places[0].with_name("*" + places[0].suffix) if "*" in pattern else places[0]
        found, wanted = place.relative_to(root).parts[0], Path(pattern).parts[0]
        if found != wanted and found.lower() == wanted.lower():  # the name at the top is wrong
            place, pattern = root / found, wanted
        changes.append(f"{place} to {root / pattern}")
    return f"move or rename {', '.join(changes)}"


def _is_readable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def _loose(pattern: str) -> str:
    """The pattern for upper and lower case, and for .jpg also another ending of images."""
    loose = re.sub("[a-zA-Z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return loose.replace(".[jJ][pP][gG]", ".[jJpPwW]*")
