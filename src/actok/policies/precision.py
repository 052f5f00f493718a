"""How exactly a policy computes when it acts: in float32, or under bfloat16 autocast, as its training may have.

Autocast rounds the matrices of linear layers and convolutions to bfloat16 each time that one is used; all else (tables,
norms, the sum that runs through the layers) stays in float32. `round_matrices` rounds the same ones once: what comes out
is the same, bit for bit, and they take half the memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from actok.core import ConfigError

# As torch calls the first, and as trainings call the second (`TrainConfig.precision`).
PRECISIONS = ("float32", "bf16")
# Layers whose parameters autocast rounds whenever they are used.
_ROUNDED = (nn.Linear, nn.modules.conv._ConvNd)

__all__ = ["PRECISIONS", "check_precision", "computing", "exactly", "round_matrices"]


def check_precision(precision: str) -> str:
    """The name itself. Raises ConfigError for one that is none of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    return precision


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network computes in that precision. In float32 nothing is changed, whatever is around it."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast, if there is one around it, does nothing: actions are decoded in float32."""
    return torch.autocast(device.type, enabled=False)


def round_matrices(network: nn.Module) -> None:
    """Hold in bfloat16 what autocast would round to it anyway. What another kind of layer reads too stays as it is."""
    shared = {id(p) for m in network.modules() if not isinstance(m, _ROUNDED) for p in m.parameters(recurse=False)}
    for module in network.modules():
        if isinstance(module, _ROUNDED):
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in shared:
                    parameter.data = parameter.data.to(torch.bfloat16)
