"""Image preprocessing of foundation models, from their own preprocessor_config.json, by NumPy and PIL alone.

transformers' fast image processors need torchvision, which pulls a build of torch of its own; its slow ones come and go with
versions. What a model was trained to see does not change with them: resize on 8-bit images (PIL), crop, rescale, normalise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from actok.backbones.source import ModelSource
from actok.core.errors import ConfigError, DataError, MissingExtraError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number, as in preprocessor_config.json
MAX_ASPECT = 200

__all__ = ["FixedImages", "PatchImages", "check_images", "read_preprocessor"]


def check_images(images: Any, name: str) -> np.ndarray:
    """`images` as uint8 [B, H, W, 3]. Raises DataError naming what it is instead."""
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape[1:]:
        raise DataError(
            f"{name} is {array.dtype} {list(array.shape)}; give uint8 [B, H, W, 3] (RGB, 0 to 255, channels last)"
        )
    return array


def read_preprocessor(source: ModelSource) -> dict[str, Any]:
    """The image processor's settings: preprocessor_config.json, or its section in processor_config.json.

    Raises ConfigError where the folder has neither.
    """
    values = source.read("preprocessor_config.json")
    if values is None:
        values = (source.read("processor_config.json") or {}).get("image_processor")
    if not isinstance(values, dict):
        raise ConfigError(f"{source.name} has no preprocessor_config.json; download the whole model")
    return values


def _resize(images: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    if images.shape[1:3] == (height, width):
        return images
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "transformers", "resizing images for a foundation model") from error
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height), resample)) for x in images])


def _sides(value: Any, what: str) -> tuple[int, int] | int:
    """(height, width), or the shortest side as an int."""
    if isinstance(value, Mapping) and "height" in value and "width" in value:
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and value.get("shortest_edge") and not value.get("longest_edge"):
        return int(value["shortest_edge"])
    if isinstance(value, int):
        return value
    raise ConfigError(
        f"{what} {value!r} of the preprocessor is not known; it is {{height, width}} or {{shortest_edge}}"
    )


@dataclass(frozen=True, kw_only=True)
class FixedImages:
    """Images resized and cropped to one size: CLIP, SigLIP, PaliGemma, DINOv2.

    Attributes:
        size: (height, width) to resize to, or the length of the shortest side; None leaves the size alone.
        crop: (height, width) of the centre that is kept, or None. What lies outside is lost, as in the model's training.
        resample: PIL's number of the interpolation.
        scale: factor of the 8-bit values (1/255).
        mean, std: by channel, after scaling.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, source: ModelSource, side: int | None = None) -> FixedImages:
        """From the model's folder; `side` is that of a square to resize to, instead of the file's size.

        Raises ConfigError where a setting is not known.
        """
        values = read_preprocessor(source)
        if side is not None:
            values["size"] = {"height": side, "width": side}
        size = _sides(values["size"], "size") if values.get("do_resize", True) and values.get("size") else None
        crop = None
        if values.get("do_center_crop", False):
            kept = _sides(values.get("crop_size", 224), "crop_size")
            crop = kept if isinstance(kept, tuple) else (kept, kept)
        elif isinstance(size, int) and isinstance(values["size"], int):
            size = (size, size)  # a bare number without a crop is a square
        return cls(
            size=size,
            crop=crop,
            resample=int(values.get("resample", BICUBIC)),
            **_scaling(values),
        )

    def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 h w"]:
        """Pixels as the model reads them. Raises DataError where an image is smaller than the crop."""
        height, width = images.shape[1:3]
        if isinstance(self.size, tuple):
            height, width = self.size
        elif self.size is not None:
            shortest = min(height, width)
            height, width = (
                self.size if side == shortest else int(self.size * side / shortest) for side in (height, width)
            )
        images = _resize(images, height, width, self.resample)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise DataError(f"images of {height} x {width} are smaller than the model's crop {self.crop}")
            images = images[:, top : top + self.crop[0], left : left + self.crop[1]]
        factor, shift = (x[:, None, None] for x in _affine(self))
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)) * factor - shift)


@dataclass(frozen=True, kw_only=True)
class PatchImages:
    """Images of any size as rows of patches: Qwen2.5-VL and Qwen3-VL.

    The sides become multiples of patch x merge, the aspect ratio stays, and the area lies between `min_pixels` and
    `max_pixels`. A still image fills the temporal patch by repetition. Rows go merge block by merge block, so that the rows
    which the model merges into one token follow each other.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, source: ModelSource, max_pixels: int | None = None) -> PatchImages:
        """From the model's folder; `max_pixels` overrides the file's.

        Raises ConfigError where it is below the smallest area or a setting is not known.
        """
        values = read_preprocessor(source)
        size = values.get("size") or {}
        smallest = int(values.get("min_pixels") or size.get("shortest_edge") or 56 * 56)
        largest = int(max_pixels or values.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280)
        if largest < smallest:
            raise ConfigError(f"max_pixels {largest} is below the model's min_pixels; give {smallest} or more")
        return cls(
            patch=int(values.get("patch_size", 14)),
            merge=int(values.get("merge_size", 2)),
            temporal=int(values.get("temporal_patch_size", 2)),
            min_pixels=smallest,
            max_pixels=largest,
            resample=int(values.get("resample", BICUBIC)),
            **_scaling(values),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (down, across) of an image of that size. Raises DataError beyond an aspect ratio of 200."""
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise DataError(f"an image of {height} x {width} is longer than {MAX_ASPECT} times its width; crop it")
        unit = self.patch * self.merge
        down, across = round(height / unit) * unit, round(width / unit) * unit
        if down * across > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            down, across = (max(unit, math.floor(x / shrink / unit) * unit) for x in (height, width))
        elif down * across < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            down, across = (math.ceil(x * grow / unit) * unit for x in (height, width))
        return down // self.patch, across // self.patch

    def tokens(self, height: int, width: int) -> int:
        """Tokens that an image of that size takes in the prompt."""
        down, across = self.grid(height, width)
        return down * across // self.merge**2

    def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B L P"]:
        """Rows of patches, L = down x across, P = 3 x temporal x patch x patch."""
        down, across = self.grid(*images.shape[1:3])
        images = _resize(images, down * self.patch, across * self.patch, self.resample)
        m, p = self.merge, self.patch
        blocks = images.reshape(len(images), down // m, m, p, across // m, m, p, 3)
        rows = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(images), down * across, 3, 1, p, p)
        factor, shift = (x[:, None, None, None] for x in _affine(self))
        out = np.empty((*rows.shape[:3], self.temporal, p, p), np.float32)
        np.multiply(rows, factor, out=out)
        out -= shift
        return torch.from_numpy(out.reshape(len(images), down * across, -1))


def _scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields `scale`, `mean`, `std` of both classes."""
    normal = values.get("do_normalize", True)
    return {
        "scale": float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0,
        "mean": tuple(values.get("image_mean") or CLIP_MEAN) if normal else (0.0, 0.0, 0.0),
        "std": tuple(values.get("image_std") or CLIP_STD) if normal else (1.0, 1.0, 1.0),
    }


def _affine(settings: FixedImages | PatchImages) -> tuple[np.ndarray, np.ndarray]:
    """(value x scale - mean) / std as factor and shift by channel, float32 [3]."""
    std = np.asarray(settings.std, np.float64)
    return (settings.scale / std).astype(np.float32), (np.asarray(settings.mean) / std).astype(np.float32)
