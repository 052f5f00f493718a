"""Codes of a frozen tokenizer, emitted in the passes that its layout (or a chosen block size) asks for.

Source: FASTer (arXiv 2512.04952), section 3.2: block-wise autoregression, eq. (3), positions with random spacing, codes
emitted by the backbone itself or by an action expert that reads its keys and values. Token-wise, parallel, prefix and
next-scale decoding are the same loop over another `DecodingPlan`. Within one sequence <BoBlk> ends text and begins blocks,
<EoBlk> ends them and text goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actok.backbones.decoder import DecoderBackbone, KVCache
from actok.core import ActionTokenizer, ChunkContext
from actok.policies.base import PolicyBatch
from actok.policies.blocks import (
    DecodingPlan,
    block_inputs,
    jittered_positions,
    pass_mask,
    plan,
    positions,
    training_inputs,
)
from actok.policies.expert import Expert
from actok.policies.heads import Emitted, Head, Seen
from actok.policies.precision import exactly
from actok.policies.sampling import SamplingConfig, rows_of_places, sample_block
from actok.policies.vocab import VocabularyMap

# Sequences of varying length are trained in plans whose length is a multiple of this, so that few of them are made.
LENGTH_STEP = 8
# The longest text, in tokens, that a policy says before it acts, or after.
MOST_TEXT = 64

__all__ = ["TokenHead", "read_on", "say", "text_losses"]


class TokenHead(Head):
    """Cross-entropy on codes, and their sampling under the tokenizer's constraint.

    Args:
        backbone: emits the codes, unless there is an expert of that `width`.
        tokenizer, horizon, embodiment: what the codes are of.
        vocab: of the backbone.
        block: of `policies.blocks.plan`; None: the layout's own blocks.
        spacing: k of the positions' random spacing; even, 0: none.
        sampling: how codes are drawn.
        expert_width: of an action expert; 0: none.
    """

    def __init__(
        self,
        backbone: DecoderBackbone,
        tokenizer: ActionTokenizer,
        vocab: VocabularyMap,
        *,
        horizon: int,
        embodiment: str,
        block: int | None,
        spacing: int,
        sampling: SamplingConfig,
        expert_width: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.horizon, self.embodiment = tokenizer, horizon, embodiment
        self.layout = tokenizer.layout_for(horizon, embodiment)
        self.block, self.spacing, self.sampling = block, spacing, sampling
        self.vocab = vocab
        self.coder: CodeExpert | None = None
        if expert_width:
            self.vocab = VocabularyMap.for_layouts("added", self.layout, 1)
            self.coder = CodeExpert(backbone, expert_width, self.vocab)
        self.plan = plan(self.layout, block)
        positions(self.plan, spacing)  # refuses an odd spacing
        self._plan_of = lru_cache(maxsize=None)(self._cut_plan)
        self.accuracy: dict[str, Tensor] = {}

    def _cut_plan(self, length: int) -> DecodingPlan:
        if self.layout.fixed_length is not None:
            return self.plan
        whole = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.layout.max_len)
        return plan(self.layout, self.block, length=whole)

    def losses(self, seen: Seen, batch: PolicyBatch) -> dict[str, Tensor]:
        """{"tokens": mean cross-entropy (nats a code) of all codes, each given the blocks before its own}, eq. (3).

        Deviation: the softmax of a position runs over the codes of its own table, not over the whole vocabulary. Nothing
        else can be drawn there (`sample_block`), and the table is a small part of the vocabulary.
        """
        known = batch.codes >= 0
        chosen = self._plan_of(int(known.sum(1).max()))
        codes = F.pad(batch.codes, (0, max(0, chosen.tokens - batch.codes.shape[1])), value=-1)[:, : chosen.tokens]
        known = codes >= 0
        ids = torch.where(known, self.vocab.to_lm(codes.clamp(min=0), self.layout), self.vocab.end)
        hidden, coder = self._hidden(seen, chosen, ids), self._coder(seen)
        total, right = hidden.new_zeros((), dtype=torch.float32), torch.zeros_like(known)
        table = self.layout.table[: chosen.tokens]
        for t in np.unique(table):
            where = torch.from_numpy(np.flatnonzero(table == t)).to(ids.device)
            rows = self.vocab.rows_of(int(t))
            logits = coder.logits(hidden[:, where], rows)
            wanted = (ids[:, where] - rows.start).masked_fill(~known[:, where], -100)
            total = total + F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
            if not self.training:
                right[:, where] = logits.argmax(-1) == wanted
        if not self.training:
            self.accuracy = self._accuracy(right, known)
        return {"tokens": total / known.sum()}

    def logits(self, seen: Seen, chosen: DecodingPlan, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
        """Of all N codes at once, under teacher forcing, over the whole vocabulary; `ids` are the vocabulary's."""
        return self._coder(seen).logits(self._hidden(seen, chosen, ids))

    def _hidden(self, seen: Seen, chosen: DecodingPlan, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N w"]:
        fed = training_inputs(chosen, ids, self.vocab.boblk)
        batch, slots = fed.shape
        if self.training:
            places = jittered_positions(chosen, self.spacing, batch=batch)
        else:
            places = positions(chosen, self.spacing)[None]
        places = places.to(fed.device) + seen.next_position[:, None]
        sees = torch.from_numpy(chosen.sees).to(fed.device)
        mask = torch.cat([seen.real[:, None].expand(-1, slots, -1), sees.expand(batch, -1, -1)], 2)
        coder = self._coder(seen)
        hidden, _ = coder.run(coder.embed(fed), places, mask, seen.cache)
        return hidden[:, torch.from_numpy(chosen.reads).to(hidden.device)]

    def _coder(self, seen: Seen) -> Any:
        return seen.backbone if self.coder is None else self.coder

    def _accuracy(self, right: Tensor, known: Tensor) -> dict[str, Tensor]:
        level = torch.from_numpy(self.layout.coords[: right.shape[1], 0]).to(right.device)
        return {
            "accuracy" if value < 0 else f"accuracy_{value}": right[:, level == value].sum()
            / known[:, level == value].sum()
            for value in level.unique().tolist()
        }

    # -- acting ---------------------------------------------------------------------------------------------------

    def act(self, seen: Seen, *, generator: torch.Generator | None, deadline: float | None) -> Emitted:
        """Emit codes pass by pass, then decode them.

        With a deadline the passes end at the first decodable prefix after it; where the layout has none, at the last.
        """
        begin = time.perf_counter()
        context = ChunkContext(horizon=self.horizon, embodiment=self.embodiment, anchor=seen.anchor)
        codes, passes = self.emit(seen, context, generator, deadline)
        emitted = time.perf_counter()
        found = codes.cpu().numpy()
        sequences: Any = found if (found >= 0).all() else [row[row >= 0] for row in found]
        with exactly(seen.real.device):
            decoded = self.tokenizer.decode(sequences, context)
        return Emitted(
            actions=np.asarray(decoded.actions, np.float32),
            valid=decoded.valid,
            reasons=decoded.reasons or [None] * len(seen),
            passes=passes,
            codes=found,
            seconds={"actions": emitted - begin, "decode": time.perf_counter() - emitted},
            clipped=decoded.clipped,
        )

    def emit(
        self, seen: Seen, context: ChunkContext, generator: torch.Generator | None, deadline: float | None
    ) -> tuple[Int[Tensor, "B n"], int]:
        """Codes, -1 behind the end of a sequence, and how many passes they took."""
        chosen, coder, cache, known = self.plan, self._coder(seen), seen.cache, seen.cache.length
        constraint = None if self.layout.total else self.tokenizer.constraint(context)
        places = positions(chosen, self.spacing).to(seen.real.device)
        codes = ids = seen.next_position.new_zeros(len(seen), 0)
        state = None
        for j in range(chosen.passes):
            fed = block_inputs(chosen, j, ids, self.vocab.boblk)
            first, last = chosen.slots[j], chosen.slots[j + 1]
            own = pass_mask(chosen, j, 0).to(fed.device).expand(len(seen), -1, -1)
            mask = torch.cat([seen.real[:, None].expand(-1, last - first, -1), own], 2)
            where = seen.next_position[:, None] + places[first:last]
            hidden, longer = coder.run(coder.embed(fed), where, mask, cache)
            cache = _kept(longer, chosen, first, last)
            rows = rows_of_places(self.layout, self.vocab, np.arange(chosen.edges[j], chosen.edges[j + 1]))
            block = sample_block(
                coder.logits(hidden[:, chosen.emits(j)], rows),
                self.layout,
                self.vocab,
                start=chosen.edges[j],
                config=self.sampling,
                constraint=constraint,
                state=state,
                generator=generator,
                first_id=rows.start,
            )
            codes, ids, state = torch.cat([codes, block.codes], 1), torch.cat([ids, block.ids], 1), block.state
            if bool(block.done.all()):
                break
            if deadline is not None and time.perf_counter() >= deadline and (enough := chosen.decodable(j + 1)):
                return codes[:, :enough], j + 1
        assert cache.length >= known
        return codes, j + 1


class CodeExpert(nn.Module):
    """An action expert with a table of codes of its own."""

    def __init__(self, backbone: DecoderBackbone, width: int, vocab: VocabularyMap) -> None:
        super().__init__()
        self.expert = Expert(backbone, width)
        self.table = nn.Embedding(vocab.embeddings, width)
        self.out = nn.Linear(width, vocab.embeddings, bias=False)

    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n w"]:
        """Of codes and control tokens."""
        return self.table(ids)

    def run(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """See `Expert.run`."""
        return self.expert.run(embeds, positions, mask, cache)

    def logits(self, hidden: Float[Tensor, "B n w"], rows: slice | None = None) -> Float[Tensor, "B n V"]:
        """Over the expert's own ids, or some of them."""
        return F.linear(hidden, self.out.weight if rows is None else self.out.weight[rows])


def _kept(cache: KVCache, chosen: DecodingPlan, first: int, last: int) -> KVCache:
    """Without the queries of the pass just made."""
    kept = chosen.kept[first:last]
    if kept.all():
        return cache
    before = np.ones(cache.length - (last - first), bool)
    return cache.select(torch.from_numpy(np.concatenate([before, kept])).to(cache.keys[0].device))


# -- text around the blocks ---------------------------------------------------------------------------------------


def text_losses(
    seen: Seen, texts: Sequence[str] | None, stop: int, before: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Seen]:
    """Mean cross-entropy (nats a token) of texts and the token `stop` that ends each, and what is seen after the texts.

    `before` are ids that are read first and not predicted. Without texts only `stop` is predicted.
    """
    backbone = seen.backbone
    said = [[]] * len(seen) if texts is None else backbone.text_ids(texts)
    device = seen.real.device
    if before is not None:
        seen = read_on(seen, before)
    targets, _ = _padded([[*ids, stop] for ids in said], device, fill=-100)
    hidden = seen.last[:, None]
    if any(said):
        ids, real = _padded(said, device)
        further, seen = seen.read(ids, real)
        hidden = torch.cat([hidden, further], 1)
    logits = backbone.logits(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), seen


def read_on(seen: Seen, rows: Sequence[Sequence[int]]) -> Seen:
    """What is seen after B sequences of ids, of whatever lengths, have been read."""
    if not any(rows):
        return seen
    return seen.read(*_padded(rows, seen.real.device))[1]


def say(seen: Seen, vocab: VocabularyMap, stop: int, limit: int = MOST_TEXT) -> tuple[list[str], Seen]:
    """The likeliest text, token by token, until `stop` or `limit` tokens, and what is seen then.

    Only text can be said: no code (of a "tail" they are ids of the text tokenizer too), no control token but `stop`, no
    special token of the backbone.
    """
    backbone = seen.backbone
    allowed = torch.zeros(backbone.vocab_size, dtype=torch.bool, device=seen.real.device)
    allowed[: backbone.text_size] = True
    for value in backbone.special_ids.values():
        allowed[value] = False
    allowed[slice(*vocab.span)] = False
    allowed[stop] = True
    said: list[list[int]] = [[] for _ in range(len(seen))]
    going = torch.ones(len(seen), dtype=torch.bool, device=seen.real.device)
    for _ in range(limit):
        logits = backbone.logits(seen.last[:, None])[:, 0].masked_fill(~allowed, -torch.inf)
        chosen = logits.argmax(-1)
        going = going & (chosen != stop)
        if not bool(going.any()):
            break
        for b in going.nonzero()[:, 0].tolist():
            said[b].append(int(chosen[b]))
        _, seen = seen.read(chosen[:, None], going[:, None])
    return [backbone.text_of(ids) for ids in said], seen


def _padded(rows: Sequence[Sequence[int]], device: Any, fill: int = 0) -> tuple[Tensor, Tensor]:
    """int64 [B, n] padded on the right, and bool [B, n] where it is real."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)
    real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=device)
    return ids, real
