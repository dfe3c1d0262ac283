"""Settings and numbers in words, for messages."""
from typing import Any, Dict, List


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
    """What differs from the other settings, each as 'flag value (whose: other value)'."""
    return [f"{flag_of(name)} {settings.get(name)} ({whose}: {other})"
            for name, other in others.items() if settings.get(name) != other]
