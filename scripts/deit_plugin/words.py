"""Settings and numbers in words, for messages."""
from typing import Any, Dict, List

from datasets import first_five

# Settings that are not command-line arguments.
BATCH, STEPS = "effective batch size", "steps per epoch"
TRAIN_IMAGES, TEST_IMAGES = "train images", "test images"
HELD_OUT = "checksum of the held-out images' names"


def count(number: int, what: str) -> str:
    """'1 process', '2 processes'."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def flag_of(name: str) -> str:
    """The flag of an argument as DeiT spells it; words are returned unchanged."""
    if " " in name:
        return name
    return "--" + (name if name in ("num_workers", "output_dir") else name.replace("_", "-"))


def differing(settings: Dict[str, Any], others: Dict[str, Any], whose: str) -> List[str]:
    """What differs from the other settings, each as '--flag value (whose: other value)'.

    Only names in both are compared: DeiT's commits have different flags.
    """
    def in_words(name: str) -> str:
        counted = name in (STEPS, TRAIN_IMAGES, TEST_IMAGES)  # printed as "2040 train images"
        return f"{settings[name]} {name}" if counted else f"{flag_of(name)} {settings[name]}"

    return [f"{in_words(name)} ({whose}: {other})"
            for name, other in others.items() if name in settings and settings[name] != other]


def unequal(own: List[str], others: List[str], here: str, there: str) -> str:
    """What differs between two lists of class names."""
    parts = [f"only {where}: {first_five(names)}" for where, names in (
        (here, sorted(set(own) - set(others))), (there, sorted(set(others) - set(own)))) if names]
    return "; ".join(parts) or "the same names in another order"
