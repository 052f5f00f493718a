"""Laws of the semantic figures on codes whose meaning is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from actok.core import ActionGroup, ActionSpace, ChunkContext, DataError, FitPart, TokenLayout, Tokens
from actok.evaluation import semantics
from actok.evaluation.information import entropy, label_information
from actok.evaluation.levels import LevelCodes, level_use, split_levels
from actok.evaluation.probes import linear_probe
from actok.evaluation.retrieval import retrieval
from actok.evaluation.semantics import LabelledChunks, LabelledData, measure_semantics, raw_probes, raw_retrieval
from actok.evaluation.substitution import cosine_of_motion, likely_codes, substitution
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics
from actok.training import fit_parts

SPACE = ActionSpace(
    embodiment="arm",
    dim=3,
    rate_hz=10.0,
    groups=(
        ActionGroup(name="tip", kind="position", dims=(0, 1), unit="m", scale=1.0, mode="delta"),
        ActionGroup(name="grip", kind="gripper", dims=(2,), unit="fraction", scale=1.0),
    ),
)
# Level 0 at two times, then level 1 at two times.
LAYOUT = TokenLayout.uniform(
    np.array([7, 7, 5, 5]),
    np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]),
    table=np.array([0, 0, 1, 1]),
)


def tokens(ids, fixed=True):
    lengths = [len(i) for i in ids]
    return Tokens(
        flat=np.concatenate([np.asarray(i, np.int64) for i in ids]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        horizon=2,
        fixed_length=lengths[0] if fixed else None,
        out_of_range=np.zeros(len(ids), np.int64),
        saturated=np.zeros(len(ids), np.int64),
    )


def codes(symbols, size):
    """Chunks [B, S] of symbols."""
    symbols = np.asarray(symbols)
    return LevelCodes(
        level=0,
        symbols=symbols.reshape(-1),
        offsets=np.arange(len(symbols) + 1) * symbols.shape[1],
        size=size,
    )


# -- levels ------------------------------------------------------------------------------------------------------------


def test_levels_are_told_apart_and_numbered_by_table():
    first, second, whole = split_levels(tokens([[6, 1, 4, 0], [2, 2, 3, 3]]), LAYOUT)
    assert (first.level, second.level, whole.level) == (0, 1, None)
    assert first.symbols.tolist() == [6, 1, 2, 2]
    assert second.symbols.tolist() == [4, 0, 3, 3]
    assert (first.size, second.size, whole.size) == (7, 5, 12)
    assert whole.symbols.tolist() == [6, 1, 7 + 4, 7 + 0, 2, 2, 7 + 3, 7 + 3]
    assert first.bags.toarray()[1].tolist() == pytest.approx([0, 0, np.sqrt(2), 0, 0, 0, 0])
    assert whole.take(np.array([1])).symbols.tolist() == [2, 2, 10, 10]


def test_a_code_of_another_part_is_another_symbol():
    layout = TokenLayout.uniform(7, np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]))
    (only,) = split_levels(tokens([[3, 3, 5, 5]]), layout)
    assert only.symbols.tolist() == [3, 10, 5, 12]
    assert only.size == 14


def test_sequences_of_varying_length_are_whole_and_may_be_empty():
    (whole,) = split_levels(tokens([[1, 1, 2], [], [4]], fixed=False), TokenLayout.variable(7, 0, 5))
    assert whole.level is None
    assert whole.lengths.tolist() == [3, 0, 1]
    assert whole.bags.toarray().sum(1) == pytest.approx([np.sqrt(3), 0, 1])
    with pytest.raises(DataError, match="exceeds the layout's 2"):
        split_levels(tokens([[1, 1, 2]], fixed=False), TokenLayout.variable(7, 0, 2))


def test_perplexity_of_uniform_and_of_constant_codes():
    assert level_use(codes(np.arange(35).reshape(7, 5) % 5, 11)).perplexity == pytest.approx(5)
    assert level_use(codes(np.arange(35).reshape(7, 5) % 5, 11)).used == pytest.approx(5 / 11)
    assert level_use(codes(np.full((7, 5), 3), 11)).perplexity == pytest.approx(1)


# -- information -------------------------------------------------------------------------------------------------------


def test_codes_that_equal_the_label_hold_its_whole_entropy():
    label = np.random.default_rng(0).integers(0, 5, 997)
    found = label_information(codes(np.stack([label] * 3, 1), 5), label, np.arange(997))
    assert found.entropy == pytest.approx(entropy(label))
    assert found.bits == pytest.approx(found.entropy)
    assert found.share > 0.97
    assert found.excess == pytest.approx(found.bits - found.chance)
    assert found.pairs == 997


def test_independent_codes_hold_nothing_beyond_chance_and_the_correction_is_unbiased():
    rng = np.random.default_rng(1)
    excess, bits, spread = [], [], []
    for seed in range(11):
        label, symbol = rng.integers(0, 7, 499), rng.integers(0, 53, (499, 1))
        found = label_information(codes(symbol, 53), label, np.arange(499), repeats=13, seed=seed)
        excess.append(found.excess)
        bits.append(found.bits)
        spread.append(found.chance_sd)
    # The plug-in estimate is far above 0 (Miller and Madow: (53 - 1)(7 - 1) / (2 N ln 2) bits); the excess is not.
    assert np.mean(bits) == pytest.approx(52 * 6 / (2 * 499 * np.log(2)), rel=0.25)
    assert abs(np.mean(excess)) < 4 * np.mean(spread) / np.sqrt(11)
    assert np.mean(spread) < 0.1 * np.mean(bits)


def test_what_an_episode_repeats_is_no_information_about_its_label():
    """Every episode has a code and a label of its own kind, drawn independently; its chunks repeat both."""
    rng = np.random.default_rng(2)
    episode = np.repeat(np.arange(61), 17)
    label, symbol = rng.integers(0, 3, 61)[episode], rng.integers(0, 11, 61)[episode]
    by_episode = label_information(codes(symbol[:, None], 11), label, episode)
    by_chunk = label_information(codes(symbol[:, None], 11), label, np.arange(len(episode)))
    assert by_chunk.excess > 5 * by_chunk.chance_sd
    assert abs(by_episode.excess) < 3 * by_episode.chance_sd


def test_phases_in_the_same_order_in_every_episode_are_information():
    """At the same place of another episode the label is the same, which says nothing against the codes."""
    episode, phase = np.repeat(np.arange(41), 29), np.tile(np.arange(29) // 10, 41)
    assert label_information(codes(phase[:, None], 3), phase, episode).share > 0.95
    one = episode == 0
    assert label_information(codes(phase[one, None], 3), phase[one], episode[one]).excess > 0.5


@pytest.mark.parametrize("changing", [False, True])
def test_nothing_is_said_by_codes_of_episodes_of_unequal_lengths_that_know_no_label(changing):
    """Within an episode codes repeat, and labels stay or come in a fixed order."""
    found = []
    for seed in range(23):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(5, 47, 41)
        episode = np.repeat(np.arange(41), lengths)
        label = rng.integers(0, 3, 41)[episode]
        if changing:
            label = np.concatenate([np.sort(rng.integers(0, 3, n)) for n in lengths])
        symbol = rng.integers(0, 11, 41)[episode]
        found.append(label_information(codes(symbol[:, None], 11), label, episode, repeats=7, seed=seed).excess)
    assert abs(np.mean(found)) < 0.015 + 2 * np.std(found) / np.sqrt(23)


def test_information_needs_two_labels():
    with pytest.raises(DataError, match="1 labels say nothing"):
        label_information(codes(np.zeros((5, 1), int), 3), np.zeros(5, int), np.arange(5))


# -- probes ------------------------------------------------------------------------------------------------------------


def probe(symbols, label, size):
    """Train on the first half, judge on the second; every chunk is an episode."""
    half = len(label) // 2
    bags, episode = codes(symbols, size).bags, np.arange(len(label))
    return linear_probe(bags[:half], label[:half], episode[:half], bags[half:], label[half:], episode[half:])


def test_a_probe_of_codes_that_equal_the_label_is_right():
    label = np.random.default_rng(3).integers(0, 5, 601)
    found = probe(np.stack([label] * 2, 1), label, 5)
    assert (found.accuracy, found.balanced, found.low, found.high) == (1, 1, 1, 1)
    assert found.classes == 5


def test_a_probe_of_independent_codes_is_as_good_as_the_majority():
    rng = np.random.default_rng(4)
    label = np.where(rng.random(1201) < 0.6, 2, rng.integers(0, 5, 1201))
    found = probe(rng.integers(0, 3, (1201, 1)), label, 3)
    assert found.accuracy == pytest.approx(found.majority, abs=0.03)
    assert found.balanced == pytest.approx(1 / 5, abs=0.05)
    assert found.low <= found.accuracy <= found.high


def test_a_label_unseen_in_training_counts_as_wrong():
    label = np.array([0, 1] * 50 + [0, 1, 2, 2] * 5)
    found = linear_probe(
        np.eye(3)[label[:100]], label[:100], np.arange(100), np.eye(3)[label[100:]], label[100:], np.arange(20)
    )
    assert found.accuracy == pytest.approx(0.5)
    assert found.balanced == pytest.approx(2 / 3)


def test_the_optimiser_finds_the_minimum_that_scipy_finds(monkeypatch):
    from scipy.optimize import minimize

    from actok.evaluation import probes

    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(97, 7)), rng.integers(0, 3, 97)
    monkeypatch.setattr(probes, "ITERATIONS", 300)
    monkeypatch.setattr(probes, "TOLERANCE", 0.0)
    found = probes._fit(x, y, 3, 1e-2)

    def loss(flat):
        w = flat.reshape(8, 3)
        score = x @ w[:-1] + w[-1]
        log = score - np.log(np.exp(score).sum(1, keepdims=True))
        return -log[np.arange(97), y].mean() + 5e-3 * (w[:-1] ** 2).sum()

    best = minimize(loss, np.zeros(24), method="BFGS")
    assert loss(found.reshape(-1)) == pytest.approx(best.fun, abs=1e-8)
    assert found[:-1] == pytest.approx(best.x.reshape(8, 3)[:-1], abs=1e-3)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def test_retrieval_of_codes_that_name_the_instruction_is_perfect_and_of_others_is_chance():
    rng = np.random.default_rng(6)
    words = rng.normal(size=(7, 11)).astype(np.float32) + 5
    train, test = rng.integers(0, 7, 503), np.arange(211) % 7
    exact = retrieval(codes(train[:, None], 7).bags, train, words[train], codes(test[:, None], 7).bags, test)
    for ranking, queries, candidates in ((exact.chunk_to_text, 211, 7), (exact.text_to_chunk, 7, 211)):
        assert (ranking.queries, ranking.candidates) == (queries, candidates)
        assert (ranking.recall1, ranking.recall5, ranking.median_rank) == (1, 1, 1)
    assert exact.chunk_to_text.chance1 == pytest.approx(1 / 7)
    assert exact.chunk_to_text.chance5 == pytest.approx(5 / 7)
    assert exact.chunk_to_text.chance_rank == 4

    said = [
        retrieval(
            codes(rng.integers(0, 5, (503, 1)), 5).bags,
            train,
            words[train],
            codes(rng.integers(0, 5, (211, 1)), 5).bags,
            test,
            seed=seed,
        )
        for seed in range(13)
    ]
    assert np.mean([s.chunk_to_text.recall1 for s in said]) == pytest.approx(1 / 7, abs=0.04)
    assert np.mean([s.text_to_chunk.recall5 for s in said]) == pytest.approx(said[0].text_to_chunk.chance5, abs=0.12)


# -- substitution ------------------------------------------------------------------------------------------------------


def test_likely_codes_are_chosen_level_by_level_among_those_that_agree():
    ids = np.array([[1, 5, 0, 4], [1, 6, 0, 3], [2, 6, 4, 3], [2, 6, 4, 2], [1, 5, 3, 3]])
    # Slot 0: 1 wins (three of five), and 0 among those three, though 4 is as frequent over all; slot 1: 6, then 3.
    assert likely_codes(ids, LAYOUT).tolist() == [1, 6, 0, 3]


def test_cosine_of_motion_knows_rest_and_first_steps():
    normaliser = Normaliser.make("min_max", Statistics.from_array(np.array([[-1, -1, 0], [1, 1, 4]], np.float32)))
    a = np.zeros((4, 5, 3))
    a[0, :, 0], a[1, :, 0] = 1, 1  # moves along x
    a[2, :, 2] = np.linspace(1, 3, 5)  # the gripper opens, whose values are positions
    b = a.copy()
    b[1] *= -2
    b[2, :, 2] -= 7
    assert cosine_of_motion(a, b, SPACE, normaliser) == pytest.approx([1, -1, 1, 0])
    steps = np.ones((4, 5), bool)
    steps[:, 3:] = False
    b[0, 3:] = -9
    assert cosine_of_motion(a, b, SPACE, normaliser, steps)[0] == pytest.approx(1)


class Directions:
    """Code k of the first level moves along direction k; nothing else counts."""

    def decode(self, ids, context):
        angle = 2 * np.pi * ids[:, :1] / 7
        actions = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 2)
        return SimpleNamespace(actions=np.repeat(actions, 5, 1))


@pytest.mark.parametrize("state", [False, True])
def test_codes_likely_under_the_words_move_as_was_done_under_them(state):
    rng = np.random.default_rng(8)
    text = rng.integers(0, 7, 211)
    ids = np.stack([text, text, rng.integers(0, 5, 211), rng.integers(0, 5, 211)], 1)
    actions = Directions().decode(ids, None).actions
    normaliser = Normaliser.make("min_max", Statistics.from_array(np.array([[-1, -1, -1], [1, 1, 1]], np.float32)))
    where = rng.normal(size=(211, 2)) if state else None
    found = substitution(
        Directions(),
        LAYOUT,
        train_ids=ids[:150],
        train_text=text[:150],
        train_instruction=text[:150],
        train_phase=text[:150] % 2 + 1,
        train_state=where if where is None else where[:150],
        test_ids=ids[150:],
        test_text=text[150:],
        test_instruction=text[150:],
        test_phase=text[150:] % 2 + 1,
        test_state=where if where is None else where[150:],
        actions=actions[150:],
        context=ChunkContext(horizon=5),
        space=SPACE,
        normaliser=normaliser,
    )
    assert (found.state, found.chunks) == (state, 61)
    assert found.own == pytest.approx(1)
    assert found.reconstruction == pytest.approx(1)
    assert found.other == pytest.approx(-1 / 6, abs=0.12)  # the mean of the six other directions
    assert found.closer == 1
    assert found.difference == pytest.approx(found.own - found.other)
    # Of the same phase are the directions two, four or six sevenths of a turn away.
    own = np.arange(7)
    alike = [[b for b in own if b != a and b % 2 == a % 2] for a in own]
    expected = np.array(
        [np.mean([1 - np.cos(2 * np.pi * (a - b) / 7) for b in others]) for a, others in enumerate(alike)]
    )
    assert found.same_phase == pytest.approx(expected[text[150:]].mean(), abs=0.15)


def test_without_phases_no_other_instruction_is_of_the_same_one():
    text = np.arange(14) % 7
    ids = np.stack([text] * 4, 1)
    normaliser = Normaliser.make("min_max", Statistics.from_array(np.array([[-1, -1, -1], [1, 1, 1]], np.float32)))
    side = {"ids": ids, "text": text, "instruction": text, "phase": 0 * text, "state": None}
    found = substitution(
        Directions(),
        LAYOUT,
        **{f"{part}_{name}": value for part in ("train", "test") for name, value in side.items()},
        actions=Directions().decode(ids, None).actions,
        context=ChunkContext(horizon=5),
        space=SPACE,
        normaliser=normaliser,
    )
    assert found.same_phase is None
    assert found.own == pytest.approx(1)


# -- everything --------------------------------------------------------------------------------------------------------


def labelled(count, seed, first_episode):
    """Each of three tasks moves in a direction of its own; the phase is whether the gripper is open."""
    rng = np.random.default_rng(seed)
    episode = np.repeat(np.arange(count // 11), 11) + first_episode
    task, phase = episode % 3, np.arange(len(episode)) % 2
    actions = rng.normal(0, 0.02, (len(episode), 5, 3))
    actions[:, :, 0] += np.cos(2 * task)[:, None]
    actions[:, :, 1] += np.sin(2 * task)[:, None]
    actions[:, :, 2] = phase[:, None]
    features = np.eye(3)[task] + 3
    return LabelledChunks(
        actions=actions.astype(np.float32),
        pad_mask=np.zeros(actions.shape[:2], bool),
        episode=episode,
        labels={"task": task, "instruction": task, "phase": phase, "verb": np.zeros_like(task)},
        features=features.astype(np.float32),
    )


@pytest.fixture(scope="module")
def data():
    train, test = labelled(297, 0, 0), labelled(99, 1, 100)
    return LabelledData(
        train=train,
        test=test,
        names={"task": ("a", "b", "c"), "instruction": ("go a", "go b", "go c"), "phase": ("0", "1"), "verb": ("go",)},
        space=SPACE,
        normaliser=Normaliser.make("quantile", Statistics.from_array(train.actions.reshape(-1, 3))),
    )


def test_every_figure_of_a_tokenizer_of_fixed_length(data):
    pytest.importorskip("sklearn")
    tokenizer = fit_parts("bins", [FitPart(actions=data.train.actions, space=SPACE)], bins=7)
    found = measure_semantics(tokenizer, data)
    (level,) = found.levels
    assert level.level == 0
    assert level.probes["task"].accuracy == level.probes["phase"].accuracy == 1
    assert set(level.missing) == {"verb"}
    assert level.information["task"].excess > 3 * level.information["task"].chance_sd  # of nine episodes
    assert found.retrieval.chunk_to_text.recall1 == 1
    (one,) = found.substitution  # no states are known
    assert one.own > 0.95 > 0.3 > one.other
    assert one.same_phase > 0.5
    assert found.noise.error_rate[0] <= found.noise.error_rate[-1]
    assert found.noise.by_level[0] == pytest.approx(found.noise.error_rate, abs=0.01)
    assert found.map.points.shape == (99, 2)
    for example in found.examples:
        assert 1 >= sum(share for _, share in example.words) > 0.99
        assert example.motion.shape == (5, 3)
    assert found.missing == {}
    assert raw_probes(data)["task"].accuracy == 1
    assert raw_retrieval(data).chunk_to_text.recall1 == 1
    assert raw_retrieval(data).text_to_chunk.recall1 == 1


def test_retrieval_from_chunks_that_say_nothing_of_their_words_is_chance_and_needs_features(data):
    rng = np.random.default_rng(4)
    silent = {
        part: LabelledChunks(**{**vars(chunks), "actions": rng.normal(size=chunks.actions.shape).astype(np.float32)})
        for part, chunks in (("train", data.train), ("test", data.test))
    }
    found = raw_retrieval(LabelledData(**{**vars(data), **silent})).chunk_to_text
    assert found.recall1 == pytest.approx(found.chance1, abs=0.15)
    blind = LabelledData(**{**vars(data), "train": LabelledChunks(**{**vars(data.train), "features": None})})
    assert "give --features DIR" in raw_retrieval(blind)


def test_what_a_variable_length_has_no_figure_for_is_named(data):
    fast = fit_parts("fast", [FitPart(actions=data.train.actions, space=SPACE)], vocab=300)
    without = LabelledData(
        **{**vars(data), "test": data.test.take(np.arange(9))}
    )  # too few for a map, and of one episode: one label
    found = measure_semantics(fast, without)
    assert [level.level for level in found.levels] == [None]
    assert found.substitution == ()
    assert found.noise.by_level == ()
    assert set(found.missing) == {"levels", "substitution", "map"}
    assert found.levels[0].missing["task"] == "9 chunks of 1 labels say nothing of information; give two of each"


def test_noise_is_counted_by_hand(data, monkeypatch):
    """A tokenizer whose second token changes under any noise, and whose first never does."""
    layout = TokenLayout.uniform(np.array([3, 997]), np.array([[0, 0, 0], [1, 0, 0]]), table=np.array([0, 1]))

    def encode(actions, context):
        return tokens([[1, int(abs(a[0, 0]) * 1e4) % 997] for a in actions])

    stub = SimpleNamespace(encode=encode, layout_for=lambda horizon, embodiment: layout)
    found = semantics._noise(stub, data, None, 0)
    assert found.by_level[0] == (0, 0, 0)
    assert found.by_level[1] == pytest.approx((1, 1, 1), abs=0.05)
    assert found.error_rate == pytest.approx([r / 2 for r in found.by_level[1]])


def test_training_and_test_chunks_of_one_episode_are_refused(data):
    with pytest.raises(DataError, match="episode 0 is in the training and in the test chunks"):
        LabelledData(**{**vars(data), "test": data.train})
