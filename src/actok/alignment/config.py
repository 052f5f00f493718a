"""Which semantic objectives a codec is trained with, and how strongly. This module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from actok.core import ConfigError

__all__ = ["HEAD", "AlignmentConfig"]

Target = Literal["codes", "actions"]
# Channels of an attention head of the masked model.
HEAD = 32


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Weights and settings of the semantic objectives; the defaults are X-Tokenizer's. A weight of 0 turns one off.

    Attributes:
        masking: weight of masked action modelling.
        masking_target: what is told from what was left visible: "codes", the level-0 codes (the paper); "actions", the
            chunk itself (the project page).
        masking_share: share of the slots that are hidden.
        masking_after: share of the training steps before which there is no masked action modelling.
        masking_depth: Transformer layers of the masked model.
        contrast: weight of the InfoNCE between latents and a teacher's features.
        temperature: of the InfoNCE.
        prediction: weight of the regression of the teacher's feature of the frame after the chunk.
        width: of the masked model, of the space that latents and features are compared in, and of the prediction's hidden
            layer.
    """

    masking: float = 0.1
    masking_target: Target = "codes"
    masking_share: float = 0.15
    masking_after: float = 0.1
    masking_depth: int = 2
    contrast: float = 0.5
    temperature: float = 0.1
    prediction: float = 0.2
    width: int = 64

    def __post_init__(self) -> None:
        for name in ("masking", "contrast", "prediction"):
            self._number(name, "of at least 0", least=0.0)
        self._number("masking_share", "between 0 and 1", above=0.0, below=1.0)
        self._number("masking_after", "of at least 0, below 1", least=0.0, below=1.0)
        self._number("temperature", "above 0", above=0.0)
        if self.masking_target not in get_args(Target):
            raise ConfigError(f"masking_target is {self.masking_target!r}; choose one of {', '.join(get_args(Target))}")
        if not _whole(self.masking_depth) or self.masking_depth < 1:
            raise ConfigError(f"masking_depth is {self.masking_depth!r}; give a whole number of at least 1")
        if not _whole(self.width) or self.width < HEAD or self.width % HEAD:
            raise ConfigError(f"width is {self.width!r}; give a multiple of {HEAD}, the size of an attention head")

    def _number(
        self, name: str, limits: str, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
    ) -> None:
        value = getattr(self, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not real or value < least or not above < value < below:
            raise ConfigError(f"{name} is {value!r}; give a number {limits}")

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective reads a teacher's features."""
        return self.contrast > 0 or self.prediction > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
