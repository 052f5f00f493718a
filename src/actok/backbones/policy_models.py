"""Published vision-language models as policy backbones: PaliGemma, Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from actok.backbones.decoder import DecoderBackbone, KVCache, Prefix
from actok.backbones.images import FixedImages, PatchImages, read_preprocessor
from actok.backbones.policy_backbone import DeepPrefix, TransformersBackbone, rows
from actok.backbones.prompts import TEXT, FilledPrompts, chat_form, qwen_form
from actok.backbones.source import ModelSource, find_model, load_network, require_transformers
from actok.core.errors import ConfigError

__all__ = ["InternVL", "PaliGemma", "QwenVL", "SmolVLM", "backbone_from_spec", "load_backbone"]


class PaliGemma(TransformersBackbone):
    """PaliGemma and PaliGemma 2: `<image>` x n, `<bos>`, text, newline, all attending to each other, from position 1."""

    class_name: ClassVar[Mapping[str, str]] = {"paligemma": "PaliGemmaForConditionalGeneration"}
    decoders = ("gemma", "gemma2")
    # SigLIP's own pooling, which PaliGemma does not read; older and newer transformers place it differently.
    unused = ("model.vision_tower.head.", "model.vision_tower.vision_model.head.")
    first_position = 1
    causal = False

    def __init__(self, source: ModelSource, network: Any) -> None:
        """As the base class."""
        super().__init__(source, network)
        self.images = FixedImages.load(source)
        self.side = _square(self.images, self.name)
        self.tokens_per_image = (self.side // int(self.network.config.vision_config.patch_size)) ** 2

    def form(self, views: int) -> str:
        """The form of its pre-training; there is no chat template."""
        return self.image_token * views + str(self.text_tokenizer.bos_token) + TEXT + "\n"

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values": _tiles(self.images, images).to(self.dtype)}, [self.tokens_per_image] * len(images)


class QwenVL(TransformersBackbone):
    """Qwen2.5-VL and Qwen3-VL. Images keep their aspect ratio and take as many tokens as their area asks for.

    Positions have three axes; tokens that follow the prompt stand at the same number on all of them.
    """

    class_name: ClassVar[Mapping[str, str]] = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
    }
    decoders = ("qwen2_5_vl_text", "qwen3_vl_text")

    def __init__(self, source: ModelSource, network: Any) -> None:
        """As the base class."""
        super().__init__(source, network)
        self.images = PatchImages.load(source)

    def form(self, views: int) -> str:
        """One turn of the user through the chat template (else Qwen's plain form), and the opening of the assistant's."""
        return qwen_form(self.text_tokenizer, self.image_token, views, self.name, answer=True)

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        views = [self.images(x) for x in images]
        grids = [(1, *self.images.grid(*x.shape[1:3])) for x in images]
        patches = torch.cat([view[b] for b in range(len(images[0])) for view in views])
        grid = torch.tensor(grids).repeat(len(images[0]), 1)
        tokens = [self.images.tokens(*x.shape[1:3]) for x in images]
        return {"pixel_values": patches.to(self.dtype), "image_grid_thw": grid}, tokens

    def _features(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = self.network.model.get_image_features(**pixels)
        if self.model_type != "qwen3_vl":
            return rows(output), ()
        if isinstance(output, tuple):  # transformers 4: the features, then those of the first layers
            return rows(output[0]), tuple(rows(x) for x in output[1])
        return rows(output), tuple(rows(x) for x in output.deepstack_features)

    @cached_property
    def _takes_types(self) -> bool:
        """Newer transformers read positions off token types, older ones off the ids."""
        return "mm_token_type_ids" in signature(self.network.model.get_rope_index).parameters

    def _positions(self, prompts: FilledPrompts, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        positions, _ = self.network.model.get_rope_index(
            prompts.ids,
            image_grid_thw=pixels.get("image_grid_thw"),
            attention_mask=prompts.real.long(),
            **({"mm_token_type_ids": prompts.is_image.int()} if self._takes_types else {}),
        )
        return positions, positions.masked_fill(~prompts.real, -1).amax((0, 2)) + 1

    def _pass(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: KVCache | None, **more: Any
    ) -> tuple[Tensor, KVCache]:
        axes = positions if positions.ndim == 3 else positions.expand(3, -1, -1)
        return super()._pass(embeds, axes, mask, cache, **more)

    def run_prefix(self, prefix: Prefix) -> tuple[Float[Tensor, "B L W"], KVCache]:
        """As the base class; Qwen3-VL's deep visual features are added to the outputs of the first layers."""
        more: dict[str, Any] = {}
        if isinstance(prefix, DeepPrefix):
            appended = prefix.embeds.shape[1] - prefix.is_image.shape[1]
            is_image = nn.functional.pad(prefix.is_image, (0, appended))
            more = {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(prefix.deep)}
        return self._pass(prefix.embeds, prefix.positions, prefix.mask(), None, **more)


class InternVL(TransformersBackbone):
    """InternVL of transformers' own kind ("...-hf" on the Hub).

    Each view is one square tile. The published processor may cut a large image into up to twelve and add a thumbnail; a
    policy's cameras give the whole view at a fixed number of tokens instead.
    """

    class_name: ClassVar[Mapping[str, str]] = {"internvl": "InternVLForConditionalGeneration"}
    decoders = ("qwen2", "qwen3", "llama")
    marks: ClassVar[tuple[str, str]] = ("<img>", "</img>")

    def __init__(self, source: ModelSource, network: Any) -> None:
        """As the base class. Raises ConfigError also where the tokenizer lacks the marks around an image."""
        super().__init__(source, network)
        _require_tokens(self, self.marks)
        self.images = FixedImages.load(source)
        vision, patch = self.network.config.vision_config, self.network.config.vision_config.patch_size
        patch = int(patch if isinstance(patch, int) else vision.patch_size[0])
        side = _square(self.images, self.name) // patch * self.network.config.downsample_ratio
        self.tokens_per_image = int(side) ** 2

    def form(self, views: int) -> str:
        """One turn of the user through the chat template (else its plain form), and the opening of the assistant's.

        Every image stands between its two marks.
        """
        if self.text_tokenizer.chat_template is None:
            images = f"{self.image_token}\n" * views
            form = f"<|im_start|>user\n{images}{TEXT}<|im_end|>\n<|im_start|>assistant\n"
        else:
            form = chat_form(self.text_tokenizer, self.image_token, views, self.name, answer=True)
        return form.replace(self.image_token, self.image_token.join(self.marks))

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values": _tiles(self.images, images).to(self.dtype)}, [self.tokens_per_image] * len(images)

    def _features(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        config = self.network.config
        output = self.network.model.get_image_features(
            **pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return rows(output), ()


class SmolVLM(TransformersBackbone):
    """SmolVLM 2, and SmolVLM of the Idefics 3 kind.

    Each view is one square of the vision tower's size, as SmolVLM reads the frames of a video. The published processor may
    enlarge a single image and split it into many; a policy's cameras give the whole view at a fixed number of tokens instead.
    """

    class_name: ClassVar[Mapping[str, str]] = {
        "smolvlm": "SmolVLMForConditionalGeneration",
        "idefics3": "Idefics3ForConditionalGeneration",
    }
    decoders = ("llama",)
    decoder_name = "text_model"
    marks: ClassVar[tuple[str, str]] = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")

    def __init__(self, source: ModelSource, network: Any) -> None:
        """As the base class. Raises ConfigError also where the tokenizer lacks the marks around an image."""
        super().__init__(source, network)
        _require_tokens(self, ("<fake_token_around_image>", "<global-img>"))
        limit = read_preprocessor(source).get("max_image_size") or {}
        side = int(limit.get("longest_edge") or self.network.config.vision_config.image_size)
        self.images = FixedImages.load(source, side)  # the file's own size is the one before splitting
        patches = side // int(self.network.config.vision_config.patch_size)
        self.tokens_per_image = patches**2 // int(self.network.config.scale_factor) ** 2

    def form(self, views: int) -> str:
        """One turn of the user through the chat template (else its plain form), and the opening of the assistant's.

        Every image stands between marks that call it whole.
        """
        if self.text_tokenizer.chat_template is None:
            begin = f"<|im_start|>User:{self.image_token * views}" if views else "<|im_start|>User: "
            form = f"{begin}{TEXT}<end_of_utterance>\nAssistant:"
        else:
            form = chat_form(self.text_tokenizer, self.image_token, views, self.name, answer=True)
        return form.replace(self.image_token, self.image_token.join(self.marks))

    def _pixels(self, images: Sequence[np.ndarray]) -> tuple[dict[str, Tensor], list[int]]:
        tiles = _tiles(self.images, images).unflatten(0, (-1, len(images)))
        return {"pixel_values": tiles.to(self.dtype)}, [self.tokens_per_image] * len(images)


FAMILIES: tuple[type[TransformersBackbone], ...] = (PaliGemma, QwenVL, InternVL, SmolVLM)


def _family(model_type: str, name: str) -> tuple[type[TransformersBackbone], str]:
    for family in FAMILIES:
        if model_type in family.class_name:
            return family, family.class_name[model_type]
    known = ", ".join(sorted(x for family in FAMILIES for x in family.class_name))
    raise ConfigError(f"{name} is a {model_type}, which is no policy backbone; known model types are {known}")


def load_backbone(
    spec: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> DecoderBackbone:
    """A published vision-language model, by Hub id ("owner/name", "owner/name@revision") or local folder.

    All its weights are kept and trainable, but for those that nothing reads; it is in evaluation mode.

    Args:
        spec: Hub id or folder, in transformers' layout.
        device: as torch names it.
        dtype: float32, bfloat16 or float16, as torch's or by name; None is float32 on the CPU and the checkpoint's own
            elsewhere.

    Raises:
        ConfigError: no such model, an unknown dtype, a model type that no family here has, or a decoder that cannot be run exactly.
        MissingExtraError: transformers is not installed.
    """
    source = find_model(spec)
    family, class_name = _family(source.model_type, source.name)
    wanted = None if dtype is None else str(dtype).removeprefix("torch.")
    network = load_network(source, class_name, device=str(device), dtype=wanted, unused=family.unused)
    return family(source, network)


def backbone_from_spec(spec: Mapping[str, Any], files: Mapping[str, bytes]) -> DecoderBackbone:
    """The untrained twin of a backbone, from its `spec()` and `files()`: its weights are loaded by `load_state_dict`.

    Raises:
        ConfigError: the spec or a file is not one of such a backbone.
        MissingExtraError: transformers is not installed.
    """
    if spec.get("kind") != "transformers" or "config.json" not in files:
        raise ConfigError(
            f"{dict(spec)} with {sorted(files)} describes no model of transformers; save the policy again"
        )
    name = str(spec["name"])
    family, class_name = _family(str(spec["model_type"]), name)
    transformers = require_transformers(f"building {name}")
    with TemporaryDirectory() as place:
        folder = Path(place)
        for file, content in files.items():
            if Path(file).name != file:
                raise ConfigError(f"file {file!r} of {name} is no plain name; save the policy again")
            (folder / file).write_bytes(content)
        source = ModelSource(folder=folder, name=name, config=json.loads(files["config.json"]))
        before = torch.get_default_dtype()
        # The default dtype, not `.to`: the tables of rotary frequencies stay as precise as transformers makes them.
        torch.set_default_dtype(getattr(torch, str(spec["dtype"])))
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            network = getattr(transformers, class_name)(config)
        finally:
            torch.set_default_dtype(before)
        return family(source, network.eval())


def _square(images: FixedImages, name: str) -> int:
    """The side of what the preprocessing gives. Raises ConfigError where it is no square."""
    made = images.crop or images.size
    if not isinstance(made, tuple) or made[0] != made[1]:
        raise ConfigError(
            f"the preprocessing of {name} gives images of {made}; it reads squares: name height and width"
        )
    return made[0]


def _tiles(preprocess: FixedImages, images: Sequence[np.ndarray]) -> Tensor:
    """Pixels [B x views, 3, h, w], sample by sample."""
    return torch.stack([preprocess(x) for x in images], dim=1).flatten(0, 1)


def _require_tokens(backbone: TransformersBackbone, tokens: Sequence[str]) -> None:
    known = backbone.text_tokenizer.get_vocab()
    lacking = [x for x in tokens if x not in known]
    if lacking:
        raise ConfigError(
            f"the tokenizer of {backbone.name} lacks {', '.join(lacking)}; use that of the published model"
        )
