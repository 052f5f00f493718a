"""Judging a tokenizer on validation episodes while it trains, with the metrics of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actok.core import ActionTokenizer, ChunkContext, FitPart, to_numpy
from actok.evaluation.codes import CodeSequences, code_use
from actok.evaluation.comparison import Comparison
from actok.evaluation.metrics import normalised_error, valid_reconstruction
from actok.signal.normalise import Normaliser

# Of the valid reconstruction rate, in normalised units.
TOLERANCES = (0.03, 0.1)

__all__ = ["HeldOutChunks", "judge"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutChunks:
    """Validation chunks of one dataset.

    Attributes:
        name: of the dataset.
        part: the chunks.
        anchor: [B, P] proprioception at their starts, or None.
        ruler: of normalised figures: 1 % and 99 % quantiles of the training episodes.
    """

    name: str
    part: FitPart
    anchor: np.ndarray | None
    ruler: Normaliser

    @classmethod
    def of(cls, name: str, part: FitPart, anchor: np.ndarray | None, statistics: Any, most: int) -> HeldOutChunks:
        """At most so many of the chunks, evenly spread."""
        rows = np.unique(np.linspace(0, len(part.actions) - 1, most).round().astype(np.int64))
        sample = FitPart(
            actions=part.actions[rows],
            space=part.space,
            statistics=statistics,
            pad_mask=None if part.pad_mask is None else part.pad_mask[rows],
        )
        ruler = Normaliser.make("quantile", statistics)
        return cls(name=name, part=sample, anchor=None if anchor is None else anchor[rows], ruler=ruler)


def judge(tokenizer: ActionTokenizer, datasets: Sequence[HeldOutChunks]) -> dict[str, Any]:
    """Metrics as JSON values; each is the mean over datasets, whose own l1 is told too where there are several.

    "l1" is the normalised error and "vrr" the valid reconstruction rate (eq. 4 of FASTer as printed) of docs/metrics.md;
    "codes_used" and "perplexity" are lists with one entry a code table.
    """
    l1, vrr, used, perplexity = [], [], [], []
    for held in datasets:
        part = held.part
        context = ChunkContext(embodiment=part.space.embodiment, anchor=held.anchor, pad_mask=part.pad_mask)
        tokens = tokenizer.encode(part.actions, context)
        comparison = Comparison(
            reference=part.actions,
            reconstruction=to_numpy(tokenizer.decode(tokens).actions),
            space=part.space,
            normaliser=held.ruler,
            pad_mask=part.pad_mask,
        )
        error = normalised_error(comparison)
        l1.append(float("inf") if error.l1 is None else error.l1)
        vrr.append(valid_reconstruction(comparison, TOLERANCES).literal)
        layout = tokenizer.layout_for(tokens.horizon, part.space.embodiment)
        tables = code_use(CodeSequences.of(tokens, layout))
        used.append([t.used for t in tables])
        perplexity.append([t.size**t.entropy for t in tables])
    found: dict[str, Any] = {
        "l1": float(np.mean(l1)),
        "vrr": {f"{t:g}": float(v) for t, v in zip(TOLERANCES, np.mean(vrr, axis=0), strict=True)},
        "codes_used": _mean(used),
        "perplexity": _mean(perplexity),
        "chunks": sum(len(held.part.actions) for held in datasets),
    }
    if len(datasets) > 1:
        found["l1_by_dataset"] = [{"name": h.name, "l1": float(v)} for h, v in zip(datasets, l1, strict=True)]
    return found


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean over datasets for each table; a dataset whose layout leaves a table out does not count there."""
    width = max(map(len, rows))
    return [float(np.mean([r[i] for r in rows if i < len(r)])) for i in range(width)]
