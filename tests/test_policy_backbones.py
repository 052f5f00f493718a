"""Vision-language models as policy backbones: every family from a tiny random configuration in the published file layout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_teachers import CLIP_STYLE, QWEN_SPECIAL, QWEN_TEXT, save, save_tokenizer
from torch import nn

from actok.backbones.decoder import KVCache, Prefix
from actok.backbones.policy_backbone import DeepPrefix
from actok.backbones.policy_models import backbone_from_spec, load_backbone
from actok.core.errors import ConfigError, DataError

TEXTS = ["open the drawer", "pick up the red block and place it on the left shelf", "close it"]
ROWS, LAYERS = 41, 3
TEXT = {**QWEN_TEXT, "vocab_size": ROWS, "num_hidden_layers": LAYERS, "initializer_range": 0.3}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "initializer_range": 0.3}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
CHAT = (
    "<|im_start|>{% for m in messages %}User:{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def qwen(folder, name, text, vision, preprocessor):
    import transformers

    ids = save_tokenizer(folder, QWEN_SPECIAL, pad_token="<|im_start|>", eos_token="<|im_end|>")
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text},
        vision_config={"depth": 3, "num_heads": 2, "out_hidden_size": 32, **TOWER, **vision},
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=ROWS - 1,
        tie_word_embeddings=False,
    )
    return save(folder, getattr(transformers, f"{name}ForConditionalGeneration")(config), preprocessor)


def make_qwen2_5(folder):
    text = {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    preprocessor = {**CLIP_STYLE, "patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    return qwen(folder, "Qwen2_5_VL", text, {"fullatt_block_indexes": [1]}, preprocessor)


def make_qwen3(folder):
    text = {"head_dim": 16, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}, "rope_theta": 3000.0}
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    preprocessor = {**HALF, "patch_size": 16, "size": {"shortest_edge": 1024, "longest_edge": 16777216}}
    return qwen(folder, "Qwen3VL", text, vision, preprocessor)


def paligemma(folder, text):
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    special = ["<pad>", "<eos>", "<bos>", "<image>"]
    ids = save_tokenizer(folder, special, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tower = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, **TOWER}
    config = PaliGemmaConfig(
        text_config={**TEXT, "num_key_value_heads": 1, "head_dim": 8, **text},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=32,
        image_token_index=ids["<image>"],
    )
    return save(folder, PaliGemmaForConditionalGeneration(config), {**HALF, "size": {"height": 28, "width": 28}})


def make_paligemma(folder):
    return paligemma(folder, {"model_type": "gemma"})


def make_paligemma2(folder):
    caps = {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.3, "query_pre_attn_scalar": 8}
    return paligemma(folder, {"model_type": "gemma2", "sliding_window": 211, **caps})


def make_internvl(folder):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    ids = save_tokenizer(folder, special, pad_token="<|im_start|>", eos_token="<|im_end|>")
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, **TOWER}
    config = InternVLConfig(
        text_config={
            **TEXT,
            "model_type": "qwen2",
            "rope_theta": 7000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        },
        vision_config=tower,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    preprocessor = {**CLIP_STYLE, "size": {"height": 56, "width": 56}, "crop_to_patches": True}
    return save(folder, InternVLForConditionalGeneration(config), preprocessor)


def smolvlm(folder, name):
    import transformers

    special = ["<|im_start|>", "<end>", "<image>", "<fake_token_around_image>", "<global-img>"]
    template = CHAT.replace("IMAGE", "<image>")
    ids = save_tokenizer(folder, special, template=template, pad_token="<|im_start|>", eos_token="<end>")
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama", "rope_theta": 9000.0, "pad_token_id": 0},
        vision_config={**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7},
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    preprocessor = {**HALF, "resample": 1, "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
    return save(folder, getattr(transformers, f"{name}ForConditionalGeneration")(config), preprocessor)


MAKERS = {
    "paligemma": make_paligemma,
    "paligemma2": make_paligemma2,
    "qwen2_5_vl": make_qwen2_5,
    "qwen3_vl": make_qwen3,
    "internvl": make_internvl,
    "smolvlm": lambda folder: smolvlm(folder, "SmolVLM"),
    "idefics3": lambda folder: smolvlm(folder, "Idefics3"),
}
ROTARY = {"qwen2_5_vl": 5000, "qwen3_vl": 3000, "internvl": 7000, "smolvlm": 9000, "idefics3": 9000}
TIED = ("paligemma", "paligemma2", "internvl")
families = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        (root / name).mkdir()
        make(root / name)
    return root


@pytest.fixture(scope="module")
def backbones(folders):
    made = {name: load_backbone(folders / name) for name in MAKERS}
    for backbone in made.values():
        assert not backbone.training
    return made


def views(count=2, batch=3, seed=0):
    """Views of different sizes, none of them the model's own."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (batch, h, w, 3), dtype=np.uint8) for h, w in [(61, 83), (97, 53)][:count]]


@families
def test_smoke(backbones, name):
    b = backbones[name]
    p = b.prefix(TEXTS, views())
    h, c = b.run_prefix(p)
    print(p.embeds.shape, c.length)
