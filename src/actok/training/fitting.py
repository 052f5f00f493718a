"""From data and a preset's name to a fitted tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from actok.training.config import FINISH_CHUNKS, TrainConfig, train_config
from actok.training.semantic import alignment_config, open_features, same_teacher
from actok.training.tolerance import Tolerance, search

if TYPE_CHECKING:
    from actok.alignment.store import FeatureStore

# Of training, validation and test episodes, here and in the benchmark.
FRACTIONS = (0.8, 0.1, 0.1)
# Training chunks of a dataset that are held in memory, unless the caller says how many.
MAX_CHUNKS = 200_000

__all__ = ["FRACTIONS", "Material", "fit", "fit_parts", "load", "load_material"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """One dataset ready for fitting: chunks by split, all from whole episodes.

    Attributes:
        train, validation, test: FitPart of each split, or None where the split is empty.
        pool: all training chunks, cut when they are asked for; `train` is an even sample where they are too many.
        rows: indices of the chunks of `pool` that count, None: all.
        anchors: proprioception at the chunk starts of validation and test, or None.
        accumulator: statistics of the training episodes, to be merged with those of other datasets.
        origin: what the data were and how the action space was found, for the artifact's meta.
        features: of a teacher, for the dataset's frames, or None.
    """

    train: FitPart
    validation: FitPart | None
    test: FitPart | None
    pool: Chunks
    anchors: Mapping[str, np.ndarray | None]
    accumulator: StatisticsAccumulator
    origin: Mapping[str, Any]
    rows: np.ndarray | None = None
    features: FeatureStore | None = None

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
    name: str,
    parts: Sequence[FitPart],
    *,
    training: Mapping[str, Any] | None = None,
    alignment: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ActionTokenizer:
    """Fit the preset `name`, its settings overridden by `settings`, on prepared chunks of one or more embodiments.

    A learned preset is trained, by its [training] table overridden by `training` (fields of `TrainConfig`), on all parts
    together, every chunk as likely as any other; the last weights are kept, since nothing is held out. Objectives
    (`alignment`, fields of `actok.alignment.AlignmentConfig` over the preset's) that need a teacher are left out.
    """
    preset = find_preset(name)
    target = load_target(preset.target)
    if target.learned:
        from actok.training.learned import train_parts

        objectives = alignment_config(name, alignment, None, frames=False)
        return train_parts(target, *_configs(name, settings, training), parts, alignment=objectives)
    _refuse_training(name, training or alignment)
    config = build_config(target.config_class, merge_settings(preset.settings, settings), f"tokenizer {name!r}")
    tokenizer: ActionTokenizer = target.fit(parts, config)
    return tokenizer


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
    max_chunks: int | None = None,
    training: Mapping[str, Any] | None = None,
    features: str | Path | None = None,
    alignment: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> ActionTokenizer:
    """Fit a tokenizer on a user's data.

    Episodes are split 80/10/10 by `seed`; fitting sees the training episodes only. An array of chunks is fitted on as a
    whole, unless a tolerance asks for a split of its chunks. With `tolerance` the preset's sweep is searched from coarse
    to fine: the first setting whose error on the validation episodes is within it is taken, and its error on the test
    episodes stands in the artifact's meta.

    A learned preset is trained: by steps of gradient descent on all training chunks, judged on the validation episodes
    now and then; the weights of the smallest normalised l1 there are kept (the last ones where nothing is held out).

    Args:
        name: a preset (`actok.list_tokenizers()`).
        data: float array [B, T, D] of chunks; a folder, file or Hub id; a list of episodes [T, D]; a list of datasets
            (one embodiment each); or a `Mixture`, whose ratios then say how many training chunks each of its datasets
            gives, or for a learned preset which share of every batch. Without ratios each chunk weighs the same.
        tolerance: e.g. "2 mm, 1 deg" or "0.02 raw, p95", by default at the 99th percentile; see `Tolerance.parse`.
        horizon: T; default one second of control (`ActionSpace.default_horizon`), where all datasets agree on it.
            Ignored for an array of chunks.
        space: action space preset, TOML file or object; needed where the data do not tell.
        rate_hz: resample every dataset to this rate first; None: each at its own.
        seed: of the split and of subsampling.
        max_chunks: a larger training set is subsampled to this many chunks of each dataset, evenly over all. Default:
            200,000, and all of them for a learned preset, which cuts chunks when it needs them.
        training: of a learned preset: fields of `actok.training.TrainConfig`, over the preset's.
        features: of a learned preset: folder of `actok features`, with a teacher's features of these data; trains it on
            semantic objectives too, which a preset of X-Tokenizer always asks for.
        alignment: of a learned preset: fields of `actok.alignment.AlignmentConfig`, over the preset's.
        run: of a learned preset: folder for its log and checkpoints; None: nothing but the result is kept.
        resume: go on where the run in that folder stands, with the same data and settings.
        progress: of a learned preset: tell on stderr how it goes.
        **settings: override the preset's settings.

    Raises:
        ConfigError: unknown preset or setting. DataError: nothing to fit on, bad values. SpaceMismatchError: D differs
        from the space. ToleranceError: no setting of the sweep meets the tolerance (the message says how near).
        TrainingError: training broke down (a loss that is not finite, memory, another process). TrainingStopped, a
        KeyboardInterrupt: SIGTERM or Ctrl-C; the step is finished and, with a run folder, saved.
    """
    target = load_target(find_preset(name).target)
    trained = target.learned and tolerance is None  # else fitted on chunks in memory, possibly many times
    _check_options(name, target.learned, tolerance, training, run, resume)
    if not target.learned and (alignment or features is not None):
        raise ConfigError(f"{name} is fitted in closed form and has no objectives; leave out features and alignment")
    if target.learned and not trained and (alignment or features is not None):
        raise ConfigError(
            f"the search for a tolerance trains {name} on chunks in memory, which have no features, and on its own"
            " objectives; leave out features and alignment"
        )
    if max_chunks is not None and max_chunks < 1:
        raise ConfigError(f"max_chunks is {max_chunks}; give at least 1")
    if target.learned:
        _configs(name, settings, training)  # refuses what cannot be used before any data are read
    if run is not None:
        from actok.training.run_folder import check_run

        check_run(run, resume=resume)
    ratios = None
    if isinstance(data, Mixture):
        ratios, data = data.ratios, data.open()
    # A list of arrays [T, D] is one dataset, its episodes; a list of anything else holds one dataset an entry.
    several = isinstance(data, (list, tuple)) and data and not (_is_array(data[0]) and data[0].ndim == 2)
    sources = data if several else [data]
    objectives = None
    if trained:
        frames = not any(_is_array(source) for source in sources)
        objectives = alignment_config(name, alignment, features, frames=frames, data=sources)
    limit = max_chunks or MAX_CHUNKS
    options: dict[str, Any] = {
        "horizon": horizon,
        "space": space,
        "rate_hz": rate_hz,
        "seed": seed,
        "max_chunks": min(limit, max(1, FINISH_CHUNKS // len(sources))) if trained else limit,
        "features": features if objectives is not None and objectives.needs_teacher else None,
    }
    materials = [
        load_material(source, hold_out=tolerance is not None or not _is_array(source), **options) for source in sources
    ]
    horizons = {m.origin["name"]: m.origin["horizon"] for m in materials}
    if len(set(horizons.values())) > 1:
        found = ", ".join(f"{steps} ({dataset})" for dataset, steps in horizons.items())
        raise ConfigError(f"the datasets' horizons differ: {found}; name one for all with horizon (--horizon)")
    if trained:
        materials = _to_draw_from(materials, ratios, max_chunks)
    elif ratios is not None:
        materials = _in_ratio(materials, ratios, limit)
    same_teacher([m.features for m in materials if m.features is not None])
    materials = _one_normaliser_each(_one_name_one_space(materials))
    meta: dict[str, Any] = {"preset": name, "data": [dict(m.origin) for m in materials]}
    if trained:
        from actok.training.learned import train_materials

        tokenizer = train_materials(
            name,
            target,
            *_configs(name, settings, training),
            materials,
            ratios="size" if ratios is None else ratios,
            alignment=objectives,
            run=run,
            resume=resume,
            progress=progress,
        )
    elif tolerance is None:
        tokenizer = fit_parts(name, [m.train for m in materials], **settings)
    else:
        bound = Tolerance.parse(tolerance)
        fit_each = partial(fit_parts, training=training)
        tokenizer, meta["tolerance"] = search(name, materials, bound, settings, fit_each)
    return tokenizer.with_meta(meta)


def _configs(name: str, settings: Mapping[str, Any], training: Mapping[str, Any] | None) -> tuple[Any, TrainConfig]:
    """The config of a learned preset's class and of its training."""
    preset = find_preset(name)
    config_class = load_target(preset.target).config_class
    config = build_config(config_class, merge_settings(preset.settings, settings), f"tokenizer {name!r}")
    return config, train_config(preset.training, training, repr(name))


def _check_options(
    name: str, learned: bool, tolerance: Any, training: Mapping[str, Any] | None, run: Any, resume: bool
) -> None:
    """Refuse options of `fit` that mean nothing together."""
    if not learned:
        _refuse_training(name, training)
        if run is not None or resume:
            raise ConfigError(f"{name} is fitted in closed form and has no run to keep or resume; leave it out")
    elif tolerance is not None:
        if not find_preset(name).sweep:
            raise ConfigError(
                f"{name} is trained and has no sweep of settings to search for a tolerance; train it and look at its errors"
                " with actok bench, or take a closed-form tokenizer"
            )
        if run is not None or resume:
            raise ConfigError(f"the search for a tolerance trains {name} several times and keeps no run; leave run out")
    elif resume and run is None:
        raise ConfigError("resume is asked for without a run folder; name it (run=, --run)")


def _to_draw_from(
    materials: Sequence[Material], ratios: Sequence[float] | None, max_chunks: int | None
) -> list[Material]:
    """Materials with the chunks that training draws from: all, or `max_chunks` of each, evenly spread."""
    found = []
    for i, material in enumerate(materials):
        size, rows = len(material.pool), None
        if max_chunks is not None and size > max_chunks:
            rows = np.linspace(0, size - 1, max_chunks).round().astype(np.int64)
        origin = {**material.origin, "train_chunks": size if rows is None else len(rows)}
        if ratios is not None:
            origin["ratio"] = ratios[i]
        found.append(replace(material, rows=rows, origin=origin))
    return found


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
        anchor = None if part.anchor is None else part.anchor[rows]
        train = replace(part, actions=part.actions[rows], pad_mask=pad, anchor=anchor)
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
    max_chunks: int = MAX_CHUNKS,
    hold_out: bool = True,
    features: str | Path | None = None,
) -> Material:
    """Open a source, split it by episode (`hold_out` False: all of it is training data) and cut chunks.

    `features` is the folder where a teacher's features of it are.

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

    train_pool = Chunks(cache, steps, split.train, stride=stride)

    def part(which: str) -> FitPart | None:
        episodes = getattr(split, which)
        if not len(episodes):
            return None
        pool = train_pool if which == "train" else Chunks(cache, steps, episodes, stride=stride)
        wanted = np.arange(len(pool))
        if len(wanted) > max_chunks:
            wanted = np.linspace(0, len(pool) - 1, max_chunks).round().astype(np.int64)
        batch = pool.batch(wanted)
        anchors[which] = batch.anchor
        pad = batch.pad_mask if batch.pad_mask.any() else None
        return FitPart(actions=batch.actions, space=space, statistics=statistics, pad_mask=pad, anchor=batch.anchor)

    train = part("train")
    assert train is not None, "split_dataset fills train first"
    return Material(
        train=train,
        validation=part("validation"),
        test=part("test"),
        pool=train_pool,
        anchors=anchors,
        accumulator=accumulator,
        features=None if features is None else open_features(features, dataset, rate_hz),
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
