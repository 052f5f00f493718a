"""How the results are made: jobs, their identity, curves read off between points."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actok.core import build_config, find_preset, merge_settings, parse_assignments
from actok.core.registry import load_target

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from results import training
from results.curves import Figures, expected_entropy, expected_share, read_off
from results.jobs import HORIZON, JOBS, MATCHED
from results.places import Places


def point(bits: float, l1: float, vrr: float) -> Figures:
    return Figures(tokens=bits / 8, bits=bits, l1=l1, vrr=(vrr, vrr / 2))


def test_a_power_law_is_read_off_exactly_between_its_points():
    points = [point(b, 3.0 / b**0.7, 0.1 * np.log(b)) for b in (400.0, 50.0, 1300.0)]
    found = read_off(points, lambda f: f.bits, 123.0)
    assert found is not None
    assert found.l1 == pytest.approx(3.0 / 123.0**0.7)
    assert found.vrr == pytest.approx((0.1 * np.log(123.0), 0.05 * np.log(123.0)))
    assert found.tokens == pytest.approx(123.0 / 8)
    same = read_off(points, lambda f: f.tokens, 123.0 / 8)
    assert same is not None
    assert same.l1 == pytest.approx(found.l1)


def test_nothing_is_read_off_outside_a_sweep():
    points = [point(50.0, 0.2, 0.1), point(400.0, 0.1, 0.3)]
    assert read_off(points, lambda f: f.bits, 49.0) is None
    assert read_off(points, lambda f: f.bits, 401.0) is None
    assert read_off([], lambda f: f.bits, 50.0) is None
    end = read_off(points, lambda f: f.bits, 400.0)
    assert end is not None
    assert end.l1 == pytest.approx(0.1)


def test_uniform_draws_as_expected():
    assert expected_share(7, 1) == pytest.approx(1 / 7)
    assert expected_share(2, 3) == pytest.approx(7 / 8)
    # Miller's correction, exact to first order in 1 / drawn.
    size, drawn = 61, 6100
    approximate = (np.log(size) - (size - 1) / (2 * drawn)) / np.log(size)
    assert expected_entropy(size, drawn) == pytest.approx(approximate, abs=2e-4)
    assert expected_entropy(4096, 140) < 0.62


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_asked_for_on_the_command_line_as_its_table_says(name):
    """What `actok fit` makes of --set and --train is the settings that the job stands for."""
    job = JOBS[name]
    preset = find_preset(job.preset)
    settings, wanted = job.resolved(103)
    assert merge_settings(preset.settings, parse_assignments(training.assignments(job.settings))) == settings
    changed = {k: v for k, v in wanted.items() if preset.training.get(k) != v}
    assert {**preset.training, **parse_assignments(training.assignments(changed))} == wanted
    assert build_config(load_target(preset.target).config_class, settings, name)
    assert job.pace is None or JOBS[job.pace].pace is None


@pytest.mark.parametrize("name", ["fastervq-tiny", *(f"{name}-252" for name in MATCHED)])
def test_matched_jobs_spend_about_the_bits_of_fastervq(name):
    from actok.core import ActionSpace, FitPart
    from actok.signal.statistics import Statistics

    job = JOBS[name]
    target = load_target(find_preset(job.preset).target)
    config = build_config(target.config_class, job.resolved(103)[0], name)
    parts = []
    for dim in (7, 28):  # the widest of the data sets makes VQ-VLA's latents
        chunks = np.random.default_rng(0).normal(size=(53, HORIZON, dim)).astype(np.float32)
        statistics = Statistics.from_array(chunks.reshape(-1, dim))
        parts.append(FitPart(actions=chunks, space=ActionSpace.raw(dim, f"robot{dim}"), statistics=statistics))
    layout = target.prepare(parts, config).layout_for(HORIZON, "robot7")
    assert np.log2(layout.vocab).sum() == pytest.approx(252, rel=0.05)


def test_a_trained_tokenizer_is_kept_while_the_same_is_asked_for(tmp_path, monkeypatch):
    data = tmp_path / "metaworld"
    data.mkdir()
    (data / "episodes.npz").write_bytes(b"0" * 11)
    places = Places(work=tmp_path)
    job = replace(JOBS["vqbet-tiny"], seconds=1.0)
    monkeypatch.setattr(training, "calibrated_steps", lambda job, scale: 103)
    folder = places.trained / job.name
    assert not training.finished(job, places)
    training.write_bytes(folder / "spec.json", training.json.dumps(training.specification(job, places)))
    assert not training.finished(job, places)  # begun, not done
    training.write_bytes(folder / "tokenizer" / "config.json", "{}")
    assert training.finished(job, places)
    assert not training.finished(replace(job, settings={"hidden": 67}), places)
    (data / "episodes.npz").write_bytes(b"0" * 13)
    assert not training.finished(job, places)
    monkeypatch.setattr(training, "calibrated_steps", lambda job, scale: 107)
    (data / "episodes.npz").write_bytes(b"0" * 11)
    assert not training.finished(job, places)
    assert training.specification(JOBS["without-unitree"], places) is None
