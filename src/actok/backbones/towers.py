"""Models with a tower for images, a tower for text, or both: CLIP, SigLIP, DINOv2, sentence encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from actok.backbones.images import FixedImages
from actok.backbones.source import ModelSource, load_network, load_text_tokenizer
from actok.core.errors import ConfigError, DataError

__all__ = ["ImageEncoder", "ImageTextTowers", "SentenceEncoder"]


def _tokens(
    tokenizer: Any, texts: Sequence[str], limit: int, pad: int | None, name: str, device: torch.device
) -> dict[str, Tensor]:
    """ids and mask int64 [B, L], padded on the right: to the longest, or all to `pad`.

    Raises DataError where a text is longer than `limit` tokens.
    """
    coded = tokenizer(list(texts))["input_ids"]
    for text, ids in zip(texts, coded, strict=True):
        if len(ids) > limit:
            raise DataError(f"the text {text!r} has {len(ids)} tokens; {name} reads {limit}: shorten it")
    length = pad or max(map(len, coded))
    ids = torch.full((len(coded), length), tokenizer.pad_token_id or 0, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(coded):
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class _Encoder:
    """A frozen network.

    Attributes:
        class_name: model_type -> class of transformers.
        unused: prefixes of weights that no result depends on, so that a checkpoint may lack them.
    """

    class_name: ClassVar[Mapping[str, str]]
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: ModelSource, *, device: str = "cpu", dtype: str | None = None) -> None:
        """Load it. Raises as `load_network` does."""
        self.source = source
        self.network: Any = load_network(
            source, self.class_name[source.model_type], device=device, dtype=dtype, unused=self.unused
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype


class ImageTextTowers(_Encoder):
    """CLIP and SigLIP: two towers into one space of width `dim`."""

    class_name: ClassVar[Mapping[str, str]] = {"clip": "CLIPModel", "siglip": "SiglipModel"}

    def __init__(self, source: ModelSource, *, device: str = "cpu", dtype: str | None = None) -> None:
        """Load both towers. Raises as `load_network` does."""
        super().__init__(source, device=device, dtype=dtype)
        self.tokenizer = load_text_tokenizer(source)
        self.images = FixedImages.load(source)
        text = self.network.config.text_config
        self.limit = int(text.max_position_embeddings)
        # SigLIP was trained on texts filled up to their full length, reads its last place, and masks nothing.
        self.filled = source.model_type == "siglip"
        self.dim = int(
            getattr(text, "projection_size", text.hidden_size) if self.filled else self.network.config.projection_dim
        )

    def text(self, texts: Sequence[str]) -> Float[Tensor, "B F"]:
        """Embeddings of unit length. Raises DataError where a text is too long."""
        pad = self.limit if self.filled else None
        tokens = _tokens(self.tokenizer, texts, self.limit, pad, self.source.name, self.device)
        if self.filled:
            del tokens["attention_mask"]
        return normalize(_pooled(self.network.get_text_features(**tokens)).float(), dim=-1)

    def image(self, images: np.ndarray) -> Float[Tensor, "B F"]:
        """Embeddings of unit length of images uint8 [B, H, W, 3]."""
        pixels = self.images(images).to(self.device, self.dtype)
        return normalize(_pooled(self.network.get_image_features(pixel_values=pixels)).float(), dim=-1)


def _pooled(output: Any) -> Tensor:
    """The tensor itself (older transformers), or the pooled output of a model output."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ImageEncoder(_Encoder):
    """DINOv2 (with or without registers): the normalised class token of the last layer."""

    class_name: ClassVar[Mapping[str, str]] = {
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
    }

    def __init__(self, source: ModelSource, *, device: str = "cpu", dtype: str | None = None) -> None:
        """Load it. Raises as `load_network` does."""
        super().__init__(source, device=device, dtype=dtype)
        self.images = FixedImages.load(source)
        self.dim = int(self.network.config.hidden_size)

    def image(self, images: np.ndarray) -> Float[Tensor, "B F"]:
        """Embeddings of unit length of images uint8 [B, H, W, 3]."""
        pixels = self.images(images).to(self.device, self.dtype)
        return normalize(self.network(pixel_values=pixels).pooler_output.float(), dim=-1)


class SentenceEncoder(_Encoder):
    """BERT-like encoders: the pooling that 1_Pooling/config.json names (mean over the real tokens where there is none).

    Reads the files of sentence-transformers: modules.json, 1_Pooling/config.json, sentence_bert_config.json.
    """

    class_name: ClassVar[Mapping[str, str]] = {
        "bert": "BertModel",
        "distilbert": "DistilBertModel",
        "roberta": "RobertaModel",
        "xlm-roberta": "XLMRobertaModel",
        "mpnet": "MPNetModel",
        "modernbert": "ModernBertModel",
    }
    unused = ("pooler.",)  # the head of next-sentence prediction
    modules = ("Transformer", "Pooling", "Normalize")

    def __init__(self, source: ModelSource, *, device: str = "cpu", dtype: str | None = None) -> None:
        """Load it. Raises ConfigError on a module or a pooling that is not known here, else as `load_network` does."""
        for module in source.read("modules.json") or []:
            kind = str(module["type"]).rpartition(".")[2]
            if kind not in self.modules:
                raise ConfigError(f"{source.name} has a module {kind}; known are {', '.join(self.modules)}")
        self.pooling = _pooling(source)
        super().__init__(source, device=device, dtype=dtype)
        self.tokenizer = load_text_tokenizer(source)
        limits = source.read("sentence_bert_config.json") or {}
        positions = int(getattr(self.network.config, "max_position_embeddings", 512))
        # The RoBERTa family's first places are taken: positions begin after the padding id.
        offset = 2 if source.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
        self.limit = min(int(limits.get("max_seq_length") or positions), positions - offset)
        self.lower = bool(limits.get("do_lower_case", False))
        self.dim = int(self.network.config.hidden_size)

    def text(self, texts: Sequence[str]) -> Float[Tensor, "B F"]:
        """Embeddings of unit length. Raises DataError where a text is too long."""
        if self.lower:
            texts = [x.lower() for x in texts]
        tokens = _tokens(self.tokenizer, texts, self.limit, None, self.source.name, self.device)
        states = self.network(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        if self.pooling == "cls":
            pooled = states[:, 0]
        elif self.pooling == "max":
            pooled = states.masked_fill(mask == 0, -torch.inf).amax(dim=1)
        else:
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return normalize(pooled, dim=-1)


def _pooling(source: ModelSource) -> str:
    """ "mean", "cls" or "max"."""
    values = source.read("1_Pooling/config.json") or {"pooling_mode_mean_tokens": True}
    chosen = [k for k, v in values.items() if k.startswith("pooling_mode") and v]
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    if len(chosen) != 1 or chosen[0] not in names:
        raise ConfigError(f"{source.name} pools by {chosen}; known is one of {', '.join(names)}")
    return names[chosen[0]]
