"""The processes that train together."""

from __future__ import annotations

import torch


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and how many there are: (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
