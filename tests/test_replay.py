"""Decode-and-replay: open-loop execution of decoded demonstrations, and the statistics over it."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actok.core import ActokError, FitPart
from actok.data import Episode, EpisodeDataset
from actok.envs import make_env
from actok.evaluation.intervals import compare_paired, wilson
from actok.evaluation.record import collect
from actok.evaluation.replay import replay
from actok.tokenizers.bins import BinsConfig, BinsTokenizer
from pointmass import SPACE, PointMass
from realdata import REAL, needs_real

HORIZON = 11  # neither divides nor is divided by the episodes' lengths


class Memory(EpisodeDataset):
    """Episodes in memory with a space."""

    def __init__(self, episodes: Sequence[Episode], space=SPACE) -> None:
        self.name, self.space, self.space_origin = "memory", space, "named by the test"
        self.lengths = np.array([len(e) for e in episodes])
        self._episodes = episodes

    def episode(self, index: int, *, images: bool = False) -> Episode:
        return self._episodes[index]


class Refusing(BinsTokenizer):
    """Bins that decline to decode chunks whose first press value is coded above half."""

    kind = "refusing"

    def _decode(self, flat, offsets, horizon, embodiment, context, repair):
        result = super()._decode(flat, offsets, horizon, embodiment, context, repair)
        valid = result.chunks[:, 0, 2] <= 0
        reasons = [None if ok else "declined" for ok in valid]
        return result._replace(valid=valid, reasons=reasons)


def fitted(bins: int, episodes: Sequence[Episode], space=SPACE, cls=BinsTokenizer, horizon: int = HORIZON):
    steps = np.concatenate([e.actions for e in episodes])
    chunks = steps[: len(steps) // horizon * horizon].reshape(-1, horizon, space.dim)
    return cls.fit([FitPart(actions=chunks, space=space)], BinsConfig(bins=bins, normaliser="min_max"))


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return list(collect(PointMass(), ["far", "half", "near"], 5, seed=2))


@pytest.fixture(scope="module")
def result(episodes: list[Episode]) -> dict:
    tokenizers = {
        "fine": fitted(257, episodes),
        "coarse": fitted(2, episodes),
        "refusing": fitted(257, episodes, cls=Refusing),
    }
    return replay(PointMass(), Memory(episodes), tokenizers, workers=1, progress=False)


def test_the_demonstrations_themselves_succeed_and_fine_bins_with_them(result: dict) -> None:
    assert list(result["tokenizers"]) == ["exact", "fine", "coarse", "refusing"]
    assert result["tokenizers"]["exact"]["rate"] == result["tokenizers"]["fine"]["rate"] == 1
    assert result["tokenizers"]["coarse"]["rate"] < 0.5


def test_success_is_that_of_decoding_and_executing_by_hand(result: dict, episodes: list[Episode]) -> None:
    env, tokenizer = PointMass(), fitted(2, episodes)
    expected = []
    for episode in episodes:
        env.restore(episode.task, episode.start_state)
        solved = False
        for start in range(0, len(episode), HORIZON):
            chunk = episode.actions[start : start + HORIZON]
            decoded = tokenizer.decode(tokenizer.encode(chunk[None])).actions[0] if len(chunk) == HORIZON else None
            if decoded is None:  # bins code each step for itself, so a short chunk decodes alone
                decoded = tokenizer.decode(tokenizer.encode(chunk[None]), horizon=len(chunk)).actions[0]
            for action in decoded:
                env.step(action)
                solved |= env.success
        expected.append(solved)
    assert result["tokenizers"]["coarse"]["success"] == expected


def test_an_undecodable_episode_fails_and_is_not_executed(result: dict, episodes: list[Episode]) -> None:
    declined = [any(e.actions[t, 2] > 0.5 for t in range(0, len(e), HORIZON)) for e in episodes]
    row = result["tokenizers"]["refusing"]
    assert any(declined)
    assert not all(declined)
    assert row["invalid"] == sum(declined)
    assert row["success"] == [not d for d in declined]

    env = PointMass()
    chosen = [i for i, d in enumerate(declined) if d]
    refusing = {"refusing": fitted(257, episodes, cls=Refusing)}
    alone = replay(env, episodes, refusing, episodes=chosen, workers=1, progress=False)
    only_exact = PointMass()
    replay(only_exact, episodes, {}, episodes=chosen, workers=1, progress=False)
    assert env.steps_executed == only_exact.steps_executed
    assert alone["tokenizers"]["refusing"]["normalised_l1"] is None


def test_the_statistics_follow_from_the_successes(result: dict, episodes: list[Episode]) -> None:
    assert result["env"] == "pointmass"
    assert result["horizon"] == HORIZON
    assert result["episodes"] == [{"task": e.task, "index": e.index} for e in episodes]
    for row in result["tokenizers"].values():
        success = row["success"]
        assert row["rate"] == pytest.approx(np.mean(success))
        assert tuple(row["ci95"]) == wilson(sum(success), len(success))
        assert sum(t["n"] for t in row["per_task"].values()) == len(success)
        for task, part in row["per_task"].items():
            of_task = [s for s, e in zip(success, episodes, strict=True) if e.task == task]
            assert (part["n"], part["success"]) == (len(of_task), sum(of_task))
            assert part["rate"] == pytest.approx(np.mean(of_task))
    names = list(result["tokenizers"])
    assert [(p["a"], p["b"]) for p in result["paired"]] == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for pair in result["paired"]:
        a, b = (np.array(result["tokenizers"][pair[k]]["success"]) for k in "ab")
        expected = compare_paired(a, b)
        assert pair["p_value"] == expected.p_value
        assert pair["ci95"] == [expected.low, expected.high]
        assert pair["both"] + pair["only_a"] + pair["only_b"] + pair["neither"] == len(episodes)
        assert pair["difference"] == pytest.approx(a.mean() - b.mean())
    json.dumps(result, allow_nan=False)


def test_the_error_is_that_of_the_decoded_steps(result: dict, episodes: list[Episode]) -> None:
    tokenizer = fitted(257, episodes)
    steps = np.concatenate([e.actions for e in episodes])
    low, high = np.quantile(steps.astype(np.float64), [0.01, 0.99], axis=0)
    decoded = tokenizer.decode(tokenizer.encode(steps[None]), horizon=len(steps)).actions[0]
    expected = np.mean(np.abs(decoded - steps) / ((high - low) / 2))
    assert result["tokenizers"]["fine"]["normalised_l1"] == pytest.approx(expected, rel=1e-5)
    assert result["tokenizers"]["exact"]["normalised_l1"] == 0


def test_two_processes_replay_as_one_does_and_order_does_not_matter(result: dict, episodes: list[Episode]) -> None:
    tokenizers = {
        "fine": fitted(257, episodes),
        "coarse": fitted(2, episodes),
        "refusing": fitted(257, episodes, cls=Refusing),
    }
    other = replay(PointMass(), Memory(episodes), tokenizers, workers=2, progress=False)
    for r in (result, other):
        assert all(row["seconds"] > 0 for row in r["tokenizers"].values())

    def timeless(r: dict) -> dict:
        rows = {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in r["tokenizers"].items()}
        return r | {"tokenizers": rows}

    assert timeless(other) == timeless(result)
    order = list(range(len(episodes)))[::-1]
    reverse = replay(PointMass(), episodes, tokenizers, episodes=order, workers=1, progress=False)
    for name, row in reverse["tokenizers"].items():
        assert row["success"][::-1] == result["tokenizers"][name]["success"]


def test_another_horizon_cuts_other_chunks(episodes: list[Episode]) -> None:
    tokenizers = {"a": fitted(31, episodes), "b": fitted(31, episodes, horizon=7)}
    mixed = replay(PointMass(), episodes, tokenizers, episodes=[0], workers=1, progress=False)
    assert mixed["horizon"] is None
    assert [mixed["tokenizers"][n]["horizon"] for n in ("exact", "a", "b")] == [None, HORIZON, 7]
    given = replay(PointMass(), episodes, tokenizers, episodes=[0], horizon=101, workers=1, progress=False)
    assert given["horizon"] == 101  # longer than any episode: one padded chunk
    assert given["tokenizers"]["a"]["success"] == mixed["tokenizers"]["a"]["success"]


def test_what_cannot_be_replayed_is_refused(episodes: list[Episode]) -> None:
    env, tokenizer = PointMass(), fitted(31, episodes)
    renamed = SPACE.renamed("elsewhere")
    metres = replace(SPACE, groups=(replace(SPACE.groups[0], scale=0.5), SPACE.groups[1]))
    cases = [
        (Memory(episodes), {"exact": tokenizer}, {}, "rename it"),
        (Memory(episodes), {}, {"episodes": [99]}, "episode 99"),
        (Memory(episodes), {}, {"episodes": []}, "no episode"),
        (Memory(episodes), {"x": tokenizer}, {"horizon": 0}, "horizon is 0"),
        (Memory([replace(episodes[0], start_state={})]), {}, {}, "actok collect"),
        (Memory([replace(episodes[0], start_state={"qpos": np.zeros(2)})]), {}, {}, "no position"),
        (Memory([replace(episodes[0], task="drawer")]), {}, {}, "drawer"),
        (Memory(episodes, metres), {}, {}, "scale: 0.03 against 0.5"),
        (Memory(episodes, replace(SPACE, rate_hz=13.0)), {}, {}, "13 actions a second"),
        ([replace(episodes[0], actions=np.zeros((5, 2), np.float32))], {}, {}, "shape"),
        (Memory(episodes, renamed), {"x": tokenizer}, {}, "adapt"),
        (Memory(episodes), {"x": fitted(31, episodes, space=metres)}, {}, "another action space"),
    ]
    for dataset, tokenizers, options, words in cases:
        with pytest.raises(ActokError, match=words):
            replay(env, dataset, tokenizers, **({"workers": 1, "progress": False} | options))


def test_a_tokenizer_under_another_embodiment_name_of_the_same_space_is_used(episodes: list[Episode]) -> None:
    renamed = SPACE.renamed("elsewhere")
    tokenizer = fitted(257, episodes, space=renamed)
    done = replay(PointMass(), Memory(episodes, renamed), {"fine": tokenizer}, episodes=[1], workers=1, progress=False)
    assert done["tokenizers"]["fine"]["success"] == [True]


# -- the real simulator -----------------------------------------------------------------------------------------------


def test_meta_world_demonstrations_replay_exactly_and_through_bins() -> None:
    pytest.importorskip("metaworld")
    env = make_env("metaworld")
    recorded = list(collect(env, ["button-press-v3", "door-open-v3", "pick-place-v3"], 2, seed=1))
    tokenizers = {"fine": fitted(256, recorded, env.space), "coarse": fitted(2, recorded, env.space)}
    done = replay(env, recorded, tokenizers, workers=1, progress=False)
    assert done["tokenizers"]["exact"]["rate"] == 1
    assert done["tokenizers"]["fine"]["rate"] == 1
    assert done["tokenizers"]["coarse"]["rate"] < 1


@needs_real
def test_stored_meta_world_demonstrations_replay_from_their_start_states() -> None:
    pytest.importorskip("metaworld")
    stored = []
    for task in ("coffee-button-v3", "hammer-v3", "reach-wall-v3"):
        with np.load(REAL / "sim" / "metaworld_state" / f"{task}.npz") as data:
            ends = np.cumsum(data["episode_length"])
            for k in range(3):
                steps = slice(ends[k] - data["episode_length"][k], ends[k])
                stored.append(
                    Episode(
                        index=len(stored),
                        actions=data["action"][steps],
                        task=task,
                        start_state={"rand_vec": data["rand_vec"][k]},
                    )
                )
    done = replay(make_env("metaworld"), stored, {}, workers=1, progress=False)
    assert done["tokenizers"]["exact"]["success"] == [True] * 9
