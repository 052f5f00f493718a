"""InfoNCE between latents and a teacher's features, over the chunks of all processes.

Sources: van den Oord et al. 2018 (CPC, arXiv 1807.03748, equation 4); Radford et al. 2021 (CLIP, arXiv 2103.00020, figure
3: symmetric); Khosla et al. 2020 (SupCon, arXiv 2004.11362, equation 2: several positives, averaged outside the
logarithm; which of them stand in the denominator is different here, see `info_nce`); X-Tokenizer (arXiv 2606.14752: a global and a local term on the latents before quantisation).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.alignment.features import FeatureBatch
from actok.alignment.slots import pooled, standardised
from actok.quantizers import ranks
from actok.quantizers.base import full_precision

# The logit of what is not among the negatives: minus infinity, but with a gradient where there are none at all.
NEVER = -1e30

__all__ = ["Contrast", "identities", "info_nce"]


def info_nce(
    actions: Float[Tensor, "n W"], features: Float[Tensor, "n W"], group: Int[Tensor, "n"], temperature: float
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of n pairs of unit vectors against the pairs of all processes, with several positives.

    With logits L[i, j] = <actions i, features j> / temperature, and P(i) all j of the group of i, it is the mean over i of

        mean over j in P(i) of -log(exp L[i, j] / (exp L[i, j] + sum over k not in P(i) of exp L[i, k]))

    averaged with the same of L transposed: each positive competes with the negatives, and never with another positive.
    Without equal groups this is the ordinary cross-entropy; without negatives it is 0. (The usual mean of log-probabilities,
    with all positives in the denominator, would not tell the groups apart: where the features of a group are identical, its
    sum over the group is that of single positives, term by term, and it pushes away those that fit best.)

    Processes may have different n, also none. Each gives the part of its own pairs, so weighted that the mean over processes
    is the loss of one process with all pairs; and so is the mean of the gradients, which data-parallel training takes:
    gradients go back to the process that a vector came from. All processes have to call it.
    """
    with full_precision(actions):
        counts = _counts(actions)
        every_group = _everyone(group, counts)
        positive = group[:, None] == every_group
        rows, columns = positive.nonzero(as_tuple=True)
        share = (1 / positive.sum(1))[rows]
        a, f = actions.float() / temperature, features.float()
        there = a @ _everyone(f, counts).T
        back = there.T if ranks.alone() else f @ _everyone(a, counts).T
        found = []
        for logits in (there, back):
            negatives = logits.masked_fill(positive, NEVER).logsumexp(1)
            found.append((F.softplus(negatives[rows] - logits[rows, columns]) * share).sum())
        return torch.stack(found).sum() * (len(counts) / (2 * max(1, sum(counts))))


class _Everyone(torch.autograd.Function):
    """Rows of all processes, of `counts[rank]` rows each; the gradient of a row is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        """See the class."""
        ctx.counts = counts
        return _stacked(x, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """See the class."""
        rank = torch.distributed.get_rank()
        return ranks.total(gradients[0]).split(ctx.counts)[rank], None


def _counts(x: Tensor) -> list[int]:
    """How many rows each process has."""
    if ranks.alone():
        return [len(x)]
    found: list[int] = ranks.pooled(torch.tensor([len(x)], device=x.device)).tolist()
    return found


def _everyone(x: Tensor, counts: list[int]) -> Tensor:
    if ranks.alone():
        return x
    found: Tensor = _Everyone.apply(x, counts) if x.is_floating_point() else _stacked(x, counts)
    return found


def _stacked(x: Tensor, counts: list[int]) -> Tensor:
    filled = x.new_zeros(max(1, *counts), *x.shape[1:])
    filled[: len(x)] = x
    parts = ranks.pooled(filled).split(len(filled))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def identities(features: Float[Tensor, "n F"]) -> Int[Tensor, "n"]:
    """Equal where feature vectors are, in all channels, to the precision of bfloat16 (means of equal frames may differ in
    the last bit of float32). A polynomial of the channels' bits modulo 2^64: the same on all machines."""
    bits = (features.bfloat16() + 0.0).view(torch.int16).long()  # + 0.0: minus zero is zero
    powers = torch.full((features.shape[1],), 6364136223846793005, device=features.device).cumprod(0)  # Knuth's MMIX
    return (bits * powers).sum(1)


class Contrast(nn.Module):
    """Latents before quantisation against a teacher's features.

    Global: the mean of a chunk's real slots against the mean of its frames; positives are chunks with identical features
    (`FeatureBatch.group`). Local: each slot against the mean of its frames, all other slots of all chunks being negatives
    but those with identical features; only chunks whose features vary in time take part, and only slots with a real frame.
    With v the share of such chunks, the loss is (global + v * local) / (1 + v): their average where all vary.

    Both sides go through a linear map each (features are standardised before) to a common width, onto the unit sphere.

    Args:
        dim: C. feature_dim: F. width: of the common space. temperature: of the softmax.
    """

    def __init__(self, dim: int, feature_dim: int, *, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.whole_action, self.slot_action = nn.Linear(dim, width), nn.Linear(dim, width)
        self.whole_feature, self.slot_feature = nn.Linear(feature_dim, width), nn.Linear(feature_dim, width)

    def forward(
        self, latents: Float[Tensor, "B S C"], real: Bool[Tensor, "B S"], features: FeatureBatch
    ) -> Float[Tensor, ""]:
        """The loss; `real`: which slots stand for any real step."""
        whole = info_nce(
            _unit(self.whole_action(pooled(latents, real))),
            _unit(self.whole_feature(standardised(features.whole))),
            features.group,
            self.temperature,
        )
        if features.slots is None:
            unused = [*self.slot_action.parameters(), *self.slot_feature.parameters()]
            return whole + torch.stack([p.sum() for p in unused]).sum() * 0.0  # data-parallel training wants all used
        counts = features.slot_known & features.varies[:, None]
        means = features.slots[counts]
        local = info_nce(
            _unit(self.slot_action(latents[counts])),
            _unit(self.slot_feature(standardised(means))),
            identities(means),
            self.temperature,
        )
        seen = ranks.total(torch.stack([features.varies.sum(), torch.ones_like(features.varies).sum()]))
        share = seen[0] / seen[1]
        return (whole + share * local) / (1 + share)


def _unit(x: Float[Tensor, "n W"]) -> Float[Tensor, "n W"]:
    return F.normalize(x.float(), dim=-1)
