"""From data and a preset's name to a fitted tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import (
    ActionSpace,
    ActionTokenizer,
    ConfigError,
    FitPart,
    as_float_batch,
    build_config,
    find_class,
    find_preset,
    merge_settings,
    read_artifact,
)
from actok.core.arrays import is_torch
from actok.core.registry import load_target
from actok.data import Chunks, FrameCache, Mixture, open_dataset, split_dataset
from actok.signal.sketch import StatisticsAccumulator
from actok.training.config import train_config
from actok.training.tolerance import Tolerance, search

# Of training, validation and test episodes, here and in the benchmark.
FRACTIONS = (0.8, 0.1, 0.1)

__all__ = ["FRACTIONS", "Material", "fit", "fit_parts", "load", "load_material"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """One dataset ready for fitting: chunks by split, all from whole episodes.

    Attributes:
        train, validation, test: FitPart of each split, or None where the split is empty.
        anchors: proprioception at the chunk starts of validation and test, or None.
        accumulator: statistics of the training episodes, to be merged with those of other datasets.
        origin: what the data were and how the action space was found, for the artifact's meta.
    """

    train: FitPart
    validation: FitPart | None
    test: FitPart | None
    anchors: Mapping[str, np.ndarray | None]
    accumulator: StatisticsAccumulator
    origin: Mapping[str, Any]

    def renamed(self, embodiment: str) -> Material:
        """The same chunks under another embodiment's name."""
        parts = {
            which: None if part is None else replace(part, space=part.space.renamed(embodiment))
            for which, part in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }
        return replace(self, **parts)  # type: ignore[arg-type]


def load(folder_or_hub_id: str | Path, *, revision: str | None = None) -> ActionTokenizer:
    """Load any tokenizer: a folder or Hub id written by `save_pretrained`, or published FAST+ files.

    Raises ArtifactError naming what is missing, truncated or edited.
    """
    from actok.tokenizers.fast import FastTokenizer, is_published_folder

    if is_published_folder(folder_or_hub_id, revision):
        return FastTokenizer.from_published(folder_or_hub_id, revision=revision)
    artifact = read_artifact(folder_or_hub_id, revision=revision)
    tokenizer: ActionTokenizer = find_class(artifact.kind).from_artifact(artifact)
    return tokenizer


def fit_parts(
    name: str, parts: Sequence[FitPart], *, training: Mapping[str, Any] | None = None, **settings: Any
) -> ActionTokenizer:
    """Fit the preset `name`, its settings overridden by `settings`, on prepared chunks of one or more embodiments.

    A learned preset is trained, by its [training] table overridden by `training` (fields of `TrainConfig`), on all parts
    together, every chunk as likely as any other; the last weights are kept, since nothing is held out.
    """
    preset = find_preset(name)
    target = load_target(preset.target)
    config = build_config(target.config_class, merge_settings(preset.settings, settings), f"tokenizer {name!r}")
    if not target.learned:
        _refuse_training(name, training)
        fitted: ActionTokenizer = target.fit(parts, config)
        return fitted
    from actok.training.learned import train_parts

    return train_parts(target, config, parts, train_config(preset.training, training, f"{name!r}"))


def _refuse_training(name: str, training: Mapping[str, Any] | None) -> None:
    if training:
        raise ConfigError(
            f"{name} is fitted in closed form and takes no training settings; leave out {', '.join(training)}"
        )


def fit(
    name: str,
    data: Any,
    *,
    tolerance: Any = None,
    horizon: int | None = None,
    space: str | Path | ActionSpace | None = None,
    rate_hz: float | None = None,
    seed: int = 0,
    max_chunks: int = 200_000,
    **settings: Any,
) -> ActionTokenizer:
    """Fit a tokenizer on a user's data.

    Episodes are split 80/10/10 by `seed`; fitting sees the training episodes only. An array of chunks is fitted on as a
    whole, unless a tolerance asks for a split of its chunks. With `tolerance` the preset's sweep is searched from coarse
    to fine: the first setting whose error on the validation episodes is within it is taken, and its error on the test
    episodes stands in the artifact's meta.

    Args:
        name: a preset (`actok.list_tokenizers()`).
        data: float array [B, T, D] of chunks; a folder, file or Hub id; a list of episodes [T, D]; a list of datasets
            (one embodiment each); or a `Mixture`, whose ratios then say how many training chunks each of its datasets
            gives.
        tolerance: e.g. "2 mm, 1 deg" or "0.02 raw, p95", by default at the 99th percentile; see `Tolerance.parse`.
        horizon: T; default one second of control (`ActionSpace.default_horizon`), where all datasets agree on it.
            Ignored for an array of chunks.
        space: action space preset, TOML file or object; needed where the data do not tell.
        rate_hz: resample every dataset to this rate first; None: each at its own.
        seed: of the split and of subsampling.
        max_chunks: a larger training set is subsampled to this many chunks, evenly over all.
        **settings: override the preset's settings.

    Raises:
        ConfigError: unknown preset or setting. DataError: nothing to fit on, bad values. SpaceMismatchError: D differs
        from the space. ToleranceError: no setting of the sweep meets the tolerance (the message says how near).
    """
    find_preset(name)
    if max_chunks < 1:
        raise ConfigError(f"max_chunks is {max_chunks}; give at least 1")
    ratios = None
    if isinstance(data, Mixture):
        ratios, data = data.ratios, data.open()
    # A list of arrays [T, D] is one dataset, its episodes; a list of anything else holds one dataset an entry.
    several = isinstance(data, (list, tuple)) and data and not (_is_array(data[0]) and data[0].ndim == 2)
    sources = data if several else [data]
    options: dict[str, Any] = {
        "horizon": horizon,
        "space": space,
        "rate_hz": rate_hz,
        "seed": seed,
        "max_chunks": max_chunks,
    }
    materials = [
        load_material(source, hold_out=tolerance is not None or not _is_array(source), **options) for source in sources
    ]
    horizons = {m.origin["name"]: m.origin["horizon"] for m in materials}
    if len(set(horizons.values())) > 1:
        found = ", ".join(f"{steps} ({dataset})" for dataset, steps in horizons.items())
        raise ConfigError(f"the datasets' horizons differ: {found}; name one for all with horizon (--horizon)")
    if ratios is not None:
        materials = _in_ratio(materials, ratios, max_chunks)
    materials = _one_normaliser_each(_one_name_one_space(materials))
    parts = [m.train for m in materials]
    meta: dict[str, Any] = {
        "preset": name,
        "data": [dict(m.origin) for m in materials],
    }
    if tolerance is None:
        tokenizer = fit_parts(name, parts, **settings)
    else:
        bound = Tolerance.parse(tolerance)
        tokenizer, meta["tolerance"] = search(name, materials, bound, settings, fit_parts)
    return tokenizer.with_meta(meta)


def _in_ratio(materials: Sequence[Material], ratios: Sequence[float], max_chunks: int) -> list[Material]:
    """Training chunks in the ratios of a mixture, as many in all as there are (at most `max_chunks`).

    A dataset with more chunks than its share is thinned evenly, one with fewer gives each of them more than once.
    """
    total = min(max_chunks, sum(len(m.train.actions) for m in materials))
    found = []
    for material, ratio in zip(materials, ratios, strict=True):
        part, share = material.train, max(1, round(total * ratio / sum(ratios)))
        rows = np.linspace(0, len(part.actions) - 1, share).round().astype(np.int64)
        pad = None if part.pad_mask is None else part.pad_mask[rows]
        train = replace(part, actions=part.actions[rows], pad_mask=pad)
        found.append(replace(material, train=train, origin={**material.origin, "train_chunks": share, "ratio": ratio}))
    return found


def _one_name_one_space(materials: Sequence[Material]) -> list[Material]:
    """Datasets whose embodiments share a name although their spaces differ (two arrays) get names of their own."""
    seen: dict[str, ActionSpace] = {}
    found = []
    for material in materials:
        space = material.train.space
        name, number = space.embodiment, 2
        while (known := seen.get(name)) is not None and known.differences(space):
            name, number = f"{space.embodiment}_{number}", number + 1
        seen[name] = space
        found.append(material if name == space.embodiment else material.renamed(name))
    return found


def _one_normaliser_each(materials: Sequence[Material]) -> list[Material]:
    """Datasets of one embodiment get the statistics of all of their training episodes together."""
    merged: dict[str, StatisticsAccumulator] = {}
    for material in materials:
        name = material.train.space.embodiment
        if name in merged:
            merged[name].merge(material.accumulator)
        else:
            merged[name] = StatisticsAccumulator.from_arrays(material.accumulator.to_arrays())
    statistics = {name: accumulator.result() for name, accumulator in merged.items()}
    return [replace(m, train=replace(m.train, statistics=statistics[m.train.space.embodiment])) for m in materials]


def load_material(
    source: Any,
    *,
    horizon: int | None = None,
    space: str | Path | ActionSpace | None = None,
    rate_hz: float | None = None,
    seed: int = 0,
    max_chunks: int = 200_000,
    hold_out: bool = True,
) -> Material:
    """Open a source, split it by episode (`hold_out` False: all of it is training data) and cut chunks.

    An array [B, T, D] counts as B episodes of one chunk each.
    """
    stride = 1
    if _is_array(source):
        source = list(as_float_batch(source, "chunks"))
        stride = horizon = len(source[0])
    dataset = open_dataset(source, space=space)
    cache = FrameCache.build(dataset, rate_hz=rate_hz)
    space = cache.space
    steps = space.default_horizon if horizon is None else horizon
    split = split_dataset(dataset, fractions=FRACTIONS if hold_out else (1.0, 0.0, 0.0), seed=seed)
    accumulator = cache.accumulate(split.train)
    statistics = accumulator.result()
    anchors: dict[str, np.ndarray | None] = {}

    def part(which: str) -> FitPart | None:
        episodes = getattr(split, which)
        if not len(episodes):
            return None
        pool = Chunks(cache, steps, episodes, stride=stride)
        wanted = np.arange(len(pool))
        if len(wanted) > max_chunks:
            wanted = np.linspace(0, len(pool) - 1, max_chunks).round().astype(np.int64)
        batch = pool.batch(wanted)
        anchors[which] = batch.anchor
        pad = batch.pad_mask if batch.pad_mask.any() else None
        return FitPart(actions=batch.actions, space=space, statistics=statistics, pad_mask=pad)

    train = part("train")
    assert train is not None, "split_dataset fills train first"
    return Material(
        train=train,
        validation=part("validation"),
        test=part("test"),
        anchors=anchors,
        accumulator=accumulator,
        origin={
            "name": dataset.name,
            "episodes": len(dataset),
            "frames": int(np.sum(dataset.lengths)),
            "horizon": steps,
            "train_chunks": len(train.actions),
            "space_origin": dataset.space_origin,
            "split": {"seed": seed, "fractions": list(FRACTIONS)} if hold_out else None,
        },
    )


def _is_array(source: Any) -> bool:
    return isinstance(source, np.ndarray) or is_torch(source)
