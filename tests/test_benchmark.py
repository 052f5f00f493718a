"""The benchmark end to end on generated data: results, resuming, errors, interruption."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

import actok.benchmark.suite as suite
from actok.benchmark import read_results, run_benchmark, text_table
from actok.benchmark.prepare import prepare
from actok.benchmark.results import FORMAT, UnitStore, module_hash, plain
from actok.benchmark.table import WIDTH, number
from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, FitPart
from actok.evaluation.metrics import TOLERANCES
from actok.training import fit_parts
from actok.training.fitting import FRACTIONS
from realdata import REAL, needs_real

D, E = 5, 11

SPACE = ActionSpace(
    embodiment="test_arm",
    dim=D,
    rate_hz=13.0,
    groups=(
        ActionGroup(name="tip", kind="position", dims=(0, 1), unit="m", scale=0.02, mode="delta"),
        ActionGroup(name="joint", kind="joint", dims=(2, 3), unit="rad", scale=1.0),
        ActionGroup(name="grip", kind="gripper", dims=(4,), unit="fraction", scale=1.0),
    ),
)
SMALL = {"max_chunks": 61, "max_fit_chunks": 203, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Little time on latency, and no page (test_report.py has it)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actok.benchmark.measure.LATENCY_SECONDS", 0.02)
        patch.setattr("actok.benchmark.suite.write_report", lambda results, path: path)
        yield


@pytest.fixture(scope="module")
def episodes() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(E):
        x = np.cumsum(rng.normal(size=(int(rng.integers(29, 53)), D)), axis=0) / 7
        x[:, 4] = x[:, 4] > 0
        found.append(x.astype(np.float32))
    return found


@pytest.fixture(scope="module")
def run(episodes, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    tokenizers = ["bins", ("coarse", "bins", {"bins": 8}), ("broken", "bins", {"bins": 1})]
    results = run_benchmark([episodes], tokenizers, out, spaces=SPACE, sweep=True, **SMALL)
    return out, results


def unit(results, label):
    return next(u for u in results["results"] if u["tokenizer"] == label and not u["sweep"])


def test_results_say_what_was_measured_and_how(run):
    out, results = run
    assert read_results(out) == json.loads((out / "results.json").read_text()) == results
    assert results["format"] == FORMAT
    p = results["provenance"]
    assert p["packages"]["numpy"] == np.__version__
    assert p["cores"] >= 1
    assert p["command"]
    (dataset,) = results["datasets"]
    assert ActionSpace.from_dict(dataset["space"]) == SPACE
    assert dataset["horizon"] == SPACE.default_horizon
    assert sum(dataset["episodes"].values()) == E
    assert dataset["test_chunks"]["used"] <= 61 < dataset["test_chunks"]["of"] + 61


def test_errors_follow_from_the_bin_width(run):
    _, results = run
    (dataset,) = results["datasets"]
    for label, bins in (("bins", 256), ("coarse", 8)):
        m = unit(results, label)["metrics"]
        # Within range, an error is at most half a bin of width 2 / K, and a quarter on average.
        assert m["normalised"]["l1"] < 1.6 / bins
        assert m["rate"]["bits_fixed"] == pytest.approx(dataset["horizon"] * D * np.log2(bins))
        assert m["rate"]["over_bins"] == pytest.approx(8 / np.log2(bins))
        assert m["valid"]["random"] == 1
        assert m["normalised"]["undecodable"] == 0
    fine, coarse = (unit(results, n)["metrics"]["physical"] for n in ("bins", "coarse"))
    assert [g["unit"] for g in fine] == ["mm", "deg", "fraction"]
    assert [g["path"] is None for g in fine] == [False, True, True]
    assert all(a["step"]["mean"] < b["step"]["mean"] for a, b in zip(fine[:2], coarse[:2], strict=True))


def test_the_sweep_goes_from_coarse_to_fine(run):
    _, results = run
    points = [u["metrics"] for u in results["results"] if u["sweep"] and u["tokenizer"] == "bins"]
    errors = [m["normalised"]["mse"] for m in sorted(points, key=lambda m: m["rate"]["bits_fixed"])]
    assert len(errors) > 3
    assert errors == sorted(errors, reverse=True)


def test_a_failing_tokenizer_is_recorded_and_the_rest_goes_on(run):
    out, results = run
    failed = unit(results, "broken")
    assert failed["status"] == "error"
    assert "bins is 1" in failed["error"]
    assert "broken: FAILED: bins is 1" in (out / "table.txt").read_text()
    assert unit(results, "coarse")["status"] == "ok"


def test_ctrl_c_inside_compiled_code_ends_the_run():
    """Numba turns a KeyboardInterrupt into a SystemError, which is no failure of the tokenizer."""

    def work():
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        suite._attempt(work)


def test_table_is_readable(run):
    out, results = run
    text = (out / "table.txt").read_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    header = next(line for line in text.splitlines() if line.startswith("tokenizer"))
    for title in ("tokens", "bits", "l1", "path mm", "deg", "VRR"):
        assert title in header
    shown = f"{unit(results, 'bins')['metrics']['normalised']['l1']:.3g}"
    assert shown in next(line for line in text.splitlines() if line.startswith("bins"))
    rows = [line for line in text_table(results, markdown=True).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[:4]}) == 1
    assert "given by the caller" in text


def test_a_warning_is_shown_once_with_all_it_concerns(episodes, tmp_path):
    still = [e.copy() for e in episodes]
    for e in still:
        e[:, 3] = 0.5
    run_benchmark([still], ["bins", "dct"], tmp_path, spaces=SPACE, **SMALL)
    text = " ".join((tmp_path / "table.txt").read_text().split())
    assert text.count("never changes in the data") == 1
    assert "note on bins, dct: embodiment 'test_arm': joint.1 never changes" in text
    assert "Constant: joint.1." in text


def test_number():
    assert [number(v) for v in (None, 0, 0.0012345, 12.345, 1234.5, 1e-5)] == [
        "-",
        "0",
        "0.00123",
        "12.3",
        "1230",
        "1.00e-05",
    ]


def test_finished_units_are_reused_until_data_or_settings_change(episodes, tmp_path, monkeypatch):
    first = run_benchmark([episodes], ["bins"], tmp_path, spaces=SPACE, **SMALL)

    def refuse(*_, **__):
        raise DataError("fitted again")

    monkeypatch.setattr(suite, "fit_parts", refuse)
    again = run_benchmark([episodes], ["bins"], tmp_path, spaces=SPACE, **SMALL)
    assert again["results"] == first["results"]
    changed = [e.copy() for e in episodes]
    for e in changed:
        e += np.float32(1e-3)
    others = (
        run_benchmark([episodes], ["bins"], tmp_path, spaces=SPACE, fresh=True, **SMALL),
        run_benchmark([episodes], ["bins"], tmp_path, spaces=SPACE, seed=1, **SMALL),
        run_benchmark([episodes], ["bins"], tmp_path, spaces=SPACE, horizon=7, **SMALL),
        run_benchmark([episodes], [("bins", "bins", {"bins": 9})], tmp_path, spaces=SPACE, **SMALL),
        run_benchmark([changed], ["bins"], tmp_path, spaces=SPACE, **SMALL),
    )
    assert [o["results"][0]["error"] for o in others] == ["fitted again"] * 5


def test_an_interrupted_run_leaves_whole_files_and_can_go_on(episodes, tmp_path, monkeypatch):
    real = suite.measure
    calls = []

    def second_is_interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    tokenizers = ["bins", ("coarse", "bins", {"bins": 8})]
    monkeypatch.setattr(suite, "measure", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark([episodes], tokenizers, tmp_path, spaces=SPACE, **SMALL)
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1
    assert json.loads((tmp_path / files[0]).read_text())["status"] == "ok"
    results = run_benchmark([episodes], tokenizers, tmp_path, spaces=SPACE, **SMALL)
    assert [u["status"] for u in results["results"]] == ["ok", "ok"]
    assert len(calls) == 3


def test_a_damaged_unit_is_measured_again(tmp_path):
    store = UnitStore(tmp_path)
    key = store.key(dataset="d", settings={"bins": 3})
    assert key != store.key(dataset="d", settings={"bins": 4})
    store.put(key, {"status": "ok"})
    assert store.get(key) == {"status": "ok"}
    (tmp_path / f"{key}.json").write_text('{"status": ')
    assert store.get(key) is None


def test_a_unit_is_stale_under_other_packages_threads_or_module(tmp_path, monkeypatch):
    store = UnitStore(tmp_path)
    before = store.key(dataset="d")
    assert store.key(dataset="d") == before
    monkeypatch.setenv("OMP_NUM_THREADS", "23")
    threads = store.key(dataset="d")
    monkeypatch.setattr("actok.benchmark.results.importlib.metadata.version", lambda name: "0.0")
    assert len({before, threads, store.key(dataset="d")}) == 3

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebodys_codec.py").write_text("x = 1")
    one = module_hash("somebodys_codec")
    (tmp_path / "somebodys_codec.py").write_text("x = 2")
    assert one
    assert module_hash("somebodys_codec") not in (one, None)
    assert module_hash("no_such_package.codec") is None


@pytest.mark.parametrize("given", [{}, [], {"env": "metaworld"}])
def test_something_else_than_replay_results_is_refused_before_measuring(episodes, tmp_path, given):
    with pytest.raises(ConfigError, match=r"have no '.*'; give the replay\.json"):
        run_benchmark([episodes], ["bins"], tmp_path / "out", spaces=SPACE, replay=given, **SMALL)
    assert not (tmp_path / "out").exists()


def test_saved_and_fitted_tokenizers_are_judged_too(episodes, tmp_path):
    train = np.concatenate([e[:26].reshape(2, 13, D) for e in episodes])
    tokenizer = fit_parts("bins", [FitPart(actions=train, space=SPACE)], bins=32)
    folder = tokenizer.save_pretrained(tmp_path / "mine")
    results = run_benchmark([episodes], [folder, ("live", tokenizer, {})], tmp_path / "out", spaces=SPACE, **SMALL)
    saved, live = results["results"]
    assert (saved["tokenizer"], saved["fitted_here"], saved["adapted"]) == ("mine", False, False)
    assert saved["metrics"]["normalised"] == live["metrics"]["normalised"]
    assert results["datasets"][0]["horizon"] == 13  # the tokenizer's own

    # Another robot's tokenizer is adapted to this data, one of another width refused.
    other = fit_parts("bins", [FitPart(actions=train, space=SPACE.renamed("other"))], bins=32)
    narrow = fit_parts("pca", [FitPart(actions=train[:, :, :3], space=ActionSpace.raw(3))])
    given = [("other", other, {}), ("narrow", narrow, {})]
    results = run_benchmark([episodes], given, tmp_path / "out", spaces=SPACE, horizon=13, **SMALL)
    assert unit(results, "other")["adapted"] is True
    assert unit(results, "narrow")["status"] == "error"


def test_a_tokenizer_that_may_have_seen_the_answers_is_noted(episodes, tmp_path):
    train = np.concatenate([e[:26].reshape(2, 13, D) for e in episodes])
    tokenizer = fit_parts("bins", [FitPart(actions=train, space=SPACE)])
    same = {"seed": 0, "fractions": list(FRACTIONS)}
    for case, (split, noted) in enumerate((({**same, "seed": 3}, True), (None, True), (same, False))):
        known = tokenizer.with_meta({"data": [{"name": "arrays", "split": split}]})
        results = run_benchmark([episodes], [known], tmp_path / str(case), spaces=SPACE, **SMALL)
        assert any("may have seen test episodes" in w for w in results["results"][0]["warnings"]) is noted


def test_several_datasets_keep_apart(episodes, tmp_path):
    results = run_benchmark([episodes, episodes[:7]], ["bins"], tmp_path, spaces=[SPACE, None], **SMALL)
    assert [d["name"] for d in results["datasets"]] == ["arrays", "arrays-2"]
    assert [u["dataset"] for u in results["results"]] == ["arrays", "arrays-2"]
    assert results["results"][1]["metrics"]["physical"][0]["unit"] == "raw"


def test_no_test_chunk_overlaps_the_training_episodes(episodes):
    numbered = [
        np.full_like(e, i) + np.linspace(0, 0.5, len(e), dtype=np.float32)[:, None] for i, e in enumerate(episodes)
    ]
    (one,) = prepare(
        [numbered], ActionSpace.raw(D), horizon=7, seed=0, tolerances=TOLERANCES, max_chunks=10**6, max_fit_chunks=10**6
    )
    train = set(np.floor(one.held_out.train.actions).astype(int).ravel())
    test = set(np.floor(one.held_out.test).astype(int).ravel())
    assert test == set(one.test_episodes)
    assert not train & test


def test_bad_requests_are_refused_before_anything_is_measured(episodes, tmp_path):
    def bench(tokenizers, **options):
        return run_benchmark([episodes], tokenizers, tmp_path / "none", spaces=SPACE, **SMALL, **options)

    with pytest.raises(ConfigError, match="did you mean 'bins'"):
        bench(["binz"])
    with pytest.raises(ConfigError, match="share the label 'bins'"):
        bench(["bins", ("bins", "bins", {"bins": 3})])
    with pytest.raises(ConfigError, match="at least one of each"):
        bench([])
    with pytest.raises(DataError, match="2 action spaces are given for 1 datasets"):
        run_benchmark([episodes], ["bins"], tmp_path / "none", spaces=[SPACE, SPACE], **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="too few to hold one out"):
            run_benchmark([episodes[:1]], ["bins"], tmp_path / "none", spaces=SPACE, **SMALL)
    assert not (tmp_path / "none").exists()


def test_results_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "results.json"
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "does not hold benchmark results"),
        (json.dumps({"format": FORMAT, "schema_version": 99}), "schema version 99"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_results(tmp_path)


def test_plain_values():
    assert plain({"a": np.float32(0.5), "b": (np.int64(3), float("nan")), "c": np.arange(2)}) == {
        "a": 0.5,
        "b": [3, None],
        "c": [0, 1],
    }


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, actok.benchmark; print(sorted({'numpy', 'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_real
def test_real_demonstrations(tmp_path):
    results = run_benchmark(
        [REAL / "sim" / "libero_state"], ["bins", "dct"], tmp_path, max_chunks=101, max_fit_chunks=997, progress=False
    )
    bins, dct = (u["metrics"] for u in results["results"])
    assert bins["rate"]["bits_fixed"] > dct["rate"]["bits_fixed"]
    assert bins["normalised"]["mse"] < dct["normalised"]["mse"]
    assert {g["unit"] for g in bins["physical"]} >= {"mm", "deg"}
