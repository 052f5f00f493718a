"""Vision-language models: a prompt of images and text in, hidden states of a chosen layer out.

One class for each family adapts what differs: the prompt's form, how images become tokens, and the arguments of the forward
pass. Masks are padded on the right; a real token never sees padding.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from actok.backbones.images import FixedImages, PatchImages
from actok.backbones.prompts import TEXT, PromptBatch, fill_prompts, load_chat_tokenizer, qwen_form
from actok.backbones.source import ModelSource, load_network
from actok.core.errors import ConfigError

__all__ = ["PaliGemma", "PromptBatch", "QwenVL", "VisionLanguageModel"]


class VisionLanguageModel(ABC):
    """A frozen vision-language model, cut after a chosen layer.

    Attributes:
        network: the model of transformers without its language-model head.
        text_tokenizer: its text tokenizer.
        layer: number of decoder layers that run, 1..layers.
        dim: F, width of the hidden states.
    """

    class_name: ClassVar[Mapping[str, str]]  # model_type -> class of transformers
    unused: ClassVar[tuple[str, ...]] = ()  # prefixes of weights that a checkpoint may lack

    def __init__(
        self, source: ModelSource, *, layer: int | None = None, device: str = "cpu", dtype: str | None = None
    ) -> None:
        """Load it.

        Args:
            source: the model's files.
            layer: whose hidden states are wanted, as transformers counts `hidden_states`: 1 is the first decoder layer's
                output, -1 the last one's after the final norm; -3 leaves the last two layers out. None is -1. Layers
                after it are not kept.
            device, dtype: as in `load_network`.

        Raises:
            ConfigError: the layer does not exist, or loading fails.
            MissingExtraError: transformers is not installed.
        """
        full: Any = load_network(
            source, self.class_name[source.model_type], device=device, dtype=dtype, unused=self.unused
        )
        self.source = source
        self.network: Any = full.model
        self.text_tokenizer = load_chat_tokenizer(source)
        self.image_id = int(getattr(full.config, "image_token_id", None) or full.config.image_token_index)
        self.image_token = str(self.text_tokenizer.convert_ids_to_tokens(self.image_id))
        self.dim = int(full.config.get_text_config().hidden_size)
        self.layer = self._cut(-1 if layer is None else layer)

    def _cut(self, layer: int) -> int:
        decoder = self.network.language_model
        count = len(decoder.layers)
        chosen = layer + count + 1 if layer < 0 else layer
        if not 1 <= chosen <= count:
            raise ConfigError(
                f"layer {layer} of {self.source.name} does not exist; it has {count} layers: 1 to {count}, or -{count} to -1"
            )
        if (
            chosen < count
        ):  # hidden_states[i] is the input of layer i, before any norm; only the last has been through it
            decoder.layers = decoder.layers[:chosen]
            decoder.norm = nn.Identity()
        return chosen

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @abstractmethod
    def prompt(self, views: int) -> str:
        """The prompt's form for that many images: `{text}` where the text goes, one image token where each image goes."""

    @abstractmethod
    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        """Arguments of the forward pass for views uint8 [B, H, W, 3], rows sample by sample, and tokens for each view."""

    @abstractmethod
    def _arguments(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Arguments of the forward pass beside ids, mask and pixels."""

    def prepare(self, texts: Sequence[str], images: Sequence[np.ndarray]) -> PromptBatch:
        """Prompts of B texts with the same views: each of `images` is uint8 [B, H, W, 3].

        Raises DataError where a text contains the image token or no token at all.
        """
        pixels, tokens = self._pixels(images) if images else ({}, [])
        made = fill_prompts(self.prompt(len(images)), texts, tokens, self.text_tokenizer, self.image_id)
        return PromptBatch(
            **{k: v.to(self.device) for k, v in vars(made).items()},
            pixels={k: v.to(self.device) for k, v in pixels.items()},
        )

    def hidden(self, batch: PromptBatch) -> Float[Tensor, "B L F"]:
        """Hidden states of the chosen layer; those of padding mean nothing."""
        states: Tensor = self.network(
            input_ids=batch.ids,
            attention_mask=batch.real.long(),
            use_cache=False,
            **batch.pixels,
            **self._arguments(batch),
        ).last_hidden_state
        return states


class QwenVL(VisionLanguageModel):
    """Qwen2.5-VL and Qwen3-VL. Images keep their aspect ratio and take as many tokens as their area asks for."""

    class_name: ClassVar[Mapping[str, str]] = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
    }

    def __init__(
        self,
        source: ModelSource,
        *,
        layer: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """As the base class; `max_pixels` bounds the area of an image, hence its tokens (None: the model's own bound)."""
        super().__init__(source, layer=layer, device=device, dtype=dtype)
        self.images = PatchImages.load(source, max_pixels)

    def prompt(self, views: int) -> str:
        """One turn of the user through the tokenizer's chat template: the images in order, then the text.

        Without a template: the same turn in Qwen's plain form. Raises ConfigError where the template has no place for images.
        """
        return qwen_form(self.text_tokenizer, self.image_token, views, self.source.name)

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        views = [self.images(x) for x in images]
        grids = [(1, *self.images.grid(*x.shape[1:3])) for x in images]
        rows = [view[b] for b in range(len(images[0])) for view in views]
        grid = torch.tensor(grids).repeat(len(images[0]), 1)
        tokens = [self.images.tokens(*x.shape[1:3]) for x in images]
        return {"pixel_values": torch.cat(rows).to(self.dtype), "image_grid_thw": grid}, tokens

    def _arguments(self, batch: PromptBatch) -> dict[str, Tensor]:
        return {"mm_token_type_ids": batch.is_image.int()} if self._takes_types else {}

    @cached_property
    def _takes_types(self) -> bool:
        """Newer transformers read positions off token types, older ones off the ids."""
        return "mm_token_type_ids" in inspect.signature(self.network.forward).parameters


class PaliGemma(VisionLanguageModel):
    """PaliGemma and PaliGemma 2: `<image>` x n, `<bos>`, text, newline, all attending to each other."""

    class_name: ClassVar[Mapping[str, str]] = {"paligemma": "PaliGemmaForConditionalGeneration"}
    # SigLIP's own pooling, which PaliGemma does not read; older and newer transformers place it differently.
    unused = ("model.vision_tower.head.", "model.vision_tower.vision_model.head.")

    def __init__(
        self, source: ModelSource, *, layer: int | None = None, device: str = "cpu", dtype: str | None = None
    ) -> None:
        """As the base class."""
        super().__init__(source, layer=layer, device=device, dtype=dtype)
        self.images = FixedImages.load(source)
        vision = self.network.config.vision_config
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2

    def prompt(self, views: int) -> str:
        """The form of its pre-training; there is no chat template."""
        return self.image_token * views + str(self.text_tokenizer.bos_token) + TEXT + "\n"

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        views = torch.stack([self.images(x) for x in images], dim=1).flatten(0, 1)
        return {"pixel_values": views.to(self.dtype)}, [self.tokens_per_image] * len(images)

    def _arguments(self, batch: PromptBatch) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(batch.ids)}  # 0 is the prefix: attention in both directions
