"""Codes and language-model ids: a bijection for every layout, as openpi counts, and nothing else is ever mapped."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionSpace, ConfigError, FitPart, TokenError, TokenLayout, find_preset
from actok.core.config import build_config
from actok.core.registry import load_target, tokenizer_presets
from actok.policies.vocab import CONTROLS, VocabularyMap

torch.set_num_threads(1)
T, D = 8, 5
MODEL = 20011


def layout_of(sizes: list[int], tables: list[int], blocks: list[int], prefixes: tuple[int, ...] = ()) -> TokenLayout:
    """A hand-made layout: the size of each table, the table of each position, the size of each block."""
    ends = list(itertools.accumulate([0, *blocks]))
    table = np.array(tables)
    return TokenLayout(
        vocab=np.array(sizes)[table],
        table=table,
        coords=np.zeros((len(table), 3)),
        blocks=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends)),
        prefixes=prefixes,
        min_len=len(table),
        max_len=len(table),
        total=True,
    )


def layout_of_preset(name: str) -> TokenLayout:
    """A closed-form tokenizer fitted on tiny arrays, a learned one as it is before training (its layout is the same)."""
    chunks = np.random.default_rng(0).normal(size=(31, T, D)).cumsum(1).astype(np.float32)
    part = FitPart(actions=chunks, space=ActionSpace.raw(D), anchor=chunks[:, 0])
    preset = find_preset(name)
    cls = load_target(preset.target)
    config = build_config(cls.config_class, preset.settings, name)
    return (cls.prepare([part], config) if cls.learned else cls.fit([part], config)).layout


MADE = {
    "oat": layout_of([7, 5, 3], [0, 1, 2] * 4, [3, 3, 6], (3, 6, 12)),
    "ragged": layout_of([11, 13, 17], [0, 0, 1, 1, 2, 2, 2], [3, 3, 1]),
    "unused table": layout_of([2, 1, 19], [0, 2, 2, 0], [4]),
    "one table, several sizes": TokenLayout.uniform(np.array([3, 29, 2]), np.zeros((3, 3)), block=2),
    "bpe": TokenLayout.variable(211, 3, 23),
}
# A preset without training is fitted in closed form.
SMALL = sorted(n for n, p in tokenizer_presets().items() if n.endswith("-tiny") or not p.training)


@functools.cache
def layouts() -> dict[str, TokenLayout]:
    return MADE | {name: layout_of_preset(name) for name in SMALL}


def maps(layout: TokenLayout, shared: bool = False) -> list[VocabularyMap]:
    """One of each kind, with control tokens that the model has and has not."""
    rest = {"shared": shared, "existing": {"end": 1}, "special": (0, 1, 2)}
    probe = VocabularyMap.for_layouts("added", layout, MODEL, **rest)
    return [
        probe,
        VocabularyMap.for_layouts("tail", layout, MODEL, reserved=13, **rest),
        VocabularyMap.for_layouts("range", layout, MODEL, start=37, stop=37 + probe.size, **rest),
        VocabularyMap.for_layouts("range", layout, MODEL, start=MODEL - 5, stop=MODEL + 2 * probe.size, **rest),
    ]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [*MADE, *SMALL])
def test_every_pair_of_table_and_code_has_an_id_of_its_own_and_comes_back(name, shared):
    """All codes of all positions, in every kind of map: distinct where they mean something else, and inverse."""
    layout = layouts()[name]
    for vocab in maps(layout, shared):
        ids_of: dict[tuple[int, int], int] = {}
        for table in np.unique(layout.table):
            position = int(np.flatnonzero(layout.table == table)[np.argmax(layout.vocab[layout.table == table])])
            codes = np.arange(layout.vocab[position])
            ids = vocab.to_lm(codes, layout, np.full(len(codes), position))
            found = vocab.to_codes(ids, layout, np.full(len(codes), position))
            assert found.is_code.all()
            assert (found.codes == codes).all()
            assert (ids == vocab.ids_of(int(table))[: len(codes)]).all()
            ids_of |= {(0 if shared else int(table), int(c)): int(i) for c, i in zip(codes, ids, strict=True)}
        assert len(set(ids_of.values())) == len(ids_of)
        controls = {vocab.boblk, vocab.eoblk, vocab.end}
        assert len(controls) == 3
        assert vocab.end == 1
        used = set(ids_of.values()) | (controls - {1})
        assert len(used) == len(ids_of) + 2 == vocab.size  # nothing is wasted, nothing collides
        low, high = vocab.span
        assert low <= min(used)
        assert max(used) < high <= vocab.embeddings
        assert vocab.embeddings >= MODEL


@pytest.mark.parametrize("name", [*MADE, *SMALL])
def test_sequences_come_back_in_numpy_and_torch_alike(name):
    layout = layouts()[name]
    codes = np.random.default_rng(1).integers(0, layout.vocab, (3, layout.max_len))
    for vocab in maps(layout):
        ids = vocab.to_lm(codes, layout)
        tensor = vocab.to_lm(torch.from_numpy(codes), layout)
        assert tensor.dtype == torch.int64
        assert (tensor.numpy() == ids).all()
        assert (vocab.to_codes(ids, layout).codes == codes).all()
        assert torch.equal(vocab.to_codes(tensor, layout).codes, torch.from_numpy(codes))
        # Any tail of the sequence is mapped as it is within the whole, one sequence as in a batch.
        tail = np.arange(layout.max_len // 2, layout.max_len)
        assert (vocab.to_lm(codes[:, tail], layout, tail) == ids[:, tail]).all()
        assert (vocab.to_lm(codes[1], layout) == ids[1]).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(MADE)), shared=st.booleans())
def test_an_id_that_is_no_code_there_is_found_and_every_other_is_a_bijection(data, name, shared):
    """For any id at any position: it is a code there exactly if some code of that position has that id."""
    layout = MADE[name]
    vocab = data.draw(st.sampled_from(maps(layout, shared)))
    position = data.draw(st.integers(0, layout.max_len - 1))
    low, high = vocab.span
    given_id = data.draw(st.integers(low - 3, high + 3) | st.integers(-5, MODEL + 5))
    codes = np.arange(layout.vocab[position])
    expected = np.flatnonzero(vocab.to_lm(codes, layout, np.full(len(codes), position)) == given_id)
    found = vocab.to_codes(np.array([given_id]), layout, np.array([position]))
    assert found.is_code.tolist() == [len(expected) == 1]
    assert found.codes.tolist() == (expected.tolist() or [-1])


def test_the_tail_counts_as_openpi_does():
    """PaliGemma has 257152 ids; FAST token 0 is below its 128 segmentation tokens, and further ones go downwards."""
    layout = TokenLayout.variable(2048, 1, 300)
    vocab = VocabularyMap.for_layouts("tail", layout, 257152, reserved=128, existing={"end": 1})
    tokens = np.random.default_rng(0).integers(0, 2048, 300)
    assert (vocab.to_lm(tokens, layout) == 257152 - 1 - 128 - tokens).all()
    assert vocab.embeddings == 257152
    assert {vocab.boblk, vocab.eoblk} == {257152 - 1 - 128 - 2048, 257152 - 1 - 128 - 2049}


def test_one_map_serves_several_layouts():
    short, long = layout_of([7, 5], [0, 1], [2]), layout_of([3, 5, 11], [0, 1, 2], [3])
    vocab = VocabularyMap.for_layouts("added", [short, long], 101)
    assert vocab.tables == (7, 5, 11)
    assert (vocab.to_lm([2, 4], short) == vocab.to_lm([2, 4, 0], long)[:2]).all()
    with pytest.raises(ConfigError, match="position 2 of the layout takes 11 codes of table 2"):
        VocabularyMap.for_layouts("added", short, 101).to_lm([2, 4, 0], long)


@pytest.mark.parametrize("shared", [False, True])
def test_json_gives_an_equal_map(shared):
    for vocab in maps(MADE["oat"], shared):
        again = VocabularyMap.from_dict(json.loads(json.dumps(vocab.to_dict())))
        assert again == vocab
        assert [again.boblk, again.eoblk, again.end] == [vocab.boblk, vocab.eoblk, vocab.end]
    with pytest.raises(ConfigError, match="no setting 'kin'; did you mean 'kind'"):
        VocabularyMap.from_dict(vocab.to_dict() | {"kin": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "text"}, "kind is 'text'; give one of added, tail, range"),
        ({"tables": ()}, r"tables are \(\)"),
        ({"tables": (3, -1)}, r"tables are \(3, -1\)"),
        ({"tables": (0,)}, "at least one above 0"),
        ({"model_vocab": 0}, "model_vocab is 0"),
        ({"shared": 1}, "shared is 1"),
        ({"kind": "tail", "model_vocab": 7}, "10 ids and 0 reserved ones do not fit into the model's 7"),
        ({"kind": "tail", "model_vocab": 17, "reserved": 8}, "10 ids and 8 reserved ones"),
        ({"reserved": 3}, "only 'tail' leaves ids above it"),
        ({"kind": "range"}, "give both for kind 'range' only"),
        ({"start": 3, "stop": 20}, "give both for kind 'range' only"),
        ({"kind": "range", "start": 31, "stop": 40}, "too small for 10 ids .* give at least stop=41"),
        ({"kind": "range", "start": -4, "stop": 40}, "the range from -4"),
        (
            {"kind": "range", "start": 31, "stop": 50, "special": (2, 34)},
            "special id 34 is among the map's ids 31 to 40 .* move the range",
        ),
        ({"kind": "tail", "special": (96,)}, r"special id 96 is among the map's ids 91 to 100 .* \(reserved=5\)"),
        ({"special": (50, 107, 103)}, "special id 103 is among the map's ids 101 to 110 .2 such ids are.; count them"),
        ({"kind": "tail", "existing": {"end": 100}}, "'end' has the id 100, which is among the map's ids 92 to 100"),
        ({"existing": {"end": 101}}, "the model has ids 0 to 100"),
        ({"existing": {"eos": 1}}, "the control tokens are boblk, eoblk, end"),
        ({"existing": {"end": 1, "boblk": 1}}, "an id of its own"),
        ({"special": (-1,)}, "special holds -1"),
    ],
)
def test_a_map_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        VocabularyMap(**{"kind": "added", "tables": (3, 4), "model_vocab": 101} | values)


def test_codes_that_cannot_be_are_refused_and_named():
    layout = layout_of([7, 5], [0, 1], [2])
    vocab = VocabularyMap.for_layouts("added", layout, 101)
    for codes in ([[0, 4], [6, 5]], torch.tensor([[0, 4], [6, 5]])):
        with pytest.raises(TokenError, match=r"code 5 stands where codes go from 0 to 4 \(1 such codes"):
            vocab.to_lm(codes, layout)
    with pytest.raises(TokenError, match="code -1 stands where"):
        vocab.to_lm([-1, 2], layout)
    with pytest.raises(TokenError, match="positions go from 0 to 2, sequences of this layout have at most 2"):
        vocab.to_lm([1, 2, 3], layout)
    for wrong in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([True, False]), np.array([True])):
        with pytest.raises(TokenError, match="give integers"):
            vocab.to_lm(wrong, layout)
    with pytest.raises(TokenError, match="single number 3"):
        vocab.to_codes(3, layout)
    with pytest.raises(ConfigError, match="table 2 is not among the map's 2"):
        vocab.ids_of(2)
    with pytest.raises(ConfigError, match="no layout was given"):
        VocabularyMap.for_layouts("added", [], 101)
    assert set(CONTROLS) == {"boblk", "eoblk", "end"}
