"""What every head of a policy reads, and what it has to answer; heads know of no other head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.backbones.decoder import DecoderBackbone, KVCache
from actok.policies.base import PolicyBatch

__all__ = ["Emitted", "Head", "Seen"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the backbone has made of B observations.

    Attributes:
        backbone: to go on with.
        cache: keys and values of K positions.
        real: bool [B, K], False on padding.
        last: float [B, W], hidden state of the last real position.
        next_position: int64 [B], of the token that follows.
        anchor: float32 [B, P], proprioception in raw units, or None.
    """

    backbone: DecoderBackbone
    cache: KVCache
    real: Bool[Tensor, "B K"]
    last: Float[Tensor, "B W"]
    next_position: Int[Tensor, "B"]
    anchor: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.real)

    def detach(self) -> Seen:
        """What a head reads that shall not train the backbone."""
        return replace(self, cache=self.cache.detach(), last=self.last.detach())

    def read(self, ids: Int[Tensor, "B n"], real: Bool[Tensor, "B n"]) -> tuple[Float[Tensor, "B n W"], Seen]:
        """Read on, token after token (causally): hidden states, and what is seen then. Padding stands on the right."""
        count = ids.shape[1]
        steps = real.long().cumsum(1)
        own = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril() & real[:, None]
        own = own | torch.eye(count, dtype=torch.bool, device=ids.device)
        mask = torch.cat([self.real[:, None].expand(-1, count, -1), own], 2)
        places = self.next_position[:, None] + (steps - 1).clamp(min=0)
        hidden, cache = self.backbone.run(self.backbone.embed(ids), places, mask, self.cache)
        end = (steps[:, -1] - 1).clamp(min=0)
        last = torch.where(real.any(1)[:, None], hidden[torch.arange(len(ids)), end], self.last)
        return hidden, replace(
            self,
            cache=cache,
            real=torch.cat([self.real, real], 1),
            last=last,
            next_position=self.next_position + steps[:, -1],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Emitted:
    """What a head gives for B observations: the fields of `Acted` that are its own."""

    actions: Float[np.ndarray, "B T D"]
    valid: Bool[np.ndarray, "B"]
    reasons: Sequence[str | None]
    passes: int
    codes: Int[np.ndarray, "B n"] | None
    seconds: Mapping[str, float]
    clipped: Int[np.ndarray, "B"]


class Head(nn.Module, ABC):
    """One way from what the backbone saw to actions."""

    @abstractmethod
    def losses(self, seen: Seen, batch: PolicyBatch) -> dict[str, Tensor]:
        """Losses by name, unweighted."""

    @abstractmethod
    def act(self, seen: Seen, *, generator: torch.Generator | None, deadline: float | None) -> Emitted:
        """Actions in raw units; `deadline` is a moment of `time.perf_counter`, or None."""
