"""Foundation models of tiny random configurations, in the published file layout: a folder of each family."""

import json

WORDS = [
    "open",
    "close",
    "the",
    "drawer",
    "pick",
    "up",
    "red",
    "blue",
    "block",
    "and",
    "place",
    "it",
    "on",
    "left",
    "shelf",
    "now",
    "please",
]
TEXTS = ["open the drawer", "pick up the red block and place it on the left shelf", "close it"]
TEMPLATE = (
    "<|im_start|>system\nnow please<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CLIP_STYLE = {
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def save_tokenizer(folder, special, wrap=None, template=None, **named):
    """A word tokenizer with these special tokens; `wrap` = (begin, end) added to each text. Returns token -> id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate([*special, "[UNK]", "system", "user", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if wrap:
        begin, end = wrap
        form = f"{begin} $A {end}" if begin else f"$A {end}"
        raw.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[(t, vocabulary[t]) for t in wrap if t]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        additional_special_tokens=list(special),
        chat_template=template,
        **named,
    )
    fast.save_pretrained(folder)
    return vocabulary


def save(folder, network, preprocessor=None):
    network.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


QWEN_TEXT = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def make_qwen2_5(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = save_tokenizer(folder, QWEN_SPECIAL, template=TEMPLATE, pad_token="<|im_end|>")
    config = Qwen2_5_VLConfig(
        text_config={**QWEN_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=36,
    )
    preprocessor = {
        **CLIP_STYLE,
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), preprocessor)


def make_qwen3(folder):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = save_tokenizer(folder, QWEN_SPECIAL, template=TEMPLATE, pad_token="<|im_end|>")
    config = Qwen3VLConfig(
        text_config={**QWEN_TEXT, "head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=36,
    )
    preprocessor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 16777216},
    }
    return save(folder, Qwen3VLForConditionalGeneration(config), preprocessor)


def make_paligemma(folder):
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    ids = save_tokenizer(folder, ["<pad>", "<eos>", "<bos>", "<image>"], pad_token="<pad>", bos_token="<bos>")
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "vocab_size": 37,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "initializer_range": 0.2,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        projection_dim=32,
        image_token_index=ids["<image>"],
    )
    preprocessor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 4,
        "size": {"height": 28, "width": 28},
    }
    return save(folder, PaliGemmaForConditionalGeneration(config), preprocessor)


def make_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    special = ["<|startoftext|>", "<|endoftext|>"]
    ids = save_tokenizer(folder, special, wrap=special, pad_token="<|endoftext|>")
    small = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    eos = ids["<|endoftext|>"]
    config = CLIPConfig(
        text_config={
            **small,
            "hidden_size": 32,
            "vocab_size": 37,
            "max_position_embeddings": 17,
            "bos_token_id": ids["<|startoftext|>"],
            "eos_token_id": eos,
            "pad_token_id": eos,
        },
        vision_config={**small, "hidden_size": 48, "image_size": 28, "patch_size": 14},
        projection_dim=29,
        initializer_factor=3.0,
    )
    preprocessor = {**CLIP_STYLE, "size": 32, "do_center_crop": True, "crop_size": 28}
    return save(folder, CLIPModel(config), preprocessor)


def make_siglip(folder):
    from transformers import SiglipConfig, SiglipModel

    save_tokenizer(folder, ["</s>"], wrap=("", "</s>"), pad_token="</s>", eos_token="</s>")
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**small, "vocab_size": 37, "max_position_embeddings": 17, "projection_size": 32},
        vision_config={**small, "image_size": 28, "patch_size": 14},
    )
    preprocessor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
    }
    return save(folder, SiglipModel(config), preprocessor)


def make_bert(folder):
    from transformers import BertConfig, BertModel

    special = ["[PAD]", "[CLS]", "[SEP]"]
    save_tokenizer(folder, special, wrap=special[1:], pad_token="[PAD]")
    config = BertConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=17,
        initializer_range=0.2,
    )
    return save(folder, BertModel(config))


def make_dinov2(folder):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14
    )
    preprocessor = {
        **CLIP_STYLE,
        "do_center_crop": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_processor_type": "BitImageProcessor",
    }
    return save(folder, Dinov2Model(config), preprocessor)


MAKERS = {
    "qwen2_5_vl": make_qwen2_5,
    "qwen3_vl": make_qwen3,
    "paligemma": make_paligemma,
    "clip": make_clip,
    "siglip": make_siglip,
    "bert": make_bert,
    "dinov2": make_dinov2,
}
