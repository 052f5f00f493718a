"""One codebook: nearest codes, moving averages, k-means start, dead codes.

Sources: van den Oord et al. 2017 (arXiv 1711.00937, appendix A.1: moving averages); Zeghidour et al. 2021 (SoundStream,
arXiv 2107.03312, section III-C: k-means on the first batch, dead codes replaced by vectors of the batch).

Deviations: (1) A code's vector is its moving sum over its moving count, without Laplace smoothing, which pulls codes
that are seldom used towards zero; a code that nothing has fallen to keeps its vector. (2) A code is dead when its moving
count falls below a share of the *mean* count. Published thresholds are absolute counts, which mean something else for
every batch size: with fewer latents a batch than codes, an absolute threshold of 1 or 2 replaces nearly all codes at
every step. (3) A revived code starts at the mean count, which gives it time to be used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.quantizers.ranks import alone, from_first, pooled, total

__all__ = ["DISTANCES", "Codebook", "draw", "k_means", "nearest"]

DISTANCES = ("euclidean", "cosine", "direction")
# Elements of the [rows, K] score matrix held at once. On a CPU a block should stay in the cache; a GPU and a compiled
# graph want few large blocks.
BLOCK_CPU = 2**20
BLOCK_LARGE = 2**26
# Noise on a vector of the batch that is drawn a second time, as a share of the root mean square of the drawn vectors.
JITTER = 1e-3


@torch.no_grad()
def nearest(z: Float[Tensor, "N C"], table: Float[Tensor, "K C"], distance: str) -> Int[Tensor, "N"]:
    """The row of `table` nearest to each z; the lowest index where two are equally near.

    |z - c|^2 without its constant |z|^2 is |c|^2 - 2 z.c, so one matrix product scores all codes, in blocks of rows.
    """
    if distance == "euclidean":
        offset, keys, scale = table.square().sum(1), table, -2.0
    else:
        offset, keys, scale = table.new_zeros(len(table)), F.normalize(table, dim=1), -1.0
    if torch.compiler.is_exporting():  # the number of rows may be symbolic
        return torch.addmm(offset, z, keys.T, alpha=scale).argmin(1)
    block = BLOCK_CPU if z.device.type == "cpu" and not torch.compiler.is_compiling() else BLOCK_LARGE
    rows = max(1, block // len(table))
    parts = [torch.addmm(offset, part, keys.T, alpha=scale).argmin(1) for part in z.split(rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def draw(z: Float[Tensor, "N C"], mask: Bool[Tensor, "N"] | None, count: int) -> Float[Tensor, "{count} C"]:
    """`count` random rows of z where `mask` is True, over all processes, and the same ones in every process.

    Different rows while they last, then the same ones again with a little noise. At least one row must be unmasked.
    """
    keys = torch.rand(len(z), device=z.device)
    if mask is not None:
        keys = keys.masked_fill(~mask, -1.0)
    keys, order = keys.topk(min(count, len(z)))  # the highest of random keys: a draw without replacement
    rows = z[order]
    if not alone():
        missing = count - len(rows)
        keys = pooled(F.pad(keys, (0, missing), value=-1.0))
        rows = pooled(F.pad(rows, (0, 0, 0, missing)))
        keys, order = keys.topk(count)
        rows = rows[order]
    available = (keys >= 0).sum()
    turn = torch.arange(count, device=z.device)
    rows = rows[turn % available.clamp(min=1)]
    size = (rows.square().mean().sqrt() * JITTER).clamp(min=1e-6)
    noise = torch.randn_like(rows) * size
    return from_first(torch.where((turn >= available)[:, None], rows + noise, rows))


@torch.no_grad()
def tally(
    z: Float[Tensor, "N C"], codes: Int[Tensor, "N"], mask: Bool[Tensor, "N"] | None, size: int
) -> Float[Tensor, "K C+1"]:
    """How many rows fell to each code (last column) and their sum, over all processes."""
    rows = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
    if mask is not None:
        rows = torch.where(mask[:, None], rows, 0.0)  # not a product: a masked row may hold anything
    return total(z.new_zeros(size, z.shape[1] + 1).index_add_(0, codes, rows))


@torch.no_grad()
def k_means(
    z: Float[Tensor, "N C"], mask: Bool[Tensor, "N"] | None, size: int, steps: int, distance: str
) -> tuple[Float[Tensor, "{size} C"], Float[Tensor, "{size}"]]:
    """Means [K, C] of Lloyd's algorithm over the data of all processes, and how many rows fell to each [K].

    A cluster that nothing falls to keeps its vector, which is a row of z.
    """
    means = draw(z, mask, size)
    counts = means.new_zeros(size)
    for _ in range(steps):
        sums = tally(z, nearest(z, means, distance), mask, size)
        counts = sums[:, -1]
        means = torch.where(counts[:, None] > 0, sums[:, :-1] / counts[:, None].clamp(min=1.0), means)
    return means, counts


class Codebook(nn.Module):
    """K vectors of C numbers.

    Buffers: `counts` [K], the moving average of how many latents of a batch fall to each code; with `update = "ema"`,
    `sums` [K, C], that of their sums, and `vectors`, which are their quotient; `initialised`. With
    `update = "gradient"`, `vectors` is a parameter, and `counts` only tells dead codes. `pace`, 1 unless a trainer sets
    it and kept in no file, multiplies the weight 1 - decay of a new batch in the moving averages.

    Args:
        size: K.
        dim: C.
        config: a VectorConfig.
    """

    counts: Tensor
    sums: Tensor
    pace: Tensor
    initialised: Tensor

    def __init__(self, size: int, dim: int, config: Any) -> None:
        super().__init__()
        self.size, self.dim, self.config = size, dim, config
        vectors = torch.randn(size, dim) / dim**0.5
        if config.update == "gradient":
            self.vectors: Tensor = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
            self.register_buffer("sums", vectors.clone())
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("pace", torch.ones(()), persistent=False)  # a tensor: a number would be compiled in
        self.register_buffer("initialised", torch.tensor(config.kmeans_steps == 0))
        # What the hot path asks instead of the buffer: reading a buffer would stall a GPU and split a compiled graph.
        self._started = False

    def table(self) -> Float[Tensor, "K C"]:
        """The vectors that codes stand for: on the unit sphere for the cosine distance."""
        return F.normalize(self.vectors, dim=1) if self.config.distance == "cosine" else self.vectors

    def lookup(self, codes: Int[Tensor, "*any"]) -> Float[Tensor, "*any C"]:
        """The vectors of codes. Looked up first and normalised then, so that autograd holds on to no codebook: `update`
        may change it before the backward pass."""
        vectors = F.embedding(codes, self.vectors)
        return F.normalize(vectors, dim=-1) if self.config.distance == "cosine" else vectors

    def search(self, z: Float[Tensor, "N C"]) -> Int[Tensor, "N"]:
        """The nearest code of each row."""
        return nearest(z, self.table(), self.config.distance)

    def start(self, z: Float[Tensor, "N C"], mask: Bool[Tensor, "N"] | None) -> None:
        """In training, before the first search: k-means on the batch, unless it was done before."""
        if self.training and not self._started:
            self._start(z.detach(), mask)

    @torch.no_grad()
    def update(self, z: Float[Tensor, "N C"], codes: Int[Tensor, "N"], mask: Bool[Tensor, "N"] | None) -> None:
        """In training, after the search: moving averages of the rows where `mask` is True, then dead codes."""
        if not self.training:
            return
        z = z.detach()
        batch = tally(z, codes, mask, self.size)
        weight = (1.0 - self.config.decay) * self.pace
        self.counts.lerp_(batch[:, -1], weight)
        if self.config.update == "ema":
            self.sums.lerp_(batch[:, :-1], weight)
            used = (self.counts > torch.finfo(torch.float32).tiny)[:, None]
            self.vectors.copy_(torch.where(used, self.sums / self.counts[:, None], self.vectors))
        if self.config.dead_below > 0:
            self._revive(z, mask, batch[:, -1].sum())

    def _revive(self, z: Tensor, mask: Tensor | None, rows: Tensor) -> None:
        """Dead codes become random latents of this batch. Without branches, so that it compiles into the step."""
        mean = self.counts.mean()
        dead = (self.counts < self.config.dead_below * mean) & (rows > 0)
        if not alone() and not bool(dead.any()):  # the same in every process; spares the exchange of candidates
            return
        position = (dead.cumsum(0) - 1).clamp(min=0)
        fresh = draw(z, mask, self.size)[position]
        self._put(torch.where(dead[:, None], fresh, self.vectors), torch.where(dead, mean, self.counts), dead)

    @torch.no_grad()
    def weigh(self, share: float) -> None:
        """Multiply the moving averages, which leaves the vectors: after a start from several batches, they are those of one."""
        self.counts.mul_(share)
        if self.config.update == "ema":
            self.sums.mul_(share)

    def _put(self, vectors: Tensor, counts: Tensor, changed: Tensor) -> None:
        """Vectors and counts, and sums where they changed."""
        self.vectors.copy_(vectors)
        self.counts.copy_(counts)
        if self.config.update == "ema":
            self.sums.copy_(torch.where(changed[:, None], vectors * counts[:, None], self.sums))

    @torch.compiler.disable
    @torch.no_grad()
    def _start(self, z: Tensor, mask: Tensor | None) -> None:
        if not bool(self.initialised):
            rows = total(z.new_tensor([float(len(z) if mask is None else mask.sum())]))
            if not bool(rows > 0):
                return  # nothing to start from; the next batch will do
            vectors, counts = k_means(z, mask, self.size, self.config.kmeans_steps, self.config.distance)
            vectors = from_first(vectors)
            self._put(
                vectors, torch.where(counts > 0, counts, counts.mean()), torch.ones_like(counts, dtype=torch.bool)
            )
            self.initialised.fill_(True)
        self._started = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started = False  # `initialised` may have changed

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"size={self.size}, dim={self.dim}, update={self.config.update}, distance={self.config.distance}"
