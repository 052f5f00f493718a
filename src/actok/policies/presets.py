"""Policies by name: TOML files under configs/policies.

summary = "one line"                # shown by `actok list policies`
paper = "FASTer (arXiv 2512.04952)"
[backbone]                          # kind = "tiny" and fields of TinyConfig, or model = Hub id or folder
kind = "tiny"
[policy]                            # fields of VLAConfig
block = 7
[training]                          # fields of actok.training.TrainConfig, and stages
steps = 3000
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from actok.core import ConfigError
from actok.core.registry import CONFIGS, read_toml, suggest

__all__ = ["PolicyPreset", "find_policy_preset", "policy_presets"]


@dataclass(frozen=True, kw_only=True)
class PolicyPreset:
    """A named policy with the settings of its parts."""

    name: str
    summary: str
    paper: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


@cache
def policy_presets() -> Mapping[str, PolicyPreset]:
    """All packaged ones by name."""
    found = {}
    for path in sorted((CONFIGS / "policies").glob("*.toml"), key=lambda p: p.stem):
        try:
            found[path.stem] = PolicyPreset(name=path.stem, **read_toml(path))
        except TypeError as error:
            raise ConfigError(f"{path}: {error}; a preset has summary, paper, backbone, policy, training") from None
    return found


def find_policy_preset(name: str) -> PolicyPreset:
    """The preset of that name. Raises ConfigError with the nearest one."""
    presets = policy_presets()
    if name not in presets:
        raise ConfigError(f"no policy is called {name!r}; {suggest(name, list(presets))}")
    return presets[name]
