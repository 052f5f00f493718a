"""Training on a teacher's features: from extraction to a tokenizer, interrupted and resumed, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import ChunkContext, ConfigError, DataError, find_preset
from actok.data import find_space
from actok.training import TrainingStopped, fit
from actok.training.checkpoint import latest_checkpoint, read_checkpoint
from actok.training.engine import Trainer
from actok.training.features import extract_features
from fake_teacher import DIM, FakeTeacher

HORIZON, P = 13, 5
# Masking begins at step 5, in the middle of what is cut and resumed; codebooks start at step 3.
TRAINING = {
    "steps": 11,
    "batch_size": 19,
    "quantise_after": 3,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 100,
}
ALIGN = {"masking_after": 0.45, "width": 32}
SETTINGS = {
    "width": 24,
    "heads": 3,
    "encoder_depth": 1,
    "latent_dim": 10,
    "dropout": 0.1,
    "quantizer": {"codes": 17, "levels": 2},
}


def write(folder, name, *, proprio, seed):
    """A dataset of 23 episodes, whose frames have an instruction and a phase each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(11, 31, 23)
    steps = int(lengths.sum())
    values = {
        "action": rng.uniform(-0.3, 0.3, (steps, 7)).astype(np.float32),
        "episode_length": lengths,
        "instruction": np.array([f"open door {e % 3}" for e in range(len(lengths))]),
        "phase": np.concatenate([np.arange(n) * 2 // n for n in lengths]),
        "phase_names": np.array(["reach", "pull"]),
        "control_hz": np.float64(find_space("libero_franka").rate_hz),
    }
    if proprio:
        values["proprio"] = rng.normal(size=(steps, P)).astype(np.float32)
    np.savez(folder / f"{name}.npz", **values)
    return folder / f"{name}.npz"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data with and without proprioception, and features of both."""
    folder = tmp_path_factory.mktemp("semantic")
    data = [write(folder, "with", proprio=True, seed=0), write(folder, "without", proprio=False, seed=1)]
    extract_features(data, FakeTeacher(), folder / "features", space="libero_franka", progress=False)
    return folder, data


def train(place, **changed):
    folder, data = place
    options = {
        "horizon": HORIZON,
        "space": "libero_franka",
        "features": folder / "features",
        "alignment": ALIGN,
        "training": TRAINING,
        "progress": False,
        **SETTINGS,
        **changed,
    }
    return fit("xtokenizer-tiny", data, **options)


def stop_after(monkeypatch, step):
    monkeypatch.setattr(Trainer, "_agreed", lambda self, requested: self.done == step)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_heads_are_trained_along_dropped_and_resumed_to_the_bit(place, tmp_path, monkeypatch):
    whole = train(place, run=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in lines if "losses" in line]
    assert all({"masking", "contrast", "prediction", "l1"} <= set(x) for x in losses)
    assert losses[1]["masking"] == 0.0 < losses[-1]["masking"]
    assert not any("heads" in name for name in whole.codec.state_dict())

    # Data without proprioception beside data with: one embodiment, whose state may be missing.
    actions = np.random.default_rng(2).uniform(-0.3, 0.3, (3, HORIZON, 7)).astype(np.float32)
    for anchor in (None, np.zeros((3, P))):
        assert whole.decode(whole.encode(actions, ChunkContext(anchor=anchor))).valid.all()

    for step in (3, 7):  # as the codebooks are to start, and with all objectives under way
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(TrainingStopped):
                train(place, run=tmp_path / f"cut{step}")
        torch.manual_seed(step)
        assert train(place, run=tmp_path / f"cut{step}", resume=True).weights_hash == whole.weights_hash
        ends = [read_checkpoint(latest_checkpoint(tmp_path / n / "checkpoints")) for n in ("whole", f"cut{step}")]
        for group, tensors in ends[0].tensors.items():
            assert tensors.keys() == ends[1].tensors[group].keys()
            assert all(torch.equal(value, ends[1].tensors[group][name]) for name, value in tensors.items()), group
        assert ends[0].tensors["heads"]["contrast.whole_feature.weight"].shape == (ALIGN["width"], DIM)
        assert any(name.startswith("heads.masked_codes.") for name in ends[0].tensors["optimizer"])


def test_a_run_with_other_objectives_or_features_is_not_resumed(place, tmp_path, monkeypatch):
    _, data = place
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(TrainingStopped):
            train(place, run=tmp_path / "run")
    for name, teacher in (("other", FakeTeacher(name="other")), ("changed", FakeTeacher(scale=2.0))):
        extract_features(data, teacher, tmp_path / name, space="libero_franka", progress=False)
    for changed, message in (
        ({"alignment": {**ALIGN, "contrast": 0.3}}, r"alignment.contrast was 0.5, now 0.3"),
        (
            {"alignment": {"masking": 0, "contrast": 0, "prediction": 0}, "features": None},
            r"alignment was .*, now null",
        ),
        ({"features": tmp_path / "other"}, r"alignment.teachers\[0\].model was \"fake\", now \"other\""),
        ({"features": tmp_path / "changed"}, r"alignment.features\[0\] was"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(place, run=tmp_path / "run", resume=True, **changed)


def test_features_that_are_needed_or_useless_are_named(place, tmp_path, monkeypatch):
    _, data = place
    with pytest.raises(ConfigError, match=r"run `actok features --data .*with.npz .*--align contrast=0 prediction=0"):
        train(place, features=None)
    with pytest.raises(ConfigError, match="nothing else reads them; leave features out"):
        train(place, alignment={"contrast": 0.0, "prediction": 0.0})
    extract_features(data[:1], FakeTeacher(), tmp_path / "half", space="libero_franka", progress=False)
    with pytest.raises(DataError, match="there are no features of dataset 'without'"):
        train(place, features=tmp_path / "half")
    extract_features(data[1:], FakeTeacher(name="other"), tmp_path / "half", space="libero_franka", progress=False)
    with pytest.raises(ConfigError, match="features are of different teachers"):
        train(place, features=tmp_path / "half")
    with pytest.raises(ConfigError, match="chunks in memory belong to no episode"):
        fit("xtokenizer-tiny", np.zeros((7, HORIZON, 3), np.float32), features=tmp_path / "half", progress=False)
    swept = replace(find_preset("xtokenizer-tiny"), sweep=({"latent_dim": 10},))
    monkeypatch.setattr("actok.training.fitting.find_preset", lambda name: swept)
    with pytest.raises(ConfigError, match=r"search for a tolerance.* leave out features and alignment"):
        train(place, tolerance="1 raw")
