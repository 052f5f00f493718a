"""Vision-language models as policy backbones: every family from a tiny random configuration in the published file layout."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.backbones.decoder import KVCache
from actok.backbones.policy_backbone import DeepPrefix
from actok.backbones.policy_models import backbone_from_spec, load_backbone
from actok.backbones.prompts import fill_prompts
from actok.core.errors import ConfigError, DataError
from model_folders import CLIP_STYLE, QWEN_SPECIAL, QWEN_TEXT, save, save_tokenizer

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


def own_forward(backbone, prefix_ids, images):
    """transformers' own forward pass over the same ids and pixels, with masks and positions of its own making."""
    pixels, _ = backbone._pixels(images) if images else ({}, [])
    ids, real = prefix_ids.ids, prefix_ids.real
    arguments = {"input_ids": ids, "attention_mask": real.long(), **pixels}
    if backbone.model_type == "paligemma":
        arguments["token_type_ids"] = torch.zeros_like(ids)
    elif "qwen" in backbone.model_type:
        arguments["mm_token_type_ids"] = prefix_ids.is_image.int()
    with torch.no_grad():
        return backbone.network.model(**arguments).last_hidden_state, backbone.network(**arguments).logits


def filled(backbone, texts, images):
    tokens = backbone._pixels(images)[1] if images else []
    return fill_prompts(backbone.form(len(images)), texts, tokens, backbone.text_tokenizer, backbone.image_id)


def block_mask(prefix, sizes, seed=0):
    """Random masks of pieces after a prefix: each sees some earlier positions and some of its own piece, itself always."""
    rng = torch.Generator().manual_seed(seed)
    count, length = prefix.real.shape
    total = length + sum(sizes)
    whole = torch.zeros(count, total, total, dtype=torch.bool)
    whole[:, :length, :length] = prefix.mask()
    start = length
    for size in sizes:
        seen = torch.rand(count, size, start + size, generator=rng) < 0.6
        seen[:, :, :length] &= prefix.real[:, None]
        whole[:, start : start + size, : start + size] = seen
        start += size
    return whole | torch.eye(total, dtype=torch.bool)


def suffix(backbone, prefix, count, seed=1):
    """Random ids after a prefix, at jittered positions. Returns embeddings and positions."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (len(prefix.real), count), generator=rng)
    steps = torch.randint(1, 4, (len(prefix.real), count), generator=rng)
    return backbone.embed(ids), prefix.next_position[:, None] - 1 + steps.cumsum(1)


def joined(backbone, prefix, embeds, positions, mask):
    """Prefix and suffix in one pass."""
    if prefix.positions.ndim == 3:
        positions = positions.expand(3, -1, -1)
    deep = {}
    if isinstance(prefix, DeepPrefix):
        more = torch.zeros(positions.shape[1:], dtype=torch.bool)
        deep = {
            "visual_pos_masks": torch.cat((prefix.is_image, more), 1),
            "deepstack_visual_embeds": list(prefix.deep),
        }
    parts = torch.cat((prefix.embeds, embeds), 1), torch.cat((prefix.positions, positions), -1)
    return backbone._pass(*parts, mask, None, **deep)


# ---------------------------------------------------------------- the outside anchor


@families
@pytest.mark.parametrize("count", [0, 1, 2])
def test_our_prompt_and_pass_equal_the_models_own_forward(backbones, name, count):
    backbone = backbones[name]
    images = views(count)
    prefix = backbone.prefix(TEXTS, images)
    with torch.no_grad():
        hidden, cache = backbone.run_prefix(prefix)
        logits = backbone.logits(hidden)
    prompts = filled(backbone, TEXTS, images)
    # transformers lets PaliGemma's real tokens see no padding, as here; what padding itself sees means nothing.
    own_hidden, own_logits = own_forward(backbone, prompts, images)
    torch.testing.assert_close(hidden[prefix.real], own_hidden[prompts.real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[prefix.real], own_logits[prompts.real], atol=2e-5, rtol=1e-4)
    assert logits.std() > 1e-2
    assert cache.length == prefix.real.shape[1]


@families
def test_the_prompt_holds_each_view_and_leaves_the_text_whole(backbones, name):
    backbone = backbones[name]
    images = views()
    prompts = filled(backbone, TEXTS, images)
    prefix = backbone.prefix(TEXTS, images)
    per_view = {"paligemma": [4, 4], "paligemma2": [4, 4], "internvl": [4, 4], "smolvlm": [4, 4], "idefics3": [4, 4]}
    per_view |= {"qwen2_5_vl": [6, 6], "qwen3_vl": [6, 6]}
    assert prompts.is_image.sum(1).tolist() == [sum(per_view[name])] * 3
    for row, text in enumerate(TEXTS):
        assert backbone.text_of(prompts.ids[row][prompts.is_text[row]].tolist()) == text
    assert prefix.real.sum(1).tolist() == prompts.real.sum(1).tolist()
    assert prefix.last().tolist() == (prefix.real.sum(1) - 1).tolist()
    other = backbone.prefix(TEXTS, [images[0], 255 - images[1]])
    moved = (other.embeds - prefix.embeds).abs().amax(-1) > 1e-4
    second = prompts.is_image & (prompts.is_image.cumsum(1) > per_view[name][0])
    assert moved[second].all()
    assert not moved[~second].any()


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_pixels_are_those_of_the_published_processor_for_one_whole_tile(backbones, name):
    """Square pictures, for which transformers' two resizings of SmolVLM are one."""
    if name == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        processor = GotOcr2ImageProcessorPil(**{**CLIP_STYLE, "size": {"height": 56, "width": 56}})
    else:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        side = {"longest_edge": 28}
        processor = SmolVLMImageProcessorPil(
            **{**HALF, "resample": 1}, size=side, max_image_size=side, do_image_splitting=False
        )
    images = np.random.default_rng(5).integers(0, 256, (3, 61, 61, 3), dtype=np.uint8)
    expected = torch.as_tensor(np.asarray(processor(list(images), return_tensors="np")["pixel_values"]))
    ours = backbones[name]._pixels([images])[0]["pixel_values"]
    torch.testing.assert_close(ours.flatten(0, -4), expected.flatten(0, -4), atol=1e-5, rtol=0)


def test_the_form_of_each_family(backbones):
    form = {name: backbones[name].form(2) for name in MAKERS}
    assert form["paligemma"] == form["paligemma2"] == "<image><image><bos>{text}\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert form["qwen2_5_vl"] == f"<|im_start|>user\n{image * 2}{{text}}<|im_end|>\n<|im_start|>assistant\n"
    assert form["qwen3_vl"] == form["qwen2_5_vl"]
    image = "<img><IMG_CONTEXT></img>\n"
    assert form["internvl"] == f"<|im_start|>user\n{image * 2}{{text}}<|im_end|>\n<|im_start|>assistant\n"
    image = "<fake_token_around_image><global-img><image><fake_token_around_image>"
    assert form["smolvlm"] == form["idefics3"] == f"<|im_start|>User:{image * 2}{{text}}<end>\nAssistant:"


# ---------------------------------------------------------------- passes


@families
def test_pieces_over_the_cache_equal_one_pass_and_leave_it_unchanged(backbones, name):
    backbone = backbones[name]
    prefix = backbone.prefix(TEXTS, views())
    sizes = (2, 5, 1, 3)
    mask = block_mask(prefix, sizes)
    with torch.no_grad():
        embeds, positions = suffix(backbone, prefix, sum(sizes))
        whole, every = joined(backbone, prefix, embeds, positions, mask)
        hidden, cache = backbone.run_prefix(prefix)
        parts, start = [hidden], prefix.real.shape[1]
        for piece in positions.split(sizes, 1):
            n = piece.shape[1]
            before = [x.clone() for x in cache.keys]
            begin = start - prefix.real.shape[1]
            part, after = backbone.run(
                embeds[:, begin : begin + n], piece, mask[:, start : start + n, : start + n], cache
            )
            assert cache.length == start
            assert all(torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True))
            parts.append(part)
            cache, start = after, start + n
    assert cache.length == every.length == start
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    for a, b in zip((*cache.keys, *cache.values), (*every.keys, *every.values), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@families
def test_what_the_mask_hides_changes_nothing(backbones, name):
    backbone = backbones[name]
    prefix = backbone.prefix(TEXTS, views(1))
    length = prefix.real.shape[1]
    with torch.no_grad():
        embeds, positions = suffix(backbone, prefix, 7)
        _, cache = backbone.run_prefix(prefix)
        mask = torch.ones(3, 7, length + 7, dtype=torch.bool)
        mask[:, :, :length] &= prefix.real[:, None]
        mask[:, :5, length + 5 :] = False
        base, _ = backbone.run(embeds, positions, mask, cache)
        changed = torch.cat((embeds[:, :5], -embeds[:, 5:]), 1)
        other, _ = backbone.run(changed, positions, mask, cache)
    torch.testing.assert_close(base[:, :5], other[:, :5], atol=1e-6, rtol=0)
    assert (base[:, 5:] - other[:, 5:]).abs().amin(-1).max() > 0
    assert (base[:, 5:] - other[:, 5:]).abs().max() > 1e-2


@families
def test_sdpa_equals_eager(backbones, folders, name):
    backbone = backbones[name]
    eager = load_backbone(folders / name)
    eager.network.set_attn_implementation("eager")
    implementation = eager.network.config.get_text_config()._attn_implementation
    assert implementation == "eager"
    assert (backbone.network.config.get_text_config()._attn_implementation == "sdpa") == (name != "paligemma2")
    found = []
    for model in (backbone, eager):
        with torch.no_grad():
            prefix = model.prefix(TEXTS, views())
            embeds, positions = suffix(model, prefix, 5)
            hidden, cache = model.run_prefix(prefix)
            mask = block_mask(prefix, (5,))[:, -5:]
            found.append(torch.cat((hidden, model.run(embeds, positions, mask, cache)[0]), 1))
    keep = torch.cat((prefix.real, torch.ones(3, 5, dtype=torch.bool)), 1)
    torch.testing.assert_close(found[0][keep], found[1][keep], atol=1e-5, rtol=1e-4)


@families
def test_padding_changes_nothing(backbones, name):
    """Prompts of 3, 11 and 2 words, together and alone, with what follows."""
    backbone = backbones[name]
    images = views()
    with torch.no_grad():
        prefix = backbone.prefix(TEXTS, images)
        embeds, positions = suffix(backbone, prefix, 5)
        mask = block_mask(prefix, (5,))[:, -5:]
        hidden, cache = backbone.run_prefix(prefix)
        after, _ = backbone.run(embeds, positions, mask, cache)
        for i, text in enumerate(TEXTS):
            one = backbone.prefix([text], [x[i : i + 1] for x in images])
            length = one.real.shape[1]
            assert one.next_position[0] == prefix.next_position[i]
            alone, own = backbone.run_prefix(one)
            torch.testing.assert_close(alone[0], hidden[i, :length], atol=2e-5, rtol=1e-4)
            seen = mask[i : i + 1, :, torch.cat((prefix.real[i], torch.ones(5, dtype=torch.bool)))]
            follow, _ = backbone.run(embeds[i : i + 1], positions[i : i + 1], seen, own)
            torch.testing.assert_close(follow[0], after[i], atol=2e-5, rtol=1e-4)


@families
def test_positions_go_on_where_the_prompt_ends(backbones, name):
    """What the model reads next without images: one more than the last; with Qwen's images: the models' own count."""
    backbone = backbones[name]
    alone = backbone.prefix(TEXTS, [])
    first = 1 if name.startswith("paligemma") else 0
    axes = alone.positions if alone.positions.ndim == 3 else alone.positions[None]
    for row, length in enumerate(alone.real.sum(1).tolist()):
        assert axes[:, row, :length].tolist() == [list(range(first, first + length))] * len(axes)
    assert alone.next_position.tolist() == (alone.real.sum(1) + first).tolist()
    seen = backbone.prefix(TEXTS, views())
    last = seen.positions.masked_fill(~seen.real, -1).amax(-1)
    assert seen.next_position.tolist() == ((last.amax(0) if last.ndim == 2 else last) + 1).tolist()
    assert (seen.positions.ndim == 3) == ("qwen" in name)
    if "qwen" in name:
        assert seen.next_position[0] < seen.real[0].sum()  # a grid takes fewer positions than tokens


@pytest.mark.parametrize("name", [x for x in MAKERS if not x.startswith("paligemma")])
def test_a_position_appended_to_the_prompt_is_the_same_as_one_that_follows_it(backbones, name):
    """A policy may append an embedding (its state) before the prompt's pass."""
    backbone = backbones[name]
    prefix = backbone.prefix(TEXTS, views())
    extra = torch.randn(3, 1, backbone.width, generator=torch.Generator().manual_seed(9))
    where = prefix.next_position[:, None].expand(*prefix.positions.shape[:-1], 1)
    longer = replace(
        prefix,
        embeds=torch.cat((prefix.embeds, extra), 1),
        real=torch.cat((prefix.real, torch.ones(3, 1, dtype=torch.bool)), 1),
        positions=torch.cat((prefix.positions, where), -1),
    )
    with torch.no_grad():
        together, _ = backbone.run_prefix(longer)
        hidden, cache = backbone.run_prefix(prefix)
        seen = torch.cat((prefix.real, torch.ones(3, 1, dtype=torch.bool)), 1)[:, None]
        after, _ = backbone.run(extra, where[0] if where.ndim == 3 else where, seen, cache)
    torch.testing.assert_close(together[:, -1:], after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[:, :-1][prefix.real], hidden[prefix.real], atol=1e-5, rtol=1e-4)


def test_deep_features_of_qwen3_reach_the_first_layers_only_through_the_prompts_pass(backbones):
    backbone = backbones["qwen3_vl"]
    prefix = backbone.prefix(TEXTS, views())
    assert isinstance(prefix, DeepPrefix)
    assert [len(x) for x in prefix.deep] == [int(prefix.is_image.sum())] * 2
    with torch.no_grad():
        _, deep = backbone.run_prefix(prefix)
        _, plain = backbone.run(prefix.embeds, prefix.positions, prefix.mask())
    changed = [(a - b).abs().amax((1, 3)) > 1e-6 for a, b in zip(deep.keys, plain.keys, strict=True)]
    assert not changed[0].any()  # the first layer reads the embeddings as they are
    assert torch.equal(changed[1] & prefix.real, prefix.is_image)
    assert not isinstance(backbone.prefix(TEXTS, []), DeepPrefix)


# ---------------------------------------------------------------- gradients


@families
def test_gradients_reach_every_weight_that_is_trained_also_through_the_cache(folders, name):
    backbone = load_backbone(folders / name)
    prefix = backbone.prefix(TEXTS, views())
    embeds, positions = suffix(backbone, prefix, 5)
    _, cache = backbone.run_prefix(prefix)
    hidden, _ = backbone.run(embeds.detach(), positions, block_mask(prefix, (5,))[:, -5:], cache)
    backbone.logits(hidden).square().mean().backward()
    trained = {k: v for k, v in backbone.named_parameters() if v.requires_grad}
    without = [k for k, v in trained.items() if v.grad is None]
    assert without == []
    # A softmax does not see what all keys share, so the bias of keys without rotary positions has none but rounding.
    still = [k for k, v in trained.items() if not v.grad.abs().max() > 1e-9]
    assert all("vis" in k and k.endswith("k_proj.bias") for k in still), still
    frozen = [k for k, v in backbone.named_parameters() if not v.requires_grad]
    assert all(".head." in k for k in frozen)
    assert bool(frozen) == name.startswith("paligemma")


@families
def test_a_detached_cache_trains_nothing(folders, name):
    backbone = load_backbone(folders / name)
    prefix = backbone.prefix(TEXTS, views(1))
    _, cache = backbone.run_prefix(prefix)
    embeds = torch.randn(3, 5, backbone.width, requires_grad=True)
    _, positions = suffix(backbone, prefix, 5)
    hidden, after = backbone.run(embeds, positions, block_mask(prefix, (5,))[:, -5:], cache.detach())
    (gradient,) = torch.autograd.grad(hidden.sum() + sum(x.sum() for x in after.keys), embeds, retain_graph=True)
    assert gradient.abs().max() > 0
    tower = next(v for k, v in backbone.named_parameters() if "vis" in k and v.requires_grad)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(hidden.sum(), tower)


# ---------------------------------------------------------------- what it says of itself


@families
def test_sizes_are_those_of_the_configuration(backbones, name):
    backbone = backbones[name]
    with torch.no_grad():
        hidden, cache = backbone.run_prefix(backbone.prefix(TEXTS, views()))
    heads = 1 if name.startswith("paligemma") else 2
    size = 16 if name == "qwen3_vl" else 8
    assert (backbone.width, backbone.layers, backbone.heads) == (32, LAYERS, 4)
    assert (backbone.kv_heads, backbone.head_dim) == (heads, size)
    assert backbone.rotary_base == ROTARY.get(name, 10000)
    assert len(cache.keys) == len(cache.values) == LAYERS
    assert cache.keys[0].shape == (3, heads, cache.length, size)
    assert backbone.logits(hidden).shape[-1] == backbone.vocab_size == ROWS
    assert backbone.text_size == max(backbone.text_tokenizer.get_vocab().values()) + 1 < ROWS
    special = backbone.special_ids
    assert special["image"] == backbone.image_id
    assert special["end"] != special["pad"]
    assert {backbone.text_of([i]) for k, i in special.items() if k not in ("end", "pad", "image")} <= set(special)
    (ids,) = backbone.text_ids(TEXTS[:1])
    assert backbone.text_of(ids) == TEXTS[0]
    assert not set(ids) & set(special.values())


@families
def test_keys_are_turned_by_the_rotary_base(backbones, name):
    """One head of one token at two positions: the angle of each pair is position / base^(2i/E), so an expert can read it."""
    backbone = backbones[name]
    embeds = torch.randn(1, 1, backbone.width, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1)
    positions = torch.tensor([[0], [19]])
    with torch.no_grad():
        _, cache = backbone.run(embeds, positions, torch.ones(2, 1, 1, dtype=torch.bool))
    still, turned = cache.keys[0][:, 0, 0]
    half = backbone.head_dim // 2
    angle = 19 / backbone.rotary_base ** (torch.arange(half) / half)
    a, b = still[:half], still[half:]
    expected = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- table and twin


@families
def test_resize_keeps_old_rows_and_draws_new_ones_by_the_seed(folders, name):
    drawn = []
    for _ in range(2):
        backbone = load_backbone(folders / name)
        assert backbone.tied == (name in TIED)
        tables = [backbone._table, backbone._head]
        before = [x.weight.detach().clone() for x in tables]
        torch.manual_seed(7)
        backbone.resize(ROWS + 997)
        tables = [backbone._table, backbone._head]
        assert backbone.vocab_size == ROWS + 997 == backbone.logits(torch.zeros(1, 1, backbone.width)).shape[-1]
        for old, module in zip(before, tables, strict=True):
            known, new = old[: backbone.text_size], module.weight[ROWS:].detach()
            torch.testing.assert_close(module.weight[:ROWS].detach(), old, atol=0, rtol=0)
            spread = known.std(0)
            assert ((new.mean(0) - known.mean(0)).abs() < 5 * spread / 997**0.5 + 1e-9).all()
            torch.testing.assert_close(new.std(0), spread, rtol=0.15, atol=1e-9)
        assert backbone.tied == (name in TIED)
        assert all(x.weight.requires_grad for x in tables)
        drawn.append([x.weight.detach().clone() for x in tables])
        backbone.resize(ROWS)
        assert backbone.vocab_size == ROWS + 997
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@families
def test_the_twin_takes_the_weights_and_does_the_same(folders, tmp_path, name):
    moved = shutil.copytree(folders / name, tmp_path / "here" / name)
    backbone = load_backbone(moved)
    backbone.resize(ROWS + 12)
    spec = json.loads(json.dumps(dict(backbone.spec())))
    files = dict(backbone.files())
    assert not any(str(tmp_path).encode() in content for content in files.values())
    images = views()
    state = {k: v.detach().clone() for k, v in backbone.state_dict().items()}
    assert len({v.untyped_storage().data_ptr() for v in backbone.state_dict().values()}) == len(state)
    shutil.rmtree(moved)
    twin = backbone_from_spec(spec, files)
    assert not twin.training
    twin.load_state_dict(state)
    assert twin.tied == backbone.tied
    assert (twin.name, twin.vocab_size, twin.text_size) == (name, ROWS + 12, backbone.text_size)
    results = []
    for model in (backbone, twin):
        with torch.no_grad():
            results.append(model.logits(model.run_prefix(model.prefix(TEXTS, images))[0]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)
    assert twin.spec() == backbone.spec()
    assert twin.files() == files


def test_half_precision_keeps_rotary_frequencies_exact_in_the_twin(folders):
    half = load_backbone(folders / "smolvlm", dtype="bfloat16")
    twin = backbone_from_spec(half.spec(), half.files())
    twin.load_state_dict(half.state_dict())
    assert twin.dtype == torch.bfloat16
    rotary = [x.network.model.text_model.rotary_emb.inv_freq for x in (half, twin)]
    torch.testing.assert_close(rotary[0], rotary[1], atol=0, rtol=0)
    assert rotary[0].dtype == torch.float32
    with torch.no_grad():
        both = [x.run_prefix(x.prefix(TEXTS, views()))[0] for x in (half, twin)]
    assert both[0].dtype == torch.bfloat16
    torch.testing.assert_close(both[0], both[1], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_is_refused_in_training_where_it_would_empty_the_cache(folders):
    backbone = load_backbone(folders / "qwen2_5_vl").train()
    backbone.network.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match=r"0 of 3 layers .* turn gradient checkpointing off"):
        backbone.run_prefix(backbone.prefix(TEXTS, views()))


def test_train_and_eval_reach_the_network(folders):
    backbone = load_backbone(folders / "smolvlm")
    assert not backbone.network.training
    backbone.train()
    assert all(m.training for m in backbone.network.modules())
    backbone.eval()
    assert not any(m.training for m in backbone.network.modules())


# ---------------------------------------------------------------- errors


def changed(folders, tmp_path, name, **values):
    """A copy of a model's folder with other values in config.json; "text.x" stands for text_config's x."""
    folder = shutil.copytree(folders / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        section, _, field = key.rpartition("__")
        (config[f"{section}_config"] if section else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_unknown_model_type_names_those_known(folders, tmp_path):
    folder = changed(folders, tmp_path, "smolvlm", model_type="bert")
    with pytest.raises(ConfigError, match=r"bert, .* idefics3, internvl, paligemma, qwen2_5_vl, qwen3_vl, smolvlm"):
        load_backbone(folder)
    with pytest.raises(ConfigError, match="describes no model"):
        backbone_from_spec({"kind": "tiny"}, {})


def test_a_decoder_that_one_pass_cannot_serve_is_refused(folders, tmp_path):
    folder = changed(
        folders,
        tmp_path,
        "smolvlm",
        text__rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0},
    )
    with pytest.raises(ConfigError, match=r"rotary positions .*linear"):
        load_backbone(folder)


def test_prompts_that_cannot_be_are_refused(backbones):
    backbone = backbones["paligemma2"]
    with pytest.raises(DataError, match="3 texts and views of"):
        backbone.prefix(TEXTS, views(batch=2))
    with pytest.raises(DataError, match="0 texts"):
        backbone.prefix([], [])
    with pytest.raises(DataError, match="uint8"):
        backbone.prefix(TEXTS, [np.zeros((3, 8, 8, 3))])
    with pytest.raises(DataError, match="contains <image>"):
        backbone.prefix(["open <image>"], views(batch=1))
    with pytest.raises(DataError, match=f"id {ROWS} is no text"):
        backbone.text_of([2, ROWS])
    count = backbone.longest + 1
    assert count == 212  # the sliding window of its first layer
    with pytest.raises(DataError, match=r"212 positions .* \(211\)"):
        backbone.run(torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, count).bool())


def test_marks_that_the_tokenizer_lacks_are_named(folders, tmp_path):
    folder = changed(folders, tmp_path, "smolvlm")
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("<global-img>", "<other>"))
    with pytest.raises(ConfigError, match="lacks <global-img>"):
        load_backbone(folder)


def test_the_cache_is_what_the_contract_says(backbones):
    backbone = backbones["internvl"]
    with torch.no_grad():
        _, cache = backbone.run_prefix(backbone.prefix(TEXTS, views()))
    assert isinstance(cache, KVCache)
    kept = cache.select(slice(2, 9))
    assert kept.length == 7
    torch.testing.assert_close(kept.keys[1], cache.keys[1][:, :, 2:9])
