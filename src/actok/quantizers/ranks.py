"""The processes of a data-parallel run: sums, pools and copies that leave every process with the same numbers.

With one process everything here is free and leaves no trace in a compiled graph.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "from_first", "pooled", "total"]


def alone() -> bool:
    """True where there is one process."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def total(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    return x if alone() else _total(x)


def pooled(x: Tensor) -> Tensor:
    """The x of all processes, of the same shape in each, stacked along the first axis."""
    return x if alone() else _pooled(x)


def from_first(x: Tensor) -> Tensor:
    """The x of the first process."""
    return x if alone() else _from_first(x)


@torch.compiler.disable
def _total(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x


@torch.compiler.disable
def _pooled(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.compiler.disable
def _from_first(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.broadcast(x, src=0)
    return x
