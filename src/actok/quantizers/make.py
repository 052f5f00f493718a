"""From settings to a quantiser."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from actok.core import ConfigError, build_config
from actok.quantizers.base import Quantizer
from actok.quantizers.fsq import FiniteScalarConfig, FiniteScalarQuantizer
from actok.quantizers.grouped import GroupedConfig, GroupedQuantizer
from actok.quantizers.lfq import LookupFreeConfig, LookupFreeQuantizer
from actok.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from actok.quantizers.residual import ResidualConfig, ResidualQuantizer
from actok.quantizers.vq import VectorConfig, VectorQuantizer

__all__ = ["KINDS", "make_quantizer"]

KINDS: dict[str, tuple[type, type[Quantizer]]] = {
    "vq": (VectorConfig, VectorQuantizer),
    "residual": (ResidualConfig, ResidualQuantizer),
    "grouped": (GroupedConfig, GroupedQuantizer),
    "fsq": (FiniteScalarConfig, FiniteScalarQuantizer),
    "lfq": (LookupFreeConfig, LookupFreeQuantizer),
    "multi_scale": (MultiScaleConfig, MultiScaleQuantizer),
}


def make_quantizer(settings: Mapping[str, Any], dim: int) -> Quantizer:
    """A quantiser of latents with C = `dim` channels from settings such as {"kind": "residual", "levels": 3}.

    Raises ConfigError for an unknown kind, an unknown setting, or a value that cannot be used.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"quantizer is {settings!r}; give a table of settings, or set quantizer.kind={settings}")
    kind = settings.get("kind")
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(KINDS)}"
        raise ConfigError(f"there is no quantizer kind {kind!r}; {hint}")
    config_class, quantizer_class = KINDS[kind]
    config = build_config(config_class, {k: v for k, v in settings.items() if k != "kind"}, f"quantizer {kind!r}")
    return quantizer_class(config, dim)  # type: ignore[arg-type]
