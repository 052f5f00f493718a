"""Training policies: the loop on a policy of two layers, resuming to the bit, whole policies, the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import actok
import test_policy_backbones
from actok.backbones.policy_models import load_backbone
from actok.cli.main import main
from actok.core import (
    ConfigError,
    DataError,
)
from actok.policies.base import PolicyObservation
from actok.policies.load import load_policy, policy_integrity
from actok.training import TrainingError, TrainingStopped
from actok.training.policy import policy_tokenizer, train_policy
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import PolicyTrainConfig, trained_names
from actok.training.policy_trainer import PolicyTrainer, evaluate
from actok.training.run_folder import RunFolder
from policy_demos import FEW, TINY, D, H, P, T, W, frames, regressor, same, weights, without


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fast():
    return actok.fit("fast", frames(), horizon=T)


@pytest.fixture(scope="module")
def bins():
    return actok.fit("bins", frames(), horizon=T, bins=11)


@pytest.fixture
def samples(bins):
    return PolicyData.build(frames(), bins, progress=False)


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_validation_loss_and_tells_it(samples, tmp_path):
    config = PolicyTrainConfig(steps=120, batch_size=32, learning_rate=0.01, eval_every=60, log_every=20)
    policy = regressor(samples)
    before = evaluate(policy, samples.validation, most=1000, batch_size=32)
    summary = PolicyTrainer(policy, samples, config, folder=RunFolder(tmp_path / "run", {}), progress=False).run()
    after = evaluate(policy, samples.validation, most=1000, batch_size=32)
    assert after["losses"]["l1"] < before["losses"]["l1"]
    assert summary["validation"] == {"step": 120, **evaluate(policy, samples.validation, most=2048, batch_size=32)}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [60, 120]
    assert set(summary["losses"]) == {"l1", "noise"}
    assert summary["epochs"] == pytest.approx(120 * 32 / len(samples))


def test_an_evaluation_is_the_mean_over_samples_and_disturbs_nothing(samples):
    policy = regressor(samples).train()
    held_out = samples.validation
    state = torch.get_rng_state()
    whole = evaluate(policy, held_out, most=10_000, batch_size=len(held_out))
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training
    parts = [evaluate(policy, held_out, most=10_000, batch_size=b) for b in (7, 7, 1)]
    assert parts[0] == parts[1]
    assert whole["samples"] == parts[0]["samples"] == len(held_out)
    batch = held_out.batch(np.arange(len(held_out)))
    policy.eval()
    assert whole["losses"]["l1"] == pytest.approx(policy.losses(batch)["l1"].item())
    assert whole["report"]["worst"] == pytest.approx(policy.noted)
    assert parts[0]["report"]["worst"] <= whole["report"]["worst"]


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(samples, tmp_path, monkeypatch):
    stages = [{"share": 0.6, "train": ["all"]}, {"share": 0.4, "train": ["flow"]}]
    config = PolicyTrainConfig(
        steps=23, batch_size=16, learning_rate=0.02, eval_every=5, log_every=3, weight_ema=0.9, stages=stages
    )
    whole = regressor(samples)
    summary = PolicyTrainer(whole, samples, config, progress=False).run()
    for stop in (4, 14, 19):
        name = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(PolicyTrainer, "_agreed", lambda self, requested, stop=stop: self.done == stop)
            trainer = PolicyTrainer(regressor(samples), samples, config, folder=RunFolder(name, {}), progress=False)
            assert not trainer.resume()
            with pytest.raises(TrainingStopped, match=f"after step {stop} of 23, saved in {name}"):
                trainer.run()
        policy = regressor(samples, seed=99)
        folder = RunFolder(name, {}, resume=True)
        trainer = PolicyTrainer(policy, samples, config, folder=folder, progress=False)
        assert trainer.resume()
        resumed = trainer.run()
        assert same(weights(policy), weights(whole))
        assert resumed["validation"] == summary["validation"]
    trainer = PolicyTrainer(
        again := regressor(samples, seed=98), samples, config, folder=RunFolder(name, {}, resume=True), progress=False
    )
    assert trainer.resume()
    assert trainer.run()["losses"] == resumed["losses"]
    assert same(weights(again), weights(whole))


def test_what_no_stage_trains_is_in_no_checkpoint(samples, tmp_path):
    config = PolicyTrainConfig(steps=2, batch_size=4, stages=[{"share": 1, "train": "flow"}])
    trainer = PolicyTrainer(regressor(samples), samples, config, folder=RunFolder(tmp_path / "run", {}), progress=False)
    trainer.run()
    model = load_file(next(tmp_path.glob("run/checkpoints/step-*/model.safetensors")))
    assert set(model) == {"parts.flow.weight", "parts.flow.bias"}
    assert trainer.parameters == sum(v.numel() for v in model.values())


def test_the_moving_average_is_what_is_judged_and_kept(samples):
    options = {"steps": 9, "batch_size": 8, "learning_rate": 0.05, "eval_every": 3, "warmup_steps": 0}
    plain, averaged = regressor(samples), regressor(samples)
    PolicyTrainer(plain, samples, PolicyTrainConfig(**options), progress=False).run()
    trainer = PolicyTrainer(averaged, samples, PolicyTrainConfig(**options, weight_ema=0.5), progress=False)
    raw = {}
    step = trainer.optimizer.step

    def watched():
        step()
        raw[len(raw)] = weights(averaged)

    trainer.optimizer.step = watched
    summary = trainer.run()
    assert same(raw[8], weights(plain))
    mean = {name: value.clone() for name, value in weights(regressor(samples)).items()}
    for number in range(9):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = {name: decay * mean[name] + (1 - decay) * raw[number][name] for name in mean}
    assert all(torch.allclose(mean[n], value, atol=1e-6) for n, value in weights(averaged).items())
    judged = evaluate(averaged, samples.validation, most=2048, batch_size=8)
    assert summary["validation"]["losses"] == judged["losses"]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_model_in_parts_is_refused(samples, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=f"configured for {name}, .* every process holds a whole one"):
        PolicyTrainer(regressor(samples), samples, PolicyTrainConfig(**FEW), progress=False)


def test_a_loss_that_is_not_finite_ends_the_run(samples):
    policy = regressor(samples, breaks=True)
    config = PolicyTrainConfig(steps=5, batch_size=4, log_every=2)
    with pytest.raises(TrainingError, match="training broke down in step 1: l1 is nan"):
        PolicyTrainer(policy, samples, config, progress=False).run()


# -- whole policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [("tokens",), ("flow", "tokens")])
def test_a_trained_policy_acts_alone_from_its_folder(fast, tmp_path, capsys, heads):
    settings = {**TINY, "heads": list(heads), "flow_expert": 8, "speaks": True, "temperature": 0.0}
    policy = train_policy(frames(), fast, settings=settings, views=["image"], training=FEW, progress=False)
    policy.save_pretrained(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    observation = PolicyData.build(frames(), fast, views=["image"], progress=False).batch([3, 1, 4]).observation
    for head in heads:
        acted = [p.act(observation, head=head, generator=torch.Generator().manual_seed(0)) for p in (policy, loaded)]
        assert acted[0].valid.all()
        assert np.array_equal(acted[0].actions, acted[1].actions)
        assert acted[0].actions.shape == (3, T, D)
    assert set(loaded.meta["task_steps"]) == {"open", "shut"}
    assert loaded.meta["training"]["steps"] == 6
    assert set(loaded.meta["training"]["losses"]) == {"tokens", "text"} | set(heads)
    lengths = PolicyData.build(frames(), fast, progress=False).train.token_lengths
    assert loaded.meta["passes"] == pytest.approx(lengths.mean())  # one code a pass; no pass for the end
    one = PolicyObservation(
        instruction=observation.instruction[:1],
        proprio=observation.proprio[:1],
        images={view: pixels[:1] for view, pixels in observation.images.items()},
    )
    emitted = loaded.act(one, head="tokens", generator=torch.Generator().manual_seed(0))
    assert emitted.passes == (emitted.codes >= 0).sum()

    assert main(["inspect", str(tmp_path / "policy")]) == 0
    text = capsys.readouterr().out
    rows = [line.split(None, 1) for line in text.splitlines() if line]
    for row in (
        ["policy", "VLA, preset actok-vla-tiny"],
        ["tokenizer", f"fast, hash {fast.weights_hash}"],
        ["horizon", f"{T} steps"],
        ["heads", ", ".join(heads)],
        ["state", f"{P} numbers, as {policy.config.state}"],
        ["parameters", f"{sum(p.numel() for p in policy.parameters()):,}"],
    ):
        assert row in rows
    assert f"{W} x {H} pixels" in next(line for line in text.splitlines() if line.startswith("view image "))
    assert "16 training episodes" in text
    assert "trained 6 steps" in text
    assert main(["inspect", str(tmp_path / "policy"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["views"], facts["meta"]["image_sizes"]) == (["image"], {"image": [H, W]})
    assert facts["settings"]["temperature"] == facts["decoding"]["temperature"] == 0.0


def test_a_resumed_run_is_the_same_policy_and_another_run_is_refused(bins, tmp_path, monkeypatch):
    options = {"settings": TINY, "training": FEW, "progress": False}
    whole = train_policy(frames(), bins, **options)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 4)
        with pytest.raises(TrainingStopped):
            train_policy(frames(), bins, run=tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        train_policy(frames(), bins, run=tmp_path / "run", **options)
    other = {**options, "settings": TINY | {"block": 3}}
    with pytest.raises(ConfigError, match=r"settings.block was null, now 3"):
        train_policy(frames(), bins, run=tmp_path / "run", resume=True, **other)
    resumed = train_policy(frames(), bins, run=tmp_path / "run", resume=True, **options)
    assert same(weights(resumed), weights(whole))
    seeded = train_policy(frames(), bins, **{**options, "training": {**FEW, "seed": 1}})
    assert not same(weights(seeded), weights(whole))


def test_a_policy_on_a_published_backbone_trains_what_it_is_told(bins, tmp_path):
    pytest.importorskip("transformers")
    settings = {"backbone": str(test_policy_backbones.make_paligemma(tmp_path / "model")), "token_expert": 8}
    training = {**FEW, "steps": 2, "eval_chunks": 3, "learning_rate": 0.01, "batch_size": 4}
    stages = [{"share": 1.0, "train": ["expert", "language"]}]
    options = {"preset": "fastervla-paligemma", "settings": settings, "views": ["image"], "progress": False}
    policy = train_policy(frames(), bins, training={**training, "stages": stages}, **options)
    loaded = {f"backbone.{name}": p for name, p in load_backbone(settings["backbone"]).named_parameters()}
    moved = {name for name, p in policy.named_parameters() if name in loaded and not torch.equal(p, loaded[name])}
    groups = ("vision", "language", "embeddings", "expert", "backbone")
    found = {
        group: trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": group}]).stages)[0]
        for group in groups
    }
    assert not moved & found["vision"]
    assert found["embeddings"] < found["language"]
    assert len(moved) > len(found["language"]) / 2
    assert found["vision"] | found["language"] == found["backbone"]
    assert found["expert"] == {name for name, _ in policy.named_parameters() if name.startswith("parts.tokens.")}


def test_settings_are_refused_before_data_are_read(bins, tmp_path):
    (tmp_path / "todo.txt").write_text("remember the milk")
    for options, message in (
        ({"preset": "actok-vla-tinny"}, "did you mean 'actok-vla-tiny'"),
        ({"settings": {"blok": 3}}, "has no setting 'blok'; did you mean 'block'"),
        ({"settings": {"backbone": {"widht": 3}}}, "has no setting 'widht'; did you mean 'width'"),
        ({"settings": {"backbone": 3}}, "backbone is 3; give a table"),
        (
            {"preset": "fastervla-paligemma", "settings": {"backbone": {"width": 3}}},
            "or model = a Hub id or folder alone",
        ),
        ({"training": {"compile": True}}, "compile is no setting of a policy"),
        ({"resume": True}, "without a run folder"),
        ({"run": tmp_path}, "holds something else than a training run"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_policy("nowhere", bins, progress=False, **options)
    with pytest.raises(DataError, match="set state=none"):
        train_policy(without("proprio"), bins, views=["image"], settings=TINY, training=FEW, progress=False)


def test_a_tokenizer_by_name_is_fitted_on_the_same_episodes(bins, tmp_path):
    bins.save_pretrained(tmp_path / "bins")
    found = policy_tokenizer("bins:bins=11", frames(), horizon=T)
    assert found.weights_hash == policy_tokenizer(str(tmp_path / "bins"), frames()).weights_hash == bins.weights_hash
    with pytest.raises(ConfigError, match="trained first: actok fit fastervq-tiny --data demos --out TOKENIZER"):
        policy_tokenizer("fastervq-tiny", ["demos"])
    with pytest.raises(ConfigError, match=r"'bims' is neither a folder here nor a tokenizer .* did you mean 'bins'"):
        policy_tokenizer("bims", frames())


# -- the command line -------------------------------------------------------------------------------------------------

ARGUMENTS = ["--tokenizer", "bins:bins=11", "--horizon", str(T), "--steps", "6", "--batch-size", "8"]
MORE = ["--set", "backbone.width=16", "backbone.layers=1", "backbone.heads=2", "spacing=0"]
STAGES = 'stages=[{share=0.5,train="embeddings"},{share=0.5,train=["backbone","state"]}]'
OFTEN = ["--train", "log_every=2", "weight_decay=0.0", STAGES]


def test_the_command_line_in_one_process_and_in_two_ends_with_the_same_weights(tmp_path, capsys):
    np.savez(tmp_path / "moves.npz", **without("image"))
    arguments = ["train-policy", "--data", str(tmp_path / "moves.npz"), *ARGUMENTS, *MORE, *OFTEN]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "actok"]
    two = subprocess.Popen(
        [*torchrun, *arguments, "--out", str(tmp_path / "two")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    told = capsys.readouterr().out
    assert (
        "chunks of 7 steps are 21 tokens (at most 21) of the tokenizer bins, emitted in 7 passes; heads: tokens" in told
    )
    assert f"actok rollout --policy {tmp_path / 'one'} --env ENV --out DIR" in told
    assert "trained 6 steps" in told
    assert "the last weights are kept" in told
    output, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    assert output.count("saved in") == 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    first = weights(load_policy(tmp_path / "one"))
    assert one.keys() == other.keys() == first.keys()
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_the_command_line_resamples_and_goes_on_from_a_saved_policy(tmp_path, capsys):
    np.savez(tmp_path / "moves.npz", **without("image"), control_hz=20.0)
    common = ["train-policy", "--data", str(tmp_path / "moves.npz"), "--steps", "2", "--batch-size", "8"]
    first, then = str(tmp_path / "first"), str(tmp_path / "then")
    tokenizer = ["--tokenizer", "bins:bins=11", "--horizon", str(T)]
    assert main([*common, *tokenizer, *MORE, "--rate", "8", "--out", first]) == 0
    assert load_policy(first).space.rate_hz == 8.0
    assert main([*common, "--init", first, "--out", then]) == 1
    assert "resample the data (--rate 8)" in capsys.readouterr().err
    assert main([*common, "--init", first, "--rate", "8", "--out", then]) == 0
    assert load_policy(then).meta["started_from"]["name"] == "first"
    assert f"began with the weights of first (integrity {policy_integrity(first)[:16]})" in capsys.readouterr().out
    for given, message in (
        (["--init", first, *tokenizer], "tokenizer, horizon cannot be given"),
        (["--init", first, "--backbone", "some/model"], "settings cannot be given"),
        ([], "neither a tokenizer nor a policy to start from is given; name one (--tokenizer, or --init)"),
    ):
        assert main([*common, *given, "--out", str(tmp_path / "none")]) == 1
        assert message in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "moves.npz", **without("image"))
    arguments = [
        "train-policy",
        "--data",
        str(tmp_path / "moves.npz"),
        *ARGUMENTS,
        *MORE,
        "--out",
        str(tmp_path / "out"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 2)
        assert main(arguments) == 130
    assert "after step 2 of 6" in (found := capsys.readouterr().err)
    assert "the same command with --resume goes on" in found
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--resume"]) == 0
    assert load_policy(tmp_path / "out").meta["training"]["steps"] == 6
    assert main([*arguments, "--backbone", "x", "--set", "backbone.width=16"]) == 1
    assert "given twice, by --backbone and by --set" in capsys.readouterr().err
