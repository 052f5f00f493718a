"""actok bench --semantics end to end on real demonstrations: labels, features, figures, tables, pictures, resuming."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import actok.benchmark.semantics as semantics
from actok.benchmark import run_benchmark
from actok.cli import main
from actok.core import ConfigError, DataError
from actok.data import Chunks, FrameCache, open_dataset
from actok.data.instructions import chunk_labels
from actok.training.features import extract_features
from fake_teacher import FakeTeacher
from realdata import REAL, needs_real

TASKS = ("reach-v3", "drawer-open-v3", "push-v3")
OAT = Path(__file__).parent / "weights" / "oat"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three tasks of Meta-World, and features of them."""
    folder = tmp_path_factory.mktemp("semantics")
    (folder / "three").mkdir()
    for task in TASKS:
        shutil.copy(REAL / "sim" / "metaworld_state" / f"{task}.npz", folder / "three")
    extract_features(folder / "three", FakeTeacher(), folder / "features", progress=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actok.benchmark.measure.LATENCY_SECONDS", 0.02)
        patch.setattr("actok.benchmark.suite.write_report", lambda results, path: path)
        patch.setattr(semantics, "TRAIN_CHUNKS", 307)
        patch.setattr(semantics, "TEST_CHUNKS", 151)
        patch.setattr("actok.evaluation.semantics.NOISE_CHUNKS", 23)
        patch.setattr("actok.evaluation.semantics.MAP_CHUNKS", 61)
        yield


@needs_real
def test_command_line_on_meta_world(place, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = place / "out"
    command = ["bench", "--data", str(place / "three"), "--tokenizers", f"bins:bins=32,fast,{OAT}", "--out", str(out)]
    command += ["--semantics", "--features", str(place / "features")]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text())
    (facts,) = results["semantics"]
    assert set(facts["names"]["task"]) == set(TASKS)
    assert facts["teacher"]
    assert facts["raw"]["task"]["accuracy"] > facts["raw"]["task"]["majority"]
    bins, fast, oat = (u["semantics"]["figures"] for u in results["results"])
    assert bins["levels"][0]["probes"]["task"]["accuracy"] > bins["levels"][0]["probes"]["task"]["majority"]
    assert [level["level"] for level in oat["levels"]] == [*range(8), None]
    assert [level["level"] for level in fast["levels"]] == [None]
    assert {s["state"] for s in bins["substitution"]} == {False, True}
    assert bins["substitution"][0]["own"] > bins["substitution"][0]["other"]
    assert all(f["retrieval"]["chunk_to_text"]["candidates"] == 3 for f in (bins, fast, oat))
    text = (out / "table.md").read_text()
    assert "I phase" in text
    # After the three tokenizers, what the same map finds from the chunks themselves.
    assert facts["raw_retrieval"]["chunk_to_text"]["recall1"] > facts["raw_retrieval"]["chunk_to_text"]["chance1"]
    assert sum(line.startswith("| actions ") for line in text.splitlines()) == 2  # of levels, and of words
    assert "its positions mean nothing by themselves" in " ".join(text.split())
    pictures = sorted((out / "semantics").glob("*.svg"))
    assert len(pictures) == 3 + 3 * 3
    for path in pictures:
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")

    # Asked again, nothing is measured; without the flag, the ordinary units are the same.
    def refuse(*_, **__):
        raise AssertionError("measured again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actok.benchmark.suite.measure", refuse)
        patch.setattr(semantics, "measure_semantics", refuse)
        patch.setattr("actok.benchmark.suite.fit_parts", refuse)
        assert main(command) == 0
        assert json.loads((out / "results.json").read_text())["results"] == results["results"]
        assert main(command[: command.index("--semantics")]) == 0
    plain = json.loads((out / "results.json").read_text())
    assert plain["semantics"] == []
    assert not any("semantics" in u for u in plain["results"])


@needs_real
def test_the_page_shows_tables_pictures_and_words(place):
    pytest.importorskip("matplotlib")
    from actok.benchmark.report import render_report

    results = run_benchmark(
        [place / "three"],
        ["bins:bins=32"],
        place / "page",
        semantics=True,
        max_chunks=61,
        max_fit_chunks=203,
        progress=False,
    )
    page = render_report(results)
    assert "Is it semantic?" in page
    assert "Linear probe: phase" in page
    assert "open the drawer" in page or "open a drawer" in page
    assert "retrieval needs a teacher&#x27;s features" in page


def test_features_without_semantics_and_missing_features_are_refused(tmp_path):
    episodes = [np.random.default_rng(i).normal(size=(29, 3)).astype(np.float32) for i in range(7)]
    with pytest.raises(ConfigError, match="ask for semantics too"):
        run_benchmark([episodes], ["bins"], tmp_path / "out", features=tmp_path / "none", progress=False)
    with pytest.raises(DataError, match="actok features"):
        run_benchmark(
            [episodes], ["bins"], tmp_path / "out", semantics=True, features=tmp_path / "none", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_a_chunk_is_labelled_by_most_of_its_real_frames(tmp_path):
    phase = np.array([0] * 5 + [1] * 3 + [2] * 3 + [0] * 2)
    np.savez(
        tmp_path / "doors.npz",
        action=np.random.default_rng(0).normal(size=(13, 3)).astype(np.float32),
        episode_length=np.array([11, 2]),
        instruction=np.array(["open door", "close door"]),
        phase=phase,
        phase_names=np.array(["reach", "pull", "rest"]),
        control_hz=np.float64(10),
    )
    dataset = open_dataset(tmp_path / "doors.npz")
    labels = chunk_labels(dataset)
    found = semantics.label_chunks(Chunks(FrameCache.build(dataset), 7), labels, 100)
    names = [labels.phase.names[i] for i in found.labels["phase"]]
    #  starts 0..10: 5 of 7; 4 of 7; 3:3:1, the earlier; 2:3:2; then 3 real frames of 2 at last; and the short episode
    assert names[:4] == ["reach", "reach", "reach", "pull"]
    assert names[8:11] == ["rest", "rest", "rest"]
    assert names[11:] == ["reach", "reach"]
    assert [labels.verb.names[i] for i in found.labels["verb"]] == ["open"] * 11 + ["close"] * 2
