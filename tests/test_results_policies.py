"""How the results of policies are made: jobs, command lines, specifications, comparisons, pages."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actok.core import DataError, FitPart, build_config, find_preset, parse_assignments
from actok.core.registry import load_target
from actok.evaluation.intervals import compare_paired, wilson
from actok.policies.presets import find_policy_preset
from actok.policies.tiny import TinyConfig
from actok.policies.vla import VLAConfig
from actok.training.config import TrainConfig
from actok.training.policy_stages import policy_train_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from results import policies, policies_make
from results.places import Places
from results.policies import BLOCKS_OF, HYBRID, MAIN, POLICY_JOBS, PRESET, SEEDS, SUITES, TOKENIZERS
from results.policies_asked import Studio
from results.policies_hybrid_pages import PUBLISHED_HYBRID, STAGES, blocks_page, latency_page, ordering
from results.policies_make import groups
from results.policies_pages import load_rolls, write_policy_pages
from results.policies_success_pages import commands
from results.policies_tables import exceeding, holm, pairs, rank_correlation, slim_rollout, summary
from results.xtokenizer import NONE

METAWORLD = SUITES["metaworld"]
QUIET = {"say": lambda _: None}


@pytest.fixture
def studio(tmp_path) -> Studio:
    """Empty places, and demonstrations of a few bytes."""
    made = Studio(places=Places(work=tmp_path / "work", pages=tmp_path / "pages"), teacher=str(tmp_path / "teacher"))
    (tmp_path / "teacher").mkdir()
    for suite in SUITES.values():
        folder = Path(made.data(suite).path)
        folder.mkdir(parents=True)
        (folder / "episodes.npz").write_bytes(b"0" * 11)
    return made


def write(path: Path, body) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_JOBS)
def test_a_policy_is_asked_for_on_the_command_line_as_its_table_says(name, studio):
    job = POLICY_JOBS[name]
    write(studio.tokenizer(SUITES[job.suite], job.tokenizer) / "config.json", {"weights_hash": "abc"})
    spec = studio.policy_specification(job)
    command = studio.policy_command(job, spec)
    preset = find_policy_preset(PRESET)
    given = command[command.index("--set") + 1 :] if "--set" in command else []
    last = command.index("--set") if given else len(command)
    trained = parse_assignments(command[command.index("--train") + 1 : last])
    config = build_config(VLAConfig, {**preset.policy, **parse_assignments(given)}, name)
    asked = {k: v for k, v in spec["settings"].items() if k != "backbone"}
    assert config == build_config(VLAConfig, asked, name)
    assert policy_train_config(preset.training, trained, name) == policy_train_config({}, spec["training"], name)
    assert spec["training"]["seed"] == job.seed
    assert tuple(config.heads) == job.heads
    assert build_config(TinyConfig, {k: v for k, v in spec["settings"]["backbone"].items() if k != "kind"}, name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_asked_for_on_the_command_line_as_its_table_says(name, studio):
    job = TOKENIZERS[name]
    preset = find_preset(job.preset)
    spec = studio.tokenizer_specification(METAWORLD, job)
    command = studio.tokenizer_command(METAWORLD, job, spec)
    target = load_target(preset.target)
    assert build_config(target.config_class, spec["settings"], name)
    assert target.learned == (job.steps is not None)
    assert ("--features" in command) == job.features
    assert command[command.index("--data") + 1] == studio.data(METAWORLD).path
    if job.steps is None:
        assert "--train" not in command
        return
    end = next((i for i, word in enumerate(command) if word in ("--features", "--align")), len(command))
    trained = parse_assignments(command[command.index("--train") + 1 : end])
    assert build_config(TrainConfig, {**preset.training, **trained}, name) == build_config(
        TrainConfig, spec["training"], name
    )
    assert spec["training"]["steps"] == job.steps
    weights = {k: spec["alignment"].get(k) for k in NONE}
    assert (weights == dict(NONE)) == (name == "plain-rvq")


def test_what_is_compared_differs_in_one_thing():
    for suite in SUITES:
        for tokenizer in MAIN:
            assert {f"{suite}-{tokenizer}-{seed}" for seed in SEEDS} <= set(POLICY_JOBS)
    specs = {(j.suite, j.variant, j.seed): j.resolved(7) for j in POLICY_JOBS.values()}
    for (_, _, seed), (_, training) in specs.items():
        assert training == specs["metaworld", "bins", seed][1]
    flow = [specs["metaworld", variant, 0][0] for variant in HYBRID]
    assert all({**settings, "heads": None} == {**flow[0], "heads": None} for settings in flow)
    own = specs["metaworld", BLOCKS_OF, 0][0]
    for name, settings in policies.BLOCKS.items():
        assert specs["metaworld", name, 0][0] == {**own, **settings}
    assert {f"metaworld-{t}-{s}" for t in TOKENIZERS for s in SEEDS} <= set(POLICY_JOBS)
    assert {f"robosuite-lift-{t}-0" for t in TOKENIZERS} <= set(POLICY_JOBS)
    assert set(PUBLISHED_HYBRID) == set(HYBRID)
    # 21 codes: 21 is one pass, and none of the others is the tokenizer's own.
    chunks = np.random.default_rng(0).normal(size=(53, policies.HORIZON, 4)).astype(np.float32)
    space = replace(policies_make.open_dataset([chunks[0]], space="metaworld_sawyer").space, embodiment="arm")
    preset = find_preset(BLOCKS_OF)
    target = load_target(preset.target)
    layout = target.prepare(
        [FitPart(actions=chunks, space=space)], build_config(target.config_class, preset.settings, BLOCKS_OF)
    ).layout_for(policies.HORIZON)
    assert layout.fixed_length == 21
    assert [len(block) for block in layout.blocks] == [7, 7, 7]


def test_jobs_come_in_groups_that_are_compared():
    found = groups(POLICY_JOBS)
    assert [name for part in found for name in part] == list(POLICY_JOBS)
    assert set(found[0]) == {f"metaworld-{t}-0" for t in MAIN}
    assert all(len({(job.suite, job.seed) for job in part.values()}) == 1 for part in found)


def test_rollouts_of_a_seed_differ_in_the_policy_alone(studio):
    specs = []
    for name, weights in (("metaworld-bins-1", "a"), ("metaworld-flow+fast-1", "b")):
        job = POLICY_JOBS[name]
        assert studio.rollout_specification(job, job.heads[0]) is None
        write(studio.policy(job) / "config.json", {"files": {"model.safetensors": weights}})
        specs.append(studio.rollout_specification(job, "tokens"))
        command = studio.rollout_command(job, "tokens", specs[-1])
        assert command[command.index("--env") + 1] == "metaworld-state/" + ",".join(METAWORLD.tasks)
        assert command[command.index("--seed") + 1] == "1"
        assert command[command.index("--workers") + 1] == "1"
    first, second = specs
    assert first.pop("policy") != second.pop("policy")
    assert first == second


# -- keeping and adopting ---------------------------------------------------------------------------------------------


class Data:
    """As much of a data set as is asked for."""

    def __init__(self, tasks) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)


def asked(monkeypatch, tasks):
    found = []
    monkeypatch.setattr(policies_make, "run_tasks", lambda tasks, places, **_: found.extend(tasks) or [])
    monkeypatch.setattr(policies_make, "open_dataset", lambda path, **_: Data(tasks))
    return found


def test_demonstrations_that_are_there_are_taken_where_they_are_what_is_asked_for(studio, monkeypatch):
    chosen = {"metaworld-bins-0": POLICY_JOBS["metaworld-bins-0"]}
    whole = [task for task in METAWORLD.tasks for _ in range(studio.demonstrations(METAWORLD))]
    asked(monkeypatch, whole[1:])
    with pytest.raises(DataError, match="move it away"):
        policies_make.collect(studio, chosen, jobs=1, **QUIET)
    found = asked(monkeypatch, whole)
    assert policies_make.collect(studio, chosen, jobs=1, **QUIET) == []
    assert found == []
    spec = studio.root / "collected" / METAWORLD.data / "spec.json"
    assert json.loads(spec.read_text())["episodes"] == studio.demonstrations(METAWORLD)
    monkeypatch.setattr(policies, "SUITES", {"metaworld": replace(METAWORLD, tasks=METAWORLD.tasks[:3])})
    policies_make.collect(studio, chosen, jobs=1, **QUIET)
    (task,) = found
    assert "--tasks reach-v3,push-v3,pick-place-v3 " in " ".join(task.command)
    assert not Path(studio.data(METAWORLD).path).exists()  # `actok collect` wants an empty place


def identity(studio: Studio, name: str, **changes) -> dict:
    """As `actok fit` leaves it in run.json."""
    job = TOKENIZERS[name]
    spec = studio.tokenizer_specification(METAWORLD, job)
    data = {"name": METAWORLD.data, "episodes": 7, "horizon": policies.HORIZON, "split": {"seed": 0}}
    read = {"features": ["abc"], "teachers": [{"model": "a/teacher"}]} if job.features else {"features": []}
    aligned = {**spec["alignment"], **read} if spec["alignment"] else None
    body = {
        "tokenizer": spec["preset"],
        "settings": {**spec["settings"], "more": 1},
        "training": {**spec["training"], "log_every": 200, "precision": "no"},
        "data": [data],
        "alignment": aligned,
    }
    return {"identity": {**body, **changes}}


@pytest.mark.parametrize("name", ["oat-tiny", "xtokenizer-tiny", "plain-rvq"])
def test_a_tokenizer_of_the_same_command_is_adopted(name, studio, monkeypatch):
    asked(monkeypatch, ["reach-v3"] * 7)
    job = TOKENIZERS[name]
    spec = studio.tokenizer_specification(METAWORLD, job)
    folder = studio.tokenizer_job(METAWORLD, name)

    def kept() -> bool:
        return policies_make._kept_tokenizer(studio, METAWORLD, job, spec)

    assert not kept()
    write(studio.tokenizer(METAWORLD, name) / "config.json", {"weights_hash": "abc"})
    assert not kept()  # nothing says how it was made
    wrong = identity(studio, name)
    other = {
        "training": {**wrong["identity"]["training"], "steps": 17},
        "tokenizer": "bins",
        "data": [{**wrong["identity"]["data"][0], "episodes": 6}],
        "alignment": {**spec["alignment"], "features": ["abc"], "teachers": [{"model": "another"}]},
    }
    for key, value in other.items():
        write(folder / "run" / "run.json", identity(studio, name, **{key: value}))
        assert not kept(), key
    write(folder / "run" / "run.json", identity(studio, name))
    assert kept()
    (folder / "run" / "run.json").unlink()
    assert kept()  # by its specification from now on
    (Path(studio.data(METAWORLD).path) / "episodes.npz").write_bytes(b"0" * 13)
    spec = studio.tokenizer_specification(METAWORLD, job)
    assert not kept()


def test_features_are_made_before_the_tokenizer_that_reads_them(studio, monkeypatch):
    found = asked(monkeypatch, [])

    def missing(*_):
        raise DataError("none")

    monkeypatch.setattr(policies_make, "open_features", missing)
    chosen = {n: POLICY_JOBS[n] for n in ("metaworld-bins-0", "metaworld-xtokenizer-tiny-0", "metaworld-bins-1")}
    policies_make.fit_tokenizers(studio, chosen, jobs=1, **QUIET)
    assert [task.name for task in found] == [
        "features of metaworld",
        "bins of metaworld",
        "xtokenizer-tiny of metaworld",
    ]
    found.clear()
    policies_make.fit_tokenizers(replace(studio, teacher=None), chosen, jobs=1, **QUIET)
    assert [task.name for task in found] == ["bins of metaworld"]


def test_a_policy_is_trained_again_when_its_tokenizer_is_another(studio, monkeypatch):
    found = asked(monkeypatch, [])
    job = POLICY_JOBS["metaworld-bins-0"]
    chosen = {job.name: job}
    policies_make.train_policies(studio, chosen, jobs=1, **QUIET)
    assert found == []  # no tokenizer
    write(studio.tokenizer(METAWORLD, "bins") / "config.json", {"weights_hash": "abc"})
    policies_make.train_policies(studio, chosen, jobs=1, **QUIET)
    assert [task.name for task in found] == [job.name]
    write(studio.policy_job(job) / "spec.json", found.pop().spec)
    write(studio.policy(job) / "config.json", {"files": {"model.safetensors": "a"}})
    policies_make.train_policies(studio, chosen, jobs=1, **QUIET)
    assert found == []
    policies_make.roll_out(studio, chosen, jobs=1, **QUIET)
    assert [task.name for task in found] == ["metaworld-bins-0-tokens"]
    assert found.pop().accepted == (0, 3)
    write(studio.tokenizer(METAWORLD, "bins") / "config.json", {"weights_hash": "xyz"})
    policies_make.train_policies(studio, chosen, jobs=1, **QUIET)
    assert [task.name for task in found] == [job.name]


# -- figures ----------------------------------------------------------------------------------------------------------

TASKS = ("reach-v3", "push-v3", "door-open-v3")


def rolled(success: str, *, tokens: float = 21.0, ms: float = 10.0, seed: int = 0, passes: float = 3.0) -> dict:
    """A rollout.json; `success` has one mark an episode, task by task."""
    each = len(success) // len(TASKS)
    episodes = [
        {"task": task, "number": n, "seed": 100 * seed + n, "success": success[t * each + n] == "1", "invalid": None}
        for t, task in enumerate(TASKS)
        for n in range(each)
    ]
    marks = [e["success"] for e in episodes]
    stage = {"p50": ms, "p95": 2 * ms}
    return {
        "episodes": episodes,
        "success": marks,
        "rate": float(np.mean(marks)),
        "ci95": list(wilson(sum(marks), len(marks))),
        "per_task": {task: {"limit": 101} for task in TASKS},
        "invalid": 0,
        "clipped": 5,
        "chunks": 10 * len(marks),
        "passes": passes,
        "steps_to_success": 50.0,
        "latency": {"single": {"n": 7, "ms": {"images": stage, "total": stage}}},
        "policy": {
            "parameters": 1234,
            "meta": {"tokens": {"mean": tokens}, "training": {"steps": 11, "seconds": 3.0, "losses": {}}},
        },
        "provenance": {
            "actok": "0.1.0",
            "commit": "f00",
            "cpu": "a processor",
            "packages": {"torch": "2"},
            "created": f"2026-01-0{seed + 1}",
            "seed": seed,
        },
    }


def test_all_seeds_together_are_all_their_episodes():
    rolls = {s: slim_rollout(rolled(marks, seed=s)) for s, marks in ((0, "110011000"), (1, "111111000"))}
    found = summary(rolls)
    assert (found["n"], found["success"]) == (18, 10)
    assert found["ci95"] == list(wilson(10, 18))
    assert found["per_task"]["push-v3"] == {"n": 6, "success": 5, "rate": 5 / 6, "ci95": list(wilson(5, 6))}
    assert found["clipped"] == 10
    assert set(found["seeds"]) == {"0", "1"}
    assert summary({}) == {}


def test_pairs_are_of_the_start_states_that_both_met():
    rng = np.random.default_rng(0)
    marks = {name: "".join(rng.choice(list("01"), 51, p=p)) for name, p in (("a", (0.2, 0.8)), ("b", (0.8, 0.2)))}
    rolls = {
        "a": {0: slim_rollout(rolled(marks["a"])), 1: slim_rollout(rolled("1" * 51, seed=1))},
        "b": {0: slim_rollout(rolled(marks["b"]))},
        "none": {},
    }
    (found,) = pairs(rolls)
    expected = compare_paired(*(np.array([m == "1" for m in marks[name]]) for name in "ab"))
    assert found["n"] == 51
    assert found["difference"] == pytest.approx(expected.difference)
    assert found["ci95"] == [expected.low, expected.high]
    assert found["exceeds"]
    assert found["p_value"] == found["p_holm"] == expected.p_value
    text = exceeding([found])
    assert f"a over b by {100 * expected.difference:.1f} points" in text
    assert "1 of 1 difference exceed" in text
    turned = {
        **found,
        "a": "b",
        "b": "a",
        "difference": -found["difference"],
        "ci95": [-v for v in found["ci95"][::-1]],
    }
    assert exceeding([turned]) == text
    assert "0 of 1" in exceeding([{**found, "exceeds": False, "p_holm": 1.0}])
    assert pairs({"b": rolls["b"], "c": {1: rolls["a"][1]}}) == []


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_rank_correlation_reads_order_alone():
    x = [1.0, 2.0, 5.0, 7.0, 11.0, 13.0, 17.0]
    falling = rank_correlation(x, [-(v**3) for v in x])
    assert falling is not None
    assert falling["rho"] == pytest.approx(-1.0)
    assert falling["p_value"] < 0.01
    mixed = rank_correlation(x, [3.0, 1.0, 2.0, 5.0, 4.0, 1.5, 2.5])
    assert mixed is not None
    assert mixed["p_value"] > 0.05
    assert rank_correlation(x[:3], x[:3]) is None
    assert rank_correlation(x, [0.5] * len(x)) is None


def test_the_published_order_is_found_where_it_is_there():
    assert ordering(dict(PUBLISHED_HYBRID), PUBLISHED_HYBRID).startswith("The published order appears: flow <")
    swapped = {**PUBLISHED_HYBRID, "flow": 99.0}
    assert "does not appear; here it is flow+plain-rvq <" in ordering(swapped, PUBLISHED_HYBRID)
    assert "does not appear" in ordering(dict.fromkeys(PUBLISHED_HYBRID, 1.0), PUBLISHED_HYBRID)
    assert ordering({"flow": 1.0}, PUBLISHED_HYBRID).startswith("Not yet measured: flow+plain-rvq")


# -- pages ------------------------------------------------------------------------------------------------------------


def roll(studio: Studio, name: str, head: str, body: dict) -> None:
    """A rollout as the stage leaves it."""
    job = POLICY_JOBS[name]
    write(studio.policy(job) / "config.json", {"files": {"model.safetensors": name}})
    write(studio.rolled(job, head) / "spec.json", studio.rollout_specification(job, head))
    write(studio.rolled(job, head) / "rollout.json", body)


def stages_of(totals: dict[str, float]) -> dict:
    """A latency.json; with views everything takes twice as long."""
    rows = [
        {"policy": name, "head": "tokens", "views": views, "calls": 5, "passes": 21, "composed": False}
        | {"ms": {stage: {"p50": (1 + views // 2) * total, "p95": 99.0} for stage in STAGES}}
        for name, total in totals.items()
        for views in (0, 2)
    ]
    conditions = {"actok": "0", "commit": "c", "cpu": "cpu", "packages": {"torch": "2"}, "created": "now"}
    return {"conditions": conditions, "device": "cpu", "threads": 1, "rows": rows}


def test_pages_say_what_was_rolled_out(studio, monkeypatch):
    monkeypatch.setattr(policies, "SUITES", {"metaworld": replace(METAWORLD, tasks=TASKS)})
    write_policy_pages(studio)
    assert "Nothing is measured yet" in (studio.pages / "metaworld.md").read_text()
    half, full = "101010101", "111111110"
    for seed in SEEDS:
        roll(studio, f"metaworld-bins-{seed}", "tokens", rolled(half, tokens=80, ms=40.0, seed=seed))
        roll(studio, f"metaworld-fast-{seed}", "tokens", rolled(full, tokens=17, ms=25.0, seed=seed))
    roll(studio, "metaworld-fastervq-tiny-0", "tokens", rolled(full, ms=12.0))
    roll(studio, "metaworld-block-1-0", "tokens", rolled(half, ms=48.0, passes=21.0))
    roll(studio, "metaworld-dct-0", "tokens", rolled("0" * 9, tokens=10))
    write(studio.root / "latency" / "metaworld" / "latency.json", stages_of({"fastervq-tiny": 10, "block-1": 30}))
    for variant, marks in (("flow", "000000000"), ("flow+fast", half)):
        roll(studio, f"metaworld-{variant}-0", "flow", rolled(marks))
    roll(studio, "metaworld-flow+fast-0", "tokens", rolled(full))
    write_policy_pages(studio)
    page = (studio.pages / "metaworld.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    low, high = wilson(16, 18)
    assert f"| fast | 88.9 % ({100 * low:.1f} to {100 * high:.1f}) | 88.9 % | 88.9 % | 0 | 17 | 3 | 25 | - |" in rows
    assert any(line.startswith("| dct | 0.0 % (") and " | 0.0 % | - | 0 | 10 |" in line for line in rows)
    assert "0 of 1 difference" in page or "1 of 1 difference" in page
    assert "| bins | 67 | 33 | 67 |" in rows
    body = json.loads((studio.pages / "metaworld.json").read_text())
    assert "Pairs of which one has a single seed" in page
    assert body["filmed"] == {}
    assert "Two episodes" not in page
    assert {(row["a"], row["b"]) for row in body["pairs"]} == {("bins", "fast")}
    assert ("fast", "dct") in {(row["a"], row["b"]) for row in body["pairs_of_one_seed"]}
    assert body["variants"]["fast"]["seeds"]["1"]["episodes"]["push-v3"] == "111"
    assert (studio.pages / "metaworld.png").read_bytes().startswith(b"\x89PNG")
    hybrid = (studio.pages / "hybrid.md").read_text()
    assert "| flow+fast | 55.6 %" in hybrid
    assert "| 73.0 |" in hybrid
    assert "Not yet measured: flow+plain-rvq, flow+xtokenizer-tiny." in hybrid
    blocks = (studio.pages / "blocks.md").read_text()
    assert "| fastervq-tiny (its own blocks) | 88.9 %" in blocks
    assert (
        "Alone on the machine token-wise takes 3.00 times as long as in its own blocks (30 and 10 ms); published: 2.31 times."
        in blocks
    )
    assert "| block-1 | tokens | 2 | 21 | " in (studio.pages / "latency.md").read_text()
    assert "| fast | 88.9 %" in (studio.pages / "README.md").read_text()
    assert str(studio.root) not in "".join(
        path.read_text() for path in studio.pages.glob("*.*s*") if path.suffix != ".png"
    )


def test_of_many_differences_the_largest_are_named():
    rows = [
        {"a": f"a{i}", "b": "b", "difference": i / 100, "exceeds": i > 0, "ci95": [0.0, 0.1], "p_holm": 1.0}
        for i in range(20)
    ]
    told = exceeding(rows)
    assert told.startswith("19 of 20 differences")
    assert "a19 over b by 19.0" in told
    assert "a5 over b" in told
    assert "a4 over b" not in told
    assert "and 4 smaller ones" in told
    assert "smaller ones" not in exceeding(rows[:10])


def test_a_rollout_of_another_policy_is_not_shown(studio):
    job = POLICY_JOBS["metaworld-bins-0"]
    roll(studio, job.name, "tokens", rolled("101010101"))
    assert load_rolls(studio, "metaworld", "tokenizers", POLICY_JOBS)[0]
    assert not load_rolls(studio, "metaworld", "hybrid", POLICY_JOBS)[0]
    write(studio.policy(job) / "config.json", {"files": {"model.safetensors": "trained again"}})
    assert not load_rolls(studio, "metaworld", "tokenizers", POLICY_JOBS)[0]


def test_pages_without_figures_say_so():
    assert "Nothing is measured yet" in blocks_page(
        {"conditions": None, "variants": {}, "alone": {}, "pairs": [], "published": {}}
    )
    assert "Nothing is measured yet" in latency_page({"measured": {}})


def test_the_large_model_is_told_from_the_small_ones():
    pages = [latency_page({"measured": {name: stages_of({"block-wise": 10})}}) for name in ("metaworld", "paligemma")]
    assert ["with random weights" in page for page in pages] == [False, True]
    assert all("| block-wise | tokens | 2 | 21 |" in page for page in pages)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_demonstrations_to_pages_in_one_call_and_nothing_is_made_twice(tmp_path, monkeypatch):
    pytest.importorskip("metaworld")
    import make_results

    studio = Studio(places=Places(work=tmp_path / "work", pages=tmp_path / "pages", scale=0.003))
    suite = replace(METAWORLD, tasks=("drawer-close-v3",), filmed=("beast", 1))
    monkeypatch.setattr(policies, "SUITES", {"metaworld": suite})
    chosen = {"metaworld-beast-0": POLICY_JOBS["metaworld-beast-0"]}
    steps = [step for step in make_results.STEPS if step not in ("bench", "latency")]
    assert make_results._policies(studio, steps, chosen, 1) == []
    body = json.loads((studio.pages / "metaworld.json").read_text())
    row = body["variants"]["beast"]
    assert (row["n"], row["invalid"], row["passes"]) == (1, 0, 1.0)
    assert row["seeds"]["0"]["training"]["steps"] == body["steps"] == studio.scaled(policies.POLICY_STEPS, 2)
    assert body["demonstrations"] == 10
    (outcome,) = body["filmed"]["sheets"]
    assert f"metaworld-{outcome}.png" in (studio.pages / "metaworld.md").read_text()
    assert (studio.pages / f"metaworld-{outcome}.png").read_bytes().startswith(b"\x89PNG")
    assert "A trial at 0.003" in (studio.pages / "README.md").read_text()
    monkeypatch.setattr(policies_make, "run_tasks", lambda tasks, places, **_: [task.name for task in tasks])
    assert make_results._policies(studio, steps, chosen, 1) == []


def test_the_commands_on_the_pages_are_those_of_the_command_line():
    from actok.cli.parser import build_parser

    parser = build_parser()
    for part, suite in (("tokenizers", "metaworld"), ("hybrid", "metaworld"), ("blocks", "metaworld")):
        jobs = [job for job in POLICY_JOBS.values() if (job.suite, job.seed) == (suite, 0) and part in job.parts]
        lines = [line for line in commands(jobs) if line.startswith("actok ")]
        parsed = [parser.parse_args(shlex.split(line.replace("HEAD", "flow"))[1:]) for line in lines]
        trained = [args for args in parsed if args.verb == "train-policy"]
        assert len(trained) == len(jobs)
        assert {args.tokenizer.removeprefix("TOKENIZERS/") for args in trained} == {
            Path(args.out).name for args in parsed if args.verb == "fit"
        }
        for args, job in zip(trained, jobs, strict=True):
            assert parse_assignments(args.set or []) == dict(job.settings)
        assert [args.episodes for args in parsed if args.verb == "rollout"] == [20]
