"""Closed-loop rollouts: start states, vectorised environments, chunks in part and averaged, what is refused."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actok.core import ActionSpace, ConfigError, FitPart, SpaceMismatchError
from actok.envs import Env, Observation, make_env
from actok.evaluation.filming import contact_sheet, write_video
from actok.evaluation.rollout import rollout, start_seed
from actok.evaluation.trials import Decider, Trial, run_trials
from actok.evaluation.vector import Start, VectorEnv
from actok.policies.base import Acted, Policy, PolicyBatch, PolicyObservation
from actok.tokenizers.bins import BinsConfig, BinsTokenizer
from pointmass import SPACE, PointMass, Straight

HORIZON = 5
STEP = 0.03


class Scripted(Policy):
    """The point mass's expert as a policy: it plans a chunk from the state it sees, on a copy of the physics.

    Heads: "exact"; "noisy" adds draws of the generator; "tokens" goes through the tokenizer; "broken" is not valid from
    the moment that the goal is near.
    """

    heads = ("exact", "noisy", "tokens", "broken")

    def __init__(self, space: ActionSpace = SPACE, views: tuple[str, ...] = (), proprio: int = 5) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        chunks = np.clip(rng.normal(size=(7, HORIZON, space.dim)), -1, 1).astype(np.float32)
        self.tokenizer = BinsTokenizer.fit([FitPart(actions=chunks, space=space)], BinsConfig(bins=64))
        self.embodiment, self.horizon, self.views, self.proprio = space.embodiment, HORIZON, views, proprio
        self.meta = {"task_steps": {"near": 11.0, "far": 38.0}}
        self.weight = nn.Parameter(torch.zeros(3))
        self.batches: list[int] = []
        self.deadlines: set[float | None] = set()

    def losses(self, batch: PolicyBatch) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def save_pretrained(self, folder: Any) -> Any:
        raise NotImplementedError

    def act(self, observation, *, head=None, generator=None, deadline_s=None) -> Acted:
        assert not self.training
        self.batches.append(len(observation))
        self.deadlines.add(deadline_s)
        expert, chunks, near = Straight(), [], []
        for row in np.float64(observation.proprio):
            state, chunk = row[:4].copy(), []
            near.append(np.linalg.norm(state[:2] - state[2:]) < 0.3)
            for _ in range(self.horizon):
                chunk.append(expert(Observation(proprio=row, state=state)).action)
                state[:2] += STEP * chunk[-1][:2]
            chunks.append(chunk)
        actions = np.array(chunks, np.float32)
        valid = np.ones(len(actions), bool)
        if head == "noisy":
            actions = actions + 0.3 * torch.randn(actions.shape, generator=generator).numpy()
        if head == "tokens":
            actions = self.tokenizer.decode(self.tokenizer.encode(actions)).actions
        if head == "broken":
            valid = ~np.array(near)
            actions[~valid] = np.nan
        return Acted(
            actions=actions,
            valid=valid,
            reasons=[None if ok else "the goal is too near" for ok in valid],
            passes=3,
            seconds={"prefix": 0.25, "actions": 0.5},
            clipped=np.full(len(actions), 2),
        )


def tried(policy: Policy, tasks=("near", "far"), episodes: int = 5, **settings: Any) -> dict:
    return rollout(PointMass(), policy, tasks, episodes, **{"workers": 1, "progress": False, **settings})


def facts(result: dict) -> dict:
    """What must not depend on processes: all but times and identity."""
    return {k: result[k] for k in ("success", "per_task", "episodes", "calls", "chunks", "passes", "clipped", "steps")}


# -- many environments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_slots_do_what_an_environment_alone_does(workers: int) -> None:
    rng = np.random.default_rng(5)
    tasks = ("near", "far", "half")
    alone = [PointMass(view=True) for _ in tasks]
    with VectorEnv(PointMass(view=True), len(tasks), workers) as vector:
        seen = vector.reset({slot: Start(task=task, seed=slot) for slot, task in enumerate(tasks)})
        for env, slot, task in zip(alone, seen, tasks, strict=True):
            assert np.array_equal(env.reset(task, seed=slot).proprio, seen[slot].proprio)
        for length in (1, 3):
            actions = {slot: rng.uniform(-1, 0.4, (length, 3)) for slot in (2, 0)}
            moved = vector.step(actions)
            assert list(moved) == [2, 0]
            for slot, chunk in actions.items():
                last = [alone[slot].step(action) for action in chunk][-1]
                assert moved[slot].steps == length
                assert np.array_equal(moved[slot].observation.proprio, last.proprio)
                assert np.array_equal(moved[slot].observation.images["top"], last.images["top"])
                assert moved[slot].observation.state is None, "what experts know is not shown"


def test_execution_ends_at_the_first_success() -> None:
    env = PointMass()
    with VectorEnv(env, 1) as vector:
        start = {"position": np.zeros(2), "offset": np.array([3 * STEP, 0.0])}
        vector.reset({0: Start(task="near", state=start)})
        chunk = np.array([[1, 0, 0]] * 3 + [[0, 0, 1]] * 4, np.float32)
        moved = vector.step({0: chunk})[0]
        assert (moved.steps, moved.success, moved.observation) == (4, True, None)
    assert env.steps_executed == 0, "the environment given is only copied"


def test_looking_ahead_leaves_the_environment_where_it_is() -> None:
    with VectorEnv(PointMass(), 2) as vector:
        vector.reset({slot: Start(task="far", seed=3) for slot in (0, 1)})
        ahead = vector.foresee({0: 7, 1: 2})
        assert ahead[0].shape == (7, 3)
        assert np.array_equal(ahead[0][:2], ahead[1])
        assert np.array_equal(vector.foresee({0: 7})[0], ahead[0])
        here = [
            vector.step({0: ahead[0][:4]})[0].observation.proprio,
            vector.step({1: ahead[0][:4]})[1].observation.proprio,
        ]
        assert np.array_equal(*here)
        assert np.array_equal(vector.foresee({0: 3})[0], ahead[0][4:]), "the expert is where it thought it would be"


def test_slots_and_starts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="slots is 0"):
        VectorEnv(PointMass(), 0)
    with pytest.raises(ConfigError, match="inside `with VectorEnv"):
        VectorEnv(PointMass(), 2, 2).reset({0: Start(task="near", seed=0)})
    with pytest.raises(ConfigError, match="a seed or a stored state"):
        Start(task="near")
    with VectorEnv(PointMass(), 2) as vector:
        with pytest.raises(ConfigError, match="slot 2 is not one of the 2"):
            vector.reset({2: Start(task="near", seed=0)})
        with pytest.raises(ConfigError, match="no episode has begun in slot 1"):
            vector.step({1: np.zeros((1, 3))})


def test_an_error_in_a_process_arrives() -> None:
    with VectorEnv(PointMass(), 2, 2) as vector, pytest.raises(ConfigError, match="has no task 'nowhere'"):
        vector.reset({0: Start(task="near", seed=0), 1: Start(task="nowhere", seed=0)})


# -- trials -----------------------------------------------------------------------------------------------------------


def test_every_trial_runs_once_within_its_limit_and_slots_are_reused() -> None:
    class Idle(Decider):
        def __init__(self) -> None:
            self.widths: list[int] = []

        def decide(self, live, seen):
            self.widths.append(len(live))
            return {slot: np.zeros((4, 3), np.float32) if t.number != 3 else "no" for slot, t in live.items()}

    trials = [Trial(start=Start(task="near", seed=n), number=n, limit=n + 6, instruction="") for n in range(7)]
    done: list[int] = []
    with VectorEnv(PointMass(), 3) as vector:
        run_trials(vector, trials, idle := Idle(), lambda t: done.append(t.number))
    assert sorted(done) == list(range(7))
    assert [t.steps for t in trials] == [6, 7, 8, 0, 10, 11, 12]
    assert [t.calls for t in trials] == [2, 2, 2, 1, 3, 3, 3]
    assert [t.invalid for t in trials] == [None] * 3 + ["no"] + [None] * 3
    assert all(t.actions.shape[0] == t.steps for t in trials)
    assert max(idle.widths) == 3
    assert sum(idle.widths) == sum(t.calls for t in trials)


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_the_expert_as_a_policy_solves_its_tasks() -> None:
    policy = Scripted()
    result = tried(policy, episodes=7, batch=3)
    assert result["rate"] == 1.0
    assert result["per_task"]["far"]["n"] == 7
    assert (result["passes"], result["clipped"], result["invalid"]) == (3.0, 2 * result["chunks"], 0)
    assert [(e["task"], e["number"]) for e in result["episodes"]] == [(t, n) for t in ("near", "far") for n in range(7)]
    assert result["steps"] == sum(e["steps"] for e in result["episodes"])
    assert result["chunks"] == sum(e["calls"] for e in result["episodes"])
    rolled, alone = policy.batches[: result["calls"]], policy.batches[result["calls"] :]
    assert sum(rolled) == result["chunks"]
    assert max(rolled) == 3
    assert alone == [1] * (1 + result["latency"]["single"]["n"])
    assert result["latency"]["batched"]["ms"]["actions"] == {"p50": 500.0, "p95": 500.0}
    assert json.loads(json.dumps(result)) == result


def test_an_episode_is_cut_at_a_multiple_of_the_demonstrations_length() -> None:
    result = tried(Scripted(), ("never", "near"), 3, limit=1.0)
    assert result["per_task"]["never"] | {"ci95": None} == {
        "n": 3, "success": 0, "rate": 0.0, "ci95": None, "invalid": 0, "limit": 61, "steps_to_success": None,
    }  # fmt: skip
    assert {e["steps"] for e in result["episodes"][:3]} == {PointMass.max_steps}
    assert result["per_task"]["near"]["limit"] == 11
    assert tried(Scripted(), ("far",), 2, limit=0.5)["per_task"]["far"]["success"] == 0
    assert tried(Scripted(), ("far",), 2, limit=9.0)["per_task"]["far"]["limit"] == PointMass.max_steps


@pytest.mark.parametrize("settings", [{}, {"execute": 2}, {"ensemble": 0.3}], ids=str)
def test_results_do_not_depend_on_the_number_of_processes(settings: dict) -> None:
    one = tried(Scripted(), head="noisy", batch=4, seed=3, **settings)
    two = tried(Scripted(), head="noisy", batch=4, seed=3, workers=2, **settings)
    assert facts(one) == facts(two)
    assert facts(one)["episodes"] != facts(tried(Scripted(), head="noisy", batch=4, seed=4, **settings))["episodes"]


def test_without_draws_results_do_not_depend_on_the_batch() -> None:
    one, many = (tried(Scripted(), batch=batch) for batch in (1, 7))
    assert one["episodes"] == many["episodes"]


def test_start_states_depend_on_seed_task_and_number_alone() -> None:
    seeds = {start_seed(s, t, n) for s in range(3) for t in ("near", "far") for n in range(5)}
    assert len(seeds) == 30
    short, long = tried(Scripted(), ("far",), 2), tried(Scripted(), ("near", "far"), 3)
    assert [e["seed"] for e in short["episodes"]] == [e["seed"] for e in long["episodes"] if e["task"] == "far"][:2]


def test_start_states_are_not_those_of_recorded_demonstrations() -> None:
    from actok.evaluation.record import demonstrate

    env = PointMass()
    for number in range(3):
        shown = demonstrate(env, "near", seed=0, attempt=number, max_steps=2).start_state["position"]
        assert not np.array_equal(env.reset("near", seed=start_seed(0, "near", number)).proprio[:2], np.float32(shown))


class Listed(PointMass):
    """A point mass whose start states are a list of four."""

    starts = 4

    def reset(self, task: str, *, seed: int) -> Observation:
        return super().reset(task, seed=seed % 4)


def test_listed_start_states_all_come_before_one_comes_twice() -> None:
    for seed in range(5):
        result = rollout(Listed(), Scripted(), ["near"], 4, seed=seed, workers=1, progress=False)
        assert {e["seed"] % 4 for e in result["episodes"]} == set(range(4))
    with pytest.warns(UserWarning, match="4 start states, so 5 episodes repeat some"):
        rollout(Listed(), Scripted(), ["near"], 5, workers=1, progress=False)


def test_a_deadline_reaches_the_policy_and_is_refused_where_no_prefix_decodes(monkeypatch) -> None:
    policy = Scripted()
    assert tried(policy)["deadline_ms"] is None
    assert policy.deadlines == {None}
    with pytest.raises(ConfigError, match="tokens of 'bins' have no action before the last pass"):
        tried(policy, deadline_ms=30.0)
    layout = replace(policy.tokenizer.layout_for(HORIZON), prefixes=(3,))
    monkeypatch.setattr(policy.tokenizer, "layout_for", lambda *_: layout)
    policy.deadlines.clear()
    assert tried(policy, deadline_ms=30.0)["deadline_ms"] == 30.0
    assert policy.deadlines == {0.03}
    with pytest.raises(ConfigError, match=r"deadline_ms is 0\.0"):
        tried(policy, deadline_ms=0.0)


def test_fewer_steps_of_each_chunk_mean_more_calls() -> None:
    whole, part = tried(Scripted(), ("far",)), tried(Scripted(), ("far",), execute=2)
    assert part["execute"] == 2
    for a, b in zip(whole["episodes"], part["episodes"], strict=True):
        assert a["calls"] == -(-a["steps"] // HORIZON)
        assert b["calls"] == -(-b["steps"] // 2)


def test_ensembling_averages_what_overlaps_with_the_oldest_first() -> None:
    class Counting(Scripted):
        """Chunk c says 0.01 c in its first dimension, at each of its steps."""

        def act(self, observation, **rest: Any) -> Acted:
            acted = super().act(observation, **rest)
            calls = len(self.batches)
            return Acted(
                actions=np.full_like(acted.actions, 0.01 * calls), valid=acted.valid, reasons=acted.reasons, passes=1
            )

    class Remembering(PointMass):
        pass

    policy, weight = Counting(), 0.7
    seen: list[float] = []
    original = PointMass.step

    def step(self, action):
        seen.append(float(action[0]))
        return original(self, action)

    Remembering.step = step
    import actok.evaluation.vector as vector_module

    real = vector_module.pickle
    vector_module.pickle = _Direct(Remembering())
    try:
        tried(policy, ("never",), 1, ensemble=weight)
    finally:
        vector_module.pickle = real
    for now, value in enumerate(seen):
        ages = range(max(0, now - HORIZON + 1), now + 1)
        shares = np.exp(-weight * np.arange(len(ages)))
        expected = np.sum(shares * [0.01 * (c + 1) for c in ages]) / shares.sum()
        assert value == pytest.approx(expected, abs=1e-6)
    assert len(seen) == PointMass.max_steps


class _Direct:
    """Stands in for pickling, so that the test can watch the environment itself."""

    def __init__(self, env: Env) -> None:
        self._env = env

    def dumps(self, env: Env) -> bytes:
        return b""

    def loads(self, data: bytes) -> Env:
        return self._env


def test_nothing_invalid_is_executed() -> None:
    result = tried(Scripted(), ("far",), head="broken")
    assert result["rate"] == 0.0
    assert result["invalid"] == result["per_task"]["far"]["invalid"] == 5
    for episode in result["episodes"]:
        assert episode["invalid"] == "the goal is too near"
        assert episode["steps"] == HORIZON * (episode["calls"] - 1), "what was executed are the valid chunks before"


def test_tasks_are_those_of_the_training_data_unless_named() -> None:
    assert list(tried(Scripted(), None, 1)["per_task"]) == ["near", "far"]
    policy = Scripted()
    policy.meta = {"task_steps": {"near": 11.0, "fly": 3.0}}
    with pytest.warns(UserWarning, match="also trained on fly"):
        assert list(tried(policy, None, 1)["per_task"]) == ["near"]
    policy.meta = {}
    with pytest.raises(ConfigError, match="it names none"):
        tried(policy, None, 1)
    assert tried(policy, ["near"], 1)["per_task"]["near"]["limit"] == PointMass.max_steps


def test_tasks_that_the_data_call_by_their_words_are_found_by_instruction() -> None:
    policy = Scripted()
    policy.meta = {"task_steps": {"go to the far goal and press": 38.0, "near": 11.0, "fly": 3.0}}
    with pytest.warns(UserWarning, match="also trained on fly, which"):
        found = tried(policy, None, 1)["per_task"]
    assert {task: row["limit"] for task, row in found.items()} == {"near": 17, "far": 57}
    assert tried(policy, ["far", "half"], 1)["per_task"]["far"]["limit"] == 57
    policy.meta = {"task_steps": {f"fly {n} times": 3.0 for n in range(7)}}
    with pytest.raises(ConfigError, match=r"neither by name nor by instruction \(fly 0 times, .* and 2 more\)"):
        tried(policy, None, 1)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "flow"}, "no head 'flow'; it has exact, noisy"),
        ({"execute": 6}, "execute is 6, but the policy's chunks have 5 steps"),
        ({"execute": 0}, "execute is 0"),
        ({"execute": 2, "ensemble": 0.1}, "predicts at every step"),
        ({"ensemble": -1.0}, "ensemble is -1.0"),
        ({"limit": 0}, "limit is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"record": 1}, "no folder for the pictures; give out"),
        ({"record": 1, "out": "x"}, "'pointmass' names no default_views"),
        ({"tasks": ("nearr",)}, "did you mean 'near'"),
        ({"tasks": ("near", "near")}, "each once"),
        ({"episodes": 0}, "episodes is 0"),
        ({"episodes": 10**26}, "give at most 1000000 of each task"),
        ({"limit": float("nan")}, "limit is nan"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tried(Scripted(), **settings)


def test_a_policy_of_another_robot_is_refused() -> None:
    groups = (replace(SPACE.groups[0], unit="rad", kind="joint", mode="absolute", scale=None), SPACE.groups[1])
    with pytest.raises(SpaceMismatchError, match="position kind: joint against position"):
        tried(Scripted(replace(SPACE, groups=groups)))
    stranger = Scripted(replace(SPACE, groups=groups))
    stranger.meta = {"task_steps": {"fly": 3.0}}
    with pytest.raises(SpaceMismatchError, match="joint against position"):  # not: name other tasks
        tried(stranger, None)
    with pytest.raises(SpaceMismatchError, match="gives 9 actions a second, environment 'pointmass' takes 7"):
        tried(Scripted(replace(SPACE, rate_hz=9.0)))
    with pytest.raises(SpaceMismatchError, match="a state of 4 numbers, environment 'pointmass' gives 5"):
        tried(Scripted(proprio=4))
    with pytest.raises(
        SpaceMismatchError, match=r"looks through top, left; .*'pointmass' shows no images; make it with"
    ):
        tried(Scripted(views=("top", "left")))


def test_another_robot_of_the_same_action_space_is_told() -> None:
    with pytest.warns(UserWarning, match=r"trained on 'cousin' and environment 'pointmass' is"):
        tried(Scripted(replace(SPACE, embodiment="cousin")), ("near",), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried(Scripted(), ("near",), 1)


def test_a_policy_of_poses_is_not_let_loose_on_joints() -> None:
    joints = (
        replace(SPACE.groups[0], unit="rad", kind="joint", mode="absolute", scale=1.0, name="arm"),
        SPACE.groups[1],
    )
    poses = (replace(SPACE.groups[0], name="arm_position", mode="absolute"), SPACE.groups[1])

    class Joints(PointMass):
        space = replace(SPACE, groups=joints)

    with pytest.raises(
        SpaceMismatchError, match=r"a kinematic model made of the joints of arm; .* does not turn poses"
    ):
        rollout(Joints(), Scripted(replace(SPACE, groups=poses)), ["near"], 1, workers=1, progress=False)


# -- Meta-World, and pictures -----------------------------------------------------------------------------------------


class Pushing(Scripted):
    """Presses forward; solves some start states of a button, fails at reaching."""

    def __init__(self, space: ActionSpace, **rest: Any) -> None:
        super().__init__(space, **rest)
        self.meta = {"task_steps": {"reach-v3": 8.0, "button-press-v3": 90.0}}

    heads = ("forward",)

    def act(self, observation: PolicyObservation, **rest: Any) -> Acted:
        n = len(observation)
        actions = np.tile(np.array([0, 1, 0, 1], np.float32), (n, HORIZON, 1))
        # Level with the button first: its height and side are in the state (21 numbers, objects from the fourth on).
        for b, state in enumerate(observation.proprio):
            aim = np.clip(10 * (state[4:7] - state[:3]), -1, 1)
            actions[b, :, [0, 2]] = np.array([aim[0], aim[2]])[:, None]
        return Acted(actions=actions, valid=np.ones(n, bool), reasons=[None] * n, passes=1)


def test_meta_world_policies_are_filmed_at_what_they_do(tmp_path) -> None:
    pytest.importorskip("metaworld")
    from PIL import Image

    env = make_env("metaworld-state")
    policy = Pushing(env.space, proprio=21)
    result = rollout(
        env, policy, ["button-press-v3", "reach-v3"], 2, workers=1, record=2, out=tmp_path, progress=False, limit=1.5
    )
    assert result["per_task"]["reach-v3"] | {"ci95": 0} == {
        "n": 2, "success": 0, "rate": 0.0, "ci95": 0, "invalid": 0, "limit": 12, "steps_to_success": None,
    }  # fmt: skip
    assert result["per_task"]["button-press-v3"]["success"] == 2
    assert [r["success"] for r in result["recordings"]] == [True, False]
    for recording in result["recordings"]:
        assert recording["reproduced"]
        with Image.open(tmp_path / recording["sheet"]) as sheet:
            pixels = np.asarray(sheet)
        assert pixels[:224, :224].std() > 10, "there is something to see"
        assert not np.array_equal(pixels[:224, :224], pixels[:224, -224:]), "and it moves"
    with pytest.raises(SpaceMismatchError, match="a state of 21 numbers, environment 'metaworld' gives 26"):
        rollout(make_env("metaworld"), policy, ["reach-v3"], 1, workers=1)


def test_a_contact_sheet_shows_first_and_last_frame_at_equal_intervals() -> None:
    frames = np.stack([np.full((20, 30, 3), 5 * n, np.uint8) for n in range(29)])
    sheet = np.asarray(contact_sheet(frames, 3 * np.arange(29), "go", "success"))
    assert sheet.shape == (2 * 36 + 32, 4 * 30, 3)
    shown = [int(sheet[36 * row, 30 * column, 0]) // 5 for row in range(2) for column in range(4)]
    assert shown == [0, 4, 8, 12, 16, 20, 24, 28]
    few = np.asarray(contact_sheet(frames[:3], np.arange(3), "go", "failure"))
    assert few.shape[1] == 3 * 30


def test_a_video_holds_the_frames(tmp_path) -> None:
    av = pytest.importorskip("av")
    frames = np.stack([np.full((34, 46, 3), 8 * n, np.uint8) for n in range(23)])
    write_video(tmp_path / "film.mp4", frames, 26.5)
    with av.open(str(tmp_path / "film.mp4")) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate)
    assert len(read) == 23
    assert rate == pytest.approx(26.5)
    assert [abs(int(image.mean()) - 8 * n) < 6 for n, image in enumerate(read)] == [True] * 23


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """An untrained policy for Meta-World's state variant, small enough to act at once."""
    pytest.importorskip("metaworld")
    from actok.policies.prompt import StateRange
    from actok.policies.tiny import TinyConfig, TinyVLM
    from actok.policies.vla import VLA, VLAConfig

    space = make_env("metaworld-state").space
    rng = np.random.default_rng(0)
    part = FitPart(actions=np.clip(rng.normal(size=(29, HORIZON, space.dim)), -1, 1).astype(np.float32), space=space)
    backbone = TinyVLM.create(TinyConfig(width=32, layers=1, heads=2), ["move the gripper to the goal"], ())
    policy = VLA.create(
        backbone,
        BinsTokenizer.fit([part], BinsConfig(bins=17)),
        VLAConfig(),
        state=StateRange(low=-np.ones(21), high=np.ones(21)),
        meta={"task_steps": {"reach-v3": 9.0}},
    )
    folder = tmp_path_factory.mktemp("policy") / "small"
    policy.save_pretrained(folder)
    return str(folder)


def test_a_policy_made_by_hand_can_be_looked_at(saved: str, capsys) -> None:
    from actok.cli import main

    assert main(["inspect", saved]) == 0
    text = capsys.readouterr().out
    assert "demonstrations of 9 steps on average" in text
    assert "not trained by actok train-policy" in text


def test_the_verb_writes_result_and_page_and_prints_the_table(saved: str, tmp_path, capsys) -> None:
    from actok.cli import main

    arguments = ["--policy", saved, "--env", "metaworld-state", "--episodes", "2", "--workers", "1"]
    arguments += ["--set", "temperature=0", "top_k=3"]
    assert main(["rollout", *arguments, "--out", str(tmp_path / "r"), "--record", "0"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "r" / "rollout.json").read_text())
    page = (tmp_path / "r" / "rollout.html").read_text()
    assert list(result["per_task"]) == ["reach-v3"]
    assert [e["steps"] for e in result["episodes"] if not e["success"]] == [14] * (2 - sum(result["success"]))
    assert result["policy"]["source"] == saved
    assert result["invalid"] == 0
    assert result["set"] == result["policy"]["decoding"] == {"temperature": 0, "top_k": 3}
    assert "temperature set to 0, top_k set to 3" in printed
    assert "temperature 0, top_k 3" in page
    assert "reach-v3" in printed
    assert f"of {HORIZON} steps of each chunk executed" in printed
    assert f"head {result['head']}" in page
    assert "http" not in page, "nothing is loaded from elsewhere"

    from actok.benchmark.rollouts import render_rollout

    (tmp_path / "sheet.png").write_bytes(b"picture")
    film = {"task": "a<b", "number": 3, "success": True, "steps": 5, "view": "top", "sheet": "sheet.png"}
    result["recordings"] = [film | {"video": "film.mp4", "reproduced": False}]
    shown = render_rollout(result, tmp_path)
    assert "a&lt;b, episode 3: success" in shown
    assert "data:image/png;base64,cGljdHVyZQ==" in shown
    assert 'href="film.mp4"' in shown
    assert "Not reproduced" in shown
    assert "Not reproduced" not in page


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("metaworld-state/rech-v3", "did you mean 'reach-v3'"),
        ("metaworld-state/", "give NAME, NAME/all or NAME/TASK,TASK"),
        ("metaworld", "a state of 21 numbers, environment 'metaworld' gives 26"),
        ("metaworld/reach-v3", "training data came from ('metaworld-state' gives 21)"),
        ("metawrld", "no environment is called 'metawrld'"),
        ("metaworld-state --set block=3", "block is not to be set when this policy acts, only temperature, top_k"),
        ("metaworld-state --set top_k=-1", "top_k is -1"),
        ("metaworld-state --episodes 0", "episodes is 0"),
        ("metaworld-state --device gpu", "device 'gpu' cannot be used"),
        ("metaworld-state --device meta", "device 'meta' cannot be used"),
        (
            "metaworld-state --device cuda:99",
            "name one that this machine has, such as cpu, cuda or cuda:1, or leave it out",
        ),
        ("metaworld-state --limit 0", "limit is 0.0; give a factor above 0, or inf for the environment's own limit"),
    ],
)
def test_the_verb_names_what_does_not_fit(saved: str, env: str, words: str, tmp_path, capsys) -> None:
    from actok.cli import main

    arguments = ["rollout", "--policy", saved, "--workers", "1", "--env", *env.split()]
    assert main([*arguments, "--out", str(tmp_path / "made" / "new")]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "no folder is left where nothing was written"


def test_an_out_that_cannot_be_written_to_is_refused_before_anything_runs(saved: str, tmp_path, capsys) -> None:
    from actok.cli import main

    (tmp_path / "notes").write_text("remember the milk")
    for out in ("notes", "notes/deeper/rollout"):
        assert main(["rollout", "--policy", saved, "--env", "metaworld", "--out", str(tmp_path / out)]) == 1
        assert f"{tmp_path / 'notes'} is no folder that can be written to" in capsys.readouterr().err


def test_a_folder_that_is_no_whole_policy_is_named_with_what_it_is(saved: str, tmp_path, capsys) -> None:
    import shutil

    from actok.cli import main

    shutil.copytree(saved, tmp_path / "p")
    config = tmp_path / "p" / "config.json"
    text = config.read_text()
    told = {}
    for case, damage in {
        "cut": lambda: config.write_text(text[:99]),
        "other": lambda: config.write_text("{}"),
        "gone": config.unlink,
    }.items():
        damage()
        assert (
            main(["rollout", "--policy", str(tmp_path / "p"), "--env", "metaworld-state", "--out", str(tmp_path)]) == 1
        )
        told[case] = capsys.readouterr().err
    assert "config.json is truncated or edited, no longer JSON" in told["cut"]
    assert "holds no policy; name a folder" in told["other"]
    assert "holds no policy, for want of a config.json" in told["gone"]
    tokenizer = f"{saved}/tokenizer"
    assert main(["rollout", "--policy", tokenizer, "--env", "metaworld-state", "--out", str(tmp_path)]) == 1
    assert (
        f"holds a tokenizer, no policy; train one that acts through it (actok train-policy --tokenizer {tokenizer}"
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize(
    ("trained", "given", "precision"),
    [("no", [], "float32"), ("bf16", [], "float32"), ("no", ["--precision", "bf16"], "bf16"), (None, [], "float32")],
)
def test_where_and_how_exactly_a_policy_acts_is_told(
    saved: str, trained, given, precision, tmp_path, monkeypatch, capsys
) -> None:
    from actok.cli import main
    from actok.policies import load

    meta = {} if trained is None else {"training": {"config": {"precision": trained}}}
    found = load.load_policy(saved).with_meta(meta)
    monkeypatch.setattr(load, "load_policy", lambda source: found)
    line = [
        "rollout",
        "--policy",
        saved,
        "--env",
        "metaworld-state",
        "--episodes",
        "1",
        "--workers",
        "1",
        "--record",
        "0",
    ]
    assert main([*line, *given, "--limit", "inf", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert f"the policy acts on {found.state_dict()['backbone.table'].device} in {precision}" in told
    assert ("though it was trained in bf16" in told) == (trained == "bf16" and precision == "float32")
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert (result["policy"]["device"], result["policy"]["precision"]) == ("cpu", precision)
    assert result["invalid"] == 0
    assert result["limit"] is None
    assert result["per_task"]["reach-v3"]["limit"] == make_env("metaworld-state").max_steps
    assert f"in {precision}" in (tmp_path / "rollout.html").read_text()


def test_what_the_precision_is_where_none_is_named() -> None:
    from actok.benchmark.rollouts import _set_up

    policy = Scripted()
    for trained, device, told in (
        ("no", "cuda", "on cuda in float32"),
        ("bf16", "cpu", "trained in bf16 (--precision bf16)"),
    ):
        policy.meta = {"training": {"config": {"precision": trained}}}
        assert _set_up(policy, torch.device(device), None)[1].endswith(told)
    with pytest.raises(ConfigError, match="acts in float32 only, not in bf16"):
        _set_up(policy, torch.device("cuda"), None)


def test_memory_that_is_too_small_is_said_with_what_helps(saved: str, tmp_path, monkeypatch, capsys) -> None:
    from actok.cli import main

    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("actok.evaluation.rollout.rollout", full)
    assert main(["rollout", "--policy", saved, "--env", "metaworld-state", "--out", str(tmp_path / "r")]) == 1
    said = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB.); give precision bf16, a smaller batch, or device cpu" in said


def test_views_have_the_size_of_the_training_images() -> None:
    pytest.importorskip("metaworld")
    from actok.benchmark.rollouts import environment_for, split_env

    policy = Scripted(views=("observation.images.corner2",))
    policy.meta = {"image_sizes": {"observation.images.corner2": [48, 48]}}
    assert environment_for(policy, "metaworld").made_with == {"views": ("corner2",), "image_size": 48}
    assert environment_for(policy, "metaworld", 32).made_with == {"views": ("corner2",), "image_size": 32}
    policy.meta = {"image_sizes": {"observation.images.corner2": [48, 64]}}
    with pytest.raises(ConfigError, match="sides of 48, 64 pixels"):
        environment_for(policy, "metaworld")
    with pytest.raises(ConfigError, match="the policy looks at none"):
        environment_for(Scripted(), "metaworld", 32)
    assert split_env("a-b/c,d") == ("a-b", ["c", "d"])
    assert split_env("a") == ("a", None)
