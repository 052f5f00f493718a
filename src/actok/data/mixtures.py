"""Several datasets mixed by ratio, and which chunks of which dataset make up each training step.

A ratio weighs a *dataset*: it is drawn for a share ratio / (sum of ratios) of all steps or samples, however many frames it
has (ratio 5 beside 1 means five in six). A mixture file:

    summary = "one line"
    paper = "FASTer (arXiv ...), Table 3"          # optional
    [[datasets]]
    name = "bridge"                                 # key of `locations`
    space = "bridge_widowx"                         # preset or path to a TOML file; optional, else inferred
    ratio = 1.0
    source = "user/name"                            # Hub id, folder or file; a location given by the caller wins
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from actok.core import ConfigError
from actok.core.registry import CONFIGS, read_toml, suggest
from actok.data.chunks import Chunks
from actok.data.episodes import EpisodeDataset

# Longest cycle of steps in which every dataset comes up exactly as its ratio says.
LONGEST_CYCLE = 10_000
ROUNDS = 6  # of the permutation network; the published analyses of Feistel networks ask for at least 4

__all__ = ["MixedBatch", "MixedSamples", "Mixture", "MixtureEntry", "MixtureSampler", "list_mixtures", "load_mixture"]


@dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """One dataset of a mixture.

    Attributes:
        name: unique within the mixture.
        source: what `open_dataset` takes: folder, file or Hub id.
        space: preset name or TOML path, None to infer.
        ratio: weight of this dataset, above 0.
    """

    name: str
    source: str
    space: str | None = None
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < math.inf:
            raise ConfigError(f"dataset {self.name!r} has ratio {self.ratio!r}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Datasets and their ratios.

    Attributes:
        name: of the mixture.
        summary: one line.
        paper: source, "" where there is none.
        entries: at least one, names unique.
    """

    name: str
    entries: tuple[MixtureEntry, ...]
    summary: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        names = [e.name for e in self.entries]
        if not names:
            raise ConfigError(f"mixture {self.name!r} has no datasets; give at least one")
        if len(set(names)) < len(names):
            raise ConfigError(f"mixture {self.name!r} names a dataset twice: {names}; give each its own name")

    @property
    def ratios(self) -> tuple[float, ...]:
        """One per entry."""
        return tuple(e.ratio for e in self.entries)

    def open(self) -> list[EpisodeDataset]:
        """The datasets, in the order of the entries. Raises as `open_dataset` does."""
        from actok.data.open import open_dataset

        return [open_dataset(e.source, space=e.space, name=e.name) for e in self.entries]


def list_mixtures() -> list[str]:
    """Names of the packaged mixtures."""
    return sorted(path.stem for path in (CONFIGS / "mixtures").glob("*.toml"))


def load_mixture(name_or_toml: str | Path, locations: Mapping[str, str | Path] | None = None) -> Mixture:
    """A packaged mixture by name, or one from a TOML file (see the module).

    Args:
        name_or_toml: e.g. "faster_s", or the path of a file.
        locations: folder, file or Hub id of each dataset, by its name in the mixture; wins over the file's `source`.

    Raises:
        ConfigError: an unknown mixture, a malformed file, a dataset that has neither a location nor a source, or a
            location for a dataset that is not in the mixture.
    """
    path = Path(name_or_toml)
    if path.suffix != ".toml":
        if str(name_or_toml) not in list_mixtures():
            raise ConfigError(
                f"no mixture is called {str(name_or_toml)!r}; {suggest(str(name_or_toml), list_mixtures())}"
            )
        path = CONFIGS / "mixtures" / f"{name_or_toml}.toml"
    values = read_toml(path)
    if unknown := set(values) - {"summary", "paper", "datasets"}:
        raise ConfigError(f"{path} has the key {min(unknown)!r}; a mixture has summary, paper, datasets")
    given = {name: str(location) for name, location in (locations or {}).items()}
    tables = values.get("datasets", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tables):
        raise ConfigError(f"{path}: every dataset is a table [[datasets]] with a name")
    names = [t["name"] for t in tables]
    if foreign := sorted(set(given) - set(names)):
        raise ConfigError(f"mixture {path.stem!r} has no dataset {foreign[0]!r}; {suggest(foreign[0], names)}")
    missing = [t["name"] for t in tables if t["name"] not in given and "source" not in t]
    if missing:
        example = ", ".join(f'"{name}": "/path/to/it"' for name in missing)
        raise ConfigError(
            f"mixture {path.stem!r} does not know where {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'};"
            f" give source in a TOML file of your own, or pass locations={{{example}}}"
        )
    entries = []
    for table in tables:
        settings = dict(table)
        source = settings.pop("source", None)
        try:
            entries.append(MixtureEntry(source=given.get(table["name"], source), **settings))
        except TypeError as error:
            raise ConfigError(f"{path}: {error}; a dataset has name, space, ratio, source") from None
    return Mixture(
        name=path.stem, entries=tuple(entries), summary=values.get("summary", ""), paper=values.get("paper", "")
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedBatch:
    """What one step trains on.

    Attributes:
        dataset: index of the dataset; a batch is of one dataset, since their D and embodiment differ.
        indices: int64 [B] chunks of that dataset, for `Chunks.batch`.
        epoch: how often that dataset was gone through before the first of them.
    """

    dataset: int
    indices: np.ndarray
    epoch: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedSamples:
    """What one step trains on where a batch mixes datasets.

    Attributes:
        dataset: int64 [B] dataset of each sample.
        indices: int64 [B] its chunk in that dataset, for `Chunks.batch`.
    """

    dataset: np.ndarray
    indices: np.ndarray


class MixtureSampler:
    """Which chunks a training step sees, as a pure function of seed and step; nothing is stored, so resuming is exact.

    Draws come in cycles. Within one, each dataset owns exactly the number of draws its ratio asks for (ratios 5 and 1:
    five and one of six), in an order drawn anew for each cycle. Each dataset is gone through without repetition, in an
    order drawn anew for each epoch; a batch that reaches the end of an epoch continues into the next. The order is a
    keyed permutation computed per index (a Feistel network with cycle walking), so memory does not grow with the data.

    A draw is a whole batch of one dataset (`at`), or a single sample, so that batches mix datasets (`samples`).

    With several processes, rank r of W calls `at` with steps r, r + W, r + 2 W, ..., or `samples` with its rank.

    Args:
        sizes: chunks of each dataset: the `Chunks` objects or their lengths.
        ratios: one per dataset, above 0; equal where None. "size": all chunks of all datasets are one epoch, so that each
            sample is as likely as any other; for `samples` only.
        batch_size: B, of all processes together.
        seed: at least 0.

    Raises:
        ConfigError: no dataset, an empty one, ratios that need a cycle of more than 10,000 draws, a batch size below 1.
    """

    def __init__(
        self,
        sizes: Sequence[Chunks | int],
        *,
        batch_size: int,
        ratios: Sequence[float] | Literal["size"] | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes = tuple(len(s) if isinstance(s, Chunks) else int(s) for s in sizes)
        by_size = isinstance(ratios, str)
        if by_size and ratios != "size":
            raise ConfigError(f'ratios are {ratios!r}; give a number for each dataset, or "size"')
        ratios = [1.0] * len(self.sizes) if ratios is None or isinstance(ratios, str) else list(ratios)
        if not self.sizes or min(self.sizes) < 1 or len(ratios) != len(self.sizes):
            raise ConfigError(
                f"datasets of {list(self.sizes)} chunks with ratios {ratios} cannot be mixed; give at least one, none"
                " empty, and a ratio for each"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; give at least 1")
        if seed < 0:
            raise ConfigError(f"sampler seed is {seed}; give 0 or more")
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.quotas = self.sizes if by_size else _quotas(ratios)
        self._by_size = by_size

    def at(self, step: int) -> MixedBatch:
        """The batch of step 0, 1, 2, ... in any order, from any process."""
        if step < 0:
            raise ConfigError(f"step is {step}; steps count from 0")
        if self._by_size:
            raise ConfigError('ratios "size" mix samples, not batches of one dataset; use samples(step)')
        cycle, place = divmod(int(step), sum(self.quotas))
        order = _cycle(self.quotas, self.seed, cycle)
        dataset = int(order[place])
        before = cycle * self.quotas[dataset] + int((order[:place] == dataset).sum())
        size = self.sizes[dataset]
        first = before * self.batch_size
        epochs, places = np.divmod(first + np.arange(self.batch_size), size)
        indices = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            indices[mine] = _permute(places[mine], size, (self.seed, dataset, int(epoch)))
        return MixedBatch(dataset=dataset, indices=indices, epoch=first // size)

    def samples(self, step: int, *, rank: int = 0, ranks: int = 1) -> MixedSamples:
        """The samples of step 0, 1, 2, ..., in any order; rank r of W gets the r-th of W equal parts of the batch.

        Raises ConfigError where the batch cannot be divided among the ranks.
        """
        if step < 0 or not 0 <= rank < ranks:
            raise ConfigError(f"step is {step}, rank {rank} of {ranks}; both count from 0")
        share, rest = divmod(self.batch_size, ranks)
        if rest:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be divided among {ranks} processes; change batch_size"
            )
        draws = int(step) * self.batch_size + rank * share + np.arange(share)
        cycles, places = np.divmod(draws, sum(self.quotas))
        dataset, indices = np.empty(share, np.int64), np.empty(share, np.int64)
        for cycle in np.unique(cycles):
            mine = cycles == cycle
            if self._by_size:  # a cycle is an epoch of everything
                pooled = _permute(places[mine], sum(self.sizes), (self.seed, len(self.sizes), int(cycle)))
                ends = np.cumsum(self.sizes)
                dataset[mine] = np.searchsorted(ends, pooled, side="right")
                indices[mine] = pooled - (ends - self.sizes)[dataset[mine]]
                continue
            order = _cycle(self.quotas, self.seed, int(cycle))
            dataset[mine] = order[places[mine]]
            indices[mine] = int(cycle) * np.array(self.quotas)[dataset[mine]] + _ordinals(order)[places[mine]]
        if not self._by_size:
            epochs, turns = np.divmod(indices, np.array(self.sizes)[dataset])
            for d, epoch in np.unique(np.stack([dataset, epochs]), axis=1).T:
                mine = (dataset == d) & (epochs == epoch)
                indices[mine] = _permute(turns[mine], self.sizes[d], (self.seed, int(d), int(epoch)))
        return MixedSamples(dataset=dataset, indices=indices)


def _ordinals(order: np.ndarray) -> np.ndarray:
    """How often the entry at each place of a cycle has come up before it."""
    by_dataset = np.argsort(order, kind="stable")
    counts = np.bincount(order)
    ordinals = np.empty_like(order)
    ordinals[by_dataset] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ordinals


def _quotas(ratios: Sequence[float]) -> tuple[int, ...]:
    """Smallest whole numbers in the given ratios. A float stands for the shortest decimal that it prints as."""
    for ratio in ratios:
        if not (math.isfinite(ratio) and ratio > 0):
            raise ConfigError(f"ratio {ratio} cannot be used; give a number above 0")
    exact = [Fraction(str(ratio)) for ratio in ratios]
    common = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * common) for f in exact]
    quotas = tuple(w // math.gcd(*whole) for w in whole)
    if sum(quotas) > LONGEST_CYCLE:
        raise ConfigError(
            f"ratios {list(ratios)} repeat only after {sum(quotas)} steps; round them so that it is {LONGEST_CYCLE} at most"
        )
    return quotas


@lru_cache(maxsize=8)
def _cycle(quotas: tuple[int, ...], seed: int, cycle: int) -> np.ndarray:
    """Dataset of each step of a cycle. Raw PCG64 bits are the same on every NumPy version."""
    bits = np.random.PCG64([seed, cycle]).random_raw(sum(quotas))
    order = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(bits, kind="stable")]
    order.setflags(write=False)
    return order


def _permute(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Images of places [n] in 0..size-1 under a permutation of 0..size-1 drawn by the key.

    A Feistel network permutes the smallest range 4^h >= size; a value that falls outside is sent through again until it
    falls inside (cycle walking), which keeps it a permutation and takes fewer than four passes on average.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.PCG64(list(key)).random_raw(ROUNDS)
    images = places.astype(np.uint64)
    walking = np.arange(len(images))
    while len(walking):
        left, right = images[walking] >> half, images[walking] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & mask)
        images[walking] = (left << half) | right
        walking = walking[images[walking] >= size]
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
