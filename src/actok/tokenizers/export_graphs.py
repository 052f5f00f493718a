"""The two halves of a learned tokenizer as modules of tensors alone, for `actok.tokenizers.export`."""

from __future__ import annotations

import copy

import numpy as np

from actok.core import CodecBatch
from actok.signal.normalise import RANGE_SLACK
from actok.signal.rotations import DEGENERATE_LENGTH
from actok.tokenizers.embodiments import redundant_rotations
from actok.tokenizers.neural import NeuralTokenizer  # first: it says if torch is missing

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip
from torch.nn import functional as F  # isort: skip

__all__ = ["DecoderGraph", "EncoderGraph", "proper"]


class Graph(nn.Module):
    """A codec with one embodiment's constants. float32 throughout, as accelerators want it.

    Centres are split in two float32 numbers: x - high is exact where it matters, near the centre, so that a small motion
    about a large offset (a joint near 2 rad, a position in millimetres) is normalised as in float64.
    """

    def __init__(self, tokenizer: NeuralTokenizer, embodiment: str) -> None:
        super().__init__()
        robot = tokenizer.embodiment(embodiment)
        self.codec = copy.deepcopy(tokenizer.codec).cpu().eval()
        self.dim, self.channels = robot.space.dim, tokenizer.shape.channels
        self.kept = tokenizer._kept(robot)
        one = tokenizer.batch(np.zeros((1, tokenizer.horizon, self.dim), np.float32), embodiment)
        self.tables = list(one.structure)
        constants = {"present": one.present, "real": one.real, "index": one.embodiment}
        constants |= {f"table_{key}": table.contiguous() for key, table in one.structure.items()}
        normaliser = robot.normaliser
        high = normaliser.centre.astype(np.float32)
        constants["centre_high"] = torch.from_numpy(high)
        constants["centre_low"] = _float32(normaliser.centre - high)
        constants["half"] = _float32(normaliser.half)
        # What never changed decodes to its centre, whatever the network says.
        constants["reach"] = _float32(np.where(normaliser.constant, 0.0, normaliser.half))
        for key, value in constants.items():
            self.register_buffer(f"_{key}", value)

    def constant(self, name: str) -> Tensor:
        """A constant by name."""
        value: Tensor = getattr(self, f"_{name}")
        return value

    def batch(self, count: int, actions: Tensor | None) -> CodecBatch:
        """A batch of `count` chunks of this embodiment."""

        def rows(name: str) -> Tensor:
            value = self.constant(name)
            return value.expand(count, *value.shape[1:])

        return CodecBatch(
            actions=actions,
            present=rows("present"),
            real=rows("real"),
            embodiment=rows("index"),
            structure={key: rows(f"table_{key}") for key in self.tables},
        )


class EncoderGraph(Graph):
    """Raw actions to ids, and how many values of a chunk are out of range."""

    lower: Tensor
    upper: Tensor
    places: Tensor

    def __init__(self, tokenizer: NeuralTokenizer, embodiment: str) -> None:
        super().__init__(tokenizer, embodiment)
        normaliser = tokenizer.embodiment(embodiment).normaliser
        self.register_buffer("lower", _float32(normaliser.lower - RANGE_SLACK))
        self.register_buffer("upper", _float32(normaliser.upper + RANGE_SLACK))
        if self.kept is not None:
            self.register_buffer("places", torch.from_numpy(np.flatnonzero(self.kept)))

    def forward(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] to [B, N] and [B]."""
        x = ((actions - self.constant("centre_high")) - self.constant("centre_low")) / self.constant("half")
        inside = (x >= self.lower) & (x <= self.upper)  # False for what is not a number
        outside = (~inside).to(torch.int64).sum((1, 2))
        ids = self.codec.tokenize(self.batch(actions.shape[0], F.pad(x, (0, self.channels - self.dim))))
        return (ids if self.kept is None else ids[:, self.places]), outside


class DecoderGraph(Graph):
    """Ids to raw actions within the limits, and which sequences are made of ids that there are."""

    vocab: Tensor
    low: Tensor
    high: Tensor
    places: Tensor

    def __init__(self, tokenizer: NeuralTokenizer, embodiment: str) -> None:
        super().__init__(tokenizer, embodiment)
        robot = tokenizer.embodiment(embodiment)
        self.register_buffer("vocab", torch.from_numpy(tokenizer.layout_for(None, embodiment).vocab.astype(np.int64)))
        limits = robot.normaliser.limits
        self.limited = limits is not None
        if limits is not None:
            low, high = limits
            self.register_buffer("low", _float32(low))
            self.register_buffer("high", _float32(high))
        if self.kept is not None:
            # Where each token of the codec stands in a sequence that a 0 was put behind.
            places = np.where(self.kept, np.cumsum(self.kept) - 1, self.kept.sum())
            self.register_buffer("places", torch.from_numpy(places))
        self.rotations = [(str(g.rotation), list(g.dims)) for g in redundant_rotations(robot.space)]
        # The inverse of "all other dimensions, then those of the rotations".
        turning = [d for _, dims in self.rotations for d in dims]
        order = [d for d in range(self.dim) if d not in turning] + turning
        self.rest = order[: self.dim - len(turning)]
        self.back = np.argsort(order).tolist()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] to [B, T, D] and [B]."""
        known = (ids >= 0) & (ids < self.vocab)
        valid = known.all(1)
        ids = torch.where(known, ids, 0)
        if self.kept is not None:
            ids = F.pad(ids, (0, 1))[:, self.places]
        y = self.codec.detokenize(ids, self.batch(ids.shape[0], None))[:, :, : self.dim]
        y = (y * self.constant("reach") + self.constant("centre_low")) + self.constant("centre_high")
        if self.limited:
            y = torch.minimum(torch.maximum(y, self.low), self.high)
        if self.rotations:
            turned = [proper(y[:, :, dims], rotation) for rotation, dims in self.rotations]
            y = torch.cat([y[:, :, self.rest], *turned], 2)[:, :, self.back]
        return torch.where(valid[:, None, None], y, float("nan")), valid


def proper(v: Tensor, rotation: str) -> Tensor:
    """As `actok.signal.rotations.proper`: [..., 6] with orthonormal columns, or [..., 4] of length 1.

    What determines no rotation stays as it is.
    """
    if rotation.startswith("quaternion"):
        length = _length(v)
        return torch.where(length < DEGENERATE_LENGTH, v, v / length.clamp(min=DEGENERATE_LENGTH))
    first, second = v[..., :3], v[..., 3:]
    long, other = _length(first), _length(second)
    first = first / long.clamp(min=DEGENERATE_LENGTH)
    rest = second - (first * second).sum(-1, keepdim=True) * first
    sine = _length(rest)
    rest = rest / sine.clamp(min=torch.finfo(v.dtype).tiny)
    # Once more: the first pass loses digits where the columns are nearly parallel.
    rest = rest - (first * rest).sum(-1, keepdim=True) * first
    rest = rest / _length(rest).clamp(min=torch.finfo(v.dtype).tiny)
    lost = (torch.minimum(long, other) < DEGENERATE_LENGTH) | (sine < DEGENERATE_LENGTH * other)
    return torch.where(lost, v, torch.cat([first, rest], -1))


def _length(v: Tensor) -> Tensor:
    return (v * v).sum(-1, keepdim=True).sqrt()


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
