"""The small backbone: pieces = whole, padding and order change nothing, text comes back, the twin is equal."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.backbones.decoder import KVCache, Prefix
from actok.core import ArtifactError, ConfigError, DataError, TokenError
from actok.nn.transformer import rotary_angles, rotate, turn
from actok.policies.tiny import NUMBERS, TinyConfig, TinyVLM, fit_text, number_rows

torch.set_num_threads(1)
TEXTS = (
    "Task: open the drawer, State: 3 5;",
    "Task: push the red block to the goal;",
    "Task: drück den roten Knopf 左, State: 11 13 17 255;",
)
VIEWS = ("front", "wrist")
CONFIG = TinyConfig(
    width=24, layers=3, heads=6, kv_heads=2, hidden=31, image_size=32, image_channels=(5, 7, 11), text_vocab=613
)


def model_of(config: TinyConfig = CONFIG, seed: int = 0) -> TinyVLM:
    torch.manual_seed(seed)
    model = TinyVLM.create(config, TEXTS, VIEWS)
    model.resize(model.text_size + 37)
    return model.eval()


MODEL = model_of()


def images_of(batch: int, seed: int = 0, height: int = 32, width: int = 32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8) for _ in VIEWS]


def joined(prefix: Prefix, embeds: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, positions and mask of a prefix and what follows it, which sees `own` [n, n] of itself."""
    batch, n = embeds.shape[:2]
    follow = torch.cat([prefix.real[:, None].expand(-1, n, -1), own.expand(batch, -1, -1)], 2)
    mask = torch.cat([torch.cat([prefix.mask(), torch.zeros(batch, prefix.real.shape[1], n).bool()], 2), follow], 1)
    places = torch.cat([prefix.positions, prefix.next_position[:, None] + torch.arange(n)], 1)
    return torch.cat([prefix.embeds, embeds], 1), places, mask


def block_mask(edges: list[int]) -> torch.Tensor:
    step = torch.repeat_interleave(torch.arange(len(edges)), torch.tensor(edges))
    return step[:, None] >= step


# -- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5], [7]])
@pytest.mark.parametrize("views", [True, False])
def test_pieces_over_the_cache_are_the_whole(kv_heads: int, sizes: list[int], views: bool) -> None:
    model = model_of(TinyConfig(**{**vars(CONFIG), "kv_heads": kv_heads}), seed=kv_heads)
    prefix = model.prefix(TEXTS, images_of(3) if views else [])
    embeds = model.embed(torch.randint(model.vocab_size, (3, 7)))
    x, places, mask = joined(prefix, embeds, block_mask(sizes))
    whole, everything = model.run(x, places, mask)

    length = prefix.real.shape[1]
    hidden, cache = model.run(prefix.embeds, prefix.positions, prefix.mask())
    first = cache
    parts, begin = [hidden], length
    for size in sizes:
        rows = slice(begin, begin + size)
        hidden, cache = model.run(x[:, rows], places[:, rows], mask[:, rows, : begin + size], cache)
        parts.append(hidden)
        begin += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert first.length == length
    assert cache.length == everything.length == length + 7
    assert cache.keys[0].shape == (3, model.kv_heads, length + 7, model.head_dim)
    for one, other in zip((*cache.keys, *cache.values), (*everything.keys, *everything.values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_pieces_are_the_whole_under_any_mask_that_looks_back(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 11, MODEL.width, generator=generator)
    places = torch.randint(97, (2, 11), generator=generator)
    mask = torch.rand(2, 11, 11, generator=generator) < 0.4
    mask[:, :cut, cut:] = False
    mask |= torch.eye(11, dtype=torch.bool)
    whole, _ = MODEL.run(embeds, places, mask)
    first, cache = MODEL.run(embeds[:, :cut], places[:, :cut], mask[:, :cut, :cut])
    second, _ = MODEL.run(embeds[:, cut:], places[:, cut:], mask[:, cut:], cache)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


def test_a_position_is_a_function_of_what_its_row_of_the_mask_reaches() -> None:
    x = torch.randn(1, 5, MODEL.width, requires_grad=True)
    mask = torch.eye(5, dtype=torch.bool)[None].clone()
    mask[0, 3, 1] = mask[0, 4, 3] = True  # 4 sees 3, which sees 1
    hidden, _ = MODEL.run(x, torch.arange(5)[None], mask)
    (gradient,) = torch.autograd.grad(hidden[0, 4].square().sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [False, True, False, True, True]


def test_padding_changes_no_real_token() -> None:
    codes = torch.randint(MODEL.vocab_size, (3, 5))
    images = images_of(3)
    together = MODEL.prefix(TEXTS, images)
    whole, _ = MODEL.run(*joined(together, MODEL.embed(codes), block_mask([2, 3])))
    assert not together.real.all(), "the texts are of different lengths"
    for b, text in enumerate(TEXTS):
        alone = MODEL.prefix([text], [image[b : b + 1] for image in images])
        hidden, _ = MODEL.run(*joined(alone, MODEL.embed(codes[b : b + 1]), block_mask([2, 3])))
        length = alone.real.shape[1]
        assert int(together.next_position[b]) == length == int(alone.next_position[0])
        assert together.positions[b, :length].tolist() == list(range(length))
        torch.testing.assert_close(hidden[0, :length], whole[b, :length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden[0, length:], whole[b, -5:], rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_do_not_meet() -> None:
    order = torch.tensor([2, 0, 1])
    codes, images = torch.randint(MODEL.vocab_size, (3, 5)), images_of(3)

    def hidden_of(rows: torch.Tensor) -> torch.Tensor:
        prefix = MODEL.prefix([TEXTS[b] for b in rows.tolist()], [image[rows.numpy()] for image in images])
        return MODEL.run(*joined(prefix, MODEL.embed(codes[rows]), block_mask([5])))[0]

    torch.testing.assert_close(hidden_of(order), hidden_of(torch.arange(3))[order], rtol=1e-5, atol=1e-5)


def test_only_differences_of_positions_matter() -> None:
    x, places, mask = joined(MODEL.prefix(TEXTS, []), torch.randn(3, 5, MODEL.width), block_mask([2, 3]))
    here, cache = MODEL.run(x, places, mask)
    there, moved = MODEL.run(x, places + 41, mask)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.keys[0], rotate(cache.keys[0], positions=torch.full((cache.length,), 41)))
    stretched, _ = MODEL.run(x, 2 * places, mask)
    assert (stretched - here).abs().max() > 1e-3


def test_rotation_by_sample_is_that_of_each_sample() -> None:
    x, places = torch.randn(3, 2, 5, 7), torch.randint(53, (3, 5))
    together = rotate(x, positions=places)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], rotate(x[b : b + 1], positions=places[b].float()))
    back = turn(together, *rotary_angles(-places, 7))
    torch.testing.assert_close(back, x)
    # As complex numbers: channel i + 1j * channel (i + E/2), times exp(1j * position * base^(-2i/E)).
    z = torch.complex(x[..., :3], x[..., 3:6]).to(torch.complex128)
    frequency = 1e4 ** (-torch.arange(3, dtype=torch.float64) / 3)
    expected = z * torch.exp(1j * places[:, None, :, None] * frequency)
    torch.testing.assert_close(
        torch.complex(together[..., :3], together[..., 3:6]).to(z.dtype), expected, rtol=1e-4, atol=1e-5
    )


def test_grouped_heads_are_whole_heads_with_repeated_keys() -> None:
    grouped = MODEL.blocks[0]
    whole = model_of(TinyConfig(**{**vars(CONFIG), "kv_heads": 6})).blocks[0]
    state = grouped.state_dict()
    q, k, v = state["query_key_value.weight"].unflatten(0, (-1, 4)).split([6, 2, 2])
    repeated = torch.cat([q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)]).flatten(0, 1)
    whole.load_state_dict({**state, "query_key_value.weight": repeated})
    x, angles = torch.randn(2, 5, 24), rotary_angles(torch.arange(5).expand(2, -1), 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(whole(x, angles, mask)[0], grouped(x, angles, mask)[0], rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_and_another_size_are_refused() -> None:
    x, places, mask = torch.randn(2, 3, 24), torch.arange(3).expand(2, -1), torch.ones(2, 3, 3, dtype=torch.bool)
    empty = mask.clone()
    empty[1, 2] = False
    with pytest.raises(DataError, match="something to see in every row"):
        MODEL.run(x, places, empty)
    _, cache = MODEL.run(x, places, mask)
    with pytest.raises(DataError, match=r"\[2, 3, 3\] for \[2, 3\] positions after 3 cached"):
        MODEL.run(x, places, mask, cache)


# -- images -------------------------------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_of_every_view() -> None:
    model = model_of()
    prefix = model.prefix(TEXTS, images_of(3))
    _, cache = model.run(prefix.embeds, prefix.positions, prefix.mask())
    own = torch.ones(3, 1, prefix.real.shape[1] + 1, dtype=torch.bool)
    own[:, 0, :-1] = prefix.real
    begin = torch.full((3, 1), model.text_size)
    further, _ = model.run(model.embed(begin), prefix.next_position[:, None], own, cache)
    model.logits(further).logsumexp(-1).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    assert (model.stem.view.grad.abs().sum(-1) > 0).all()
    assert (model.stem.place.grad.abs().sum(-1) > 0).all()


def test_each_token_of_an_image_is_its_view_and_place() -> None:
    assert CONFIG.places == 4
    prefix = MODEL.prefix(TEXTS[:1], images_of(1))
    assert prefix.embeds.shape[1] == 2 * 4 + len(MODEL.text_ids(TEXTS[:1])[0])
    torch.testing.assert_close(prefix.embeds[:, 8:], MODEL.embed(torch.tensor(MODEL.text_ids(TEXTS[:1]))))
    front, wrist = images_of(1)
    other = MODEL.prefix(TEXTS[:1], [front, 255 - wrist])
    assert torch.equal(other.embeds[:, :4], prefix.embeds[:, :4])
    assert (other.embeds[:, 4:8] - prefix.embeds[:, 4:8]).abs().amax(-1).min() > 1e-3
    swapped = MODEL.prefix(TEXTS[:1], [wrist, front]).embeds
    difference = MODEL.stem.view[1] - MODEL.stem.view[0]
    torch.testing.assert_close(swapped[:, 4:8] - difference, prefix.embeds[:, :4], rtol=1e-5, atol=1e-5)


def test_images_of_another_size_are_resized() -> None:
    small = images_of(2)
    large = [image.repeat(3, axis=1).repeat(5, axis=2) for image in small]  # 96 x 160
    want, found = (MODEL._pixels(images, 2) for images in (small, large))
    assert found.shape == want.shape == (2, 2, 32, 32, 3)
    difference = (want.int() - found.int()).abs().float()
    assert difference.mean() < 30
    assert float(np.abs(small[0] - 127.5).mean()) > 60
    flat = [np.full((2, 19, 23, 3), 77, np.uint8)]
    assert MODEL._pixels(flat, 2).unique().tolist() == [77]


def test_other_images_are_refused() -> None:
    front, wrist = images_of(2)
    for bad in ([front[:1]], [front.astype(np.float32)], [front[..., :1]], [front[0]]):
        with pytest.raises(DataError, match=r"uint8 \[2, height, width, 3\]"):
            MODEL.prefix(TEXTS[:2], bad)
    with pytest.raises(DataError, match="3 views were given, actok-vla-tiny looks through 2"):
        MODEL.prefix(TEXTS[:2], [front, wrist, front])
    with pytest.raises(DataError, match="prompt 1 has neither text nor images"):
        MODEL.prefix(["open", ""], [])
    assert MODEL.prefix(["open", ""], [front]).next_position.tolist() == [4 + len(MODEL.text_ids(["open"])[0]), 4]


# -- text ---------------------------------------------------------------------------------------------------------


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    (ids,) = MODEL.text_ids([text])
    assert MODEL.text_of(ids) == text
    assert all(0 <= i < MODEL.text_size for i in ids)
    assert not set(ids) & set(MODEL.special_ids.values())


@pytest.mark.parametrize("text", ["<pad>", "<end>", " pad", "pad end", "\u0120", "a\r\n\t b", "", " " * 7, "\0"])
def test_text_that_looks_like_a_mark_is_text(text: str) -> None:
    (ids,) = MODEL.text_ids([text])
    assert MODEL.text_of(ids) == text
    assert not set(ids) & set(MODEL.special_ids.values())


def test_every_number_is_one_token_wherever_it_stands() -> None:
    single = [MODEL.text_ids([f" {n}"])[0] for n in range(NUMBERS)]
    assert all(len(ids) == 1 for ids in single)
    assert len({ids[0] for ids in single}) == NUMBERS
    state = MODEL.text_ids(["Task: open the drawer, State:", *(f" {n}" for n in (7, 255, 0)), ";"])
    assert MODEL.text_ids(["Task: open the drawer, State: 7 255 0;"]) == [[i for ids in state for i in ids]]
    assert len(MODEL.text_ids([" 256"])[0]) > 1


def test_words_of_the_texts_are_one_token() -> None:
    for word in (" open", " drawer", " block", " Knopf", " State", "Task"):
        assert len(MODEL.text_ids([word])[0]) == 1
    assert len(MODEL.text_ids([" unheard"])[0]) > 1


def test_the_text_tokenizer_is_a_function_of_the_set_of_texts() -> None:
    again = fit_text(iter([*reversed(TEXTS), TEXTS[1]]), CONFIG.text_vocab)
    assert again.to_str() == MODEL._text.to_str()
    many = [f"{a}{b}{c}" for a in "klmn" for b in "aeiou" for c in "rstvwxyz"]
    assert fit_text(many, 600).get_vocab_size() == 600 - 2
    assert fit_text([], 600).get_vocab_size() == 256 + NUMBERS


def test_near_numbers_begin_near() -> None:
    rows = MODEL.embed(torch.tensor(MODEL.text_ids([f" {n}" for n in range(NUMBERS)])))[:, 0].detach()
    torch.testing.assert_close(rows, number_rows(24), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(NUMBERS), rtol=1e-5, atol=1e-5)
    distance = torch.cdist(rows, rows)
    for gap in (1, 2, 5, 11):  # of the difference alone
        torch.testing.assert_close(distance.diagonal(gap), distance[0, gap].expand(NUMBERS - gap), rtol=1e-3, atol=1e-3)
    assert distance[0, 1] < distance[0, 4] < distance[0, 16] < distance[0, 64] < distance[0, 255]
    assert (distance + 99 * torch.eye(NUMBERS)).argmin(1).sub(torch.arange(NUMBERS)).abs().max() == 1


def test_special_ids_say_nothing_and_codes_are_no_text() -> None:
    pad, end = MODEL.special_ids["pad"], MODEL.special_ids["end"]
    assert (pad, end) == (MODEL.text_size - 2, MODEL.text_size - 1)
    assert MODEL.text_of([*MODEL.text_ids(["open"])[0], end, pad]) == "open"
    with pytest.raises(TokenError, match=f"id {MODEL.text_size} is no text"):
        MODEL.text_of([0, MODEL.text_size])


def test_ids_are_remembered_and_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actok.policies.tiny.REMEMBERED", 3)
    model = model_of()
    for text in ("a", "b", "c", "a", "d"):
        model.text_ids([text])[0].append(-1)
    assert list(model._known) == ["c", "a", "d"]
    assert model.text_ids(["a"]) == MODEL.text_ids(["a"])


# -- rows and twins -----------------------------------------------------------------------------------------------


def test_resize_keeps_old_rows_and_their_logits() -> None:
    model, hidden = model_of(), torch.randn(2, 3, 24)
    before, old = model.logits(hidden).detach(), model.table.detach().clone()
    model.resize(model.vocab_size - 5)
    assert model.vocab_size == len(old)
    model.resize(len(old) + 1009)
    assert model.vocab_size == len(old) + 1009
    assert model.text_size < len(old)
    assert torch.equal(model.table[: len(old)], old)
    torch.testing.assert_close(model.logits(hidden)[..., : len(old)], before)
    new = model.table[len(old) :]
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(new.std(0), old.std(0), atol=0, rtol=0.1)


def test_the_twin_is_equal() -> None:
    spec = json.loads(json.dumps(MODEL.spec()))
    twin = TinyVLM.from_spec(spec, dict(MODEL.files())).eval()
    twin.load_state_dict(MODEL.state_dict())
    assert twin.spec() == MODEL.spec()
    assert twin.files() == MODEL.files()
    for model in (twin, copy.deepcopy(MODEL)):
        prefix = model.prefix(TEXTS, images_of(3))
        hidden, _ = model.run(prefix.embeds, prefix.positions, prefix.mask())
        other = MODEL.prefix(TEXTS, images_of(3))
        assert torch.equal(
            model.logits(hidden), MODEL.logits(MODEL.run(other.embeds, other.positions, other.mask())[0])
        )


def test_a_description_that_is_not_whole_is_refused() -> None:
    spec, files = dict(MODEL.spec()), dict(MODEL.files())
    for bad, its_files, match in (
        (spec, {}, "no 'tokenizer.json'"),
        ({**spec, "kind": "paligemma"}, files, "of kind 'paligemma'"),
        ({**spec, "config": {"size": 3}}, files, "no setting 'size'"),
        (spec, {"tokenizer.json": files["tokenizer.json"][:-9]}, "truncated or edited"),
        (
            spec,
            {"tokenizer.json": files["tokenizer.json"].replace("\u012099".encode(), b"x")},
            "no token",
        ),
        ({k: v for k, v in spec.items() if k != "rows"}, files, "no 'rows'"),
    ):
        with pytest.raises(ArtifactError, match=match):
            TinyVLM.from_spec(bad, its_files)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"width": 130}, "multiple of 8"),
        ({"kv_heads": 3}, "divisor of the 4 heads"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": True}, "layers is True"),
        ({"image_size": 60}, "multiple of 16"),
        ({"image_channels": ()}, "at least one convolution"),
        ({"image_channels": (8, 0)}, "image_channels is 0"),
        ({"text_vocab": 500}, "at least 514"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TinyConfig(**values)


def test_a_cache_is_read_and_never_written() -> None:
    x, places = torch.randn(2, 3, 24), torch.arange(3).expand(2, -1)
    _, cache = MODEL.run(x, places, torch.ones(2, 3, 3, dtype=torch.bool))
    kept = KVCache(keys=tuple(k.clone() for k in cache.keys), values=tuple(v.clone() for v in cache.values))
    MODEL.run(x[:, :2], places[:, :2] + 3, torch.ones(2, 2, 5, dtype=torch.bool), cache)
    for one, other in zip((*cache.keys, *cache.values), (*kept.keys, *kept.values), strict=True):
        assert torch.equal(one, other)
