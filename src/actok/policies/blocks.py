"""How a policy emits a sequence of codes, as it follows from `TokenLayout` alone: passes, inputs, masks and positions.

Block-wise autoregression (FASTer, arXiv 2512.04952, section 3.2, eq. 3): a pass emits a whole block, given the blocks
before it. Blocks of 1 are ordinary next-token prediction, one block of N is parallel decoding. What a pass is fed is a
function of the blocks before it only; a block never sees its own targets.

* Equal blocks of B (the last may be ragged): pass j is fed block j - 1, pass 0 B times <BoBlk>, as in the paper. So slot i
  of the inputs stands where code i stands and holds code i - B. A ragged last pass is still fed the whole block before it
  (the paper has no ragged blocks); its surplus outputs emit nothing.
* Unequal blocks (block-compatible OAT 1, 1, 2, 4; CARP's growing scales): pass j is fed block j - 1, which stays in the cache,
  and one <BoBlk> as a query for each code of block j, which does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actok.core import ConfigError, TokenError, TokenLayout

__all__ = [
    "DecodingPlan",
    "additive_mask",
    "attention_mask",
    "block_inputs",
    "jittered_positions",
    "pass_mask",
    "plan",
    "positions",
    "training_inputs",
]


@dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """In which passes a sequence of N codes is emitted, and from which inputs.

    The inputs of all passes, one pass after another, are L slots; training runs them at once, decoding pass by pass.

    Attributes:
        edges: 0 = e_0 < e_1 < ... < e_J = N: pass j emits positions e_j to e_(j+1) - 1.
        shifted: equal blocks, each fed in place of its successor; else cached blocks and queries. See the module.
        prefixes: lengths at which a truncated sequence decodes, as in the layout.
        variable: sequences may end before N; the sampler says when.
    """

    edges: tuple[int, ...]
    shifted: bool
    prefixes: tuple[int, ...] = ()
    variable: bool = False

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or self.edges[0] != 0 or any(a >= b for a, b in pairwise(self.edges)):
            raise ConfigError(f"edges are {self.edges!r}; give 0 and the rising ends of at least one block")
        if self.shifted and not _equal(self.sizes):
            raise ConfigError(f"blocks of {list(self.sizes)} are not equal up to a shorter last one; set shifted=False")

    @property
    def tokens(self) -> int:
        """N."""
        return self.edges[-1]

    @property
    def passes(self) -> int:
        """J, forward passes of the policy for a whole sequence."""
        return len(self.edges) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each pass emits."""
        return tuple(b - a for a, b in pairwise(self.edges))

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Pass counts after which decoding may stop: more codes decode than after the pass before. The last is J.

        Of a variable length only the sampler knows; then only J is listed.
        """
        counts = [self.decodable(j) for j in range(self.passes)] + [self.tokens]
        return tuple(j + 1 for j, (a, b) in enumerate(pairwise(counts)) if b > a)

    def decodable(self, passes: int) -> int:
        """How many first codes decode once that many passes ran; 0: none."""
        emitted = self.edges[passes]
        whole = [emitted] if emitted == self.tokens and not self.variable else []
        return max([p for p in self.prefixes if p <= emitted] + whole, default=0)

    # -- slots ----------------------------------------------------------------------------------------------------

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """J + 1 ends: the inputs of pass j are slots slots[j] to slots[j + 1] - 1."""
        return (0, *np.cumsum(np.bincount(self._table[:, 0])).tolist())

    @property
    def inputs(self) -> int:
        """L: N rounded up to whole blocks where shifted, else 2 N less the last block."""
        return self.slots[-1]

    @property
    def source(self) -> Int[np.ndarray, "L"]:
        """Which code each slot is fed; -1: <BoBlk>."""
        return self._table[:, 1]

    @property
    def place(self) -> Int[np.ndarray, "L"]:
        """Whose position each slot takes; at or above N where a ragged last block is filled up."""
        return self._table[:, 2]

    @property
    def kept(self) -> Bool[np.ndarray, "L"]:
        """Which slots stay in the cache for later passes."""
        return self._table[:, 3] == 1

    @property
    def step(self) -> Int[np.ndarray, "L"]:
        """The pass that each slot is fed in."""
        return self._table[:, 0]

    @cached_property
    def reads(self) -> Int[np.ndarray, "N"]:
        """The slot whose output emits each code: logits[:, plan.reads] are those of codes 0 to N - 1."""
        if self.shifted:
            return np.arange(self.tokens)
        return np.flatnonzero(self.source < 0)

    def emits(self, j: int) -> slice:
        """Which of the outputs of pass j emit its codes, in order."""
        return (
            slice(0, self.sizes[j]) if self.shifted else slice(self.slots[j + 1] - self.slots[j] - self.sizes[j], None)
        )

    @cached_property
    def sees(self) -> Bool[np.ndarray, "L L"]:
        """Which slots (columns) each slot may look at: kept ones of its own pass and those before; a query, queries of its own."""
        step, kept = self.step, self.kept
        same = step[:, None] == step[None]
        return ((step[:, None] >= step[None]) & kept) | (same & ~kept[:, None] & ~kept)

    @cached_property
    def _table(self) -> Int[np.ndarray, "L 4"]:
        """(pass, code that is fed or -1, place, kept) of every slot."""
        size = self.sizes[0]
        if self.shifted:
            slot = np.arange(self.passes * size)
            return np.stack([slot // size, np.maximum(slot - size, -1), slot, np.ones_like(slot)], 1)
        parts = []
        for j in range(self.passes):
            if j:
                codes = np.arange(self.edges[j - 1], self.edges[j])
                parts.append(np.stack([np.full_like(codes, j), codes, codes, np.ones_like(codes)], 1))
            queries = np.arange(self.edges[j], self.edges[j + 1])
            parts.append(np.stack([np.full_like(queries, j), np.full_like(queries, -1), queries, 0 * queries], 1))
        return np.concatenate(parts)


def _equal(sizes: tuple[int, ...]) -> bool:
    return len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]


def plan(layout: TokenLayout, block: int | None = None, *, length: int | None = None) -> DecodingPlan:
    """The plan of a layout.

    Args:
        block: None: the layout's own blocks. B: equal blocks of B in their place, the last ragged; 1 is token-wise, N (or
            more) one parallel pass. Block-wise decoding of a tokenizer that was not trained for these blocks may cost
            quality, never validity.
        length: only where the length varies: the longest sequence of a training batch and one position for the end, at
            most N, so that a batch need not be as long as the longest possible sequence.
    """
    if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
        raise ConfigError(f"block is {block!r}; give a whole number of at least 1, or None for the layout's own blocks")
    variable = layout.fixed_length is None
    tokens = layout.max_len
    if length is not None:
        if not variable:
            raise ConfigError(f"length is {length} but every sequence of this layout has {tokens} tokens; leave it out")
        if not 1 <= length <= tokens:
            raise ConfigError(f"length is {length}; sequences of this layout have 1 to {tokens} tokens")
        tokens = length
    if block is None:
        ends = [b[-1] + 1 for b in layout.blocks if b]
        shifted = _equal(tuple(b - a for a, b in pairwise([0, *ends])))
    else:
        ends, shifted = [*range(block, layout.max_len, block), layout.max_len], True
    edges = (0, *(e for e in ends if e < tokens), tokens)
    return DecodingPlan(edges=edges, shifted=shifted, prefixes=layout.prefixes, variable=variable)


def training_inputs(plan: DecodingPlan, codes: Int[Tensor, "B N"], boblk: int) -> Int[Tensor, "B L"]:
    """What all passes are fed, one after another, under teacher forcing.

    `codes` are ids of the language model (`VocabularyMap.to_lm`), as is `boblk`. The last block is not read.
    """
    return _fed(plan, codes, boblk, 0, plan.inputs)


def block_inputs(plan: DecodingPlan, j: int, codes: Int[Tensor, "B n"], boblk: int) -> Int[Tensor, "B m"]:
    """What pass j is fed: that part of `training_inputs`. `codes` are those emitted so far; of more, the rest is not read."""
    if not 0 <= j < plan.passes:
        raise ConfigError(f"pass {j} is not among the {plan.passes} of this plan; count from 0")
    return _fed(plan, codes, boblk, plan.slots[j], plan.slots[j + 1])


def _fed(plan: DecodingPlan, codes: Tensor, boblk: int, first: int, last: int) -> Tensor:
    source = torch.from_numpy(plan.source[first:last]).to(codes.device)
    needed = int(plan.source[first:last].max()) + 1
    if codes.shape[1] < needed:
        raise TokenError(
            f"{codes.shape[1]} codes were given, the inputs are made of the first {needed}; give all of them"
        )
    begin = codes.new_full((len(codes), 1), boblk)
    return torch.cat([begin, codes], 1)[:, source + 1]


def attention_mask(plan: DecodingPlan, prefix_len: int, *, causal_prefix: bool = False) -> Bool[Tensor, "M M"]:
    """Who sees whom in training, True where a row may look; M = prefix_len + L.

    The prefix (images, text, state) sees itself, wholly or causally, and no block. A block sees the prefix, itself and
    what was fed before it. Queries are seen by their own block's queries only.
    """
    if prefix_len < 0:
        raise ConfigError(f"prefix_len is {prefix_len}; give the number of positions before the blocks, 0 or more")
    seen = torch.zeros(prefix_len + plan.inputs, prefix_len + plan.inputs, dtype=torch.bool)
    seen[:, :prefix_len] = True
    if causal_prefix:
        seen[:prefix_len, :prefix_len].tril_()
    seen[prefix_len:, prefix_len:] = torch.from_numpy(plan.sees)
    return seen


def pass_mask(plan: DecodingPlan, j: int, prefix_len: int) -> Bool[Tensor, "m M"]:
    """Who sees whom in pass j of cached decoding: rows are what it is fed, columns the prefix, the cache, and what it is fed.

    The cache holds the slots with `plan.kept` of the passes before, so that its result is that of `attention_mask`.
    """
    if not 0 <= j < plan.passes:
        raise ConfigError(f"pass {j} is not among the {plan.passes} of this plan; count from 0")
    first, last = plan.slots[j], plan.slots[j + 1]
    columns = np.concatenate([np.flatnonzero(plan.kept[:first]), np.arange(first, last)])
    own = torch.from_numpy(plan.sees[first:last][:, columns])
    return torch.cat([own.new_ones(last - first, prefix_len), own], 1)


def additive_mask(mask: Bool[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """0 where True, else the most negative number of the dtype (finite, so that half precision makes no NaN of it)."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def positions(plan: DecodingPlan, spacing: int = 2, *, prefix_len: int = 0) -> Int[Tensor, "L"]:
    """Positions at inference: code i stands at prefix_len - 1 + (i + 1)(1 + spacing / 2), the mean of those in training.

    spacing: k of FASTer's section 3.2, even, so that positions stay whole; 0: neighbours are one apart. The last position
        of the prefix is prefix_len - 1. A code that is fed and the query for it (unequal blocks) share one position.
    """
    steps = torch.full((int(plan.place.max()) + 1,), 1 + _half(spacing))
    return (prefix_len - 1 + steps.cumsum(0))[torch.from_numpy(plan.place)]


def jittered_positions(
    plan: DecodingPlan,
    spacing: int = 2,
    *,
    batch: int,
    prefix_len: int = 0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "{batch} L"]:
    """Positions in training: p_i = p_(i-1) + 1 + e_i, each e_i uniform in 0, 1, ..., spacing; each sequence its own draw."""
    _half(spacing)
    shape = (batch, int(plan.place.max()) + 1)
    steps = 1 + torch.randint(spacing + 1, shape, generator=generator)
    return (prefix_len - 1 + steps.cumsum(1))[:, torch.from_numpy(plan.place)]


def _half(spacing: int) -> int:
    if not isinstance(spacing, int) or spacing < 0 or spacing % 2:
        raise ConfigError(
            f"spacing is {spacing!r}; give an even whole number, so that the mean step is one too (0: none)"
        )
    return spacing // 2
