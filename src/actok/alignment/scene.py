"""A small vision-language teacher: camera images and instructions in one space, trained by `actok teacher` in minutes.

An image tower (strided convolutions; the cameras of a dataset stand still, so the last feature map is read place by place)
and a text tower (a Transformer over words) meet in one space, where an image lies near the text that was in force when it
was taken. Source of the objective: CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3).

Deviations from CLIP: identical texts of a batch are one text, so that no image is pushed off its own words; up to three
views of a moment are averaged, in any order; words are made of pieces (the word and its letter trigrams, as in
fastText, Bojanowski et al. 2017, arXiv 1607.04606), so that a word never seen takes part by the pieces that were.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from actok.alignment.teacher import SCENE, VIEWS, Teacher
from actok.core import ArtifactError, ConfigError, DataError
from actok.core.artifact import CONFIG_FILE, TENSOR_FILE, write_folder
from actok.nn.transformer import Stack

VERSION = 1
VOCABULARY_FILE = "vocabulary.json"
# Pixels of a side that the first convolution takes in one go: half the time of two that halve.
PATCH = 4
# Learned, in logarithm; limits as in CLIP (section 2.5).
FIRST_TEMPERATURE, MOST_SCALE = 0.07, 100.0
_WORD = re.compile(r"[^\W\d_]+|\d+")

__all__ = [
    "SceneConfig",
    "SceneModel",
    "SceneTeacher",
    "Vocabulary",
    "contrastive_loss",
    "load_scene",
    "resize",
    "save_scene",
]


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """Sizes of the two towers.

    Attributes:
        image_size: pixels of a side, to which images are resized (whole images: what is not square is squeezed).
        channels: of each convolution; the first makes one place of `PATCH` x `PATCH` pixels, each further one halves.
        text_width, text_depth, heads: of the text tower.
        dim: F, of the common space.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (64, 128, 128)
    text_width: int = 128
    text_depth: int = 2
    heads: int = 4
    dim: int = 128

    def __post_init__(self) -> None:
        for name, value in (*asdict(self).items(), *(("channels", c) for c in self.channels)):
            if name != "channels" or not isinstance(value, tuple):
                _whole(name, value, 1)
        if not self.channels:
            raise ConfigError("channels is empty; give the width of at least one convolution")
        if self.image_size % self.stride:
            raise ConfigError(
                f"image_size is {self.image_size}; give a multiple of {self.stride}, the pixels of a place after"
                f" {len(self.channels)} convolutions"
            )
        if self.text_width % (2 * self.heads):
            raise ConfigError(
                f"text_width is {self.text_width}; give a multiple of {2 * self.heads} (two for each of {self.heads} heads)"
            )

    @property
    def stride(self) -> int:
        """By how much the last feature map is smaller than the image."""
        return int(PATCH * 2 ** (len(self.channels) - 1))


class Vocabulary:
    """Pieces of words: the word itself and the trigrams of its letters. Row 0 stands for a word without known pieces.

    Args:
        pieces: all known ones, in the order of their rows 1, 2, ...
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = tuple(pieces)
        self._row = {piece: row for row, piece in enumerate(self.pieces, 1)}
        if len(self._row) < len(self.pieces):
            raise ConfigError(f"the vocabulary names a piece twice among its {len(self.pieces)}; give each once")

    @classmethod
    def fit(cls, texts: Iterable[str]) -> Vocabulary:
        """All pieces of these texts, sorted."""
        return cls(sorted({piece for text in texts for word in words_of(text) for piece in _pieces(word)}))

    def __len__(self) -> int:
        return len(self.pieces) + 1

    def rows(self, text: str) -> list[np.ndarray]:
        """For each word of a text the int64 rows of its known pieces, [0] where there is none.

        Raises DataError for a text without words.
        """
        words = words_of(text)
        if not words:
            raise DataError(f"the text {text!r} has no words; give an instruction or a task name for every frame")
        return [np.array([self._row[p] for p in _pieces(w) if p in self._row] or [0], np.int64) for w in words]


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and runs of digits."""
    return _WORD.findall(text.lower())


def _pieces(word: str) -> list[str]:
    """The word in brackets, then its trigrams; brackets mark where it begins and ends."""
    marked = f"<{word}>"
    return list(dict.fromkeys([marked, *(marked[i : i + 3] for i in range(len(marked) - 2))]))


class SceneModel(nn.Module):
    """Two towers and a temperature."""

    def __init__(self, config: SceneConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.image_tower = ImageTower(config)
        self.text_tower = TextTower(config, len(vocabulary))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(FIRST_TEMPERATURE)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by: one over the temperature."""
        return self.log_scale.exp().clamp(max=MOST_SCALE)

    def image(self, images: UInt8[Tensor, "B V H H 3"], present: Bool[Tensor, "B V"]) -> Float[Tensor, "B F"]:
        """Unit vectors of moments seen in views of `config.image_size`; each must have a view that is present."""
        return F.normalize(self.image_tower(images, present), dim=-1)

    def text(self, words: Sequence[Sequence[np.ndarray]]) -> Float[Tensor, "M F"]:
        """Unit vectors of M texts, each given as `Vocabulary.rows` does."""
        return F.normalize(self.text_tower(words), dim=-1)


class ImageTower(nn.Module):
    """Convolutions that halve the image, then two layers over the whole feature map; then the mean over views."""

    def __init__(self, config: SceneConfig) -> None:
        super().__init__()
        width = config.channels[0]
        layers: list[nn.Module] = [nn.Conv2d(3, width, PATCH, stride=PATCH), nn.GroupNorm(1, width), nn.ReLU()]
        for channels in config.channels[1:]:
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.GroupNorm(1, channels), nn.ReLU()]
            width = channels
        self.convolutions = nn.Sequential(*layers)
        self.flat = nn.Linear(width * (config.image_size // config.stride) ** 2, 2 * config.dim)
        self.out = nn.Sequential(nn.RMSNorm(2 * config.dim), nn.GELU(), nn.Linear(2 * config.dim, config.dim))

    def forward(self, images: UInt8[Tensor, "B V H H 3"], present: Bool[Tensor, "B V"]) -> Float[Tensor, "B F"]:
        """Only views that are present are looked at."""
        pixels = images[present].permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory, which is fast
        found = self.out(self.flat(self.convolutions(pixels).flatten(1)))
        total = found.new_zeros(len(present), found.shape[-1]).index_add(0, present.nonzero()[:, 0], found)
        return total / present.sum(1, keepdim=True)


class TextTower(nn.Module):
    """Words are the means of their pieces; a Transformer with rotary positions reads them, their mean is the text."""

    def __init__(self, config: SceneConfig, rows: int) -> None:
        super().__init__()
        self.pieces = nn.Embedding(rows, config.text_width)
        self.stack = Stack(config.text_depth, config.text_width, config.heads, rotary=True)
        self.out = nn.Linear(config.text_width, config.dim)

    def forward(self, words: Sequence[Sequence[np.ndarray]]) -> Float[Tensor, "M F"]:
        """Of M texts; a text's words are int64 arrays of rows."""
        flat = [rows for text in words for rows in text]
        table = self.pieces.weight
        starts = np.cumsum([0, *(len(rows) for rows in flat[:-1])])
        rows, offsets = (torch.from_numpy(a).to(table.device) for a in (np.concatenate(flat), starts))
        lengths = torch.tensor([len(text) for text in words], device=table.device)
        known = torch.arange(int(lengths.max()), device=table.device) < lengths[:, None]
        x = table.new_zeros(*known.shape, table.shape[1])
        x[known] = F.embedding_bag(rows, table, offsets, mode="mean")
        x = self.stack(x, mask=known[:, None, None, :])
        return self.out((x * known[..., None]).sum(1) / lengths[:, None])


def contrastive_loss(
    images: Float[Tensor, "B F"], texts: Float[Tensor, "M F"], text_of: Int[Tensor, "B"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of B images and the M distinct texts of the same batch, `text_of` in 0..M-1; each text has an image.

    An image looks for its text among the M, a text for its images among the B (each of them a positive, averaged).
    """
    logits = scale * images @ texts.T
    to_text = F.cross_entropy(logits, text_of)
    own = logits.log_softmax(0).gather(1, text_of[:, None])[:, 0]
    count = torch.bincount(text_of, minlength=len(texts))[text_of]
    to_image = -(own / count).sum() / len(texts)
    return (to_text + to_image) / 2


def resize(images: UInt8[np.ndarray, "B H W 3"], size: int) -> UInt8[np.ndarray, "B size size 3"]:
    """Images of `size` x `size` pixels, bilinear with anti-aliasing; those of that size as they are."""
    if images.shape[1:3] == (size, size):
        return images
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    smaller = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    found: np.ndarray = smaller.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return found


class SceneTeacher(Teacher):
    """A trained model, frozen: the unit mean of image and text, or the text alone where there are no images.

    Both live in one space. The order of views does not matter.
    """

    def __init__(self, model: SceneModel, *, name: str, content: str, views: int = VIEWS) -> None:
        """`name` of the folder and sha256 of its content, for the identity."""
        self.model, self.views, self.dim = model.eval().requires_grad_(False), views, model.config.dim
        self._name, self._content = name, content

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: str = "cpu") -> SceneTeacher:
        """What `actok teacher` wrote. Raises ArtifactError where it is not complete."""
        model, content = load_scene(folder)
        return cls(model.to(device), name=Path(folder).resolve().name, content=content)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See Teacher.identity."""
        return {
            "kind": SCENE,
            "model": self._name,
            "hash": self._content,
            "dim": self.dim,
            "views": self.views,
            "dtype": "float32",
            "layer": None,
            "pooling": "unit mean of unit image and unit text",
            "prompt": "{text}",
        }

    def _features(self, texts: list[str], images: list[np.ndarray]) -> Float[Tensor, "B F"]:
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}  # few of a recording's texts differ
        total = self.model.text([self.model.vocabulary.rows(text) for text in distinct])
        total = total[[distinct[text] for text in texts]]
        if images:
            size = self.model.config.image_size
            views = torch.from_numpy(np.stack([resize(view, size) for view in images], 1)).to(total.device)
            total = total + self.model.image(views, views.new_ones(views.shape[:2], dtype=torch.bool))
        return F.normalize(total, dim=-1)


# -- on disk ------------------------------------------------------------------------------------------------------


def save_scene(model: SceneModel, folder: str | Path, training: Mapping[str, Any]) -> Path:
    """Write config.json, vocabulary.json and model.safetensors, all or nothing. `training`: JSON facts to keep with it.

    Raises ArtifactError where the folder holds something else.
    """
    from safetensors.torch import save

    files = {
        VOCABULARY_FILE: json.dumps(model.vocabulary.pieces, ensure_ascii=False).encode(),
        TENSOR_FILE: save({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}),
    }
    body = {
        "model_type": SCENE,
        "version": VERSION,
        "config": asdict(model.config),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "training": dict(training),
    }
    return write_folder(Path(folder), {CONFIG_FILE: (json.dumps(body, indent=2) + "\n").encode(), **files})


def load_scene(folder: str | Path) -> tuple[SceneModel, str]:
    """The model in evaluation mode, and the sha256 of what its features depend on (sizes, vocabulary, weights).

    Raises ArtifactError naming what is missing, edited or too new.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    try:
        body = json.loads((folder / CONFIG_FILE).read_bytes())
        if body["model_type"] != SCENE:
            raise ArtifactError(f"{folder} holds a model of type {body['model_type']!r}, not of `actok teacher`")
        if body["version"] != VERSION:
            raise ArtifactError(
                f"{folder} was written in version {body['version']} of its format, this actok reads {VERSION}; train it"
                " again with: actok teacher"
            )
        sizes = body["config"]
        content = {}
        for name, expected in body["files"].items():
            content[name] = (folder / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != expected:
                raise ArtifactError(f"{folder / name} is truncated or edited (sha256 differs); copy the folder again")
        config = SceneConfig(**{**sizes, "channels": tuple(sizes["channels"])})
        model = SceneModel(config, Vocabulary(json.loads(content[VOCABULARY_FILE])))
        model.load_state_dict(load(content[TENSOR_FILE]))
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{folder} is no complete teacher of `actok teacher` ({type(error).__name__}: {reason}); copy the whole folder"
            " again, or train it again"
        ) from error
    matters = json.dumps([VERSION, asdict(config), body["files"]], sort_keys=True).encode()
    return model.eval().requires_grad_(False), hashlib.sha256(matters).hexdigest()


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
