"""Mutual information between codes and labels, with what chance alone would give taken off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from actok.core import DataError
from actok.evaluation.levels import LevelCodes

# Draws of one symbol a chunk, and as many permutations of the labels.
REPEATS = 32

__all__ = ["Information", "entropy", "label_information"]


@dataclass(frozen=True, kw_only=True)
class Information:
    """What one symbol of a chunk says about the chunk's label.

    Attributes:
        pairs: N, the chunks, one (symbol, label) pair each.
        bits: plug-in estimate of I(symbol; label), mean over draws; too high at finite N.
        chance: the same under labels of other episodes, mean over draws.
        chance_sd: standard deviation over them.
        excess: bits - chance.
        entropy: H(label) in bits.
        share: excess / entropy.
    """

    pairs: int
    bits: float
    chance: float
    chance_sd: float
    excess: float
    entropy: float
    share: float


def label_information(
    codes: LevelCodes,
    label: Int[np.ndarray, "B"],
    episode: Int[np.ndarray, "B"],
    *,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Information:
    """Mutual information in bits between a chunk's label and one of its symbols, drawn uniformly.

    One symbol a chunk makes N the same for tokenizers of 1 and of 60 tokens; the draw is repeated and the results are
    averaged. The plug-in estimate grows with the number of symbols and shrinks with N, so the value under permuted
    labels is subtracted. Chunks of one episode resemble each other, so each episode gets the labels of another one.
    (Permuting single chunks would call it information that an episode's codes repeat within the episode.) They are
    stretched to its length, and begin at a random place, going on from the start where they end: episodes go through
    their phases in the same order, so at the same place of another episode a label would still be right. Chunks without
    a symbol are left out.

    Raises DataError where fewer than two chunks or one label are left.
    """
    order = np.argsort(episode, kind="stable")
    order = order[codes.lengths[order] > 0]
    label = np.unique(label[order], return_inverse=True)[1]
    if len(order) < 2 or label.max() < 1:
        raise DataError(
            f"{len(order)} chunks of {len(np.unique(label))} labels say nothing of information; give two of each"
        )
    starts, lengths = codes.offsets[:-1][order], codes.lengths[order]
    _, first, counts = np.unique(episode[order], return_index=True, return_counts=True)
    place = (np.arange(len(order)) - np.repeat(first, counts)) / np.repeat(counts, counts)  # in 0..1 of the episode
    rng = np.random.default_rng(seed)
    found, chance = np.zeros(repeats), np.zeros(repeats)
    for r in range(repeats):
        symbols = codes.symbols[starts + rng.integers(0, lengths)]
        found[r] = _information(symbols, label)
        giver = np.repeat(rng.permutation(len(counts)), counts)
        turned = (place + np.repeat(rng.random(len(counts)), counts)) % 1
        chance[r] = _information(symbols, label[first[giver] + (turned * counts[giver]).astype(np.int64)])
    bits, by_chance, whole = float(found.mean()), float(chance.mean()), entropy(label)
    return Information(
        pairs=len(order),
        bits=bits,
        chance=by_chance,
        chance_sd=float(chance.std()),
        excess=bits - by_chance,
        entropy=whole,
        share=(bits - by_chance) / whole,
    )


def entropy(values: Int[np.ndarray, "_"]) -> float:
    """Entropy in bits of the empirical distribution."""
    _, counts = np.unique(values, return_counts=True)
    p = counts / len(values)
    return float(-(p * np.log2(p)).sum())


def _information(a: Int[np.ndarray, "N"], b: Int[np.ndarray, "N"]) -> float:
    return entropy(a) + entropy(b) - entropy(a * (b.max() + 1) + b)
