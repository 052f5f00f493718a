"""Semantic objectives: what each counts, what its gradient reaches, and equality with plain implementations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actok.alignment import masking
from actok.alignment.contrast import Contrast, identities, info_nce
from actok.alignment.features import FeatureBatch
from actok.alignment.masking import MaskedCodes, choose, corruption, masked_actions
from actok.alignment.objectives import AlignmentConfig, SemanticHeads
from actok.alignment.prediction import NextFeature
from actok.alignment.slots import pooled, real_slots, standardised
from actok.core import (
    ActionSpace,
    CodecBatch,
    CodecOutput,
    ConfigError,
    FitPart,
    build_config,
    find_preset,
    list_tokenizers,
)
from actok.core.registry import load_target
from actok.quantizers import make_quantizer

B, S, C, K, D, W, FEATURE = 11, 7, 5, 13, 3, 32, 17
STEP = 4  # steps of a slot
T = S * STEP - 1  # the last slot is shorter
SPANS = np.minimum(np.arange(S)[:, None] * STEP + [0, STEP], T)
RESIDUAL = {"kind": "residual", "levels": 3, "codes": K, "kmeans_steps": 2}
QUANTIZERS = {
    "residual": RESIDUAL,
    "residual by gradient": {**RESIDUAL, "update": "gradient"},
    "grouped": {"kind": "grouped", "widths": [2, 3], "inner": {"kind": "vq", "codes": K}},
    "fsq": {"kind": "fsq", "levels": [4, 3, 5]},
    "lfq": {"kind": "lfq", "bits": 3},
    "multi-scale": {"kind": "multi_scale", "scales": [1, 3, S], "codes": K},
}


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Linear(nn.Module):
    """A codec of one linear map a slot each way; slots stand for 4 steps, the last for 3."""

    def __init__(self, settings=RESIDUAL, timed=True):
        super().__init__()
        self.timed = timed
        self.encoder, self.decoder = nn.Linear(STEP * D, C), nn.Linear(C, STEP * D)
        self.quantizer = make_quantizer(settings, C)
        self.seen = []

    def slot_steps(self, steps):
        return np.minimum(np.arange(-(-steps // STEP))[:, None] * STEP + [0, STEP], steps) if self.timed else None

    def forward(self, batch):
        self.seen.append(batch)
        x = F.pad(batch.actions, (0, 0, 0, -batch.actions.shape[1] % STEP))
        latents = self.encoder(x.unflatten(1, (-1, STEP)).flatten(2))
        found = self.quantizer(latents)
        decoded = self.decoder(found.quantised).unflatten(2, (STEP, D)).flatten(1, 2)[:, : batch.actions.shape[1]]
        return CodecOutput(
            latents=latents,
            quantised=found.quantised,
            level_vectors=found.level_vectors,
            codes=found.codes,
            reconstruction=decoded,
            losses=found.losses,
        )


def chunks(count=B, steps=T, lengths=None):
    real = torch.ones(count, steps, dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(steps) < torch.tensor(lengths)[:, None]
    return CodecBatch(
        actions=torch.randn(count, steps, D),
        present=torch.ones(count, D, dtype=torch.bool),
        real=real,
        embodiment=torch.ones(count, dtype=torch.long),
    )


def features(count=B, slots=S, width=FEATURE, **changes):
    values = {
        "whole": torch.randn(count, width),
        "slots": torch.randn(count, slots, width) if slots else None,
        "slot_known": torch.ones(count, slots, dtype=torch.bool) if slots else None,
        "varies": torch.ones(count, dtype=torch.bool),
        "group": torch.arange(count),
        "next": torch.randn(count, width),
        "has_next": torch.ones(count, dtype=torch.bool),
    }
    return FeatureBatch(**{**values, **changes})


def heads_for(codec, feature_dim=FEATURE, **settings):
    config = AlignmentConfig(**{"width": W, **settings})
    return SemanticHeads(config, dim=codec.quantizer.dim, sizes=codec.quantizer.sizes, feature_dim=feature_dim)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("masking", -0.1),
        ("contrast", float("nan")),
        ("prediction", True),
        ("masking_share", 0.0),
        ("masking_share", 1.0),
        ("masking_after", 1.0),
        ("masking_depth", 0),
        ("masking_target", "tokens"),
        ("temperature", 0),
        ("width", 48),
        ("width", "128"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value!r}; (give|choose) "):
        AlignmentConfig(**{name: value})


def test_published_weights_and_what_needs_a_teacher():
    published = AlignmentConfig()
    assert (published.masking, published.contrast, published.prediction) == (0.1, 0.5, 0.2)
    assert (published.masking_share, published.temperature, published.masking_depth) == (0.15, 0.1, 2)
    assert AlignmentConfig(contrast=0).needs_teacher
    assert AlignmentConfig(prediction=0).needs_teacher
    assert not AlignmentConfig(contrast=0, prediction=0).needs_teacher


# -- slots ----------------------------------------------------------------------------------------------------------------


def test_a_slot_is_real_where_any_of_its_steps_is():
    batch = chunks(lengths=[T, 0, 1, 4, 5, 8, 9, 12, 23, 24, 25])
    found = real_slots(batch.real, torch.from_numpy(SPANS))
    for row, spans in zip(batch.real, found, strict=True):
        assert spans.tolist() == [bool(row[a:b].any()) for a, b in SPANS]


def test_pooling_takes_real_slots_only():
    x, real = torch.randn(B, S, C), torch.rand(B, S) < 0.5
    real[3] = False
    for row, kept, mean in zip(x, real, pooled(x, real), strict=True):
        torch.testing.assert_close(mean, row[kept].mean(0) if kept.any() else torch.zeros(C))


# -- masked action modelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_of_n_slots_a_share_is_chosen_at_least_one_and_never_all(share):
    slots, rows = 16, 3000
    for real_count in (2, 3, 5, 7, 11, 16):
        real = torch.zeros(rows, slots, dtype=torch.bool)
        real[:, torch.randperm(slots)[:real_count]] = True
        chosen = choose(real, share)
        counts = chosen.sum(1)
        assert not (chosen & ~real).any()
        assert counts.min() >= 1
        assert counts.max() <= real_count - 1
        expected = max(1.0, min(real_count - 1.0, share * real_count))
        assert abs(counts.float().mean().item() - expected) < 0.04
        frequency = chosen[:, real[0]].float().mean(0)  # no place is preferred
        assert (frequency - expected / real_count).abs().max() < 5 * (0.25 / rows) ** 0.5
    assert not choose(
        torch.eye(B, S, dtype=torch.bool), share
    ).any()  # one real slot, or none, leaves nothing to tell from


def test_eight_tenths_are_masked_one_swapped_one_kept():
    what = corruption(torch.ones(6000, S, dtype=torch.bool), 0.3)
    chosen = what.chosen.sum().item()
    assert not (what.masked & what.swapped).any()
    assert not ((what.masked | what.swapped) & ~what.chosen).any()
    for found, share in ((what.masked, 0.8), (what.swapped, 0.1)):
        assert abs(found.sum().item() / chosen - share) < 4 * (share * (1 - share) / chosen) ** 0.5


def test_swapped_slots_hold_codes_of_the_batch_and_the_others_their_own():
    vectors, real = torch.randn(211, S, C, requires_grad=True), torch.rand(211, S) < 0.7
    what = corruption(real, 0.6)
    found = masking._swapped(vectors, what, real)
    assert torch.equal(found[~what.swapped], vectors[~what.swapped])
    rows = {tuple(v.tolist()) for v in vectors[real]}
    swapped = [tuple(v.tolist()) for v in found[what.swapped]]
    assert len(swapped) > 3
    assert set(swapped) <= rows
    (gradient,) = torch.autograd.grad(found.sum(), vectors)
    assert torch.equal(gradient, (~what.swapped).float()[:, :, None].expand_as(vectors))


def test_what_is_masked_does_not_leak_and_padding_is_not_read(monkeypatch):
    monkeypatch.setattr(masking, "MASKED", 1.1)  # all that are chosen
    seen = []
    monkeypatch.setattr(masking, "corruption", lambda *a: seen.append(corruption(*a)) or seen[-1])
    model = MaskedCodes(C, K, width=W, depth=2, share=0.4)
    vectors = torch.randn(B, S, C, requires_grad=True)
    real = torch.arange(S) < torch.tensor([7, 7, 6, 5, 5, 4, 3, 2, 2, 1, 0])[:, None]
    codes = torch.randint(K, (B, S))
    loss = model(vectors, codes, real)
    (gradient,) = torch.autograd.grad(loss, vectors)
    chosen = seen[0].chosen
    told = chosen.any(1)
    assert told.tolist() == [True] * 9 + [False] * 2
    reached = gradient.abs().sum(-1) > 0
    assert torch.equal(reached, told[:, None] & real & ~chosen)  # all that is visible, and nothing else


def test_the_loss_is_the_cross_entropy_at_the_chosen_slots(monkeypatch):
    seen = []
    monkeypatch.setattr(masking, "corruption", lambda *a: seen.append(corruption(*a)) or seen[-1])
    model = MaskedCodes(C, K, width=W, depth=1, share=0.3)
    nn.init.zeros_(model.leave.weight)  # the same scores everywhere
    nn.init.normal_(model.leave.bias)
    real = torch.rand(B, S) < 0.8
    codes = torch.randint(K, (B, S))
    loss = model(torch.randn(B, S, C), codes, real)
    expected = -model.leave.bias.log_softmax(0)[codes[seen[0].chosen]].mean()
    torch.testing.assert_close(loss, expected)


def test_codes_that_tell_each_other_are_learned():
    table = torch.randn(K, C)
    model = MaskedCodes(C, K, width=W, depth=2, share=0.15)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        codes = (torch.randint(K, (61, 1)) + 2 * torch.arange(S)) % K  # each follows from any other and the positions
        loss = model(table[codes], codes, torch.ones_like(codes, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 * math.log(K)
    assert np.mean(losses[-20:]) < 0.35 * math.log(K)


@pytest.mark.parametrize("settings", QUANTIZERS.values(), ids=QUANTIZERS)
def test_masking_reaches_the_encoder_by_level_0_and_no_codebook(settings):
    codec = Linear(settings)
    heads = heads_for(codec, None, contrast=0, prediction=0)
    batch = chunks(lengths=[T, T, T, T, 9, 8, 5, 4, 3, 1, T])
    output = codec(batch)
    loss = heads(output, batch, None, codec)["masking"]
    encoder = gradients(loss, codec.encoder.parameters())
    assert all(g is not None and g.abs().max() > 1e-6 for g in encoder)
    assert all(g is None for g in gradients(loss, codec.decoder.parameters()))
    books = [p for name, p in codec.quantizer.named_parameters() if "codebook" in name]
    assert all(g is None or not g.any() for g in gradients(loss, books)) if books else True
    (levels,) = torch.autograd.grad(loss, output.level_vectors)
    assert levels[:, :, 0].any()
    assert not levels[:, :, 1:].any()


@pytest.mark.parametrize("preset", ["fastervq-tiny", "oat-tiny", "carp-tiny", "xtokenizer-tiny"])
@pytest.mark.parametrize("target", ["codes", "actions"])
def test_every_objective_reaches_the_encoder_of_published_codecs(preset, target):
    if preset not in list_tokenizers():
        pytest.skip(f"{preset} is not among the presets")
    found = find_preset(preset)
    tokenizer_class = load_target(found.target)
    config = build_config(tokenizer_class.config_class, found.settings, preset)
    raw = np.random.default_rng(0).normal(size=(B, 19, 7)).cumsum(1).astype(np.float32)
    tokenizer = tokenizer_class.prepare([FitPart(actions=raw, space=ActionSpace.raw(7, "arm"))], config)
    codec = tokenizer.codec.train().requires_grad_(True)
    batch = tokenizer.batch(tokenizer.normalise(raw))
    heads = heads_for(codec, masking_target=target)
    output = codec(batch)
    spans = codec.slot_steps(19)
    teacher = features(slots=None if spans is None else len(spans))
    losses = heads(output, batch, teacher, codec)
    assert tuple(losses) == heads.names == ("masking", "contrast", "prediction")
    (latents,) = torch.autograd.grad(sum(losses.values()), output.latents, retain_graph=True)
    assert latents.abs().sum() > 0
    for name, loss in losses.items():
        reached = [g for g in gradients(loss, codec.parameters()) if g is not None]
        assert sum(float(g.abs().sum()) for g in reached) > 0, name
        assert all(g.isfinite().all() for g in reached), name


# -- masked actions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [True, False])
def test_whole_spans_of_actions_are_hidden_and_only_they_count(timed):
    codec = Linear(timed=timed)
    lengths = [T, T, T, T, 26, 23, 19, 14, 9, 5, 3]
    batch = chunks(lengths=lengths)
    batch = replace(batch, actions=torch.where(batch.real[:, :, None], 2.0, 1000.0).expand(-1, -1, D).clone())
    batch.present[:, 1] = False
    batch.actions[:, :, 1] = -1000.0
    nn.init.zeros_(codec.decoder.weight)
    nn.init.constant_(codec.decoder.bias, 5.0)
    spans = torch.from_numpy(SPANS)  # the same as without: both are of 4 steps
    loss = masked_actions(batch, spans if timed else None, codec, 0.3)
    assert loss.item() == 3.0  # |5 - 2| at every hidden step, neither padding nor absent channels
    hidden = codec.seen[-1].actions[:, :, 0] == 0
    assert not (hidden & ~batch.real).any()
    for row, real, length in zip(hidden, batch.real, lengths, strict=True):
        by_slot = [(row[a:b] == real[a:b]).all() and row[a] for a, b in SPANS]
        assert row.sum() == sum(int(real[a:b].sum()) for (a, b), h in zip(SPANS, by_slot, strict=True) if h)
        real_count = -(-length // STEP)
        assert (1 if real_count > 1 else 0) <= sum(map(bool, by_slot)) <= max(0, real_count - 1)


def test_masked_actions_teach_the_codec_but_no_codebook_a_second_time():
    codec = Linear({**RESIDUAL, "dropout": 0.5})
    heads = heads_for(codec, None, contrast=0, prediction=0, masking_target="actions")
    batch = chunks()
    output = codec(batch)
    before = {k: v.clone() for k, v in codec.quantizer.state_dict().items()}
    loss = heads(output, batch, None, codec)["masking"]
    assert all(torch.equal(before[k], v) for k, v in codec.quantizer.state_dict().items())
    assert all(m.training for m in codec.modules())
    # (Not the weight of this encoder: it sees a slot at a time, and nothing of a hidden one.)
    reached = gradients(loss, [codec.encoder.bias, *codec.decoder.parameters()])
    assert all(g is not None and g.any() for g in reached)
    heads.masking_on = False
    calls = len(codec.seen)
    assert heads(output, batch, None, codec)["masking"].item() == 0
    assert len(codec.seen) == calls


# -- contrast -------------------------------------------------------------------------------------------------------------


def pairs(count=B, width=C):
    return (F.normalize(torch.randn(count, width), dim=1).requires_grad_() for _ in range(2))


def test_info_nce_is_cross_entropy_where_no_features_are_equal():
    a, f = pairs()
    logits = a @ f.T / 0.1
    expected = (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2
    torch.testing.assert_close(info_nce(a, f, torch.randperm(B) * 7, 0.1), expected)


def test_info_nce_is_a_plain_loop_over_positives():
    a, f = (x.detach().double() for x in pairs())
    group = torch.tensor([5, 3, 5, 8, 3, 5, 1, 2, 9, 9, 4])
    total = 0.0
    for i in range(B):
        positives = [j for j in range(B) if group[j] == group[i]]
        for own, every in ((a[i], f), (f[i], a)):
            scores = [math.exp(float(own @ every[j]) / 0.3) for j in range(B)]
            against = sum(scores[j] for j in range(B) if j not in positives)
            total -= sum(math.log(scores[j] / (scores[j] + against)) for j in positives) / len(positives) / (2 * B)
    assert info_nce(a.float(), f.float(), group, 0.3).item() == pytest.approx(total, rel=1e-5)


def test_positives_do_not_push_one_another_away():
    group = torch.tensor([0, 0, 0, 1, 2])
    features = torch.eye(5)[group]
    actions = F.normalize(features + 0.3 * torch.randn(5, 5), dim=1).requires_grad_()
    assert info_nce(features, features, group, 0.01).item() < 1e-6  # no cost of having several positives
    assert info_nce(features, features, torch.arange(5), 0.01).item() > 0.5
    together = info_nce(actions, features, torch.zeros(5, dtype=torch.long), 0.1)
    assert together.item() == 0
    assert not torch.autograd.grad(together, actions)[0].any()  # there is nothing to tell apart
    (pull,) = torch.autograd.grad(info_nce(actions, features, group, 0.5), actions)
    assert ((-pull * features).sum(1) > 0).all()  # each towards its own features, the best fitting ones too


def test_nothing_to_contrast_is_zero_with_a_gradient():
    a, f = (torch.zeros(0, C, requires_grad=True) for _ in range(2))
    loss = info_nce(a, f, torch.zeros(0, dtype=torch.long), 0.1)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, a)[0].shape == (0, C)


def test_identities_are_those_of_equal_features():
    base = torch.randn(211, FEATURE)
    assert len(identities(base).unique()) == 211
    order = torch.randint(211, (503,))
    assert torch.equal(identities(base[order]), identities(base)[order])
    zero = torch.zeros(2, FEATURE)
    zero[1] = -0.0
    assert identities(zero).unique().numel() == 1
    one = base[:1].half().float()
    thirds = torch.stack([one, one, one]).mean(0)
    assert torch.equal(identities(one), identities(thirds))
    swapped = base[:, torch.tensor([1, 0, *range(2, FEATURE)])]
    assert not (identities(swapped) == identities(base)).any()


def contrast():
    return Contrast(C, FEATURE, width=W, temperature=0.1)


def terms(model, latents, teacher, counts):
    """Global and local loss from their definitions."""
    unit = (
        F.normalize(model.whole_action(latents.mean(1)), dim=1),
        F.normalize(model.whole_feature(standardised(teacher.whole)), dim=1),
    )
    whole = info_nce(*unit, teacher.group, 0.1)
    rows, means = latents[counts], teacher.slots[counts]
    _, same = torch.unique(means, dim=0, return_inverse=True)
    unit = F.normalize(model.slot_action(rows), dim=1), F.normalize(model.slot_feature(standardised(means)), dim=1)
    return whole, info_nce(*unit, same, 0.1)


def test_the_average_of_global_and_local_where_all_features_vary():
    model, latents, teacher = contrast(), torch.randn(B, S, C), features()
    everywhere = torch.ones(B, S, dtype=torch.bool)
    teacher.slots[:, 1] = teacher.slots[:, 0]  # the same within a chunk
    teacher.slots[2, 4] = teacher.slots[6, 5]  # and between two
    whole, local = terms(model, latents, teacher, everywhere)
    torch.testing.assert_close(model(latents, everywhere, teacher), (whole + local) / 2)


def test_chunks_whose_features_do_not_vary_have_no_local_term():
    model, latents = contrast(), torch.randn(B, S, C)
    everywhere = torch.ones(B, S, dtype=torch.bool)
    teacher = features(varies=torch.arange(B) < 3)
    whole, local = terms(model, latents, teacher, teacher.varies[:, None].expand(B, S))
    torch.testing.assert_close(model(latents, everywhere, teacher), (whole + 3 / B * local) / (1 + 3 / B))
    for none in (
        replace(teacher, varies=torch.zeros(B, dtype=torch.bool)),
        replace(teacher, slots=None, slot_known=None),
    ):
        loss = model(latents, everywhere, none)
        torch.testing.assert_close(loss, whole)
        for name, gradient in zip(dict(model.named_parameters()), gradients(loss, model.parameters()), strict=True):
            assert gradient is not None, name  # data-parallel training needs all
            assert bool(gradient.any()) == name.startswith("whole"), name


def test_padded_slots_are_neither_pooled_nor_contrasted():
    model, latents, teacher = contrast(), torch.randn(B, S, C), features()
    real = torch.arange(S) < torch.randint(1, S, (B, 1))
    teacher = replace(teacher, slot_known=real)
    loss = model(latents, real, teacher)
    changed = torch.where(real[:, :, None], latents, 1e3)
    blank = replace(teacher, slots=torch.where(real[:, :, None], teacher.slots, -7.0))
    torch.testing.assert_close(model(changed, real, blank), loss)


# -- prediction -----------------------------------------------------------------------------------------------------------


def test_prediction_learns_a_linear_map_of_the_mean_of_real_slots():
    model = NextFeature(C, FEATURE, width=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    turn, offset = torch.randn(C, FEATURE), 20 * torch.randn(FEATURE)  # far from 0, standardising is nearly linear
    errors = []
    for _ in range(200):
        quantised, real = torch.randn(61, S, C), torch.arange(S) < torch.randint(1, S + 1, (61, 1))
        target = pooled(quantised, real) @ turn + offset
        quantised = torch.where(real[:, :, None], quantised, 50.0)
        loss = model(quantised, real, features(61, next=target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    wanted = standardised(target)
    constant = (wanted - wanted.median(0).values).abs().mean().item()
    assert np.mean(errors[-20:]) < 0.3 * constant


def test_prediction_counts_chunks_that_are_followed_by_a_frame():
    model, real = NextFeature(C, FEATURE, width=W), torch.ones(B, S, dtype=torch.bool)
    quantised, teacher = torch.randn(B, S, C, requires_grad=True), features(has_next=torch.arange(B) % 3 == 0)
    loss = model(quantised, real, teacher)
    rows = torch.arange(0, B, 3)
    found = model.outer(F.gelu(model.inner(quantised[rows].mean(1))))
    torch.testing.assert_close(loss, (found - standardised(teacher.next[rows])).abs().mean())
    (gradient,) = torch.autograd.grad(loss, quantised)
    assert torch.equal(gradient.flatten(1).any(1), teacher.has_next)
    # The same for a teacher of another scale and offset.
    other = replace(teacher, next=100 * teacher.next + 7)
    torch.testing.assert_close(model(quantised, real, other), loss, rtol=1e-4, atol=1e-5)


# -- all together ---------------------------------------------------------------------------------------------------------


def test_losses_are_weighted_and_follow_torchs_generator():
    codec, batch, teacher = Linear(), chunks(), features()
    output = codec(batch)
    heads = heads_for(codec)
    double = heads_for(codec, masking=0.2, contrast=1.0, prediction=0.4)
    double.load_state_dict(heads.state_dict())
    found = []
    for which in (heads, heads, double):
        torch.manual_seed(5)
        found.append(which(output, batch, teacher, codec))
    assert found[0] == found[1]
    for name in heads.names:
        torch.testing.assert_close(found[2][name], 2 * found[0][name])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"masking": 0}, ("contrast", "prediction")),
        ({"contrast": 0}, ("masking", "prediction")),
        ({"prediction": 0, "contrast": 0}, ("masking",)),
    ],
)
def test_an_objective_without_weight_is_not_there(settings, names):
    codec, batch = Linear(), chunks()
    heads = heads_for(codec, **settings)
    assert heads.names == names == tuple(heads(codec(batch), batch, features(), codec))


def test_where_nothing_counts_losses_are_zero_and_every_parameter_is_used():
    codec = Linear()
    heads = heads_for(codec)
    batch = chunks(lengths=[0] * B)
    nothing = torch.zeros(B, dtype=torch.bool)
    teacher = features(
        varies=nothing, has_next=nothing, slot_known=torch.zeros(B, S, dtype=torch.bool), group=torch.zeros(B).long()
    )
    output = codec(batch)
    losses = heads(output, batch, teacher, codec)
    assert losses["masking"].item() == losses["prediction"].item() == 0
    for on in (True, False):
        heads.masking_on = on
        total = sum(heads(output, batch, teacher, codec).values())
        found = gradients(total, heads.parameters())
        assert all(g is not None and g.isfinite().all() for g in found)
        masked = gradients(total, heads.masked_codes.parameters())
        assert not any(g.any() for g in masked)


def test_masking_starts_when_it_is_switched_on():
    codec, batch = Linear(), chunks()
    heads = heads_for(codec, None, contrast=0, prediction=0)
    output = codec(batch)
    heads.masking_on = False
    off = heads(output, batch, None, codec)["masking"]
    assert off.item() == 0
    assert off.requires_grad
    heads.masking_on = True
    assert heads(output, batch, None, codec)["masking"].item() > 0


def test_bfloat16_gives_the_losses_of_float32():
    codec, batch, teacher = Linear(), chunks(), features()
    heads = heads_for(codec)
    output = codec(batch)
    output = replace(output, losses={}, latents=output.latents.bfloat16().float())
    torch.manual_seed(3)
    plain = heads(output, batch, teacher, codec)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        low = heads(replace(output, latents=output.latents.bfloat16()), batch, teacher, codec)
    for name, loss in low.items():
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0.01)


def test_errors_name_what_is_missing():
    codec, batch = Linear(), chunks()
    with pytest.raises(ConfigError, match=r"contrast is 0\.5 and prediction 0\.2.*give features"):
        heads_for(codec, None)
    heads = heads_for(codec)
    output = codec(batch)
    with pytest.raises(ConfigError, match="no teacher's features"):
        heads(output, batch, None, codec)
    with pytest.raises(ConfigError, match="features are 19 wide, the objectives were made for 17"):
        heads(output, batch, features(width=19), codec)
    short = chunks(steps=STEP)
    alone = heads_for(codec, None, contrast=0, prediction=0)
    alone.masking_on = False  # told at the first step, not when masking begins
    with pytest.raises(ConfigError, match="one slot of a chunk"):
        alone(codec(short), short, None, codec)
