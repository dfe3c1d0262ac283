"""What the processes of a run, which may be on several machines, tell each other."""
import json
from typing import Any, Dict, List

import torch
import torch.distributed

from .errors import UserError
from .job import differing

LONGEST = 2**16  # characters of what a process tells


def gather(facts: Dict[str, Any], device: str) -> List[Dict[str, Any]]:
    """Collect the ``facts`` of every rank, which must be serialisable as JSON."""
    text = json.dumps(facts).ljust(LONGEST).encode()
    # all_gather_object of torch 1.7.1 would use the rank as the number of a GPU of this machine.
    own = torch.tensor([*text], device=device)
    everyone = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [json.loads(bytes(its.tolist())) for its in everyone]


def require_same(everyone: List[Dict[str, Any]], rank: int) -> None:
    """Raise UserError if a rank of another machine was launched differently.

    Such ranks would train different models, or wait for each other forever.
    """
    for other, facts in enumerate(everyone):
        different = differing(everyone[rank], facts, f"rank {other}")
        if different:
            raise UserError(f"rank {rank} has {', '.join(different)}: pass the same on all "
                            "machines, with the same data and one shared --output_dir")
