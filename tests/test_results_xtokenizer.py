"""How X-Tokenizer's results are made: jobs, command lines, measurements at a tiny scale, pages."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actok.core import FitPart, build_config, find_preset, parse_assignments
from actok.core.registry import load_target
from realdata import REAL, needs_real

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from results import xtokenizer, xtokenizer_images, xtokenizer_measure
from results.jobs import HORIZON
from results.places import Places
from results.training import assignments, kept_specification
from results.xtokenizer import ABLATION, ARMS, IMAGES, LEFT_OUT, SEEDS, SEMANTIC_JOBS, UNION, SemanticJob, Workshop
from results.xtokenizer_images import IMAGE_JOBS
from results.xtokenizer_images_page import images_page
from results.xtokenizer_measure import PAIRS, SHARING
from results.xtokenizer_pages import write_semantic_pages
from results.xtokenizer_tables import rows_by_seed, semantic_row

from actok.alignment.config import AlignmentConfig
from actok.training import fit_parts, load


def workshop(tmp_path: Path, data_root: Path | None = None) -> Workshop:
    places = Places(work=tmp_path / "work", pages=tmp_path / "pages", data_root=data_root)
    data = places.work / "metaworld"
    data.mkdir(parents=True)
    (data / "episodes.npz").write_bytes(b"0" * 11)
    return Workshop(places=places, teacher=str(tmp_path))


@pytest.mark.parametrize("name", [*SEMANTIC_JOBS, *IMAGE_JOBS])
def test_a_job_is_asked_for_on_the_command_line_as_its_table_says(name):
    job = {**SEMANTIC_JOBS, **IMAGE_JOBS}[name]
    preset = find_preset(job.preset)
    settings, training = job.resolved(103)
    assert build_config(load_target(preset.target).config_class, settings, name)
    assert training["steps"] == 103
    config = build_config(AlignmentConfig, {**preset.alignment, **parse_assignments(assignments(job.align))}, name)
    # Features are asked for exactly where an objective reads them; FASTerVQ has no objectives of its own.
    assert job.features == (
        config.needs_teacher and (bool(preset.alignment) or job.name.startswith("fastervq-aligned"))
    )
    assert set(job.only) | set(job.without) <= set(UNION if name in SEMANTIC_JOBS else IMAGES)


def test_every_variant_is_trained_alike_with_every_seed():
    for variant in ABLATION:
        jobs = [SEMANTIC_JOBS[f"{variant}-{seed}"] for seed in SEEDS]
        assert [job.training["seed"] for job in jobs] == list(SEEDS)
        assert len({job.steps for job in jobs}) == 1
    assert len({SEMANTIC_JOBS[f"{v}-0"].steps for v in ABLATION}) == 1
    assert len({job.steps for job in SEMANTIC_JOBS.values() if job.part in ("union", "left_out")}) == 1
    assert set(SHARING) <= set(SEMANTIC_JOBS)
    assert {name for pair in PAIRS for name in pair} <= set(ARMS)
    assert {f"without-{name}" for name in LEFT_OUT} <= set(SEMANTIC_JOBS)


def test_fastervq_spends_as_much_as_xtokenizer():
    found = []
    for name in ("full-0", "fastervq-0"):
        job = SEMANTIC_JOBS[name]
        target = load_target(find_preset(job.preset).target)
        chunks = np.random.default_rng(0).normal(size=(53, HORIZON, 4)).astype(np.float32)
        space = replace(xtokenizer.open_dataset([chunks[0]], space="metaworld_sawyer").space, embodiment="arm")
        parts = [FitPart(actions=chunks, space=space)]
        layout = target.prepare(parts, build_config(target.config_class, job.resolved(103)[0], name)).layout_for(
            HORIZON
        )
        found.append((len(layout.vocab), np.log2(layout.vocab).sum()))
    assert found[0] == found[1]


def test_a_trained_tokenizer_is_kept_while_the_same_is_asked_for(tmp_path, monkeypatch):
    work = workshop(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    plain, full = (SEMANTIC_JOBS[name] for name in ("plain-rvq-0", "full-0"))
    spec = xtokenizer.specification(full, work)
    assert spec["features"] is not None
    assert spec["alignment"]["contrast"] > 0
    assert xtokenizer.specification(plain, work)["features"] is None
    assert xtokenizer.specification(SEMANTIC_JOBS["union"], work)["data"][0]["name"] == "metaworld"
    assert xtokenizer.specification(SEMANTIC_JOBS["alone-aloha_sim"], work) is None
    xtokenizer.write_bytes(work.folder(full.name) / "spec.json", json.dumps(spec))
    assert not xtokenizer.finished(full, work)  # begun, not done
    xtokenizer.write_bytes(work.tokenizer(full.name) / "config.json", "{}")
    assert xtokenizer.finished(full, work)
    assert not xtokenizer.finished(replace(full, align={"masking": 0}), work)
    assert not xtokenizer.finished(replace(full, steps=17), work)
    other = tmp_path / "other"
    other.mkdir()
    assert not xtokenizer.finished(full, replace(work, teacher=str(other)))
    assert work.features != replace(work, teacher=str(other)).features


def test_tasks_ask_for_features_objectives_and_seed(tmp_path, monkeypatch):
    work = workshop(tmp_path)
    asked = []
    monkeypatch.setattr(xtokenizer, "run_tasks", lambda tasks, places, **_: asked.extend(tasks) or [])
    chosen = {name: SEMANTIC_JOBS[name] for name in ("no-masking-1", "plain-rvq-2", "alone-aloha_sim")}
    xtokenizer.train_semantic(work, jobs=1, chosen=chosen, say=lambda _: None)
    assert [task.name for task in asked] == ["no-masking-1", "plain-rvq-2"]  # ALOHA's data are not at hand
    first, second = (" ".join(task.command) for task in asked)
    assert f"--features {work.features}" in first
    assert "--align masking=0" in first
    assert "seed=1" in first
    assert "--features" not in second
    assert "--align masking=0 contrast=0 prediction=0" in second
    assert f"--out {work.tokenizer('plain-rvq-2')}" in second


@pytest.fixture
def seen(tmp_path) -> Workshop:
    """Two data sets with images, and other recordings of the first one's two tasks."""
    work = workshop(tmp_path, tmp_path / "data")
    for path, names in (
        (IMAGES["metaworld_img64"], "ab"),
        (IMAGES["robosuite_img64"], "c"),
        ("sim/metaworld_state", "abd"),
    ):
        folder = tmp_path / "data" / path
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.npz").write_bytes(b"0" * 13)
    return work


def test_each_variant_reads_the_features_of_its_own_teacher(seen, monkeypatch):
    asked = []
    for module in (xtokenizer, xtokenizer_images):
        monkeypatch.setattr(module, "run_tasks", lambda tasks, places, **_: asked.extend(tasks) or [])
    assert xtokenizer_images.train_images(seen, jobs=1, say=lambda _: None) == []
    assert asked == []  # no teacher yet
    xtokenizer_images.features_that_see(seen, jobs=1, say=lambda _: None)
    teacher = xtokenizer_images.scene_teacher(seen)
    texts = [" ".join(task.command) for task in asked]
    assert f"--out {teacher} --steps {xtokenizer_images.TEACHER_STEPS}" in texts[0]
    assert all(source.path in texts[0] for source in seen.images.values())
    assert [f"--teacher {name}" in text for name, text in zip((teacher, seen.teacher), texts[1:], strict=True)] == [
        True
    ] * 2
    asked.clear()
    xtokenizer.write_bytes(teacher / "config.json", json.dumps({"training": {"loss": 0.5}}))
    chosen = {name: job for name, job in IMAGE_JOBS.items() if name.endswith("-1")}
    xtokenizer_images.train_images(seen, jobs=1, chosen=chosen, say=lambda _: None)
    told = {task.name: " ".join(task.command) for task in asked}
    assert list(told) == ["images-1", "words-1", "neither-1"]
    scene = xtokenizer_images.teacher_of("images", seen).features
    assert scene != seen.features
    assert f"--features {scene}" in told["images-1"]
    assert f"--features {seen.features}" in told["words-1"]
    assert "--features" not in told["neither-1"]
    assert all(f"--data {seen.images['metaworld_img64'].path}" in text for text in told.values())


def test_images_are_judged_on_new_recordings_of_the_same_tasks(seen, monkeypatch):
    asked = []
    monkeypatch.setattr(xtokenizer_images, "run_tasks", lambda tasks, places, **_: asked.extend(tasks) or [])
    assert xtokenizer_images.judge_images(seen, jobs=1) == []
    assert asked == []  # nothing is trained
    job = IMAGE_JOBS["neither-2"]
    xtokenizer.write_bytes(seen.tokenizer(job.name) / "config.json", "{}")
    xtokenizer.write_bytes(seen.folder(job.name) / "spec.json", json.dumps(xtokenizer.specification(job, seen)))
    xtokenizer_images.judge_images(seen, jobs=1)
    own, new = (list(task.command) for task in asked)
    assert "--features" in own
    assert "--features" not in new
    folder = Path(new[new.index("--data") + 1])
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", "b.npz"]
    assert all(path.resolve().parent.name == "metaworld_state" for path in folder.iterdir())


def test_the_page_shows_means_over_seeds_and_the_widest_interval():
    rows = {
        "0": {"probe_phase_0": 0.5, "interval_phase_0": [0.4, 0.6], "l1": 0.1, "bits_phase_0": 4e-16},
        "1": {"probe_phase_0": 0.7, "interval_phase_0": [0.45, 0.8], "l1": 0.3},
    }
    own = {
        "conditions": None,
        "test_episodes": 10,
        "test_chunks": 680,
        "raw": {"phase": {"accuracy": 0.3, "majority": 0.25}},
        "variants": {"images": rows, "words": {}},
    }
    page = images_page({"teacher": None, "features": {}, "judged": {"own": own}})
    assert "| images | 2 | - | 60 % (40 to 80) | - | - | 0 | 0.2 (0.1 to 0.3) | - |" in page
    assert "| words | 0 | - | - | - | - | - | - | - |" in page
    assert "text to chunk" not in page  # nobody asked for words
    assert "phase 30 % and 25 %" in page
    assert "680 chunks of 10 test episodes" in page


# -- measurements -----------------------------------------------------------------------------------------------------


def stand_in(work: Workshop, job: SemanticJob) -> None:
    """A closed-form tokenizer where a trained one is looked for."""
    parts = []
    for source in job.drawn(work) or []:
        data = xtokenizer.open_dataset(source.path, space=source.space)
        chunks = np.stack([data.episode(i).actions[:HORIZON] for i in range(3)])
        parts.append(FitPart(actions=chunks, space=data.space))
    fit_parts("bins", parts, bins=7).save_pretrained(work.tokenizer(job.name))
    spec = xtokenizer.specification(job, work)
    xtokenizer.write_bytes(work.folder(job.name) / "spec.json", json.dumps(spec))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two arms lifting a cube, a tokenizer of both, one of the first alone and one without the second."""
    tmp_path = tmp_path_factory.mktemp("results")
    recorded = tmp_path / "data" / "sim" / "robosuite_state"
    recorded.mkdir(parents=True)
    for name in ("Panda", "UR5e"):
        (recorded / f"Lift_{name}.npz").symlink_to(REAL / "sim" / "robosuite_state" / f"Lift_{name}.npz")
    work = workshop(tmp_path, tmp_path / "data")
    arms = {name: ARMS[name] for name in ("arm_panda", "arm_ur5e")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xtokenizer, "ARMS", arms)
        patch.setattr(xtokenizer, "UNION", dict.fromkeys(arms, 5))
        patch.setattr(xtokenizer_measure, "TEST_CHUNKS", 53)
        patch.setattr(xtokenizer_measure, "FIT_CHUNKS", 101)
        patch.setattr(xtokenizer_measure, "CRITERION", xtokenizer_measure.SameMotion(position_m=0.03))
        xtokenizer.make_arms(work, say=lambda _: None)
        names = ("union", "without-arm_ur5e", "alone-arm_panda")
        chosen = {name: SEMANTIC_JOBS[name] for name in names}
        for job in chosen.values():
            stand_in(work, job)
        failed = xtokenizer_measure.measure_arms(work, chosen)
        failed += xtokenizer_measure.measure_shared(work, chosen, pairs=(("arm_panda", "arm_ur5e"),), stride=5)
        assert failed == []
        yield work, chosen


def _read(work: Workshop, name: str):
    return json.loads((work.root / "bench" / f"{name}.json").read_text())


@needs_real
def test_achieved_paths_are_data_sets_of_their_own(measured):
    work, _ = measured
    for name in ("arm_panda", "arm_ur5e"):
        data = xtokenizer.open_dataset(work.sources[name].path)
        assert data.space.embodiment == name
        assert data.episode(0).subtask_names[0] == "approach"
        assert data.episode(0).instruction == "lift the red cube"
        assert data.tasks[0] == "Lift"
    told = []
    xtokenizer.make_arms(work, say=told.append)
    assert told == []  # made once


@needs_real
def test_every_tokenizer_is_judged_on_the_robots_it_is_meant_for(measured):
    work, _ = measured
    found = _read(work, "arms")
    units = {(u["dataset"], u["tokenizer"]): u for u in found["results"]}
    expected = {(robot, name) for robot in ("arm_panda", "arm_ur5e") for name in ("union", "union-fast")}
    assert set(units) == expected | {("arm_panda", "alone-arm_panda"), ("arm_ur5e", "without-arm_ur5e")}
    assert units["arm_ur5e", "without-arm_ur5e"]["adapted"]
    assert not units["arm_ur5e", "union"]["adapted"]
    assert all(u["metrics"]["normalised"]["l1"] > 0 for u in units.values())
    assert set(load(work.root / "trained" / "union-fast" / "union-fast").spaces) == {"arm_panda", "arm_ur5e"}


@needs_real
def test_codes_of_a_left_out_arm_are_compared_through_adapt(measured):
    work, _ = measured
    rows = {row["tokenizer"]: row for row in _read(work, "shared")["results"]}
    assert rows["union"]["adapted"] == []
    assert rows["without-arm_ur5e"]["adapted"] == ["arm_ur5e"]
    assert rows["union"]["pairs"] == rows["without-arm_ur5e"]["pairs"] > 0
    assert 0 < rows["union"]["deviation_m"] <= 0.03


# -- pages ------------------------------------------------------------------------------------------------------------


def unit(tokenizer: str, phase: float, l1: float) -> dict:
    level = {
        "use": {"perplexity": 100 * phase, "used": phase},
        "probes": {"phase": {"accuracy": phase, "majority": 0.25}},
        "information": {"phase": {"excess": 2 * phase}},
    }
    ranking = {"recall1": phase / 2, "recall5": phase, "chance1": 0.02, "median_rank": 3.0}
    semantics = {
        "levels": [{**level, "level": 0}, {**level, "level": None}],
        "noise": {"sigma": [0.004, 0.008], "error_rate": [0.1, 0.5], "by_level": []},
        "retrieval": {"text_to_chunk": ranking, "chunk_to_text": {**ranking, "recall1": None}},
        "substitution": [{"state": True, "own": 0.5, "other": 0.1, "difference": 0.4}],
        "map": {"points": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], "labels": {"phase": [0, 1, -1], "task": [0, 0, 0]}},
        "examples": [
            {"symbol": 5, "share": 0.5, "chunks": 7, "words": [["reach", 0.6]], "motion": [[0.0, 1.0], [1.0, 0.0]]}
        ],
    }
    metrics = {
        "normalised": {"l1": l1},
        "rate": {"tokens_mean": 20.0, "bits_fixed": 180.0},
        "vrr": {"tolerances": [0.03, 0.1], "literal": [0.2, 0.6]},
    }
    status = {"status": "ok", "error": None}
    return {
        "tokenizer": tokenizer,
        "sweep": False,
        **status,
        "metrics": metrics,
        "semantics": {**status, "figures": semantics},
    }


def test_a_row_holds_what_was_measured_and_nothing_else():
    row = semantic_row(unit("full-0", 0.5, 0.01))
    assert row["l1"] == 0.01
    assert (row["probe_phase_0"], row["bits_phase_all"], row["perplexity_0"]) == (0.5, 1.0, 50.0)
    assert (row["noise_0.008"], row["substitution_state_difference"]) == (0.5, 0.4)
    assert row["text_to_chunk_recall1"] == 0.25
    assert "chunk_to_text_recall1" not in row
    assert "probe_task_0" not in row
    failed = {**unit("full-0", 0.5, 0.01), "semantics": {"status": "error", "error": "no labels"}}
    assert set(semantic_row(failed)) == {"l1", "vrr_0.03", "vrr_0.1", "bits", "tokens"}
    rows = rows_by_seed(
        "full", [(1, unit("full-1", 0.5, 0.01)), (1, unit("full-0", 0.5, 0.01)), (2, unit("fully-2", 1, 1))]
    )
    assert list(rows) == ["1"]


@needs_real
def test_pages_show_means_ranges_and_published_figures(measured):
    work, chosen = measured
    conditions = _read(work, "arms")["provenance"]
    labels = {"dataset": "metaworld", "names": {"phase": ["reach", "grasp"], "task": ["lift"]}, "raw": {}}
    for seed, phase in zip(SEEDS, (0.25, 0.5, 0.75), strict=True):
        results = [unit(f"full-{seed}", phase, 0.01), *([unit("bins", 0.9, 0.002)] if seed == 0 else [])]
        body = {"provenance": conditions, "results": results, "semantics": [labels]}
        xtokenizer.write_bytes(work.root / "bench" / f"ablation-{seed}" / "results.json", json.dumps(body))
    steps = {"all": {"ratio": 1.25, "ratio_quartiles": [1.2, 1.3]}}
    speed = {"settings": {"preset": "xtokenizer-tiny"}, "rounds": 7, "steps": steps}
    xtokenizer.write_bytes(work.root / "bench" / "speed.json", json.dumps(speed))
    stand_in_meta = {
        "training": {"parameters": 10, "steps": 3, "seconds": 1.0, "chunks_per_s": 5.0, "validation": None}
    }
    for name in chosen:
        tokenizer = load(work.tokenizer(name)).with_meta(stand_in_meta)
        tokenizer.save_pretrained(work.tokenizer(name))
    write_semantic_pages(work, chosen)
    ablation = (work.pages / "ablation.md").read_text()
    assert "| full | 50 % (25 % to 75 %) |" in ablation.replace("| full | - | ", "| full | ")  # no probe for the task
    assert "| *published: X-Tokenizer* | 510 | 700 | 828 | 916 |" in ablation
    assert "| bins | 180 | 0.002 |" in ablation
    figures = json.loads((work.pages / "ablation.json").read_text())
    assert set(figures["variants"]["full"]) == {"0", "1", "2"}
    arms = (work.pages / "arms.md").read_text()
    rows = [line.split(" | ") for line in arms.splitlines() if line.startswith("| arm_ur5e |")]
    assert len(rows) == 1
    assert rows[0][6] == "-"  # no tokenizer of that arm alone
    assert "| arm_panda, arm_ur5e, arm_ur5e through adapt | without-arm_ur5e |" in arms
    assert "reach (60 %)" in (work.pages / "codes.md").read_text()
    for name in ("maps.png", "codes.png"):
        assert (work.pages / name).read_bytes().startswith(b"\x89PNG")
    index = (work.pages / "README.md").read_text()
    assert "1.25 times" in index
    for page in work.pages.glob("*.md"):
        assert str(work.places.data_root) not in page.read_text()
    assert kept_specification(work.folder("union"))["preset"] == "xtokenizer-tiny"
