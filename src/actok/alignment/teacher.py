"""Frozen foundation models as teachers: instructions and camera images in, one feature for each frame out.

Source: X-Tokenizer (arXiv 2606.14752), whose teacher is Qwen2.5-VL-7B at layer -3 with three views. How its hidden states
become one vector is not published; `VisionLanguageTeacher` says what is done here. Every feature has unit length, whatever
the teacher: half precision holds it, and objectives see directions, never a scale that depends on the model.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from actok.backbones.images import check_images
from actok.backbones.source import ModelSource, find_model, require_transformers
from actok.backbones.towers import ImageEncoder, ImageTextTowers, SentenceEncoder
from actok.backbones.vision_language import PaliGemma, QwenVL, VisionLanguageModel
from actok.core.errors import ConfigError, DataError
from actok.core.registry import load_target

VIEWS = 3  # face, left wrist, right wrist
LAYER = -3  # of vision-language models, as in the paper
SCENE = "actok_scene"  # model_type of the teacher trained here
PAIR = "dinov2:IMAGE_MODEL+text:TEXT_MODEL"

__all__ = [
    "ImageAndTextTeacher",
    "SentenceTeacher",
    "Teacher",
    "TowersTeacher",
    "VisionLanguageTeacher",
    "known_teachers",
    "load_teacher",
]


class Teacher(ABC):
    """A frozen model that turns the frames of a demonstration into features of width F.

    Attributes:
        dim: F.
        reads_images: False for teachers of text alone; they refuse images.
        needs_images: True where a frame without an image has no feature.
        views: most images of one frame, in the order the caller keeps (face, left wrist, right wrist).
    """

    dim: int
    reads_images: bool = True
    needs_images: ClassVar[bool] = False
    views: int = VIEWS

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What decides the features, as JSON values: equal identities give equal features.

        Keys: kind, model (Hub id or folder name, never a path), hash (of the files' content), dim, views, dtype, layer,
        pooling, prompt (the exact form, `{text}` where the text goes), and the options of the kind.
        """

    @abstractmethod
    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        """Features of unit length, of checked input; `images` is empty or holds the views that are present."""

    def encode(
        self, texts: Sequence[str], images: Sequence[np.ndarray | None] | None = None
    ) -> Float[np.ndarray, "B F"]:
        """Features of B frames, float32 of unit length.

        A frame's feature does not depend on the others of the batch (beyond rounding).

        Args:
            texts: what is being done in each frame, B non-empty strings.
            images: views in order, each uint8 [B, H, W, 3] (RGB), None for a view that the dataset lacks; sizes may differ
                between views. None: no images at all.

        Raises:
            DataError: an empty text, a text too long for the model, images of another type, number or batch size, too many
                views, images for a teacher of text, none for a teacher that needs them, or features that are not finite.
        """
        texts = list(texts)
        bad = next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)
        if not texts or bad is not None:
            raise DataError(f"text {bad or 0} is empty; give each frame its instruction")
        present = self._check_images(len(texts), images or [])
        with torch.inference_mode():
            features: np.ndarray = self._features(texts, present).float().cpu().numpy()
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise DataError(
                f"{self.identity['model']} gives values that are not finite for {texts[row]!r}; use dtype float32"
            )
        return features

    def _check_images(self, batch: int, images: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        if len(images) > self.views:
            raise DataError(f"{len(images)} views are given and {self.views} are read; choose {self.views} of them")
        present = [check_images(x, f"view {i}") for i, x in enumerate(images) if x is not None]
        for view in present:
            if len(view) != batch:
                raise DataError(f"a view holds {len(view)} images for {batch} texts; give one for each")
        if present and not self.reads_images:
            raise DataError(f"{self.identity['model']} reads no images; leave them out")
        if self.needs_images and not present:
            raise DataError(f"{self.identity['model']} needs images; use its text model alone where there are none")
        return present


def _facts(source: ModelSource, **more: Any) -> dict[str, Any]:
    """The part of an identity that all transformers models share."""
    version = str(require_transformers(f"loading {source.name}").__version__)
    return {"model": source.name, "hash": source.content_hash(), "transformers": version.partition(".")[0], **more}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class VisionLanguageTeacher(Teacher):
    """Qwen2.5-VL, Qwen3-VL, PaliGemma: hidden states of a chosen layer, pooled over the prompt.

    Pooling: the mean over the tokens of the images and the mean over the tokens of the text, each scaled to unit length, then
    their sum scaled to unit length; the text's alone where there are no images. So hundreds of image tokens do not drown ten
    words, and the tokens of the prompt's form (system turn, role markers, where language models park activations a hundred
    times larger) do not count. The text follows the images, so its states have seen them; in order.
    """

    POOLING = "unit mean of image tokens + unit mean of text tokens"

    def __init__(self, model: VisionLanguageModel, *, views: int = VIEWS, **options: Any) -> None:
        """`options` are those the model was loaded with; they become part of the identity."""
        self.model, self.views, self.dim = model, views, model.dim
        self._options = options

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        model = self.model
        return _facts(
            model.source,
            kind=model.source.model_type,
            dim=self.dim,
            views=self.views,
            dtype=_name(model.dtype),
            layer=model.layer,
            pooling=self.POOLING,
            prompt=model.prompt(self.views),
            **self._options,
        )

    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        batch = self.model.prepare(texts, images)
        hidden = self.model.hidden(batch).float()
        total = _mean_of(hidden, batch.is_text)
        if images:
            total = total + _mean_of(hidden, batch.is_image)
        return normalize(total, dim=-1)


def _mean_of(hidden: Float[Tensor, "B L F"], chosen: Tensor) -> Float[Tensor, "B F"]:
    """Unit mean over the chosen tokens of each row, at least one."""
    kept = hidden.masked_fill(~chosen[..., None], 0)  # states of padding may be anything
    return normalize(kept.sum(dim=1) / chosen.sum(dim=1, keepdim=True), dim=-1)


class TowersTeacher(Teacher):
    """CLIP and SigLIP: the sum of the text's embedding and the mean image embedding of the views, scaled to unit length.

    Both live in one space of width F, so a frame without images has the text's embedding. The order of views does not
    matter.
    """

    def __init__(self, model: ImageTextTowers, *, views: int = VIEWS) -> None:
        self.model, self.views, self.dim = model, views, model.dim

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        source = self.model.source
        return _facts(
            source,
            kind=source.model_type,
            dim=self.dim,
            views=self.views,
            dtype=_name(self.model.dtype),
            layer=None,
            pooling="unit text + unit mean of views",
            prompt="{text}",
        )

    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        total = self.model.text(texts)
        if images:
            total = total + _over_views(self.model.image, images)
        return normalize(total, dim=-1)


def _over_views(encode: Callable[[np.ndarray], Tensor], images: list[np.ndarray]) -> Tensor:
    """Unit mean of the views' embeddings [B, F]."""
    return normalize(torch.stack([encode(x) for x in images]).mean(dim=0), dim=-1)


class ImageAndTextTeacher(Teacher):
    """DINOv2 beside a text encoder: their embeddings of unit length side by side, F = image width + text width.

    The two share no space, so a frame without images has no feature. The order of views does not matter.
    """

    needs_images = True

    def __init__(self, image: ImageEncoder, text: SentenceEncoder | ImageTextTowers, *, views: int = VIEWS) -> None:
        self.image, self.text, self.views = image, text, views
        self.dim = image.dim + text.dim

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        image, text = _facts(self.image.source), _facts(self.text.source)
        return {
            "kind": f"{self.image.source.model_type}+{self.text.source.model_type}",
            "model": f"{image['model']}+{text['model']}",
            "hash": f"{image['hash']}+{text['hash']}",
            "transformers": image["transformers"],
            "dim": self.dim,
            "views": self.views,
            "dtype": _name(self.image.dtype),
            "layer": None,
            "pooling": "unit mean of views, unit text, side by side",
            "prompt": "{text}",
        }

    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        parts = [_over_views(self.image.image, images), self.text.text(texts)]
        return normalize(torch.cat(parts, dim=-1), dim=-1)


class SentenceTeacher(Teacher):
    """A sentence encoder: text alone, pooled as its own files say."""

    reads_images = False

    def __init__(self, model: SentenceEncoder) -> None:
        self.model, self.views, self.dim = model, 0, model.dim

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        source = self.model.source
        return _facts(
            source,
            kind=source.model_type,
            dim=self.dim,
            views=0,
            dtype=_name(self.model.dtype),
            layer=None,
            pooling=self.model.pooling,
            prompt="{text}",
        )

    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        return self.model.text(texts)


def known_teachers() -> list[str]:
    """The model_types of config.json that `load_teacher` takes."""
    classes = (QwenVL, PaliGemma, ImageTextTowers, ImageEncoder, SentenceEncoder)
    return [SCENE, *(kind for cls in classes for kind in cls.class_name)]


def load_teacher(
    spec: str | Path,
    *,
    layer: int | None = None,
    views: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    **options: Any,
) -> Teacher:
    """A frozen teacher, its kind found from config.json's model_type.

    Args:
        spec: a local folder or Hub id ("owner/name", "owner/name@revision"), or "dinov2:IMAGE_MODEL+text:TEXT_MODEL".
        layer: of vision-language models alone, whose hidden states are taken; default -3. See `VisionLanguageModel`.
        views: most images of a frame, default 3; of teachers that read images alone.
        device: as torch names it.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and the checkpoint's own elsewhere.
        options: Qwen alone: `max_pixels`, the largest area of an image, which bounds its tokens.

    Raises:
        ConfigError: an unknown folder, model_type, layer or option.
        MissingExtraError: transformers is not installed.
    """
    if pair := re.fullmatch(r"dinov2:(.+)\+text:(.+)", str(spec)):
        image, text = find_model(pair[1]), find_model(pair[2])
        _refuse(spec, {"layer": layer, **options})
        if image.model_type not in ImageEncoder.class_name:
            raise ConfigError(f"{pair[1]} is a {image.model_type}; the image model of a pair is one of DINOv2")
        encoder = _text_encoder(text, device, dtype)
        return ImageAndTextTeacher(ImageEncoder(image, device=device, dtype=dtype), encoder, views=_views(views))
    source = find_model(spec)
    kind = source.model_type
    if kind == SCENE:
        _refuse(spec, {"layer": layer, "dtype": dtype, **options})
        scene: Teacher = load_target("actok.alignment.scene:SceneTeacher").from_folder(source.folder, device=device)
        if views is not None:
            scene.views = _views(views)
        return scene
    common: Any = {"device": device, "dtype": dtype}
    if kind in QwenVL.class_name:
        _refuse(spec, {k: v for k, v in options.items() if k != "max_pixels"})
        model: VisionLanguageModel = QwenVL(source, layer=LAYER if layer is None else layer, **common, **options)
        return VisionLanguageTeacher(model, views=_views(views), max_pixels=options.get("max_pixels"))
    if kind in PaliGemma.class_name:
        _refuse(spec, options)
        model = PaliGemma(source, layer=LAYER if layer is None else layer, **common)
        return VisionLanguageTeacher(model, views=_views(views))
    _refuse(spec, {"layer": layer, **options})
    if kind in ImageTextTowers.class_name:
        return TowersTeacher(ImageTextTowers(source, **common), views=_views(views))
    if kind in SentenceEncoder.class_name:
        _refuse(spec, {"views": views})
        return SentenceTeacher(SentenceEncoder(source, **common))
    if kind in ImageEncoder.class_name:
        raise ConfigError(f"{spec} reads images alone; name a text encoder beside it: {PAIR}")
    raise ConfigError(f"{spec} is a {kind!r}, which no adapter reads; known are {', '.join(known_teachers())}")


def _text_encoder(source: ModelSource, device: str, dtype: str | None) -> SentenceEncoder | ImageTextTowers:
    for cls in (SentenceEncoder, ImageTextTowers):
        if source.model_type in cls.class_name:
            return cls(source, device=device, dtype=dtype)
    kinds = ", ".join([*SentenceEncoder.class_name, *ImageTextTowers.class_name])
    raise ConfigError(f"{source.name} is a {source.model_type}; the text model of a pair is one of {kinds}")


def _views(views: int | None) -> int:
    if views is not None and views < 1:
        raise ConfigError(f"views is {views}; give 1 or more, or no images at all")
    return VIEWS if views is None else views


def _refuse(spec: str | Path, options: Mapping[str, Any]) -> None:
    """Raise ConfigError where an option was given that this kind of model does not take."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{spec} takes no {name} (given: {value!r}); leave it out")
