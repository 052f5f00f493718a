"""Which semantic objectives a tokenizer is trained on, and the teacher's features that they read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actok.core import ConfigError, build_config, find_preset

if TYPE_CHECKING:
    from actok.alignment.objectives import AlignmentConfig
    from actok.alignment.store import FeatureStore
    from actok.data import EpisodeDataset

__all__ = ["alignment_config", "open_features", "same_teacher"]


def alignment_config(
    name: str,
    given: Mapping[str, Any] | None,
    features: str | Path | None,
    *,
    frames: bool = True,
    data: Sequence[Any] = (),
) -> AlignmentConfig | None:
    """The objectives of a learned preset: its [alignment] table with the caller's values on top; None: no objectives.

    A preset without such a table has objectives, the default ones, where features or values are given. `frames` is False
    for chunks in memory, which belong to no episode: objectives that need a teacher are then left out.

    Raises ConfigError for unknown or bad values, features that nothing reads, and objectives that need features where
    none are given (naming the commands to run).
    """
    preset = find_preset(name).alignment
    if not preset and not given and features is None:
        return None
    from actok.alignment.objectives import AlignmentConfig

    owner = f"alignment of {name!r}"
    config: AlignmentConfig = build_config(AlignmentConfig, {**preset, **(given or {})}, owner)
    if not frames:
        if features is not None:
            raise ConfigError(
                "chunks in memory belong to no episode, so there are no features of them; give a dataset, or leave features"
                " out"
            )
        config = build_config(AlignmentConfig, {**vars(config), "contrast": 0.0, "prediction": 0.0}, owner)
    elif config.needs_teacher and features is None:
        places = shlex.join([str(d) for d in data if isinstance(d, (str, Path))]) or "DATA"
        raise ConfigError(
            f"{name} is trained on a teacher's features of every frame, and none are given; run `actok features --data"
            f" {places} --teacher MODEL --out FEATURES` once and pass its folder (features=, --features FEATURES), or train"
            " without them (--align contrast=0 prediction=0)"
        )
    elif features is not None and not config.needs_teacher:
        raise ConfigError(
            "features are given, but contrast and prediction are both 0, and nothing else reads them; leave features out"
        )
    return config if config.masking or config.needs_teacher else None


def open_features(folder: str | Path, dataset: EpisodeDataset, rate_hz: float | None) -> FeatureStore:
    """The features of a dataset. Raises DataError with the command to run where they are missing or stale."""
    from actok.alignment.store import FeatureStore
    from actok.data.fingerprint import fingerprint, video_print

    place = None
    if dataset.source_files and dataset.selection is None:
        place = os.path.commonpath([os.path.abspath(path) for path in dataset.source_files])
    store = FeatureStore.open(folder, dataset.name, fingerprint(dataset, rate_hz), data=place)
    store.check_videos(video_print(dataset, store.meta.get("views") or ()))
    return store


def same_teacher(stores: Sequence[FeatureStore]) -> None:
    """Raise ConfigError where the datasets' features are of different teachers."""
    for store in stores[1:]:
        if dict(store.teacher) != dict(stores[0].teacher):
            raise ConfigError(
                f"the datasets' features are of different teachers: {dict(stores[0].teacher)} and {dict(store.teacher)};"
                " extract all with one"
            )
