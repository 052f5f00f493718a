"""CARP and OmniSAT: order of tokens, masks, other embodiments, prefixes; splines, BPE and its constraint."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from actok.core import (
    ActionGroup,
    ActionSpace,
    ChunkContext,
    ConfigError,
    FitPart,
    SpaceMismatchError,
    TokenError,
    build_config,
    find_preset,
)
from actok.core.config import merge_settings
from actok.core.spaces import Kind
from actok.signal.bspline import control_points, curve
from actok.signal.statistics import Statistics

torch = pytest.importorskip("torch")

from actok.tokenizers import carp, omnisat, omnisat_codec  # noqa: E402
from actok.tokenizers.neural import join  # noqa: E402

T = 11
NAMES = ("carp", "omnisat")
CLASSES = {"carp": carp.CarpTokenizer, "omnisat": omnisat.OmniSatTokenizer}
SMALL = {
    "carp": {"width": 16, "depth": 1, "quantizer": {"codes": 13, "distance": "euclidean"}},
    "omnisat": {"width": 24, "depth": 1, "latent": 6, "vocab": 97, "quantizer": {"levels": 3, "codes": 19}},
}
SMALL["omnisat"]["gripper_quantizer"] = {"codes": 7}


def space(name: str, *groups: tuple[str, int]) -> ActionSpace:
    """Groups whose dimensions do not stand in order."""
    total = sum(width for _, width in groups)
    free = list(np.random.default_rng(total).permutation(total))
    made = []
    for i, (kind, width) in enumerate(groups):
        dims, free = tuple(int(d) for d in free[:width]), free[width:]
        rotation = "axis_angle" if kind == "rotation" else None
        made.append(ActionGroup(name=f"{kind}_{i}", kind=kind, dims=dims, rotation=rotation))
    return ActionSpace(embodiment=name, dim=total, groups=tuple(made))


ARM = space("arm", ("position", 3), ("rotation", 3), ("gripper", 1))
HAND = space("hand", ("joint", 2), ("hand", 11))  # 11 dimensions are two parts


def smooth(count: int, dim: int, seed: int = 1, horizon: int = T) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, horizon)[None, :, None]
    phase, rate = rng.uniform(size=(2, count, 1, dim))
    return np.sin(2 * np.pi * (rate * t + phase)).astype(np.float32)


def prepared(name: str, *spaces: ActionSpace, horizon: int = T, **settings):
    parts = [FitPart(actions=smooth(53, s.dim, i, horizon), space=s) for i, s in enumerate(spaces)]
    merged = merge_settings(merge_settings(find_preset(name).settings, SMALL[name]), settings)
    return CLASSES[name].prepare(parts, build_config(CLASSES[name].config_class, merged, name)), parts


def trained(name: str, *spaces: ActionSpace, steps: int = 12, **settings):
    """Codebooks that mean something; every other step the other embodiment."""
    tokenizer, parts = prepared(name, *spaces, **settings)
    codec = tokenizer.codec.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(codec.parameters(), 3e-3)
    for _ in range(steps):
        for part in parts:
            batch = tokenizer.batch(tokenizer.normalise(part.actions, context(part)), part.space.embodiment)
            optimiser.zero_grad()
            sum(codec(batch).losses.values()).backward()
            optimiser.step()
    return tokenizer.with_weights(codec.state_dict()), parts


def context(part: FitPart, **values) -> ChunkContext:
    return ChunkContext(embodiment=part.space.embodiment, **values)


@pytest.fixture(scope="module", params=NAMES)
def two(request):
    """A codec of each kind for two embodiments."""
    torch.manual_seed(0)
    return trained(request.param, ARM, HAND)


@pytest.fixture(scope="module")
def carp_one():
    torch.manual_seed(0)
    return trained("carp", ARM, steps=60)


@pytest.fixture(scope="module")
def omnisat_two():
    torch.manual_seed(0)
    tokenizer, parts = trained("omnisat", ARM, HAND)
    return tokenizer.finish(parts), parts


# -- both -------------------------------------------------------------------------------------------------------------


def mixed(tokenizer, other: np.ndarray | None = None):
    """Three chunks of a robot of 7 dimensions, whose 6 absent channels may be given any content, and two of 13."""
    first = tokenizer.batch(smooth(3, 7, 5), "arm")
    if other is not None:
        first.actions[:, :, 7:] = torch.from_numpy(other)
    return join([first, tokenizer.batch(smooth(2, 13, 6), "hand")])


def test_one_batch_of_two_embodiments_is_the_two_batches(two):
    tokenizer, _ = two
    codec, batch = tokenizer.codec, mixed(tokenizer)
    together = codec(batch)
    for rows, name, dim, seed in ((slice(0, 3), "arm", 7, 5), (slice(3, 5), "hand", 13, 6)):
        alone = codec(tokenizer.batch(smooth(len(range(5)[rows]), dim, seed), name))
        torch.testing.assert_close(together.latents[rows], alone.latents, rtol=1e-4, atol=1e-5)
        assert torch.equal(together.codes[rows], alone.codes)
        torch.testing.assert_close(together.reconstruction[rows], alone.reconstruction, rtol=1e-4, atol=1e-5)


def test_absent_channels_reach_neither_tokens_nor_losses(two):
    tokenizer, _ = two
    kept = tokenizer._kept(tokenizer.embodiment("arm"))
    codec, plain = tokenizer.codec, mixed(tokenizer)
    full = mixed(tokenizer, np.full((3, T, 6), 5.0, np.float32))
    assert kept.any()
    assert not kept.all()
    np.testing.assert_array_equal(codec.tokenize(plain)[:3, kept], codec.tokenize(full)[:3, kept])
    for name, value in codec(plain).losses.items():
        torch.testing.assert_close(codec(full).losses[name], value, rtol=1e-5, atol=1e-7)
    assert not codec(plain).reconstruction[:3, :, 7:].any()


def test_padded_steps_reach_no_loss_of_reconstruction(two):
    tokenizer, _ = two
    codec, x = tokenizer.codec, smooth(5, 7, 7)
    real = np.ones((5, T), bool)
    real[:, 8:] = False
    batch = tokenizer.batch(x, "arm", real=real)
    expected = (codec(batch).reconstruction - batch.actions)[:, :8, :7].abs().mean()
    torch.testing.assert_close(codec(batch).losses["l1"], expected)


def test_absent_parts_move_no_codebook(two):
    """Training on a robot without grippers leaves the gripper's networks and codes alone."""
    tokenizer, _ = two
    codec = type(tokenizer)(tokenizer.config, tokenizer._embodiments, T, tokenizer._tensors, tokenizer._files).codec
    codec.train().requires_grad_(True)
    x = smooth(17, 7, 8)
    present = np.zeros((17, 7), bool)
    present[:, list(ARM.groups[0].dims)] = True
    out = codec(tokenizer.batch(x, "arm", present=present))
    sum(out.losses.values()).backward()
    if isinstance(codec, omnisat_codec.OmniSatCodec):
        for name in ("rotation", "gripper"):
            for parameter in codec.encoders[name].parameters():
                assert not parameter.grad.any()
            for before, book in zip(
                tokenizer.codec.quantizer.parts[name].codebooks, codec.quantizer.parts[name].codebooks, strict=True
            ):
                torch.testing.assert_close(book.vectors, before.vectors, rtol=1e-4, atol=1e-5)
        assert codec.encoders["position"].enter.weight.grad.any()
    else:
        channels = codec.marks.weight.grad[: codec.channels].any(1)
        assert set(np.flatnonzero(channels)) == set(ARM.groups[0].dims)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "quantizer",
    [
        {},
        {"kind": "vq", "codes": 17},
        {"kind": "residual", "codes": 11, "levels": 3},
        {"kind": "fsq"},
        {"kind": "lfq"},
    ],
    ids=lambda q: q.get("kind", "own"),
)
def test_gradients_reach_every_parameter_with_any_quantizer(name, quantizer):
    own = {"quantizer": quantizer} if quantizer else {}
    if name == "omnisat" and quantizer:
        own |= {"gripper_quantizer": quantizer, "vocab": 8192}
    tokenizer, parts = prepared(name, ARM, **own)
    codec = tokenizer.codec.train().requires_grad_(True)
    batch = tokenizer.batch(tokenizer.normalise(parts[0].actions))
    for _ in range(2):  # the first step starts codebooks
        codec.zero_grad()
        out = codec(batch)
        sum(out.losses.values()).backward()
    without = [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    ids = tokenizer.encode(parts[0].actions).ids
    assert ids.shape == (53, tokenizer.layout.max_len)
    assert (ids < tokenizer.layout.vocab).all()
    codec.eval()
    torch.testing.assert_close(
        codec.detokenize(codec.tokenize(batch), batch), codec(batch).reconstruction, rtol=1e-4, atol=1e-5
    )


def test_saving_and_loading_keeps_codes_and_actions(two, tmp_path):
    tokenizer, parts = two
    if isinstance(tokenizer, omnisat.OmniSatTokenizer):
        tokenizer = tokenizer.finish(parts)
    again = type(tokenizer).from_pretrained(tokenizer.save_pretrained(tmp_path / "saved"))
    assert again.weights_hash == tokenizer.weights_hash
    for part in parts:
        tokens = tokenizer.encode(part.actions, context(part))
        np.testing.assert_array_equal(again.encode(part.actions, context(part)).flat, tokens.flat)
        np.testing.assert_array_equal(again.decode(tokens).actions, tokenizer.decode(tokens).actions)


def test_adapting_serves_a_narrower_robot_and_refuses_a_wider_one(two):
    tokenizer, _ = two
    small = space("small", ("position", 2), ("gripper", 1))
    actions = smooth(29, 3, 9)
    adapted = tokenizer.adapt(small, Statistics.from_array(actions))
    out = adapted.decode(adapted.encode(actions, ChunkContext(embodiment="small")))
    assert out.actions.shape == (29, T, 3)
    assert out.valid.all()
    wide = space("wide", ("position", 17))
    with pytest.raises(SpaceMismatchError, match="'wide' has"):
        tokenizer.adapt(wide, Statistics.from_array(smooth(29, 17, 9)))


# -- CARP -------------------------------------------------------------------------------------------------------------


def test_kinds_are_those_of_action_spaces():
    assert sorted(carp.KINDS) == sorted(get_args(Kind))


@pytest.mark.parametrize(
    ("latents", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 3, 4)), (5, (1, 3, 4, 5)), (13, (3, 7, 10, 13))],
)
def test_scales_grow_with_the_latents(latents, expected):
    assert carp.fit_scales((1, 2, 3, 4), latents) == expected


def test_scales_must_rise():
    with pytest.raises(ConfigError, match="scales are"):
        carp.CarpConfig(quantizer={"kind": "multi_scale", "scales": (1, 3, 3)})


def test_published_setting_has_ten_tokens_a_dimension_in_four_passes():
    tokenizer, _ = prepared("carp", ARM, horizon=16)
    layout = tokenizer.layout
    assert layout.max_len == 7 * 10
    assert [len(block) for block in layout.blocks] == [7, 14, 21, 28]
    assert layout.prefixes == (7, 21, 42, 70)


def test_tokens_run_scale_then_dimension_then_place(carp_one):
    tokenizer, parts = carp_one
    scales = carp.fit_scales((1, 2, 3, 4), 3)
    expected = [(k, place, d) for k, n in enumerate(scales) for d in range(7) for place in range(n)]
    assert [tuple(c) for c in tokenizer.layout.coords] == expected
    # And the ids stand there: what one dimension alone gives is found at the places of its own.
    codec, batch = tokenizer.codec, tokenizer.batch(tokenizer.normalise(parts[0].actions))
    ids = codec.tokenize(batch).numpy()
    latents = codec.encode(batch).unflatten(1, (7, 3))
    for d in (2, 5):
        own = codec.quantizer.encode(latents[:, d])[:, :, 0].numpy()
        np.testing.assert_array_equal(ids[:, tokenizer.layout.coords[:, 2] == d], own)


def test_another_code_moves_its_own_dimension_only(carp_one):
    tokenizer, parts = carp_one
    ids = tokenizer.encode(parts[0].actions[:5]).ids
    before = tokenizer.decode(ids).actions
    for n, (_, _, dim) in enumerate(tokenizer.layout.coords):
        changed = ids.copy()
        changed[:, n] = (changed[:, n] + 1) % 13
        moved = np.abs(tokenizer.decode(changed).actions - before).max((0, 1)) > 0
        assert not moved[np.arange(7) != dim].any()
        assert moved[dim]


def test_dimensions_do_not_mix(carp_one):
    tokenizer, parts = carp_one
    first = parts[0].actions[:5]
    second = first.copy()
    second[:, :, 4] *= -0.5
    a, b = tokenizer.encode(first).ids, tokenizer.encode(second).ids
    changed = set(tokenizer.layout.coords[(a != b).any(0), 2])
    assert changed == {4}


def test_every_scale_refines_what_the_coarser_ones_say(carp_one):
    tokenizer, _ = carp_one
    actions = smooth(101, 7, 12, horizon=2 * T + 3)
    ids = tokenizer.encode(actions).ids
    prefixes = tokenizer.layout_for(2 * T + 3).prefixes
    errors = [
        float(((tokenizer.decode(ids[:, :n], horizon=2 * T + 3).actions - actions) ** 2).mean()) for n in prefixes
    ]
    assert len(errors) == 3
    assert all(b < a for a, b in pairwise(errors)), errors
    short = tokenizer.decode(ids[:, : prefixes[0] + 1], horizon=2 * T + 3)
    assert not short.valid.any()


def test_a_prefix_is_the_same_whether_other_channels_exist_or_not():
    """A narrow embodiment's first scale fills only its own places among those of the codec's channels."""
    torch.manual_seed(0)
    tokenizer, parts = trained("carp", HAND, ARM, steps=5)
    layout = tokenizer.layout_for(T, "arm")
    assert layout.max_len == 7 * 6
    ids = tokenizer.encode(parts[1].actions[:3], context(parts[1])).ids
    out = tokenizer.decode(ids[:, : layout.prefixes[0]], context(parts[1]))
    assert out.valid.all()
    codec, batch = tokenizer.codec, tokenizer.batch(np.zeros((3, T, 7), np.float32), "arm")
    codes = torch.zeros(3, 13, dtype=torch.long)
    codes[:, :7] = torch.from_numpy(ids[:, :7])
    values = codec.quantizer.lookup(codes.flatten()[:, None, None]).unflatten(0, (3, 13)).flatten(1, 2)
    expected = codec.decode(values, batch)[:, :, :7].numpy()
    np.testing.assert_allclose(tokenizer.normalise(out.actions, context(parts[1])), expected, atol=1e-4)


# -- OmniSAT ----------------------------------------------------------------------------------------------------------


def test_parts_cover_every_dimension_once_and_wide_groups_are_cut():
    parts = omnisat_codec.parts_of(HAND, 6)
    assert sorted(len(p) for p in parts["position"]) == [2, 5, 6]
    assert not parts["rotation"]
    assert sorted(np.concatenate(parts["position"])) == list(range(13))
    arm = omnisat_codec.parts_of(ARM, 6)
    assert [tuple(arm[name][0]) for name in omnisat_codec.CLASSES] == [g.dims for g in ARM.groups]


def test_what_networks_see_and_give_are_the_splines_of_the_parts():
    """With networks that do nothing, decoding is spline interpolation, of degree 0 for grippers."""
    tokenizer, _ = prepared("omnisat", ARM, HAND, latent=48)
    codec = tokenizer.codec
    for which in (codec.encoders, codec.decoders):
        for name, network in which.items():
            size = 8 * codec.widths[name]
            which[name] = torch.nn.Linear(*((size, 48) if which is codec.encoders else (48, size)), bias=False)
            torch.nn.init.eye_(which[name].weight)
            assert network is not which[name]
    x = np.random.default_rng(3).normal(size=(5, T, 7)).astype(np.float32)
    batch = join([tokenizer.batch(x, "arm"), tokenizer.batch(smooth(2, 13), "hand")])
    with torch.no_grad():
        found = codec.decode(codec.encode(batch), batch)[:5, :, :7].numpy()
    for group in ARM.groups:
        degree, dims = 0 if group.kind == "gripper" else 4, list(group.dims)
        expected = curve(control_points(x[:, :, dims], 8, degree), T, degree)
        np.testing.assert_allclose(found[:, :, dims], expected, atol=1e-4)


def test_another_code_moves_its_own_part_only():
    torch.manual_seed(0)
    tokenizer, parts = trained("omnisat", ARM)
    ids = tokenizer.encode(parts[0].actions[:5]).ids
    layout = tokenizer.layout
    assert layout.total
    assert [tuple(c) for c in layout.coords] == [(q, 0, part) for part in range(3) for q in range(3)]
    assert layout.vocab.tolist() == [19] * 6 + [7] * 3
    before = tokenizer.decode(ids).actions
    for n, (_, _, part) in enumerate(layout.coords):
        changed = ids.copy()
        changed[:, n] = (changed[:, n] + 1) % layout.vocab[n]
        moved = np.abs(tokenizer.decode(changed).actions - before).max((0, 1)) > 0
        assert set(np.flatnonzero(moved)) <= set(ARM.groups[part].dims)
        assert moved.any()


@pytest.mark.parametrize("horizon", [T, 2 * T + 3])
def test_bpe_shortens_and_loses_nothing(omnisat_two, horizon):
    tokenizer, parts = omnisat_two
    plain = tokenizer.with_weights(tokenizer.codec.state_dict())
    assert plain.bpe is None
    for part in parts:
        actions = smooth(23, part.space.dim, 13, horizon)
        tokens, codes = tokenizer.encode(actions, context(part)), plain.encode(actions, context(part))
        assert tokens.lengths.sum() < codes.lengths.sum()
        layout = tokenizer.layout_for(horizon, part.space.embodiment)
        assert (tokens.lengths >= layout.min_len).all()
        np.testing.assert_array_equal(tokenizer.decode(tokens).actions, plain.decode(codes).actions)


def brute_force(tokenizer, sequence: list[int], horizon: int, embodiment: str) -> bool:
    """Whether the tokens spell a code of the right part at each place."""
    codes = super(omnisat.OmniSatTokenizer, tokenizer).layout_for(horizon, embodiment)
    atoms = [a for token in sequence for a in tokenizer.bpe.atoms[slice(*tokenizer.bpe.starts[token : token + 2])]]
    if len(atoms) != codes.max_len:
        return False
    sizes = tokenizer.codec.class_sizes
    for atom, table, vocab in zip(atoms, codes.table, codes.vocab, strict=True):
        first = sizes[: table // 3].sum()
        if not first <= atom - omnisat.FIRST_CHAR < first + vocab:
            return False
    return True


@pytest.mark.parametrize("name", ["arm", "hand"])
def test_the_constraint_admits_exactly_what_decodes(omnisat_two, name):
    tokenizer, _ = omnisat_two
    where, rng = ChunkContext(embodiment=name), np.random.default_rng(4)
    constraint = tokenizer.constraint(where)
    both = {True: 0, False: 0}
    for _ in range(150):
        state, sequence, lawful = constraint.start(), [], True
        while not constraint.done(state)[0]:
            allowed = constraint.allowed(state)[0]
            assert allowed.any()
            if rng.random() < 0.1:  # a slip
                token = int(rng.integers(constraint.vocab_size))
                if not allowed[token]:
                    lawful = False
                    with pytest.raises(TokenError, match=f"token {token} of sequence 0"):
                        constraint.advance(state, np.array([token]))
            else:
                token = int(rng.choice(np.flatnonzero(allowed)))
            sequence.append(token)
            if not lawful:
                rest = rng.choice(constraint.vocab_size, int(rng.integers(0, 7)))
                sequence += rest.tolist()
                break
            state = constraint.advance(state, np.array([token]))
        valid = bool(tokenizer.decode([sequence], where).valid[0])
        assert valid == brute_force(tokenizer, sequence, T, name)
        assert valid or not lawful
        both[valid] += 1
    assert min(both.values()) > 10, both


def test_a_code_of_another_part_is_named(omnisat_two):
    tokenizer, _ = omnisat_two
    symbols = np.zeros(9, np.int64)  # three position codes, where rotation and gripper codes belong
    out = tokenizer.decode([symbols.tolist()], ChunkContext(embodiment="arm"))
    assert not out.valid[0]
    assert np.isnan(out.actions).all()
    assert out.reasons == ["code 3 of 9 is symbol 0, outside 19..37 of its part"]
    assert tokenizer.decode([symbols[:4].tolist()], ChunkContext(embodiment="arm")).reasons == ["4 codes, expected 9"]


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ConfigError, match="codes alone take 45 symbols"):
        prepared("omnisat", ARM, vocab=44)
    with pytest.raises(ConfigError, match="different numbers of levels"):
        prepared("omnisat", ARM, gripper_quantizer={"levels": 2})
    with pytest.raises(ConfigError, match="'multi_scale', which spreads"):
        prepared("omnisat", ARM, quantizer={"kind": "multi_scale", "scales": (1,), "codes": 5})
    with pytest.raises(ConfigError, match=r"'position': 1, 'rotation': 1, 'gripper': 3"):
        prepared("omnisat", ARM, quantizer={"kind": "vq", "codes": 5})
    with pytest.raises(ConfigError, match="degree is 8"):
        omnisat.OmniSatConfig(degree=8)
    with pytest.raises(ConfigError, match="width is 9"):
        carp.CarpConfig(width=9)
