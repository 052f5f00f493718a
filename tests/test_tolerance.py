"""fit() and the tolerance search: splits are honest, the coarsest setting is found, and failure says how near it came."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

import actok
from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.data import load_mixture, open_dataset, split_dataset
from actok.training import Tolerance, ToleranceError, fit, load_material
from actok.training.fitting import FRACTIONS

ARM = ActionSpace(
    embodiment="arm",
    dim=4,
    rate_hz=20.0,
    groups=(
        ActionGroup(name="position", kind="position", dims=(0, 1, 2), unit="m", scale=1.0),
        ActionGroup(name="gripper", kind="gripper", dims=(3,), unit="fraction", scale=1.0),
    ),
)
DELTA = ActionSpace(
    embodiment="delta_arm",
    dim=3,
    rate_hz=20.0,
    groups=(ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta", unit="m", scale=0.05),),
)


def episodes(count: int, dim: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth paths of some 0.3 m, of different lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        t = np.linspace(0, 1, int(rng.integers(41, 67)))[:, None]
        phase, speed = rng.uniform(size=(2, 1, dim))
        found.append((0.15 * np.sin(2 * np.pi * (phase + speed * t))).astype(np.float32))
    return found


@pytest.mark.parametrize(
    ("text", "bounds", "percentile"),
    [
        ("2 mm, 1 deg", {"mm": 2, "deg": 1}, 99),
        ("0.2cm,p95", {"mm": 2}, 95),
        ({"rad": 0.5, "percentile": 50}, {"deg": np.degrees(0.5)}, 50),
        ("5 %", {"fraction": 0.05}, 99),
        ("1e-2 raw", {"raw": 0.01}, 99),
    ],
)
def test_parse(text, bounds, percentile):
    tolerance = Tolerance.parse(text)
    assert tolerance.bounds == pytest.approx(bounds)
    assert tolerance.percentile == percentile
    assert Tolerance.parse(tolerance) is tolerance


@pytest.mark.parametrize(
    "text", ["", "2", "mm", "2 inches", "-1 mm", "0 mm", "p99", "2 mm, p101", 3, {"mm": "x"}, {"mm": np.nan}]
)
def test_what_cannot_be_parsed_says_how_to_write_it(text):
    with pytest.raises(ConfigError, match="tolerance"):
        Tolerance.parse(text)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("bins", "2 mm"), ("fast", "3 mm"), ("beast", "2 mm"), ("dct", "8 mm"), ("pca", "30 mm")]
)
def test_the_coarsest_setting_within_the_tolerance_is_taken(name, tolerance):
    tokenizer = fit(name, [episodes(60, 4)], space=ARM, tolerance=tolerance)
    report = tokenizer.meta["tolerance"]
    within = [t for t in report["tried"] if t.get("worst_ratio", np.inf) <= 1]
    assert 0 < len(within) < len(report["tried"]), "the coarsest setting is already within: the test proves nothing"
    # Nothing was tried beyond the first step that is within, and of its normalisers the cheapest was taken.
    first = {**within[0]["setting"], "normaliser": ""}
    assert [{**t["setting"], "normaliser": ""} == first for t in report["tried"]].index(True) >= len(
        report["tried"]
    ) - 2
    assert report["bits_per_chunk"] == min(t["bits_per_chunk"] for t in within)
    assert report["setting"] in [t["setting"] for t in within]
    # Measured again from outside, on the validation episodes the search judged by.
    material = load_material(episodes(60, 4), space=ARM)
    chunks = material.validation.actions
    pad = material.validation.pad_mask
    out = tokenizer.decode(tokenizer.encode(chunks, actok.ChunkContext(pad_mask=pad)))
    error = np.linalg.norm((out.actions - chunks)[:, :, :3], axis=-1)[~pad] * 1000
    (entry,) = [e for n, e in report["validation"].items() if n.endswith("position")]
    assert np.percentile(error, 99) == pytest.approx(entry["error"], rel=1e-4)
    assert set(report["test"]) == set(report["validation"])


def test_a_tighter_tolerance_costs_more_bits():
    bits = [
        fit("bins", [episodes(60, 4)], space=ARM, tolerance=f"{mm} mm").meta["tolerance"]["bits_per_chunk"]
        for mm in (20, 5, 1)
    ]
    assert bits == sorted(set(bits))


def test_delta_spaces_are_bounded_along_the_path():
    """Each step errs by less than half a bin, but the errors add up over the chunk: the path is what counts."""
    tokenizer = fit("bins", [[np.diff(e, axis=0) / 0.05 for e in episodes(60, 3)]], space=DELTA, tolerance="1 mm")
    report = tokenizer.meta["tolerance"]
    (entry,) = report["validation"].values()
    assert entry["of"] == "path"
    material = load_material([np.diff(e, axis=0) / 0.05 for e in episodes(60, 3)], space=DELTA)
    chunks, pad = material.validation.actions, material.validation.pad_mask
    out = tokenizer.decode(tokenizer.encode(chunks, actok.ChunkContext(pad_mask=pad)))
    path = np.linalg.norm(np.cumsum((out.actions - chunks).astype(np.float64), axis=1), axis=-1)[~pad] * 0.05 * 1000
    assert np.percentile(path, 99) == pytest.approx(entry["error"], rel=1e-3)


def test_none_within_says_how_near_it_came():
    with pytest.raises(ToleranceError, match=r"no setting of bins meets 1e-06 mm .* times the bound"):
        fit("bins", [episodes(60, 4)], space=ARM, tolerance="0.000001 mm")


def test_a_setting_that_the_data_rule_out_is_passed_over(monkeypatch):
    """The search goes on past a setting that cannot be fitted; where none can be, it says why."""
    from actok.core import registry

    preset = registry.find_preset("bins")
    broken = replace(preset, sweep=({"bins": 1}, *preset.sweep))
    presets = {
        **registry.tokenizer_presets(),
        "bins": broken,
        "never": replace(preset, sweep=({"bins": 0}, {"bins": 1})),
    }
    monkeypatch.setattr(registry, "tokenizer_presets", lambda: presets)
    report = fit("bins", [episodes(60, 4)], space=ARM, tolerance="20 mm").meta["tolerance"]
    assert "bins is 1" in report["tried"][0]["refused"]
    assert min(t.get("worst_ratio", np.inf) for t in report["tried"]) <= 1
    with pytest.raises(ToleranceError, match="can be fitted on these data: bins is 1"):
        fit("never", [episodes(60, 4)], space=ARM, tolerance="20 mm")


def test_a_bound_in_a_unit_the_space_lacks_is_refused():
    with pytest.raises(ConfigError, match="measured in raw"):
        fit("bins", [episodes(60, 4)], tolerance="2 mm")


def test_a_bound_on_nothing_is_said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit("bins", [episodes(60, 4)], space=ARM, tolerance="20 mm, 1 deg")
    (said,) = (str(w.message) for w in caught)
    assert "nothing of arrays is measured in deg, but in fraction, mm" in said


def test_what_the_user_sets_is_searched_once():
    """Settings of the sweep that the user has fixed drop out of it, and what is left of it is tried once each."""
    report = fit("beast", [episodes(60, 4)], space=ARM, tolerance="1 mm", bins=256).meta["tolerance"]
    tried = [t["setting"] for t in report["tried"]]
    assert [t["bases"] for t in tried] == [5, 7, 10, 15, 20, 30, 50][: len(tried)]
    assert all(t["bins"] == 256 for t in tried)


def test_datasets_of_one_name_are_reported_each():
    report = fit("bins", [episodes(60, 4), episodes(60, 4, 1)], space=ARM, tolerance="20 mm").meta["tolerance"]
    assert list(report["validation"]) == [f"arrays#{n}/{group}" for n in (1, 2) for group in ("position", "gripper")]


def test_a_list_of_arrays_is_episodes_or_datasets_by_their_axes():
    torch = pytest.importorskip("torch")
    one, two = (np.random.default_rng(s).uniform(-1, 1, (11, 5, 3)).astype(np.float32) for s in (0, 1))
    for make in (np.asarray, torch.from_numpy):
        datasets = fit("bins", [make(one), make(two)])
        assert [d["frames"] for d in datasets.meta["data"]] == [55, 55]
        assert datasets.horizon == 5
        (facts,) = fit("bins", [make(e) for e in one], horizon=3).meta["data"]
        assert facts["episodes"] == 11
    with pytest.raises(ConfigError, match="max_chunks is -1"):
        fit("bins", one, max_chunks=-1)


def test_too_few_episodes_to_hold_any_out():
    with pytest.warns(UserWarning, match="too few"), pytest.raises(DataError, match="at least 3 episodes"):
        fit("bins", [episodes(2, 4)], space=ARM, tolerance="2 mm")


def test_fitting_never_sees_held_out_episodes():
    """An outlier in every held-out episode leaves the fit unchanged, one in a training episode does not."""
    data = episodes(30, 4)
    split = split_dataset(open_dataset(data, space=ARM), fractions=FRACTIONS)
    clean = fit("pca", [data], space=ARM)

    def spoiled(which) -> list[np.ndarray]:
        return [e + (5.0 if i in which else 0.0) * np.eye(len(e), 4, dtype=np.float32) for i, e in enumerate(data)]

    held_out = {*split.validation, *split.test}
    assert fit("pca", [spoiled(held_out)], space=ARM).weights_hash == clean.weights_hash
    assert fit("pca", [spoiled({split.train[0]})], space=ARM).weights_hash != clean.weights_hash


def test_chunks_in_an_array_are_all_fitted_on():
    chunks = np.stack([e[:41] for e in episodes(30, 4)])
    assert fit("bins", chunks).meta["data"][0]["train_chunks"] == 30
    assert fit("bins", chunks).horizon == 41


def test_several_datasets_give_one_tokenizer_with_several_embodiments():
    tokenizer = fit("fast", [episodes(30, 4), [np.diff(e, axis=0) for e in episodes(30, 3)]], horizon=17)
    assert len(tokenizer.spaces) == 2
    assert {s.dim for s in tokenizer.spaces.values()} == {3, 4}


def test_a_space_of_another_dimension_is_refused():
    with pytest.raises(SpaceMismatchError):
        fit("bins", [episodes(10, 5)], space=ARM)


def test_seed_decides_the_split():
    hashes = {fit("pca", [episodes(30, 4)], space=ARM, seed=seed).weights_hash for seed in (0, 0, 1)}
    assert len(hashes) == 2


def test_two_datasets_of_one_embodiment_share_one_normaliser():
    """Its range is that of both together, whichever comes first."""
    low, high = episodes(30, 4), [e + 1 for e in episodes(30, 4, seed=1)]
    for order in ([low, high], [high, low]):
        tokenizer = fit("bins", order, space=ARM, normaliser="min_max", horizon=17)
        normaliser = tokenizer.embodiment("arm").normaliser
        assert (normaliser.inverse(-np.ones(4)) < -0.1).all()
        assert (normaliser.inverse(np.ones(4)) > 1.1).all()


def test_a_mixture_gives_chunks_in_its_ratios(tmp_path):
    """Three steps of one dataset to one of the other, whatever their sizes, and the other is thinned or repeated."""
    paths = {}
    for name, count in (("big", 40), ("small", 4)):
        data = episodes(count, 4)
        paths[name] = tmp_path / f"{name}.npz"
        np.savez(paths[name], action=np.concatenate(data), episode_length=[len(e) for e in data])
    entries = [
        f'[[datasets]]\nname = "{n}"\nratio = {r}\nsource = "{paths[n]}"\n' for n, r in (("small", 3), ("big", 1))
    ]
    (tmp_path / "mix.toml").write_text("".join(entries))
    mixture = load_mixture(tmp_path / "mix.toml")
    small, big = fit("bins", mixture, horizon=17).meta["data"]
    assert (small["name"], big["name"]) == ("small", "big")
    assert small["train_chunks"] == pytest.approx(3 * big["train_chunks"], abs=2)
    whole = fit("bins", [str(p) for p in paths.values()], horizon=17).meta["data"]
    assert small["train_chunks"] + big["train_chunks"] == pytest.approx(sum(d["train_chunks"] for d in whole), abs=1)


def test_datasets_of_different_rates_ask_for_a_horizon():
    fast, slow = replace(ARM, rate_hz=50.0, embodiment="fast"), replace(ARM, rate_hz=5.0, embodiment="slow")
    sources = [open_dataset(episodes(20, 4), space=space, name=space.embodiment) for space in (fast, slow)]
    with pytest.raises(ConfigError, match=r"50 \(fast\), 10 \(slow\); name one"):
        fit("fast", sources)
    assert fit("fast", sources, horizon=12).horizon == 12
