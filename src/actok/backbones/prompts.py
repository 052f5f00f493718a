"""The form of a prompt: chat templates and pre-training forms, with images' tokens in place, as ids and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actok.backbones.source import ModelSource, load_text_tokenizer
from actok.core.errors import ConfigError, DataError

TEXT = "{text}"

__all__ = ["TEXT", "FilledPrompts", "PromptBatch", "chat_form", "fill_prompts", "load_chat_tokenizer", "qwen_form"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FilledPrompts:
    """Prompts of one batch as ids, padded on the right.

    Attributes:
        ids: int64 [B, L], 0 on padding.
        real: bool [B, L], False on padding.
        is_image: bool [B, L], the tokens that images fill.
        is_text: bool [B, L], the tokens of the given text; neither where the token belongs to the prompt's form.
    """

    ids: Int[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    is_image: Bool[Tensor, "B L"]
    is_text: Bool[Tensor, "B L"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch(FilledPrompts):
    """Prompts of one batch with their images, on the model's device.

    Attributes:
        pixels: further arguments of the model's forward pass (pixel values, grids).
    """

    pixels: Mapping[str, Tensor]


def load_chat_tokenizer(source: ModelSource) -> Any:
    """The model's text tokenizer, with the chat template of chat_template.json where it has none of its own.

    Raises ConfigError as `load_text_tokenizer`.
    """
    tokenizer = load_text_tokenizer(source)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (source.read("chat_template.json") or {}).get("chat_template")
    return tokenizer


def chat_form(tokenizer: Any, image_token: str, views: int, name: str, *, answer: bool = False) -> str:
    """One turn of the user through the tokenizer's chat template: the images in order, then the text.

    Args:
        tokenizer: with a chat template.
        image_token: what stands for an image in it.
        views: number of images.
        name: the model's, for messages.
        answer: whether the opening of the assistant's turn follows.

    Raises ConfigError where the template has no place for images.
    """
    content = [{"type": "image"}] * views + [{"type": "text", "text": TEXT}]
    form = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=answer
    )
    if form.count(image_token) != views or form.count(TEXT) != 1:
        raise ConfigError(
            f"the chat template of {name} makes {form.count(image_token)} images of {views}; use the template of the"
            " published model"
        )
    return str(form)


def qwen_form(tokenizer: Any, image_token: str, views: int, name: str, *, answer: bool = False) -> str:
    """`chat_form`, or without a template the same turn in Qwen's plain form."""
    if tokenizer.chat_template is not None:
        return chat_form(tokenizer, image_token, views, name, answer=answer)
    image = f"<|vision_start|>{image_token}<|vision_end|>"
    return f"<|im_start|>user\n{image * views}{TEXT}<|im_end|>\n" + ("<|im_start|>assistant\n" if answer else "")


def fill_prompts(
    form: str, texts: Sequence[str], tokens: Sequence[int], tokenizer: Any, image_id: int
) -> FilledPrompts:
    """Ids of the form with each text in its place, and each image token repeated.

    Args:
        form: `{text}` where the text goes, one image token where each image goes.
        texts: B of them.
        tokens: how many tokens each image takes, in order.
        tokenizer: of the fast kind.
        image_id: id of the image token.

    Raises DataError where a text contains the image token or no token at all.
    """
    image_token = str(tokenizer.convert_ids_to_tokens(image_id))
    before, after = form.split(TEXT)
    opening, *pieces = before.split(image_token)
    before = opening + "".join(image_token * n + piece for n, piece in zip(tokens, pieces, strict=True))
    coded = tokenizer([before + text + after for text in texts], add_special_tokens=False, return_offsets_mapping=True)
    length = max(map(len, coded["input_ids"]))
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    real, is_text = torch.zeros(2, len(texts), length, dtype=torch.bool)
    for row, (text, row_ids, spans) in enumerate(zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True)):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        real[row, : len(row_ids)] = True
        first, last = len(before), len(before) + len(text)
        is_text[row, : len(row_ids)] = torch.tensor([a < last and b > first and b > a for a, b in spans])
        if row_ids.count(image_id) != sum(tokens) or not is_text[row].any():
            raise DataError(f"the text {text!r} is empty or contains {image_token}; give plain words")
    return FilledPrompts(ids=ids, real=real, is_image=(ids == image_id) & real, is_text=is_text)
