"""Which DeiT this trainer stands for: MINI_DEIT_ERA is 2020, 2021 or head."""
import os

ERA = os.environ.get("MINI_DEIT_ERA", "head")
if ERA not in ("2020", "2021", "head"):
    raise ValueError(f"MINI_DEIT_ERA={ERA!r}: must be 2020, 2021 or head")

HEAD = ERA == "head"
SINCE_2021 = ERA != "2020"
