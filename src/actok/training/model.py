"""The module that a run optimises: a codec, and the semantic objectives it is trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actok.alignment.features import FeatureBatch
from actok.core import CodecBatch, CodecOutput
from actok.training.sources import TrainBatch

if TYPE_CHECKING:
    from actok.alignment.objectives import SemanticHeads
    from actok.tokenizers.codec import Codec

# Weight decay acts on the weights of these.
DECAYED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)

__all__ = ["Aligned", "parameter_groups", "pinned"]


class Aligned(nn.Module):
    """A codec and the semantic objectives it is trained on, as the one module that accelerate prepares."""

    def __init__(self, codec: Codec, heads: SemanticHeads | None) -> None:
        super().__init__()
        self.codec, self.heads = codec, heads

    def forward(self, batch: TrainBatch) -> CodecOutput:
        """The codec's output, its losses with those of the objectives."""
        output = self.codec(batch.chunks)
        if self.heads is None:
            return output
        semantic = self.heads(output, batch.chunks, batch.features, self.codec)
        return replace(output, losses={**output.losses, **semantic})


def parameter_groups(codec: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the codec's parameters, in its order: with weight decay (weights of linear maps and convolutions) and without."""
    decayed = {
        id(parameter)
        for module in codec.modules()
        if isinstance(module, DECAYED)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    }
    parameters = [p for p in codec.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def pinned(batch: TrainBatch) -> TrainBatch:
    """In page-locked memory, from which copies to the device do not wait."""

    def pinned(values: Any) -> dict[str, Any]:
        return {k: v.contiguous().pin_memory() if isinstance(v, Tensor) else v for k, v in vars(values).items()}

    chunks = CodecBatch(
        **{
            **pinned(batch.chunks),
            "structure": {k: v.contiguous().pin_memory() for k, v in batch.chunks.structure.items()},
        }
    )
    return TrainBatch(
        chunks=chunks, features=None if batch.features is None else FeatureBatch(**pinned(batch.features))
    )
