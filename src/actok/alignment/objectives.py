"""The semantic objectives of a training, together: losses on a codec's output and a teacher's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actok.alignment.config import AlignmentConfig
from actok.alignment.contrast import Contrast
from actok.alignment.features import FeatureBatch
from actok.alignment.masking import MaskedCodes, masked_actions
from actok.alignment.prediction import NextFeature
from actok.alignment.slots import real_slots
from actok.core import CodecBatch, CodecOutput, ConfigError

__all__ = ["Alignable", "AlignmentConfig", "SemanticHeads"]


class Alignable(Protocol):
    """What is asked of a codec besides its output (`actok.tokenizers.codec.Codec`)."""

    def slot_steps(self, steps: int) -> Any:
        """int [S, 2], the span of steps of each slot; None where slots are no spans of time."""

    def __call__(self, batch: CodecBatch) -> CodecOutput:
        """A forward pass; called for masking_target "actions" only."""


class SemanticHeads(nn.Module):
    """What is trained along with a codec and dropped afterwards: encoding and decoding need none of it.

    Losses by name: "masking" reads the level-0 vectors, "contrast" the latents before quantisation, "prediction" the
    quantised latents; further levels hear of none but prediction.

    Args:
        config: AlignmentConfig. Objectives of weight 0 are not made.
        dim: C of the latents.
        sizes: K of each level.
        feature_dim: F of the teacher; needed where the config has objectives that read its features.

    Attributes:
        names: of the objectives there are.
        masking_on: False while masked action modelling is yet to start; its loss is then 0.

    Raises ConfigError where `feature_dim` is missing.
    """

    def __init__(
        self, config: AlignmentConfig, *, dim: int, sizes: Sequence[int], feature_dim: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.feature_dim, self.masking_on = config, feature_dim, True
        self.names = tuple(name for name in ("masking", "contrast", "prediction") if getattr(config, name))
        if config.masking and config.masking_target == "codes":
            self.masked_codes = MaskedCodes(
                dim, sizes[0], width=config.width, depth=config.masking_depth, share=config.masking_share
            )
        if config.needs_teacher and feature_dim is None:
            raise ConfigError(
                f"contrast is {config.contrast} and prediction {config.prediction}, which read a teacher's features, and"
                " there are none; set both to 0, or give features"
            )
        if config.contrast:
            self.contrast = Contrast(dim, feature_dim or 0, width=config.width, temperature=config.temperature)
        if config.prediction:
            self.prediction = NextFeature(dim, feature_dim or 0, width=config.width)

    def forward(
        self, output: CodecOutput, batch: CodecBatch, features: FeatureBatch | None, codec: Alignable
    ) -> dict[str, Tensor]:
        """Weighted losses by name, float32 scalars, always finite; 0 where nothing in the batch counts.

        Random draws come from torch's global generator. With several processes, all have to call it (the contrast is over
        the chunks of all), and every parameter is in the graph, whether or not it has a say in this batch.

        Raises ConfigError where features are missing or of another width, and where codes are to be told from others and
        the codec makes a single slot.
        """
        config, losses = self.config, {}
        spans = codec.slot_steps(batch.actions.shape[1])
        if spans is not None:
            spans = torch.as_tensor(spans, device=batch.real.device)
        count, slots = output.latents.shape[:2]
        if spans is None:
            real = torch.ones(count, slots, dtype=torch.bool, device=batch.real.device)
        else:
            real = real_slots(batch.real, spans)
        if config.masking:
            losses["masking"] = config.masking * self._masking(output, batch, real, spans, codec)
        if config.needs_teacher:
            found = self._checked(features)
            if config.contrast:
                losses["contrast"] = config.contrast * self.contrast(output.latents, real, found)
            if config.prediction:
                losses["prediction"] = config.prediction * self.prediction(output.quantised, real, found)
        return losses

    def _masking(
        self, output: CodecOutput, batch: CodecBatch, real: Tensor, spans: Tensor | None, codec: Alignable
    ) -> Tensor:
        if self.config.masking_target == "actions":
            if not self.masking_on:
                return torch.zeros((), device=batch.real.device)
            return masked_actions(batch, spans, codec, self.config.masking_share)
        codes = output.codes[:, :, 0]
        if codes.shape[1] < 2:
            raise ConfigError(
                "masking is on, but the codec makes one slot of a chunk, whose code nothing is left to tell from; set masking"
                ' to 0, or masking_target to "actions"'
            )
        if not self.masking_on:
            return torch.stack([p.sum() for p in self.masked_codes.parameters()]).sum() * 0.0
        if codes.shape != real.shape:  # code slots of their own, none of which is padding
            real = torch.ones_like(codes, dtype=torch.bool)
        loss: Tensor = self.masked_codes(output.level_vectors[:, :, 0], codes, real)
        return loss

    def _checked(self, features: FeatureBatch | None) -> FeatureBatch:
        if features is None:
            raise ConfigError("a batch has no teacher's features, which contrast and prediction read; give features")
        if features.whole.shape[1] != self.feature_dim:
            raise ConfigError(
                f"features are {features.whole.shape[1]} wide, the objectives were made for {self.feature_dim}; give those"
                " of the same teacher"
            )
        return features
