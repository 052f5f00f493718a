"""A small vision-language Transformer that trains on a CPU in minutes: the backbone of `actok-vla-tiny`.

A stem of strided convolutions makes tokens of each image; a byte-level BPE, fitted on the instructions of the data, makes
tokens of the text; a pre-norm decoder with rotary positions reads both. Nothing in it is pretrained.

The prefix sees itself wholly, as in PaliGemma (arXiv 2407.07726, section 3.1): it is only read, never predicted. Whole numbers
from 0 to 255 are one token each, and their embeddings begin as sinusoids of their value, so that a state written as text
costs one token a number, and near numbers are near before anything is learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from actok.backbones.decoder import DecoderBackbone, KVCache, Prefix
from actok.core import ArtifactError, ConfigError, DataError, TokenError
from actok.core.config import build_config
from actok.nn.transformer import DecoderBlock, rotary_angles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["NUMBERS", "TinyConfig", "TinyVLM", "fit_text", "number_rows"]

KIND = "tiny"
NAME = "actok-vla-tiny"
TEXT_FILE = "tokenizer.json"
# Whole numbers 0 to NUMBERS - 1 are one token each, with the space before them.
NUMBERS = 256
# Ids behind those of the text: no text is ever coded as one of them.
SPECIAL = ("pad", "end")
BYTES = 256
# Pixels of a side that the first convolution takes in one go.
PATCH = 4
# Texts whose ids are remembered: a data set's prompts come again every epoch.
REMEMBERED = 1 << 16
# Wavelengths of the sinusoids that the embeddings of numbers begin as, from the shortest: below 4 neighbours differ more
# than numbers that are further apart; at 4 x NUMBERS all numbers lie on a quarter of a turn, in order.
WAVELENGTHS = (4.0, 4.0 * NUMBERS)


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of the network.

    Attributes:
        width: W, of the hidden states; layers, heads: of the decoder.
        kv_heads: fewer key-value heads than heads, a divisor; 0: as many.
        hidden: units of a feed-forward layer; 0: 8/3 of the width.
        image_size: pixels of a side, to which images are resized (whole images: what is not square is squeezed).
        image_channels: of each convolution; the first makes one place of 4 x 4 pixels, each further one halves.
        text_vocab: ids of the text at most, bytes, numbers and special ones included; few instructions need fewer.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 0
    hidden: int = 0
    image_size: int = 64
    image_channels: tuple[int, ...] = (32, 64, 128)
    text_vocab: int = 1000

    def __post_init__(self) -> None:
        for name, least in (
            ("width", 1),
            ("layers", 1),
            ("heads", 1),
            ("kv_heads", 0),
            ("hidden", 0),
            ("image_size", 1),
            ("text_vocab", BYTES + NUMBERS + len(SPECIAL)),
        ):
            _whole(name, getattr(self, name), least)
        if not isinstance(self.image_channels, tuple) or not self.image_channels:
            raise ConfigError(f"image_channels is {self.image_channels!r}; give the width of at least one convolution")
        for channels in self.image_channels:
            _whole("image_channels", channels, 1)
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"width is {self.width}; give a multiple of {2 * self.heads} (two for each of {self.heads} heads)"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads is {self.kv_heads}; give a divisor of the {self.heads} heads, or 0 for as many"
            )
        if self.image_size % self.stride:
            raise ConfigError(
                f"image_size is {self.image_size}; give a multiple of {self.stride}, the pixels of a place after"
                f" {len(self.image_channels)} convolutions"
            )

    @property
    def stride(self) -> int:
        """Pixels of a side that become one token."""
        return int(PATCH * 2 ** (len(self.image_channels) - 1))

    @property
    def places(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.stride) ** 2


class TinyVLM(DecoderBackbone):
    """See the module. `create` makes one for a data set, `from_spec` the untrained twin of another.

    Its output layer is its embedding table, read through a square layer: rare codes get a useful embedding from
    the outputs that do not choose them, and the layer keeps inputs from being predicted as outputs from the start.

    Args:
        config: sizes.
        text: from `fit_text`, or read from a tokenizer.json.
        views: names of the cameras in the order in which images are given; none is allowed.
    """

    def __init__(self, config: TinyConfig, text: Tokenizer, views: Sequence[str] = ()) -> None:
        super().__init__()
        self.config, self.view_names, self._text = config, tuple(views), text
        self.name, self.views = NAME, len(self.view_names)
        self.width, self.layers, self.heads = config.width, config.layers, config.heads
        self.kv_heads, self.head_dim = config.kv_heads or config.heads, config.width // config.heads
        self.rotary_base = 1e4
        self._text_size = text.get_vocab_size() + len(SPECIAL)
        # A row has length 1 and enters the first layer scaled to a mean square of 1.
        self.table = nn.Parameter(torch.randn(self._text_size, self.width) / math.sqrt(self.width))
        with torch.no_grad():
            self.table[_number_ids(text)] = number_rows(self.width) / math.sqrt(self.width)
        if self.views:
            self.stem = ImageStem(config, self.views)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                self.width,
                self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                hidden=config.hidden or None,
            )
            for _ in range(self.layers)
        )
        self.norm = nn.RMSNorm(self.width)
        self.output = nn.Linear(self.width, self.width, bias=False)
        self._known: dict[str, list[int]] = {}

    @classmethod
    def create(cls, config: TinyConfig, texts: Iterable[str], views: Sequence[str] = ()) -> TinyVLM:
        """Untrained, with a text tokenizer for these texts; weights from torch's own generator.

        `texts` are prompts as they will be read, so that a word is a token where it stands in them; numbers need not be in them.
        """
        return cls(config, fit_text(texts, config.text_vocab), views)

    # -- ids ------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """See DecoderBackbone."""
        return len(self.table)

    @property
    def text_size(self) -> int:
        """Bytes, pieces of words, numbers; then "pad" and "end"."""
        return self._text_size

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The last ones of the text."""
        return {name: self._text_size - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}

    def resize(self, rows: int) -> None:
        """See DecoderBackbone. New rows come from torch's own generator."""
        missing = rows - len(self.table)
        if missing <= 0:
            return
        old = self.table.detach()
        new = old.mean(0) + old.std(0) * torch.randn(missing, self.width, dtype=old.dtype, device=old.device)
        self.table = nn.Parameter(torch.cat([old, new]), requires_grad=self.table.requires_grad)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Every text has ids, bytes at worst, and comes back from them exactly."""
        return [list(self._ids(text)) for text in texts]

    def _ids(self, text: str) -> list[int]:
        """Of one text, from those remembered; the one that was not asked for the longest is forgotten."""
        ids = self._known.pop(text, None)
        if ids is None:
            ids = self._text.encode(text).ids
            if len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
        self._known[text] = ids
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Special ids say nothing. Raises TokenError for an id behind the text's."""
        for i in ids:
            if not 0 <= i < self._text_size:
                raise TokenError(
                    f"id {i} is no text; give ids from 0 to {self._text_size - 1}, and codes to the tokenizer"
                )
        found: str = self._text.decode([i for i in ids if i < self._text_size - len(SPECIAL)])
        return found

    # -- passes ---------------------------------------------------------------------------------------------------

    def prefix(self, texts: Sequence[str], images: Sequence[np.ndarray]) -> Prefix:
        """The tokens of the images, view by view, then the text; images of any size are resized to that of the config.

        Raises DataError for other images, more views than it takes, or a prompt without a single token.
        """
        device = self.table.device
        pixels = self._pixels(images, len(texts))
        seen = self.config.places * len(images)
        ids = [self._ids(text) for text in texts]
        lengths = np.array([seen + len(one) for one in ids], np.int64)
        if not lengths.all():
            raise DataError(f"prompt {int(lengths.argmin())} has neither text nor images; give an instruction")
        padded = np.full((len(ids), int(lengths.max(initial=seen)) - seen), self.special_ids["pad"], np.int64)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        embeds = self.embed(torch.from_numpy(padded).to(device))
        if pixels is not None:
            embeds = torch.cat([self.stem(pixels), embeds], 1)
        place = torch.arange(embeds.shape[1], device=device)
        after = torch.from_numpy(lengths).to(device)
        return Prefix(
            embeds=embeds,
            real=place < after[:, None],
            positions=place.expand(len(ids), -1),
            next_position=after,
            causal=False,
        )

    def _pixels(self, images: Sequence[np.ndarray], batch: int) -> UInt8[Tensor, "B V S S 3"] | None:
        if len(images) > len(self.view_names):
            raise DataError(
                f"{len(images)} views were given, {self.name} looks through {len(self.view_names)} ({', '.join(self.view_names) or 'none'});"
                " leave the others out"
            )
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 4 or image.shape[0] != batch or image.shape[3] != 3:
                raise DataError(
                    f"an image is {image.dtype} {list(image.shape)}; give uint8 [{batch}, height, width, 3] for {batch} prompts"
                )
        if not images:
            return None
        views = [_resize(torch.from_numpy(np.ascontiguousarray(image)), self.config.image_size) for image in images]
        return torch.stack(views, 1).to(self.table.device)

    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n W"]:
        """Rows of the table times the root of the width."""
        return F.embedding(ids, self.table) * math.sqrt(self.width)

    def run(
        self,
        embeds: Float[Tensor, "B n W"],
        positions: Int[Tensor, "B n"],
        mask: Bool[Tensor, "B n M"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Tensor, "B n W"], KVCache]:
        """See DecoderBackbone. Raises DataError for a mask of another size, or with a row that sees nothing."""
        known = 0 if cache is None else cache.length
        if mask.shape != (*embeds.shape[:2], known + embeds.shape[1]) or not mask.any(-1).all():
            raise DataError(
                f"the mask is {list(mask.shape)} for {list(embeds.shape[:2])} positions after {known} cached ones; give"
                " [B, n, cached + n], with something to see in every row"
            )
        # Once for all layers; rows are not empty, so that there is always something to normalise by.
        added = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill_(~mask, -torch.inf)[:, None]
        angles = rotary_angles(positions, self.head_dim, self.rotary_base)
        keys, values, x = [], [], embeds
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, angles, added, None if cache is None else (cache.keys[i], cache.values[i]))
            keys.append(k)
            values.append(v)
        return self.norm(x), KVCache(keys=tuple(keys), values=tuple(values))

    def logits(self, hidden: Float[Tensor, "B n W"], rows: slice | None = None) -> Float[Tensor, "B n V"]:
        """Products of what the square layer makes of the hidden states with every row of the table, or with some."""
        return F.linear(self.output(hidden), self.table if rows is None else self.table[rows])

    # -- keeping it -----------------------------------------------------------------------------------------------

    def spec(self) -> Mapping[str, object]:
        """Sizes, names of the views, rows of the table."""
        config = {**asdict(self.config), "image_channels": list(self.config.image_channels)}
        return {"kind": KIND, "config": config, "views": list(self.view_names), "rows": self.vocab_size}

    def files(self) -> Mapping[str, bytes]:
        """The text tokenizer, as the `tokenizers` library writes it."""
        return {TEXT_FILE: self._text.to_str(pretty=False).encode()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        """The untrained twin of the network that gave `spec()` and `files()`. Raises ArtifactError naming what is wrong."""
        try:
            if spec["kind"] != KIND:
                raise ArtifactError(
                    f"the backbone is of kind {spec['kind']!r}, not {KIND!r}; load it with its own class"
                )
            text = _read_text(files[TEXT_FILE])
            found = cls(build_config(TinyConfig, spec["config"], NAME), text, tuple(spec["views"]))
            found.resize(int(spec["rows"]))
        except KeyError as error:
            raise ArtifactError(f"the backbone's description has no {error}; copy the whole folder again") from None
        except ConfigError as error:
            raise ArtifactError(f"the backbone's description is edited or of another version: {error}") from None
        return found


class ImageStem(nn.Module):
    """Convolutions that halve an image, without any pooling; each place and each view adds a vector of its own."""

    def __init__(self, config: TinyConfig, views: int) -> None:
        super().__init__()
        width = config.image_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(3, width, PATCH, stride=PATCH), nn.GroupNorm(1, width), nn.ReLU()]
        for channels in config.image_channels[1:]:
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.GroupNorm(1, channels), nn.ReLU()]
            width = channels
        self.convolutions = nn.Sequential(*layers)
        self.out = nn.Linear(width, config.width)
        self.norm = nn.RMSNorm(config.width)
        self.place = nn.Parameter(torch.randn(config.places, config.width) / 2)
        self.view = nn.Parameter(torch.randn(views, 1, config.width) / 2)

    def forward(self, images: UInt8[Tensor, "B V S S 3"]) -> Float[Tensor, "B P W"]:
        """P tokens: places row by row, view by view."""
        batch, views = images.shape[:2]
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.place.dtype) / 127.5 - 1  # channels last in memory
        found = self.convolutions(pixels).flatten(2).transpose(1, 2)
        found = self.norm(self.out(found)).unflatten(0, (batch, views))
        return (found + self.place + self.view[:views]).flatten(1, 2)


def _resize(images: UInt8[Tensor, "B H W 3"], size: int) -> UInt8[Tensor, "B {size} {size} 3"]:
    """Bilinear with anti-aliasing; images of that size as they are."""
    if images.shape[1:3] == (size, size):
        return images
    pixels = F.interpolate(images.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# -- text ---------------------------------------------------------------------------------------------------------


def fit_text(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al., 2016) of these texts, whatever their order, and of the whole numbers to 255.

    Bytes first, then the numbers, then what was merged, so that `vocab` - 2 ids are used at most (two are special and
    stand for no text). A word that is a token is coded as that token, whatever the order of merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    splitting = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = splitting
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - NUMBERS - len(SPECIAL),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fitted.train_from_iterator(sorted(set(texts)), trainer)
    learnt = json.loads(fitted.to_str())["model"]
    merged = sorted(learnt["vocab"], key=learnt["vocab"].get)
    words = dict.fromkeys([*merged[:BYTES], *_number_words(), *merged[BYTES:]])
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, ignore_merges=True)
    text = Tokenizer(model)
    text.pre_tokenizer = splitting
    text.decoder = decoders.ByteLevel()
    return text


def _read_text(content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{TEXT_FILE} is truncated or edited ({reason}); copy the whole folder again") from None


def _number_words() -> list[str]:
    """ " 0" to " 255" as a byte-level tokenizer spells them: its sign for a space, then the digits."""
    return [f"\u0120{n}" for n in range(NUMBERS)]


def _number_ids(text: Tokenizer) -> Int[Tensor, "numbers"]:
    found = [text.token_to_id(word) for word in _number_words()]
    if None in found:
        raise ArtifactError(f"{TEXT_FILE} has no token for {found.index(None)}; it is not the one that was saved here")
    return torch.tensor(found)


def number_rows(width: int) -> Float[Tensor, "numbers {width}"]:
    """Sinusoids of 0 to 255 in geometric wavelengths, with a mean square of 1, as that of random rows.

    The distance of two numbers depends on their difference alone.
    """
    count = width // 2
    ratio = torch.linspace(0, 1, count, dtype=torch.float64)
    short, long = WAVELENGTHS
    angle = torch.arange(NUMBERS, dtype=torch.float64)[:, None] * (2 * math.pi / (short * (long / short) ** ratio))
    return (math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], 1)).float()


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
