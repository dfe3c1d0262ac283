"""A line every half minute that tells how far a long job is."""
import time
from datetime import timedelta
from typing import Any, Callable, Iterable, Iterator

SECONDS_BETWEEN_LINES = 30


def duration(seconds: float) -> str:
    """As hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def follow(items: Iterable[Any], total: int, what: str, images_per_item: float,
           say: Callable[[str], None], details: Callable[[], str] = str) -> Iterator[Any]:
    """Yield the items, and say from time to time how many were done.

    what: what they are, such as "step"; images_per_item: over all processes; details: called when a
    line is due.
    """
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - began)
            say(f"  {what} {done} of {total}{details()}, {rate * images_per_item:.1f} images/s, "
                f"about {duration((total - done) / rate)} to go")
        yield item
