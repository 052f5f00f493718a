"""Robot data: readers, writers, action-space presets, chunks, splits, mixtures and the memory-mapped cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Loaded on first use: each reader brings its own libraries.
_LAZY = {
    "ChunkBatch": "actok.data.chunks",
    "Chunks": "actok.data.chunks",
    "Episode": "actok.data.episodes",
    "EpisodeDataset": "actok.data.episodes",
    "FrameCache": "actok.data.cache",
    "Mixture": "actok.data.mixtures",
    "MixtureEntry": "actok.data.mixtures",
    "MixtureSampler": "actok.data.mixtures",
    "Split": "actok.data.splits",
    "TokenTable": "actok.data.tokens",
    "describe_space": "actok.data.spaces",
    "find_space": "actok.data.spaces",
    "infer_space": "actok.data.spaces",
    "list_spaces": "actok.data.spaces",
    "list_mixtures": "actok.data.mixtures",
    "load_mixture": "actok.data.mixtures",
    "open_dataset": "actok.data.open",
    "read_tokens": "actok.data.tokens",
    "split_dataset": "actok.data.splits",
    "split_episodes": "actok.data.splits",
    "stated_kinematics": "actok.data.kinematic",
    "union_mapping": "actok.data.spaces",
    "with_kinematics": "actok.data.kinematic",
    "write_lerobot": "actok.data.lerobot_write",
    "write_npz": "actok.data.tokens",
    "write_tokens": "actok.data.tokens",
}

if TYPE_CHECKING:
    from actok.data.cache import FrameCache
    from actok.data.chunks import ChunkBatch, Chunks
    from actok.data.episodes import Episode, EpisodeDataset
    from actok.data.kinematic import stated_kinematics, with_kinematics
    from actok.data.lerobot_write import write_lerobot
    from actok.data.mixtures import Mixture, MixtureEntry, MixtureSampler, list_mixtures, load_mixture
    from actok.data.open import open_dataset
    from actok.data.spaces import describe_space, find_space, infer_space, list_spaces, union_mapping
    from actok.data.splits import Split, split_dataset, split_episodes
    from actok.data.tokens import TokenTable, read_tokens, write_npz, write_tokens

__all__ = [
    "ChunkBatch",
    "Chunks",
    "Episode",
    "EpisodeDataset",
    "FrameCache",
    "Mixture",
    "MixtureEntry",
    "MixtureSampler",
    "Split",
    "TokenTable",
    "describe_space",
    "find_space",
    "infer_space",
    "list_mixtures",
    "list_spaces",
    "load_mixture",
    "open_dataset",
    "read_tokens",
    "split_dataset",
    "split_episodes",
    "stated_kinematics",
    "union_mapping",
    "with_kinematics",
    "write_lerobot",
    "write_npz",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'actok.data' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
