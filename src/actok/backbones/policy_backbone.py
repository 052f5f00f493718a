"""Models of transformers as decoder backbones: what all families share.

A family says how its prompt looks, what its images become and at which positions they stand (`policy_models.py`). Here is the
rest: passes over a mask and a cache through the model's own decoder, its table, its side files, its untrained twin.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cached
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actok.backbones.decoder import DecoderBackbone, KVCache, Prefix
from actok.backbones.images import check_images
from actok.backbones.prompts import FilledPrompts, fill_prompts, load_chat_tokenizer
from actok.backbones.source import ModelSource
from actok.core.errors import ConfigError, DataError

# Text tokenizer and preprocessing: what the twin reads beside config.json and tokenizer.json.
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
ROTARY_KINDS = ("default", "mrope", "dynamic")  # dynamic is the default up to the longest sequence

__all__ = ["DeepPrefix", "TransformersBackbone"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepPrefix(Prefix):
    """A prompt whose images also enter the first layers (Qwen3-VL); `run_prefix` adds them, `run` alone does not.

    Attributes:
        is_image: bool [B, l], the tokens that images fill, all among the first l; a policy may have appended more.
        deep: for each of the first layers, what its output gains at these tokens: float [number of them, W].
    """

    is_image: Bool[Tensor, "B l"]
    deep: tuple[Tensor, ...]


class TransformersBackbone(DecoderBackbone):
    """A vision-language model of transformers, whole and trainable, in the dtype it was loaded in.

    Attributes:
        network: the model of transformers with its language-model head.
        text_tokenizer: its text tokenizer.
        longest: positions that a pass may see: the decoder's maximum, and its sliding window where it has one. Up to that
            length a window hides nothing and dynamic rotary scaling changes nothing, so that one mask serves all layers.
    """

    class_name: ClassVar[Mapping[str, str]]  # model_type -> class of transformers
    decoders: ClassVar[tuple[str, ...]]  # model types of language models it is known to be exact with
    unused: ClassVar[tuple[str, ...]] = ()  # prefixes of weights that the features do not depend on
    decoder_name: ClassVar[str] = "language_model"
    first_position: ClassVar[int] = 0
    causal: ClassVar[bool] = True

    def __init__(self, source: ModelSource, network: Any) -> None:
        """Adapt a network of one of `class_name` to the files in `source`.

        Raises ConfigError where its decoder is none that can be run exactly, or its table has fewer rows than its tokenizer
        ids.
        """
        super().__init__()
        self.network: Any = network
        self.views = None
        self.name = source.name
        self.model_type = source.model_type
        self.text_tokenizer = load_chat_tokenizer(source)
        self._side = _side_files(source, self.text_tokenizer)
        config = self.network.config
        self.image_id = int(getattr(config, "image_token_id", None) or config.image_token_index)
        self.image_token = str(self.text_tokenizer.convert_ids_to_tokens(self.image_id))
        text = config.get_text_config()
        self.width = int(text.hidden_size)
        self.layers = int(text.num_hidden_layers)
        self.heads = int(text.num_attention_heads)
        self.kv_heads = int(text.num_key_value_heads)
        self.head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self.rotary_base = self._check_decoder(text)
        self.longest = int(text.max_position_embeddings)
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            self.longest = min(self.longest, int(text.sliding_window))
        if getattr(text, "attn_logit_softcapping", None) is not None:
            text._attn_implementation = "eager"  # sdpa would leave the cap on the scores out
        self._final_cap = getattr(text, "final_logit_softcapping", None)
        # Before transformers 5 Gemma's decoder scaled what it was given; since then its embedding does.
        scales_inside = text.model_type in ("gemma", "gemma2") and not hasattr(self._table, "embed_scale")
        self._inner_scale = self.width**0.5 if scales_inside else 1.0
        self._text_size = max(self.text_tokenizer.get_vocab().values()) + 1
        if self._text_size > self.vocab_size:
            raise ConfigError(
                f"{self.name} has {self.vocab_size} embeddings for {self._text_size} ids of its tokenizer; use the"
                " tokenizer of the published model"
            )
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(not name.startswith(self.unused))
        self.register_state_dict_post_hook(_drop_tied_head)
        self.register_load_state_dict_pre_hook(_restore_tied_head)
        self.eval()

    def _check_decoder(self, text: Any) -> float:
        """The base of the rotary positions. Raises ConfigError where layers differ in a way that one pass cannot serve."""
        if text.model_type not in self.decoders:
            raise ConfigError(
                f"{self.name} decodes with {text.model_type}; {type(self).__name__} is exact with"
                f" {', '.join(self.decoders)}: choose such a model"
            )
        rope = dict(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        base = rope.get("rope_theta", getattr(text, "rope_theta", None))
        if base is None or kind not in ROTARY_KINDS:
            raise ConfigError(
                f"{self.name} has rotary positions {rope}; known are {', '.join(ROTARY_KINDS)} with one rope_theta: take"
                " the scaling out of its config.json"
            )
        strange = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if strange:
            raise ConfigError(f"{self.name} has layers of {sorted(strange)}; choose a model whose layers all attend")
        return float(base)

    # ------------------------------------------------------------ what a family says

    @abstractmethod
    def form(self, views: int) -> str:
        """The prompt for that many images: `{text}` where the text goes, one image token where each image goes."""

    @abstractmethod
    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        """Arguments of `_features` for views uint8 [B, H, W, 3], rows sample by sample, and tokens for each view."""

    def _features(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features [tokens, W] of all images in order, and those of the first layers where the model has them."""
        return rows(self.network.model.get_image_features(**pixels)), ()

    def _positions(self, prompts: FilledPrompts, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions of the prompt, and the next one."""
        count, length = prompts.ids.shape
        positions = torch.arange(length, device=prompts.ids.device) + self.first_position
        return positions.expand(count, -1), prompts.real.sum(1) + self.first_position

    # ------------------------------------------------------------ the table

    @property
    def _table(self) -> Any:
        return self.network.get_input_embeddings()

    @property
    def _head(self) -> Any:
        return self.network.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding table."""
        return self._head.weight is self._table.weight

    @property
    def device(self) -> torch.device:
        weight: Tensor = self._table.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self._table.weight
        return weight.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table; published tables often have more than the tokenizer has ids."""
        return int(self._table.weight.shape[0])

    @property
    def text_size(self) -> int:
        """Ids of the text tokenizer, added tokens (image, location, ...) included: 0 to text_size - 1."""
        return self._text_size

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The tokenizer's special tokens by their text, and "end", "pad" and "image"."""
        known = self.text_tokenizer
        found = {token.content: i for i, token in known.added_tokens_decoder.items() if token.special}
        found |= dict(zip(known.all_special_tokens, known.all_special_ids, strict=True))
        named = {"end": known.eos_token_id, "pad": known.pad_token_id, "image": self.image_id}
        return {name: int(i) for name, i in (found | named).items() if i is not None}

    def resize(self, rows: int) -> None:
        """As the base class. The new rows are drawn by torch's generator of the CPU, so a seed decides them on any device.

        The mean and the spread, by dimension, are those of the rows that the tokenizer uses: published tables end in rows
        that were never trained.
        """
        old = self.vocab_size
        if rows <= old:
            return
        drawn = []
        for weight in [self._table.weight] if self.tied else [self._table.weight, self._head.weight]:
            known = weight[: self.text_size].detach().float().cpu()
            drawn.append(known.mean(0) + known.std(0) * torch.randn(rows - old, known.shape[1]))
        self.network.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for weight, new in zip((self._table.weight, self._head.weight), drawn, strict=False):
                weight[old:] = new.to(weight)

    # ------------------------------------------------------------ text and prompts

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As the base class."""
        return [list(map(int, x)) for x in self.text_tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def text_of(self, ids: Sequence[int]) -> str:
        """As the base class. Raises DataError for an id that is not the tokenizer's, such as a code."""
        foreign = [i for i in ids if not 0 <= i < self.text_size]
        if foreign:
            raise DataError(f"id {foreign[0]} is no text; {self.name} has text at 0 to {self.text_size - 1}")
        return str(self.text_tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def prefix(self, texts: Sequence[str], images: Sequence[np.ndarray]) -> Prefix:
        """As the base class; gradients reach the embeddings, the projector and the vision tower.

        Raises DataError also where a text is empty or contains the image token.
        """
        views = [check_images(x, f"images[{i}]") for i, x in enumerate(images)]
        if not texts or any(len(x) != len(texts) for x in views):
            raise DataError(
                f"{len(texts)} texts and views of {[len(x) for x in views]} images; give one of each a sample"
            )
        pixels, tokens = self._pixels(views) if views else ({}, [])
        pixels = {k: v.to(self.device) for k, v in pixels.items()}
        filled = fill_prompts(self.form(len(views)), texts, tokens, self.text_tokenizer, self.image_id)
        filled = FilledPrompts(**{k: v.to(self.device) for k, v in vars(filled).items()})
        embeds: Tensor = self._table(filled.ids.masked_fill(filled.is_image, 0))
        deep: tuple[Tensor, ...] = ()
        if views:
            features, deep = self._features(pixels)
            if len(features) != len(texts) * sum(tokens):
                raise ConfigError(
                    f"{self.name} makes {len(features)} tokens of images that its preprocessing counts as"
                    f" {len(texts) * sum(tokens)}; use the preprocessor_config.json of the published model"
                )
            embeds = embeds.masked_scatter(filled.is_image[..., None], features.to(embeds.dtype))
        positions, following = self._positions(filled, pixels)
        made: dict[str, Any] = {
            "embeds": embeds * self._inner_scale,
            "real": filled.real,
            "positions": positions,
            "next_position": following,
            "causal": self.causal,
        }
        return DeepPrefix(**made, is_image=filled.is_image, deep=deep) if deep else Prefix(**made)

    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n W"]:
        """As the base class."""
        embeds: Tensor = self._table(ids)
        return embeds * self._inner_scale

    # ------------------------------------------------------------ passes

    def run(
        self,
        embeds: Float[Tensor, "B n W"],
        positions: Int[Tensor, "..."],
        mask: Bool[Tensor, "B n M"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Tensor, "B n W"], KVCache]:
        """As the base class.

        Raises DataError beyond `longest` positions, and ConfigError with transformers' gradient checkpointing in training,
        which leaves nothing for the cache.
        """
        return self._pass(embeds, positions, mask, cache)

    def _pass(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: KVCache | None, **more: Any
    ) -> tuple[Tensor, KVCache]:
        if mask.shape[-1] > self.longest:
            raise DataError(
                f"{mask.shape[-1]} positions are more than {self.name} takes ({self.longest}); give fewer or smaller images,"
                " or a shorter text"
            )
        embeds = embeds.to(self.dtype)
        # Additive: the eager attention of transformers adds whatever it is given, a boolean mask too.
        added = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device)
        added = added.masked_fill(~mask, torch.finfo(embeds.dtype).min)[:, None]
        store = _store_class()(cache)
        output = getattr(self.network.model, self.decoder_name)(
            inputs_embeds=embeds / self._inner_scale,
            attention_mask=added,
            position_ids=positions,
            past_key_values=store,
            use_cache=True,
            **more,
        )
        if len(store.all_keys) != self.layers:
            raise ConfigError(
                f"{len(store.all_keys)} of {self.layers} layers of {self.name} gave their keys and values; turn gradient"
                " checkpointing off (it drops them)"
            )
        return output.last_hidden_state, KVCache(keys=tuple(store.all_keys), values=tuple(store.all_values))

    def logits(self, hidden: Float[Tensor, "B n W"], rows: slice | None = None) -> Float[Tensor, "B n V"]:
        """As the base class; capped where the model caps them (Gemma 2)."""
        head, chosen = self._head, slice(None) if rows is None else rows
        bias = None if head.bias is None else head.bias[chosen]
        found: Tensor = torch.nn.functional.linear(hidden.to(self.dtype), head.weight[chosen], bias)
        cap = self._final_cap
        return found if cap is None else torch.tanh(found / cap) * cap

    # ------------------------------------------------------------ the twin

    def spec(self) -> Mapping[str, object]:
        """As the base class; `backbone_from_spec` reads it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kind": "transformers", "name": self.name, "model_type": self.model_type, "dtype": dtype}

    def files(self) -> Mapping[str, bytes]:
        """config.json as the model is now (after `resize`), and its tokenizer and preprocessing as they were loaded."""
        config = self.network.config
        before, config._name_or_path = getattr(config, "_name_or_path", ""), ""  # no folder of this machine
        text = config.to_json_string(use_diff=False)
        config._name_or_path = before
        return {"config.json": text.encode(), **self._side}


def rows(output: Any) -> Tensor:
    """Features of images in order, float [tokens, W], in whichever form transformers gives them."""
    found = getattr(output, "pooler_output", output)
    return torch.cat(tuple(found)) if isinstance(found, (list, tuple)) else found.flatten(0, -2)


def _side_files(source: ModelSource, tokenizer: Any) -> dict[str, bytes]:
    found = {name: source.folder / name for name in SIDE_FILES}
    made = {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    whole = source.folder / "tokenizer.json"
    made["tokenizer.json"] = whole.read_bytes() if whole.is_file() else tokenizer.backend_tokenizer.to_str().encode()
    return made


@cached
def _store_class() -> Any:
    """A cache of transformers over a `KVCache` that stays as it is: keys and values are joined once, when a layer asks."""
    from transformers import DynamicCache

    class Store(DynamicCache):
        def __init__(self, past: KVCache | None) -> None:
            super().__init__()
            self.past = past
            self.all_keys: list[Tensor] = []
            self.all_values: list[Tensor] = []

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            if self.past is not None:
                key_states = torch.cat((self.past.keys[layer_idx], key_states), dim=2)
                value_states = torch.cat((self.past.values[layer_idx], value_states), dim=2)
            self.all_keys.append(key_states)
            self.all_values.append(value_states)
            return key_states, value_states

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return 0 if self.past is None else self.past.length

    return Store


def _tied_name(module: TransformersBackbone) -> str | None:
    """The state's name of an output layer that is the embedding table."""
    if not module.tied:
        return None
    return next(f"network.{name}.weight" for name, x in module.network.named_modules() if x is module._head)


def _table_name(module: TransformersBackbone) -> str:
    return next(f"network.{name}.weight" for name, x in module.network.named_modules() if x is module._table)


def _drop_tied_head(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """One table is stored once: safetensors refuses shared tensors, and it is the largest."""
    if name := _tied_name(module):
        state.pop(prefix + name, None)


def _restore_tied_head(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    name = _tied_name(module)
    if name and prefix + _table_name(module) in state:
        state.setdefault(prefix + name, state[prefix + _table_name(module)])
