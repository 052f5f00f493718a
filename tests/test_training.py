"""The trainer: batches, schedules, resuming to the bit, and every way in which a run can end."""

import json
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from torch import nn

import training_codec
from actok.core import ArtifactError, ChunkContext, ConfigError, FitPart
from actok.data import Chunks, FrameCache, open_dataset
from actok.data.mixtures import Mixture, MixtureEntry, MixtureSampler
from actok.quantizers.codebook import Codebook
from actok.quantizers.vq import VectorConfig
from actok.training import TrainConfig, TrainingError, TrainingStopped, checkpoint, fit, fit_parts, load, load_material
from actok.training.checkpoint import latest_checkpoint, read_checkpoint
from actok.training.config import train_config
from actok.training.engine import Trainer
from actok.training.evaluate import HeldOutChunks, judge
from actok.training.health import COLLAPSED_TIMES, DIVERGING_WINDOWS, Health
from actok.training.model import parameter_groups
from actok.training.run_folder import RunFolder
from actok.training.sources import Batches, Prefetcher, Source
from training_codec import PRESET, TRAINING, TinyConfig, TinyTokenizer, chunks, episodes, part


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    from actok.core.registry import tokenizer_presets

    presets = {**tokenizer_presets(), "tiny": PRESET}
    monkeypatch.setattr("actok.core.registry.tokenizer_presets", lambda: presets)
    torch.set_num_threads(1)


def lines(folder, kind: str) -> list[dict]:
    """Lines of a log that have that entry, without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timing = ("steps_per_s", "chunks_per_s", "waiting")
    return [{k: v for k, v in line.items() if k not in timing} for line in found if kind in line]


def stop_after(monkeypatch, step: int) -> None:
    """From now on a run is asked to stop after that step, as by SIGTERM."""
    monkeypatch.setattr(Trainer, "_agreed", lambda self, requested: self.done == step)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; give a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a number above 0"),
        ({"min_learning_rate": 1.5}, "min_learning_rate is 1.5; give a number of at least 0, at most 1"),
        ({"weight_ema": 1.0}, "weight_ema is 1.0; give a number of at least 0, below 1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose one of no, bf16"),
        ({"compile": "yes"}, "compile is 'yes'"),
        ({"seed": -1}, "seed is -1"),
        ({"track": (3,)}, "track is"),
    ],
)
def test_bad_training_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor():
    config = TrainConfig(steps=211, warmup_steps=17, learning_rate=0.5, min_learning_rate=0.2)
    rates = [config.learning_rate_at(step) for step in range(211)]
    assert np.allclose(np.diff(rates[:17]), 0.5 / 17)
    assert max(rates) == rates[17] == pytest.approx(0.5)
    assert (np.diff(rates[17:]) < 0).all()
    assert 0.1 < rates[-1] < 0.1005
    assert rates[17 + 97] == pytest.approx(0.3)  # half way down
    assert TrainConfig(steps=53, warmup_steps=500).warmup == 5


def test_the_callers_training_settings_win_over_the_presets():
    tokenizer = fit_parts("tiny", [part(31)], training={"steps": 5, "betas": [0.8, 0.9]})
    config = tokenizer.meta["training"]["config"]
    assert (config["steps"], config["batch_size"], config["betas"]) == (5, TRAINING["batch_size"], (0.8, 0.9))
    with pytest.raises(ConfigError, match=r"training of 'tiny' has no setting 'step'; did you mean 'steps'\?"):
        fit_parts("tiny", [part(31)], training={"step": 5})
    with pytest.raises(
        ConfigError, match="bins is fitted in closed form and takes no training settings; leave out steps"
    ):
        fit_parts("bins", [part(31)], training={"steps": 5})


def test_options_that_mean_nothing_together_are_refused(tmp_path):
    data = episodes(11)
    for options, message in (
        ({"tolerance": "1 raw"}, "no sweep of settings to search"),
        ({"resume": True}, "without a run folder"),
        ({"training": {"track": ["tensorboard"]}}, "needs a run folder"),
        ({"training": {"track": ["nothing"]}, "run": tmp_path / "x"}, "there is no tracker 'nothing'"),
        ({"max_chunks": 0}, "max_chunks is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit("tiny", data, horizon=7, progress=False, **options)
    with pytest.raises(ConfigError, match="fast is fitted in closed form and has no run"):
        fit("fast", data, horizon=7, run=tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_only_weights_of_linear_maps_and_convolutions_decay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.convolution = nn.Linear(3, 5), nn.Conv1d(2, 3, 5)
            self.norm, self.table, self.attention = nn.LayerNorm(5), nn.Embedding(7, 3), nn.MultiheadAttention(4, 2)
            self.query, self.frozen = nn.Parameter(torch.zeros(2, 3)), nn.Linear(2, 2).requires_grad_(False)

    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in parameter_groups(net, 0.3))
    assert decayed == {
        "linear.weight",
        "convolution.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert decayed | others == {name for name in names.values() if not name.startswith("frozen")}
    assert not decayed & others
    assert [g["weight_decay"] for g in parameter_groups(net, 0.3)] == [0.3, 0.0]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_mixes_datasets_of_different_width_normalised_each_for_itself():
    parts = [part(31, 3, "narrow"), part(17, 5, "wide", seed=1)]
    parts[1].actions[:] *= 100
    pad = np.zeros((17, 7), bool)
    pad[3, 5:] = True
    parts[1] = FitPart(actions=parts[1].actions, space=parts[1].space, pad_mask=pad)
    tokenizer = TinyTokenizer.prepare(parts, TinyConfig())
    sampler = MixtureSampler([31, 17], ratios="size", batch_size=48, seed=2)
    batch = Batches(tokenizer, [Source.of_part(p) for p in parts], sampler).at(0).chunks  # one epoch: everything once
    assert batch.actions.shape == (48, 7, 5)
    assert batch.embodiment.tolist() == [1] * 31 + [2] * 17
    assert batch.present.sum(1).tolist() == [3] * 31 + [5] * 17
    drawn = sampler.samples(0)
    for d, (name, rows) in enumerate((("narrow", slice(0, 31)), ("wide", slice(31, 48)))):
        dim, indices = parts[d].actions.shape[2], drawn.indices[drawn.dataset == d]
        expected = tokenizer.embodiment(name).normaliser(parts[d].actions[indices])
        assert np.array_equal(batch.actions[rows, :, :dim].numpy(), expected)
        assert not batch.actions[rows, :, dim:].any()
    assert np.array_equal(~batch.real[31:].numpy(), pad[drawn.indices[drawn.dataset == 1]])
    assert batch.real[:31].all()


def test_ranks_share_out_the_batch_of_one_process():
    parts = [part(31), part(17, 5, "wide")]
    tokenizer = TinyTokenizer.prepare(parts, TinyConfig())
    sampler = MixtureSampler([31, 17], ratios=(2, 1), batch_size=12)
    sources = [Source.of_part(p) for p in parts]
    whole = Batches(tokenizer, sources, sampler).at(5).chunks
    shares = [Batches(tokenizer, sources, sampler, rank=r, ranks=3).at(5).chunks for r in range(3)]

    def rows(batches):
        return sorted(tuple(row) for b in batches for row in b.actions.flatten(1).tolist())

    assert rows(shares) == rows([whole])
    assert {len(b) for b in shares} == {4}


def test_chunks_cut_on_demand_are_those_in_memory():
    cache = FrameCache.build(open_dataset(episodes(13)))
    pool = Chunks(cache, 7)
    everything = pool.all()
    in_memory = Source.of_part(FitPart(actions=everything.actions, space=cache.space, pad_mask=everything.pad_mask))
    rows = np.arange(len(pool))[::3]
    for source, wanted in (
        (Source.of_chunks(pool, "x"), np.arange(len(pool))),
        (Source.of_chunks(pool, "x", rows), rows),
    ):
        assert source.size == len(wanted)
        found, expected = source.cut(np.arange(source.size)), in_memory.cut(wanted)
        assert np.array_equal(found.actions, expected.actions)
        assert np.array_equal(found.pad_mask, expected.pad_mask)


def test_the_prefetcher_keeps_order_and_hands_over_errors():
    def make(step):
        if step == 41:
            raise ArtifactError("the disk is gone")
        return step * 10

    with Prefetcher(make, 3, 100) as feed:
        assert [feed.get(step) for step in range(3, 41)] == list(range(30, 410, 10))
        with pytest.raises(ArtifactError, match="the disk is gone"):
            feed.get(41)
    assert not any(t.name == "actok-batches" for t in threading.enumerate())


def test_a_prefetch_thread_that_dies_or_hangs_ends_the_run(monkeypatch):
    with Prefetcher(lambda step: step, 0, 2) as feed:
        assert [feed.get(0), feed.get(1)] == [0, 1]
        with pytest.raises(TrainingError, match="ended before step 3; resume"):
            feed.get(2)
    monkeypatch.setattr("actok.training.sources.PATIENCE_S", 0.5)
    hung = threading.Event()
    with Prefetcher(lambda step: hung.wait(10), 0, 1) as feed:
        with pytest.raises(TrainingError, match="no batch came for step 1 in 0 s; check the disk"):
            feed.get(0)
        hung.set()


# -- what training does -----------------------------------------------------------------------------------------------


def test_training_makes_it_better_and_leaves_the_callers_random_state_alone():
    held_out = chunks(53, seed=9)
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    settings = {"dropout": 0.0, "quantizer": {"codes": 64}}
    found = {
        steps: fit_parts("tiny", [part(301)], training={"steps": steps, "batch_size": 64}, **settings)
        for steps in (1, 60)
    }
    assert torch.equal(torch.random.get_rng_state(), before)
    error = {s: np.abs(t.decode(t.encode(held_out)).actions - held_out).mean() for s, t in found.items()}
    assert error[60] < 0.8 * error[1]
    assert found[60].config.quantizer == {"kind": "residual", "levels": 2, "codes": 64, "kmeans_steps": 3}
    assert found[60].meta["finished_with"] == [301]
    again = fit_parts("tiny", [part(301)], training={"steps": 60, "batch_size": 64}, **settings)
    assert again.weights_hash == found[60].weights_hash
    other = fit_parts("tiny", [part(301)], training={"steps": 60, "batch_size": 64, "seed": 1}, **settings)
    assert other.weights_hash != again.weights_hash


def test_the_moving_average_of_the_weights_is_what_is_kept(monkeypatch):
    seen = []
    step = Trainer._step

    def spy(self, *arguments):
        seen.append({name: p.detach().clone() for name, p in self.names.items()})
        step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", spy)
    training = {"steps": 5, "weight_ema": 0.3}
    kept = fit_parts("tiny", [part(31)], training=training).codec.state_dict()
    plain = fit_parts("tiny", [part(31)], training={"steps": 5}).codec.state_dict()
    trajectory = [*seen[:5], {name: plain[name] for name in seen[0]}]
    for name in seen[0]:
        average = trajectory[0][name].double()
        for done, weights in enumerate(trajectory[1:]):
            decay = min(0.3, (1 + done) / (10 + done))  # 1/10, 2/11, 3/12, then what is asked for
            average = decay * average + (1 - decay) * weights[name].double()
        assert torch.allclose(kept[name].double(), average, atol=1e-6), name
    assert torch.equal(kept["quantizer.codebooks.0.vectors"], plain["quantizer.codebooks.0.vectors"])


def test_codebooks_slow_down_with_the_learning_rate():
    """The weight of a batch in the moving averages is (1 - decay) times the share of the peak learning rate."""
    training = {
        "steps": 20,
        "warmup_steps": 2,
        "learning_rate": 0.02,
        "min_learning_rate": 0.0,
        "anneal_codebooks": True,
    }
    config = train_config({}, training, "x")
    paces = []
    step = Trainer._step

    def spy(self, number, batch):
        step(self, number, batch)
        paces.append([float(codebook.pace) for codebook in self.codebooks])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", spy)
        fit_parts("tiny", [part(301)], training=training)
    expected = [1.0] * 2 + [config.learning_rate_at(i) / 0.02 for i in range(2, 20)]
    assert all(len(p) > 0 for p in paces)
    np.testing.assert_allclose([p[0] for p in paces], expected, rtol=1e-6)
    book = Codebook(5, 3, VectorConfig(kmeans_steps=0, decay=0.9, dead_below=0.0))
    z = torch.randn(7, 3)
    before = book.counts.clone()
    book.train().pace.fill_(0.25)
    codes = book.search(z)
    book.update(z, codes, None)
    torch.testing.assert_close(book.counts, before + 0.1 * 0.25 * (codes.bincount(minlength=5) - before))


def test_codebooks_that_start_late_do_so_once_from_this_batch_and_those_that_follow(monkeypatch):
    step, encode = Trainer._step, training_codec.TinyCodec.encode
    states, inputs, counted, slots = [], [], [], set()

    def spy(self, number, batch):
        step(self, number, batch)
        book = self.codec.quantizer.codebook(0)
        states.append((self.codec.quantizer.bypassed, bool(book.initialised), book.vectors.clone()))
        counted.append(float(book.counts.sum()))

    def watched(self, batch):
        latents = encode(self, batch)
        if self.training:
            inputs.append(batch.actions)
            slots.add(latents.shape[1])
        return latents

    monkeypatch.setattr(Trainer, "_step", spy)
    monkeypatch.setattr(training_codec.TinyCodec, "encode", watched)
    tokenizer = fit_parts("tiny", [part(301)], training={"steps": 23, "quantise_after": 5})
    assert [s[:2] for s in states] == [(True, False)] * 5 + [(False, True)] * 18
    assert all(torch.equal(vectors, states[0][2]) for _, _, vectors in states[:5])
    assert (states[5][2] - states[0][2]).norm(dim=1).min() > 0
    assert [len(x) for x in inputs] == [12] * 5 + [16 * 12] + [12] * 18
    assert torch.equal(inputs[5], torch.cat(inputs[6:22]))
    # The moving counts are those of one batch of 12 chunks, not of the sixteen it started from: new batches weigh as ever.
    assert 0.5 < counted[5] / (12 * slots.pop()) < 2
    assert not tokenizer.codec.quantizer.bypassed
    assert tokenizer.meta["training"]["config"]["quantise_after"] == 5


def test_bf16_trains_and_keeps_float32_weights():
    tokenizer = fit_parts("tiny", [part(31)], training={"precision": "bf16"})
    assert all(v.dtype == torch.float32 for v in tokenizer.codec.state_dict().values() if v.is_floating_point())
    plain = fit_parts("tiny", [part(31)])
    assert tokenizer.weights_hash != plain.weights_hash
    assert np.isfinite(tokenizer.decode(tokenizer.encode(chunks(5))).actions).all()


def test_the_best_weights_on_validation_episodes_are_kept(tmp_path):
    data = episodes(40)
    options = {"horizon": 7, "progress": False, "run": tmp_path / "run"}
    training = {"steps": 30, "eval_every": 4, "learning_rate": 0.05, "log_every": 7, "min_learning_rate": 1.0}
    tokenizer = fit("tiny", data, training=training, **options)
    judged = [line["validation"] for line in lines(tmp_path / "run", "validation")]
    assert [j["step"] for j in judged] == [4, 8, 12, 16, 20, 24, 28, 30]
    best = min(judged, key=lambda j: j["l1"])
    summary = tokenizer.meta["training"]
    assert summary["validation"] == best
    assert best["step"] < 30  # else this test shows nothing
    assert set(best["vrr"]) == {"0.03", "0.1"}
    assert [line["step"] for line in lines(tmp_path / "run", "loss")] == [4, 7, 8, 12, 14, 16, 20, 21, 24, 28, 30]
    stored = read_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    state = tokenizer.codec.state_dict()
    assert all(torch.equal(stored.tensors["best"][name], state[name]) for name in state)
    assert any(not torch.equal(stored.tensors["model"][name], state[name]) for name in state)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["finished"]["validation"]["step"] == best["step"]
    assert (
        run["identity"]["data"][0]["split"]
        == tokenizer.meta["data"][0]["split"]
        == {"seed": 0, "fractions": [0.8, 0.1, 0.1]}
    )
    assert {"command", "commit", "packages", "cpu", "actok"} <= run.keys()
    # The figures are those of the benchmark on the same chunks with the saved tokenizer.
    material = load_material(data, horizon=7)
    held = HeldOutChunks.of("x", material.validation, None, material.train.statistics, 2048)
    again = judge(load(tokenizer.save_pretrained(tmp_path / "saved")), [held])
    assert again == {k: v for k, v in best.items() if k != "step"}


def test_without_validation_the_last_weights_are_kept_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = fit("tiny", chunks(31), progress=False)
    assert tokenizer.meta["training"]["validation"] is None
    assert tokenizer.meta["data"][0]["split"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_widths_is_trained_in_its_ratios_and_serves_each(tmp_path):
    entries = []
    for name, dim, count in (("narrow", 3, 30), ("wide", 5, 20)):
        found = episodes(count, dim)
        np.savez(tmp_path / f"{name}.npz", action=np.concatenate(found), episode_length=[len(e) for e in found])
        entries.append(
            MixtureEntry(name=name, source=str(tmp_path / f"{name}.npz"), ratio=3 if name == "narrow" else 1)
        )
    drawn = []
    at = Batches.at

    def spy(self, step):
        batch = at(self, step)
        drawn.append(batch.chunks.embodiment.bincount(minlength=3).tolist())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "at", spy)
        mixture = Mixture(name="mine", entries=tuple(entries))
        tokenizer = fit("tiny", mixture, horizon=7, progress=False, training={"eval_every": 5})
    assert drawn == [[0, 9, 3]] * 14
    assert [d["ratio"] for d in tokenizer.meta["data"]] == [3, 1]
    assert [d["name"] for d in tokenizer.meta["training"]["validation"]["l1_by_dataset"]] == ["narrow", "wide"]
    for (name, space), dim in zip(tokenizer.spaces.items(), (3, 5), strict=True):
        assert space.dim == dim
        tokens = tokenizer.encode(chunks(11, dim=dim), ChunkContext(embodiment=name))
        assert tokenizer.decode(tokens).actions.shape == (11, 7, dim)


# -- resuming ---------------------------------------------------------------------------------------------------------

LONG = {
    "steps": 22,
    "quantise_after": 5,
    "anneal_codebooks": True,
    "eval_every": 4,
    "checkpoint_every": 6,
    "log_every": 4,
    "weight_ema": 0.8,
    "weight_decay": 0.2,
}


@pytest.mark.parametrize("ending", ["stopped early", "stopped as it starts to quantise", "stopped", "killed"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, monkeypatch, ending):
    """Dropout, dead codes, moving averages of codebooks and weights, the best weights, the log: as if never interrupted."""
    data = episodes(40)
    options = {"horizon": 7, "progress": False, "training": LONG}
    whole = fit("tiny", data, run=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        if ending != "killed":  # between two checkpoints that are due: saves where it stands
            step = {"stopped early": 3, "stopped": 11}.get(ending, 5)  # the quantiser takes part from the sixth on
            stop_after(patch, step)
            with pytest.raises(TrainingStopped, match=f"stopped after step {step} of 22, saved in"):
                fit("tiny", data, run=tmp_path / "cut", **options)
        else:  # after more log lines than the last checkpoint knows of
            step = Trainer._step
            patch.setattr(Trainer, "_step", lambda self, i, b: step(self, i, b) if i < 16 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fit("tiny", data, run=tmp_path / "cut", **options)
            assert lines(tmp_path / "cut", "loss")[-1]["step"] == 16
    torch.manual_seed(99)
    resumed = fit("tiny", data, run=tmp_path / "cut", resume=True, **options)
    assert resumed.weights_hash == whole.weights_hash
    ends = [read_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints")) for name in ("whole", "cut")]
    assert ends[0].tensors.keys() == {"model", "heads", "ema", "optimizer", "best"}
    for group, tensors in ends[0].tensors.items():
        assert tensors.keys() == ends[1].tensors[group].keys()
        assert all(torch.equal(value, ends[1].tensors[group][name]) for name, value in tensors.items()), group
    assert any(name.endswith("exp_avg_sq") for name in ends[0].tensors["optimizer"])
    for kind in ("loss", "validation"):
        cut = [line for line in lines(tmp_path / "cut", kind) if kind == "validation" or line["step"] not in (3, 5, 11)]
        whole_lines = lines(tmp_path / "whole", kind)
        assert [line["step"] for line in cut] == [line["step"] for line in whole_lines]
        if kind == "validation" or ending == "killed":
            assert cut == whole_lines
    again = fit("tiny", data, run=tmp_path / "cut", resume=True, **options)  # a finished run has nothing left to do
    assert again.weights_hash == whole.weights_hash


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    options = {"horizon": 7, "progress": False, "run": tmp_path / "run"}
    with monkeypatch.context() as patch:
        step = Trainer._step
        patch.setattr(Trainer, "_step", lambda self, i, b: step(self, i, b) if i < 8 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit("tiny", episodes(40), **options)
    assert [line["step"] for line in lines(tmp_path / "run", "loss")] == [3, 6]
    fit("tiny", episodes(40), resume=True, **options)
    assert [line["step"] for line in lines(tmp_path / "run", "loss")] == [3, 6, 9, 12, 14]


def test_the_best_weights_outlive_an_interruption(tmp_path, monkeypatch):
    """The smallest error is found before the run is stopped, larger ones after it goes on."""
    errors = iter([3.0, 1.0, 2.0, 2.5, 4.0])

    def judged(tokenizer, datasets):
        return {"l1": next(errors), "vrr": {"0.03": 0.5}, "codes_used": [1.0]}

    monkeypatch.setattr("actok.training.learned.judge", judged)
    options = {"horizon": 7, "progress": False, "run": tmp_path / "run", "training": {"eval_every": 3}}
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(TrainingStopped):
            fit("tiny", episodes(40), **options)
    best = read_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).tensors["best"]
    tokenizer = fit("tiny", episodes(40), resume=True, **options)
    assert tokenizer.meta["training"]["validation"]["step"] == 6
    assert all(torch.equal(value, best[name]) for name, value in tokenizer.codec.state_dict().items())


def test_a_run_is_resumed_as_what_it_was_only(tmp_path, monkeypatch):
    run = tmp_path / "run"
    data = episodes(40)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(TrainingStopped):
            fit("tiny", data, horizon=7, progress=False, run=run)
    for changed, message in (
        ({"training": {"learning_rate": 0.5}}, r"training.learning_rate was 0.003, now 0.5"),
        ({"width": 16}, r"settings.width was 8, now 16"),
        ({"quantizer": {"codes": 17}}, r"settings.quantizer.codes was 13, now 17"),
        ({"horizon": 5}, r"data\[0\].horizon was 7, now 5"),
        ({"seed": 3}, r"data\[0\].split.seed was 0, now 3"),
        ({"data": [*data[:-1], data[-1] + 1]}, r"data\[0\].statistics was"),
    ):
        given = {"data": data, "horizon": 7, **changed}
        with pytest.raises(ConfigError, match=message):
            fit("tiny", given.pop("data"), progress=False, run=run, resume=True, **given)
    with pytest.raises(ConfigError, match="holds an unfinished run; go on with it"):
        fit("tiny", data, horizon=7, progress=False, run=run)
    # What changes nothing in the outcome may change.
    done = fit("tiny", data, horizon=7, progress=False, run=run, resume=True, training={"log_every": 5})
    assert done.meta["training"]["steps"] == 14


def test_a_finished_run_gives_way_and_anything_else_is_kept(tmp_path):
    run = tmp_path / "run"
    options = {"horizon": 7, "progress": False}
    fit("tiny", episodes(40), run=run, resume=True, **options)  # nothing there yet: it begins
    assert len(lines(run, "validation")) == 1
    fit("tiny", episodes(40), run=run, width=4, **options)
    assert len(lines(run, "validation")) == 1
    assert json.loads((run / "run.json").read_text())["identity"]["settings"]["width"] == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="holds something else than a training run"):
            fit("tiny", episodes(40), run=tmp_path / "mine", resume=resume, **options)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = {"horizon": 7, "progress": False, "run": run, "training": {"checkpoint_every": 2}}
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(TrainingStopped):
            fit("tiny", episodes(40), **options)
    found = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert found == ["step-000000008", "step-000000009"]  # the last two, and no rest of writing
    weights = run / "checkpoints" / "step-000000009" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"model.safetensors is truncated or edited .* delete .* to resume"):
        fit("tiny", episodes(40), resume=True, **options)
    shutil.rmtree(weights.parent)
    assert fit("tiny", episodes(40), resume=True, **options).meta["training"]["steps"] == 14


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = checkpoint._write

    def full(path, content):
        if json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] > 4:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(ArtifactError, match=r"step-000000008 cannot be written \(No space left on device\); make room"):
        fit("tiny", episodes(40), horizon=7, progress=False, run=run, training={"checkpoint_every": 4})
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000000004"]
    assert read_checkpoint(run / "checkpoints" / "step-000000004").step == 4


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_before(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"broke down in step 9: .*l1 is nan.*smaller learning_rate") as found:
        fit(
            "tiny",
            episodes(40),
            horizon=7,
            progress=False,
            run=run,
            breaks="nan",
            breaks_at=9,
            training={"checkpoint_every": 4, "log_every": 50},
        )
    assert "\n" not in str(found.value)
    stored = read_checkpoint(latest_checkpoint(run / "checkpoints"))
    assert stored.step == 8
    assert all(v.isfinite().all() for v in stored.tensors["model"].values() if v.is_floating_point())


def test_memory_that_does_not_suffice_is_told_with_what_helps():
    with pytest.raises(
        TrainingError, match=r"out of memory in step 3 with batches of 12 chunks; make batch_size smaller"
    ):
        fit_parts("tiny", [part(31)], breaks="memory", breaks_at=3)


def test_divergence_and_collapse_are_told_once_with_their_figures():
    health = Health([13, 512], warmup=5)
    health.losses(1, [{"l1": 0.01}] * 4)  # during warm-up
    health.losses(6, [{"l1": 2.0}] * 4)
    for window in range(DIVERGING_WINDOWS - 1):
        health.losses(10 + window, [{"l1": 40.0, "commitment": 2.0}])
    with pytest.warns(UserWarning, match=r"the loss diverges: 42 at step 20 is 21 times its best, 2 at step 9"):
        health.losses(20, [{"l1": 40.0, "commitment": 2.0}])
    for window in range(2 * DIVERGING_WINDOWS):
        health.losses(21 + window, [{"l1": 40.0, "commitment": 2.0}])
    health.codes(3, [0.1, 0.002], [1.0, 1.0], 700)  # during warm-up
    for step in range(10, 10 + COLLAPSED_TIMES - 1):
        health.codes(step, [0.5, 0.002], [5.0, 1.2], 700)
    with pytest.warns(
        UserWarning, match="level 1 has collapsed at step 20: its batch uses 1 of 512 codes, perplexity 1.2"
    ):
        health.codes(20, [0.5, 0.002], [5.0, 1.2], 700)
    for step in range(21, 21 + 2 * COLLAPSED_TIMES):
        health.codes(step, [0.5, 0.002], [5.0, 1.2], 700)
    assert health.warned == ["diverging", "collapsed 1"]
    other = Health([13, 512], warmup=5)
    other.restore(json.loads(json.dumps(health.state())))
    assert vars(other) == vars(health)
    healthy = Health([13], warmup=0)
    for step in range(1, 100):
        healthy.losses(step, [{"l1": math.exp(-step / 30)}])
        healthy.codes(step, [0.9], [9.0], 700)
    assert healthy.warned == []


def test_every_line_of_the_run_folder_is_whole_json_while_it_runs(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})
    for step in range(3):
        folder.log({"step": step})
        assert [line["step"] for line in lines(folder.path, "step")] == list(range(step + 1))
    for cut in ('{"step": 7, "lo', '{"step": 1, "losses": {"l1": 0.5}'):  # by a crash
        with (folder.path / "log.jsonl").open("a") as log:
            log.write(cut)
        folder.rewind(1)
        assert [line["step"] for line in lines(folder.path, "step")] == [0, 1]
