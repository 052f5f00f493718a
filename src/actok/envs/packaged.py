"""What a built-in environment reads from the packaged configuration: its action space and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from actok.core.registry import CONFIGS, read_toml
from actok.core.spaces import ActionSpace

_SPACE_FIELDS = {f.name for f in fields(ActionSpace)}

__all__ = ["packaged_instructions", "packaged_space"]


def packaged_space(name: str) -> ActionSpace:
    """The packaged action space of that name."""
    values = read_toml(CONFIGS / "spaces" / f"{name}.toml")
    # The file also says how readers recognise data of this space.
    return ActionSpace.from_dict({k: v for k, v in values.items() if k == "mode" or k in _SPACE_FIELDS})


def packaged_instructions(env: str) -> Mapping[str, str]:
    """Task key -> words, of the environment's file in configs/envs."""
    words: Mapping[str, str] = read_toml(CONFIGS / "envs" / f"{env}.toml")["instructions"]
    return words
