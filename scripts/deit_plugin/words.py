"""Settings and numbers in words, for messages."""
from typing import Any, Dict, Iterable, List


def count(number: int, what: str) -> str:
    """'1 process', '2 processes'."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def flag_of(name: str) -> str:
    """The flag of an argument as DeiT spells it; flags and words are returned unchanged."""
    if name.startswith("--") or " " in name:
        return name
    return "--" + (name if name == "num_workers" else name.replace("_", "-"))


def differing(settings: Dict[str, Any], others: Dict[str, Any], whose: str) -> List[str]:
    """What differs from the other settings, each as 'flag value (whose: other value)'.

    Only names in both are compared: DeiT's commits have different flags.
    """
    def in_words(name: str) -> str:
        counted = name in ("train images", "test images", "steps per epoch")
        return f"{settings[name]} {name}" if counted else f"{flag_of(name)} {settings[name]}"

    return [f"{in_words(name)} ({whose}: {other})"
            for name, other in others.items() if name in settings and settings[name] != other]


def some(names: Iterable[str]) -> str:
    """The first five names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def unequal(own: List[str], others: List[str], here: str, there: str) -> str:
    """What differs between two lists of class names."""
    parts = [f"only {where}: {some(names)}" for where, names in (
        (here, sorted(set(own) - set(others))), (there, sorted(set(others) - set(own)))) if names]
    return "; ".join(parts) or "the same names in another order"
