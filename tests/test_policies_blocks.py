"""Plans, inputs, masks and positions of block-wise decoding: nothing sees its own targets, and cached = uncached."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from actok.core import ConfigError, TokenError, TokenLayout
from actok.nn.transformer import Stack, block_causal_mask, rotate
from actok.policies.blocks import (
    DecodingPlan,
    additive_mask,
    attention_mask,
    block_inputs,
    jittered_positions,
    pass_mask,
    plan,
    positions,
    training_inputs,
)

torch.set_num_threads(1)
B, P, W, BOBLK = 2, 3, 16, 997


def layout_of(sizes: tuple[int, ...], prefixes: tuple[int, ...] = ()) -> TokenLayout:
    ends = list(itertools.accumulate([0, *sizes]))
    return TokenLayout(
        vocab=np.full(ends[-1], 11),
        table=np.zeros(ends[-1]),
        coords=np.zeros((ends[-1], 3)),
        blocks=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends)),
        prefixes=prefixes,
        min_len=ends[-1],
        max_len=ends[-1],
        total=True,
    )


SIZES = {
    "token-wise": (1,) * 7,
    "equal": (3, 3, 3),
    "ragged": (5, 5, 2),
    "parallel": (7,),
    "registers": (1, 1, 2, 4),
    "scales": (3, 6, 9),
    "shrinking": (5, 2, 3),
}
PLANS = {name: plan(layout_of(sizes)) for name, sizes in SIZES.items()}
every_plan = pytest.mark.parametrize("name", list(PLANS))
any_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def block_of(p: DecodingPlan) -> np.ndarray:
    """[N] the block that each code belongs to."""
    return np.repeat(np.arange(p.passes), p.sizes)


# -- plans --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(length=st.integers(1, 40), block=st.integers(1, 50))
def test_equal_blocks_take_n_over_b_passes_rounded_up(length, block):
    layout = layout_of((1, 2, *(1,) * (length - 3)) if length > 3 else (length,))
    p = plan(layout, block)
    assert p.passes == math.ceil(length / block)
    assert p.sizes[:-1] == (block,) * (p.passes - 1)
    assert sum(p.sizes) == p.tokens == length
    assert p.shifted
    assert p.inputs == p.passes * block if p.passes > 1 else p.inputs == length


@settings(deadline=None)
@given(sizes=any_sizes)
def test_the_layouts_own_blocks_are_the_plan(sizes):
    p = plan(layout_of(sizes))
    assert p.sizes == sizes
    equal = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    assert p.shifted == equal
    assert p.inputs == (len(sizes) * sizes[0] if equal else 2 * sum(sizes) - sizes[-1])


@pytest.mark.parametrize(
    ("sizes", "block", "prefixes", "stops", "decodable"),
    [
        ((1,) * 8, None, (1, 2, 4, 8), (1, 2, 4, 8), [0, 1, 2, 2, 4, 4, 4, 4, 8]),
        ((1, 1, 2, 4), None, (1, 2, 4, 8), (1, 2, 3, 4), [0, 1, 2, 4, 8]),
        ((1,) * 8, 3, (1, 2, 4, 8), (1, 2, 3), [0, 2, 4, 8]),
        ((3, 6), None, (), (2,), [0, 0, 9]),
        ((7,), None, (), (1,), [0, 7]),
    ],
)
def test_decoding_may_stop_where_more_has_become_decodable(sizes, block, prefixes, stops, decodable):
    p = plan(layout_of(sizes, prefixes), block)
    assert p.stops == stops
    assert [p.decodable(j) for j in range(p.passes + 1)] == decodable


def test_a_variable_length_is_cut_to_a_batch_and_ends_where_the_sampler_says():
    layout = TokenLayout.variable(11, 2, 23)
    whole, batch = plan(layout, 5), plan(layout, 5, length=13)
    assert whole.sizes == (5, 5, 5, 5, 3)
    assert batch.sizes == (5, 5, 3)
    assert whole.variable
    assert whole.decodable(5) == 0
    assert plan(layout).sizes == (1,) * 23
    # What a shorter plan is fed is the beginning of what the longer one is.
    codes = torch.randint(11, (B, 23))
    for j in range(2):
        assert torch.equal(block_inputs(whole, j, codes, BOBLK), block_inputs(batch, j, codes[:, :13], BOBLK))


# -- inputs -------------------------------------------------------------------------------------------------------


def test_equal_blocks_are_fed_the_block_before_and_first_the_begin_token():
    codes = torch.arange(12)[None] + 100
    ragged, begin = PLANS["ragged"], [BOBLK] * 5
    assert [block_inputs(ragged, j, codes, BOBLK)[0].tolist() for j in range(3)] == [
        begin,
        [100, 101, 102, 103, 104],
        [105, 106, 107, 108, 109],  # all of the block before, though two codes are emitted
    ]
    assert [ragged.emits(j) for j in range(3)] == [slice(0, 5), slice(0, 5), slice(0, 2)]
    token_wise = training_inputs(PLANS["token-wise"], codes[:, :7], BOBLK)
    assert token_wise[0].tolist() == [BOBLK, *range(100, 106)]


def test_unequal_blocks_are_fed_the_block_before_and_queries():
    codes = torch.arange(8)[None] + 100
    p = PLANS["registers"]
    assert [block_inputs(p, j, codes, BOBLK)[0].tolist() for j in range(4)] == [
        [BOBLK],
        [100, BOBLK],
        [101, BOBLK, BOBLK],
        [102, 103, *[BOBLK] * 4],
    ]
    assert [p.emits(j) for j in range(4)] == [slice(n, None) for n in (0, 1, 1, 2)]
    assert p.reads.tolist() == [0, 2, 4, 5, 8, 9, 10, 11]


@every_plan
def test_a_pass_needs_the_blocks_before_it_only_and_training_is_all_passes_in_a_row(name):
    p = PLANS[name]
    codes = torch.randint(11, (B, p.tokens))
    parts = [block_inputs(p, j, codes[:, : p.edges[j]], BOBLK) for j in range(p.passes)]
    assert torch.equal(torch.cat(parts, 1), training_inputs(p, codes, BOBLK))
    # Of the outputs of each pass, those that `emits` names are those that `reads` names in the whole.
    slots = torch.arange(p.inputs)
    emitted = [slots[p.slots[j] : p.slots[j + 1]][p.emits(j)] for j in range(p.passes)]
    assert torch.cat(emitted).tolist() == p.reads.tolist()
    # The output that emits a code stands at that code's position; every code but the last block's is fed once.
    assert p.place[p.reads].tolist() == list(range(p.tokens))
    assert sorted(p.source[p.source >= 0].tolist()) == list(range(p.edges[-2]))
    assert (p.step[p.reads] == block_of(p)).all()


# -- masks --------------------------------------------------------------------------------------------------------


def sight(p: DecodingPlan, mask: np.ndarray) -> np.ndarray:
    """[N, N] whether the output for code a can depend on code b, through any number of layers."""
    reach = mask.copy()
    for _ in range(len(mask).bit_length()):
        reach = reach @ reach
    fed = p.source[None] == np.arange(p.tokens)[:, None]
    return reach[p.reads] @ fed.T


@settings(deadline=None, max_examples=60)
@given(sizes=any_sizes, block=st.none() | st.integers(1, 7), prefix=st.integers(0, 3), causal=st.booleans())
def test_a_block_depends_on_all_blocks_before_it_and_on_no_other(sizes, block, prefix, causal):
    p = plan(layout_of(sizes), block)
    mask = attention_mask(p, prefix, causal_prefix=causal).numpy()
    assert mask.any(1).all()
    blocks = block_of(p)
    assert (sight(p, mask[prefix:, prefix:]) == (blocks[:, None] > blocks[None])).all()
    assert mask[prefix:, :prefix].all()
    assert not mask[:prefix, prefix:].any()
    expected = np.tri(prefix, dtype=bool) if causal else np.ones((prefix, prefix), bool)
    assert (mask[:prefix, :prefix] == expected).all()
    # Full attention inside a block: outputs of one pass see each other.
    same = blocks[:, None] == blocks[None]
    assert mask[prefix:, prefix:][np.ix_(p.reads, p.reads)][same].all()


def test_blocks_of_one_are_causal_and_equal_blocks_block_causal():
    n = PLANS["token-wise"].tokens
    for layout in (layout_of((1,) * n), layout_of((3, n - 3)), layout_of((n,))):
        assert attention_mask(plan(layout, 1), 0).tolist() == np.tri(n, dtype=bool).tolist()
    assert torch.equal(attention_mask(PLANS["equal"], 0), block_causal_mask([3, 3, 3]))
    assert torch.equal(attention_mask(PLANS["ragged"], 0), block_causal_mask([5, 5, 5]))
    assert attention_mask(PLANS["parallel"], P).all(1)[P:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_additive_mask_attends_as_the_boolean_one(dtype):
    mask = attention_mask(PLANS["registers"], P)
    scores = torch.randn(len(mask), len(mask), generator=torch.Generator().manual_seed(0)).to(dtype)
    added = (scores + additive_mask(mask, dtype)).softmax(-1)
    assert torch.equal(added, scores.masked_fill(~mask, -torch.inf).softmax(-1))


@every_plan
def test_the_loss_of_a_block_has_no_gradient_to_its_own_codes_or_later_ones(name):
    """A random Transformer: exactly zero to blocks j and later, not zero to any code of an earlier block."""
    torch.manual_seed(0)
    p = PLANS[name]
    model, head = Stack(2, W, 2, rotary=True, qk_norm=True), nn.Linear(W, 11)
    codes = torch.randint(11, (B, p.tokens))
    begin, prefix = torch.randn(W), torch.randn(B, P, W)
    embedded = torch.randn(B, p.tokens, W, requires_grad=True)
    source = torch.from_numpy(p.source)
    fed = torch.where((source < 0)[:, None], begin, embedded[:, source.clamp(min=0)])
    hidden = model(torch.cat([prefix, fed], 1), mask=attention_mask(p, P))[:, P:]
    logits = head(hidden[:, torch.from_numpy(p.reads)])
    losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").unflatten(0, (B, -1))
    for j in range(p.passes):
        loss = losses[:, p.edges[j] : p.edges[j + 1]].sum()
        (gradient,) = torch.autograd.grad(loss, embedded, retain_graph=True)
        size = gradient.abs().amax((0, 2))
        assert (size[p.edges[j] :] == 0).all()
        assert (size[: p.edges[j]] > 0).all()


class Attention(nn.Module):
    """Two layers of rotary attention with a cache of keys and values, small enough to be seen through."""

    def __init__(self, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleDict({"in": nn.Linear(W, 3 * W), "out": nn.Linear(W, W)}) for _ in range(layers)
        )

    def forward(self, x, mask, at, cache, keep):
        """Output [B, m, W], and the cache [layer](keys, values) with the positions of x that `keep` names added."""
        grown = []
        for layer, (keys, values) in zip(self.layers, cache or [(None, None)] * len(self.layers), strict=True):
            q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in layer["in"](x).chunk(3, -1))
            q, k = rotate(q, positions=at.float()), rotate(k, positions=at.float())
            old_k, old_v = (k[:, :, :0], v[:, :, :0]) if keys is None else (keys, values)
            grown.append((torch.cat([old_k, k[:, :, keep]], 2), torch.cat([old_v, v[:, :, keep]], 2)))
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + layer["out"](found.transpose(1, 2).flatten(2)).tanh()
        return x, grown


@every_plan
@torch.no_grad()
def test_decoding_with_a_cache_is_one_forward_pass_over_all_blocks(name):
    """Greedy codes block by block from a cache; the full forward pass over these codes has the same logits."""
    torch.manual_seed(1)
    p = PLANS[name]
    model, table = Attention().double(), nn.Embedding(12, W).double()
    head, prefix = nn.Linear(W, 11).double(), torch.randn(B, P, W, dtype=torch.float64)
    at = positions(p, prefix_len=P)
    _, cache = model(prefix, torch.ones(P, P, dtype=torch.bool), torch.arange(P), None, torch.ones(P, dtype=torch.bool))
    codes, stepwise = torch.zeros(B, 0, dtype=torch.long), []
    for j in range(p.passes):
        slots = slice(p.slots[j], p.slots[j + 1])
        keep = torch.from_numpy(p.kept[slots])
        fed = table(block_inputs(p, j, codes, 11))
        hidden, cache = model(fed, pass_mask(p, j, P), at[slots], cache, keep)
        stepwise.append(head(hidden[:, p.emits(j)]))
        codes = torch.cat([codes, stepwise[-1].argmax(-1)], 1)
    assert codes.shape == (B, p.tokens)
    x = torch.cat([prefix, table(training_inputs(p, codes, 11))], 1)
    where = torch.cat([torch.arange(P), at])
    hidden, _ = model(x, attention_mask(p, P), where, None, torch.ones(len(where), dtype=torch.bool))
    whole = head(hidden[:, P + torch.from_numpy(p.reads)])
    torch.testing.assert_close(torch.cat(stepwise, 1), whole, rtol=0, atol=1e-12)
    assert whole.std(1).min() > 1e-3  # positions differ, so an exchange of two would show


# -- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [0, 2, 6])
@every_plan
def test_positions_of_inference_are_the_mean_of_those_of_training(name, spacing):
    p = PLANS[name]
    fixed = positions(p, spacing, prefix_len=P)
    assert (fixed[torch.from_numpy(p.reads)] == P - 1 + (1 + spacing // 2) * torch.arange(1, p.tokens + 1)).all()
    generator = torch.Generator().manual_seed(0)
    drawn = jittered_positions(p, spacing, batch=4001, prefix_len=P, generator=generator)
    slots = int(p.place.max()) + 1
    spread = math.sqrt(((spacing + 1) ** 2 - 1) / 12 * slots / 4001)
    assert (drawn.double().mean(0) - fixed).abs().max() <= 5 * spread
    by_code = drawn[:, torch.from_numpy(p.reads)]
    steps = by_code.diff(dim=1, prepend=torch.full((4001, 1), P - 1))
    assert sorted(steps.unique().tolist()) == list(range(1, spacing + 2))
    # A code that is fed takes the position of the query that emitted it.
    if not p.shifted:
        fed = torch.from_numpy(np.flatnonzero(p.source >= 0))
        assert torch.equal(drawn[:, fed], by_code[:, torch.from_numpy(p.source)[fed]])


# -- refusals -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_refused():
    layout = layout_of((3, 4))
    for block in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match=f"block is {block}"):
            plan(layout, block)
    with pytest.raises(ConfigError, match="every sequence of this layout has 7 tokens"):
        plan(layout, length=5)
    with pytest.raises(ConfigError, match="length is 24; sequences of this layout have 1 to 23"):
        plan(TokenLayout.variable(11, 2, 23), length=24)
    with pytest.raises(ConfigError, match=r"edges are \(0, 3, 3\)"):
        DecodingPlan(edges=(0, 3, 3), shifted=True)
    with pytest.raises(ConfigError, match=r"blocks of \[3, 4\] are not equal"):
        DecodingPlan(edges=(0, 3, 7), shifted=True)


def test_inputs_that_cannot_be_made_are_refused():
    p = PLANS["equal"]
    with pytest.raises(TokenError, match="2 codes were given, the inputs are made of the first 3"):
        block_inputs(p, 1, torch.zeros(B, 2, dtype=torch.long), BOBLK)
    for call in (
        lambda j: block_inputs(p, j, torch.zeros(B, 9, dtype=torch.long), BOBLK),
        lambda j: pass_mask(p, j, P),
    ):
        for j in (-1, 3):
            with pytest.raises(ConfigError, match=f"pass {j} is not among the 3"):
                call(j)
    with pytest.raises(ConfigError, match="prefix_len is -1"):
        attention_mask(p, -1)
    for spacing in (1, -2, 2.0):
        with pytest.raises(ConfigError, match=f"spacing is {spacing}"):
            positions(p, spacing)
