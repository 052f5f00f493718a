"""All metrics of one fitted tokenizer on one dataset's held-out chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actok.benchmark.results import plain
from actok.core import ActionSpace, ActionTokenizer, ChunkContext, FitPart, to_numpy
from actok.evaluation.codes import CodeSequences, code_use, ngram_fit, rate
from actok.evaluation.comparison import Comparison
from actok.evaluation.latency import measure_latency
from actok.evaluation.metrics import jerk, normalised_error, range_use, valid_reconstruction
from actok.evaluation.physical import group_errors
from actok.evaluation.robustness import noise_stability, valid_share, wrong_token
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics

NGRAM_ORDERS = (1, 2, 3)
# Chunks for the tests that decode many damaged sequences or search edit distances.
ROBUSTNESS_CHUNKS = 256
EXAMPLES = 3
# Time spent on throughput and latency of one tokenizer.
LATENCY_SECONDS = 1.6

__all__ = ["HeldOut", "embodiment_for", "measure"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """One dataset prepared for judging tokenizers.

    Attributes:
        name: for tables.
        space: action space.
        train: chunks to fit on (and to learn code statistics from), with the training split's statistics.
        test: [B, T, D] held-out chunks, float32, raw units.
        pad_mask: [B, T] bool, True where padded.
        anchor: [B, P] proprioception at the chunk starts, or None.
        train_anchor: the same for `train`.
        normaliser: the ruler of all normalised figures: 1 % and 99 % quantiles of the training split.
        tolerances: of the valid reconstruction rate.
    """

    name: str
    space: ActionSpace
    train: FitPart
    test: np.ndarray
    pad_mask: np.ndarray
    anchor: np.ndarray | None
    train_anchor: np.ndarray | None
    normaliser: Normaliser
    tolerances: Sequence[float]

    @property
    def statistics(self) -> Statistics:
        """Of the training split."""
        statistics: Statistics = self.train.statistics
        return statistics

    def example_rows(self) -> list[int]:
        """The chunks shown in the report: unpadded ones spread over the test split (padded ones if there is no other)."""
        rows = np.flatnonzero(~self.pad_mask.any(1))
        rows = rows if len(rows) else np.arange(len(self.test))
        return [int(r) for r in np.unique(rows[np.linspace(0, len(rows) - 1, EXAMPLES).round().astype(int)])]


def embodiment_for(tokenizer: ActionTokenizer, data: HeldOut) -> tuple[ActionTokenizer, str, bool]:
    """The tokenizer able to serve `data`, the embodiment's name in it, and whether it had to be adapted.

    A known embodiment of the same name and space is used as it is; otherwise the tokenizer is adapted with the training
    split's statistics, which raises SpaceMismatchError where its codec cannot serve the space.
    """
    known = tokenizer.spaces.get(data.space.embodiment)
    if known is not None and not known.differences(data.space):
        return tokenizer, data.space.embodiment, False
    name = data.space.embodiment if known is None else f"{data.space.embodiment}@{data.name}"
    return tokenizer.adapt(data.space.renamed(name), data.statistics), name, True


def measure(
    tokenizer: ActionTokenizer, data: HeldOut, embodiment: str, *, seed: int = 0, full: bool = True
) -> dict[str, Any]:
    """Metrics as JSON values; docs/metrics.md defines each.

    `full=False` leaves out robustness, latency, n-grams and examples: what a point of a rate-distortion curve needs.
    """
    horizon = data.test.shape[1]
    context = ChunkContext(horizon=horizon, embodiment=embodiment, anchor=data.anchor, pad_mask=data.pad_mask)
    tokens = tokenizer.encode(data.test, context)
    decoded = tokenizer.decode(tokens, context)
    comparison = Comparison(
        reference=data.test,
        reconstruction=to_numpy(decoded.actions),
        space=data.space,
        normaliser=data.normaliser,
        pad_mask=data.pad_mask,
    )
    layout = tokenizer.layout_for(horizon, embodiment)
    train_context = ChunkContext(
        horizon=horizon, embodiment=embodiment, anchor=data.train_anchor, pad_mask=data.train.pad_mask
    )
    train = CodeSequences.of(tokenizer.encode(data.train.actions, train_context), layout)
    test = CodeSequences.of(tokens, layout)
    found: dict[str, Any] = {
        "chunks": len(data.test),
        "vocab_size": tokenizer.vocab_size,
        "fixed_length": layout.fixed_length,
        "total": layout.total,
        "normalised": normalised_error(comparison),
        "physical": group_errors(comparison),
        "vrr": valid_reconstruction(comparison, data.tolerances),
        "rate": rate(train, test, horizon * data.space.dim),
        "jerk": jerk(comparison),
        "range": range_use(tokens, decoded, comparison),
    }
    if full:
        found |= _behaviour(tokenizer, data, embodiment, seed)
        found |= {
            "codes": code_use(test),
            "ngram": [ngram_fit(train, test, order) for order in NGRAM_ORDERS],
            "examples": {
                "rows": data.example_rows(),
                "reconstruction": comparison.reconstruction[data.example_rows()].astype(np.float32),
            },
        }
    result: dict[str, Any] = plain(found)
    return result


def _behaviour(tokenizer: ActionTokenizer, data: HeldOut, embodiment: str, seed: int) -> Mapping[str, Any]:
    """Robustness and speed, on an even sample of the held-out chunks."""
    rows = np.unique(np.linspace(0, len(data.test) - 1, ROBUSTNESS_CHUNKS).round().astype(int))
    actions, pad = data.test[rows], data.pad_mask[rows]
    anchor = None if data.anchor is None else data.anchor[rows]
    context = ChunkContext(horizon=actions.shape[1], embodiment=embodiment, anchor=anchor, pad_mask=pad)
    tokens = tokenizer.encode(actions, context)
    clean = Comparison(
        reference=actions,
        reconstruction=to_numpy(tokenizer.decode(tokens, context).actions),
        space=data.space,
        normaliser=data.normaliser,
        pad_mask=pad,
    )
    return {
        "noise": noise_stability(tokenizer, actions, data.normaliser, context, seed=seed),
        "wrong_token": wrong_token(tokenizer, tokens, clean, context, seed=seed),
        "valid": valid_share(tokenizer, tokens, context, seed=seed),
        "latency": measure_latency(tokenizer, actions, context, budget_s=LATENCY_SECONDS),
    }
