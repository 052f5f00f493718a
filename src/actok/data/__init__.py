"""Robot data: readers, writers, action-space presets, chunks, splits, mixtures and the memory-mapped cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Loaded on first use: each reader brings its own libraries.
_LAZY = {
    "Episode": "actok.data.episodes",
    "EpisodeDataset": "actok.data.episodes",
    "open_dataset": "actok.data.open",
    "write_lerobot": "actok.data.lerobot_write",
}

if TYPE_CHECKING:
    from actok.data.episodes import Episode, EpisodeDataset
    from actok.data.lerobot_write import write_lerobot
    from actok.data.open import open_dataset

__all__ = [
    "Episode",
    "EpisodeDataset",
    "open_dataset",
    "write_lerobot",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'actok.data' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
