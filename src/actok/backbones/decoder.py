"""What a policy needs of a backbone: a prompt of images and text as embeddings, and passes over masks, positions and a cache.

A backbone is a vision-language model whose language part is a stack of decoder layers with rotary positions. A policy runs
it in pieces: the prefix (images, text, state) once, then whatever follows, each piece over the keys and values of those
before. Which position sees which is the policy's business alone; the backbone applies the mask that it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

__all__ = ["DecoderBackbone", "KVCache", "Prefix"]


@dataclass(frozen=True, kw_only=True, eq=False)
class KVCache:
    """Keys (already turned by their positions) and values of K positions, layer by layer: each [B, H, K, E].

    H is the number of key-value heads, E the size of a head. Gradients flow through it unless it is detached.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """K."""
        return int(self.keys[0].shape[2])

    def select(self, columns: Tensor | slice) -> KVCache:
        """Only these positions (a slice, or bool [K], or int64 indices)."""
        return KVCache(
            keys=tuple(k[:, :, columns] for k in self.keys), values=tuple(v[:, :, columns] for v in self.values)
        )

    def detach(self) -> KVCache:
        """The same numbers without their history: nothing that reads them trains what made them."""
        return KVCache(keys=tuple(k.detach() for k in self.keys), values=tuple(v.detach() for v in self.values))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """The embedded prompt of a batch, padded on the right.

    Attributes:
        embeds: float [B, L, W].
        real: bool [B, L], False on padding.
        positions: int64 [B, L], or [3, B, L] for models with three rotary axes (Qwen-VL).
        next_position: int64 [B], the position of the first token that follows.
        causal: whether a token of it sees only those before it; else all of them see each other.
    """

    embeds: Float[Tensor, "B L W"]
    real: Bool[Tensor, "B L"]
    positions: Int[Tensor, "..."]
    next_position: Int[Tensor, "B"]
    causal: bool

    def mask(self) -> Bool[Tensor, "B L L"]:
        """Who sees whom. Padding sees itself, so that no row is empty; nothing else sees it."""
        length = self.real.shape[1]
        seen = self.real[:, None, :].expand(-1, length, -1)
        if self.causal:
            seen = seen.tril()
        return seen | torch.eye(length, dtype=torch.bool, device=self.real.device)

    def last(self) -> Int[Tensor, "B"]:
        """Index of the last real token of each prompt."""
        return self.real.long().cumsum(1).argmax(1)


class DecoderBackbone(nn.Module, ABC):
    """A trainable vision-language model, run piece by piece.

    Attributes:
        name: Hub id, folder name or preset, for messages and `meta`.
        width: W of the hidden states.
        layers, heads, kv_heads, head_dim: of the decoder; an expert that reads its cache has the same.
        rotary_base: base of its rotary positions.
        views: how many images a prompt may have at most; None: any number.
    """

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_base: float
    views: int | None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the embedding table, and columns of `logits`."""

    @property
    @abstractmethod
    def text_size(self) -> int:
        """Ids that its text tokenizer uses: 0 to text_size - 1."""

    @property
    @abstractmethod
    def special_ids(self) -> Mapping[str, int]:
        """Ids that no code may replace, by name; "end" and "pad" where it has them."""

    @abstractmethod
    def resize(self, rows: int) -> None:
        """Give the embedding table (and an output layer of its own) at least that many rows; it never shrinks.

        New rows are drawn around the mean of the old ones, with their spread.
        """

    @abstractmethod
    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without any special tokens."""

    @abstractmethod
    def text_of(self, ids: Sequence[int]) -> str:
        """The inverse of `text_ids`, as far as the tokenizer has one."""

    @abstractmethod
    def prefix(self, texts: Sequence[str], images: Sequence[np.ndarray]) -> Prefix:
        """Embed B prompts with the same views: each of `images` is uint8 [B, H, W, 3]; none is allowed.

        Raises DataError for other images or more views than it takes.
        """

    @abstractmethod
    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n W"]:
        """Embeddings of ids as they enter the first layer (scaled where the model scales them)."""

    @abstractmethod
    def run(
        self,
        embeds: Float[Tensor, "B n W"],
        positions: Int[Tensor, "..."],
        mask: Bool[Tensor, "B n M"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Tensor, "B n W"], KVCache]:
        """One pass of n positions over the K cached ones and themselves (M = K + n).

        `positions` are [B, n] or, from `Prefix`, [3, B, n]. Returns the hidden states after the final norm, and the cache
        with the n new positions at its end; the cache that was given is unchanged.
        """

    def run_prefix(self, prefix: Prefix) -> tuple[Float[Tensor, "B L W"], KVCache]:
        """The pass over the prompt itself, before anything that follows it: `run` with its own positions and mask.

        A model that gives its first layers more than the embeddings (Qwen3-VL's deep visual features) does so here.
        """
        return self.run(prefix.embeds, prefix.positions, prefix.mask())

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "B n W"], rows: slice | None = None) -> Float[Tensor, "B n V"]:
        """Over `vocab_size` ids, or over those of `rows` only: what training on codes of one table needs."""

    @abstractmethod
    def spec(self) -> Mapping[str, object]:
        """JSON values from which `actok.policies` builds an untrained twin: {"kind": ..., ...}."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Small files that the twin needs beside its weights (text tokenizer, preprocessing), by name."""
