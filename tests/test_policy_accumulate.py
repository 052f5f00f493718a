"""A batch taken in parts: the gradients, the losses told and the run are those of the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import actok
from actok.core import ConfigError
from actok.policies import flow_head
from actok.policies.base import Policy
from actok.training import TrainingError, TrainingStopped
from actok.training.policy import train_policy
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import PolicyTrainConfig
from actok.training.policy_trainer import PolicyTrainer, evaluate
from actok.training.run_folder import RunFolder

D, P, T, H, W = 3, 5, 7, 4, 6
ONE = {"steps": 1, "batch_size": 12, "eval_chunks": 5}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def frames() -> dict:
    """Arrays of a dataset whose episodes are short, so that many chunks are padded, and whose texts differ in length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 19, 20)
    count = int(lengths.sum())
    names = ["shut the box", "open the other box that is behind it"]
    return {
        "action": rng.normal(size=(count, D)).cumsum(0).astype("float32"),
        "proprio": rng.normal(size=(count, P)).astype("float32"),
        "image": rng.integers(0, 256, (count, H, W, 3)).astype("uint8"),
        "episode_length": lengths,
        "episode_task": np.array(["shut", "open"])[np.arange(20) % 2],
        "instruction": np.array(names)[np.arange(20) % 2],
        "phase": rng.integers(0, 2, count),
        "phase_names": np.array(["reach", "pull it towards you"]),
    }


@pytest.fixture(scope="module")
def samples():
    """Samples with codes and texts of varying length."""
    fast = actok.fit("fast", frames(), horizon=T)
    return PolicyData.build(frames(), fast, views=["image"], text="subtask", after="subtask", progress=False)


class Regressor(Policy):
    """States to chunks by two linear maps, in float64, which says how many steps its loss is the mean of."""

    heads = ("flow",)

    def __init__(self, data: PolicyData, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokenizer, self.embodiment, self.horizon = data.tokenizer, data.embodiment, data.horizon
        self.views, self.proprio, self.meta = (), data.proprio, {}
        self.net = nn.Sequential(nn.Linear(P, 13), nn.Tanh(), nn.Dropout(dropout), nn.Linear(13, T * D)).double()

    def losses(self, batch):
        given = torch.from_numpy(batch.observation.proprio).double()
        error = (self.net(given).unflatten(1, (T, D)) - batch.actions)[batch.real]
        return {"l2": (error**2).mean()}

    def terms(self, batch):
        return {"l2": int(batch.real.sum())}

    def act(self, observation, *, head=None, generator=None, deadline_s=None):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError


def gradients(policy, data, batch, **settings):
    """Gradients by name, and losses, of one batch under these settings."""
    trainer = PolicyTrainer(policy, data, PolicyTrainConfig(**{**ONE, **settings}), progress=False)
    losses, _ = trainer._gradients(batch)
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found, {name: float(value.detach()) for name, value in losses.items()}


def distance(a: dict, b: dict) -> float:
    """Largest difference as a share of the largest gradient of that parameter."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-6)) for n in a)


# -- the gradient -----------------------------------------------------------------------------------------------------

KINDS = {
    "codes": {"heads": ["tokens"]},
    "expert and state as a vector": {"heads": ["tokens"], "token_expert": 8, "state": "vector"},
    "texts": {"heads": ["tokens"], "speaks": True, "concludes": True},
    "flow alone": {"heads": ["flow"], "flow_expert": 8},
    "everything": {"heads": ["flow", "tokens"], "flow_expert": 8, "flow_weight": 3.0, "speaks": True, "insulate": True},
}


@pytest.fixture(scope="module", params=KINDS, ids=[kind.replace(" ", "-") for kind in KINDS])
def policy(request, samples):
    torch.set_num_threads(1)
    settings = {"backbone": {"width": 16, "layers": 1, "heads": 2}, "spacing": 0, **KINDS[request.param]}
    return train_policy(
        frames(), samples.tokenizer, settings=settings, views=["image"], training=ONE, progress=False
    ).train()


@pytest.fixture
def same_draws(monkeypatch):
    """The flow's noise is a function of a sample's actions, so that every sample draws the same in whatever part it is."""

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def rand(self, count, device):
            return self.share.clone()

        def randn_like(self, actions):
            return (17.0 * actions).sin()

    fake = Torch()
    monkeypatch.setattr(flow_head, "torch", fake)
    original = flow_head.FlowHead.losses

    def losses(self, seen, batch):
        fake.share = batch.actions.abs().sum((1, 2)) % 1.0
        return original(self, seen, batch)

    monkeypatch.setattr(flow_head.FlowHead, "losses", losses)


def test_the_gradient_and_the_losses_of_parts_are_those_of_the_batch(policy, samples, same_draws, monkeypatch):
    batch = samples.batch(np.linspace(0, len(samples) - 1, 12).round().astype(int))
    assert len(set((batch.codes >= 0).sum(1).tolist())) > 2
    assert len(set(batch.real.sum(1).tolist())) > 2
    assert len(set(batch.text)) > 1
    whole, told = gradients(policy, samples, batch)
    for accumulate in (2, 3, 12):
        found, losses = gradients(policy, samples, batch, accumulate=accumulate)
        assert distance(whole, found) < 1e-4
        assert losses == pytest.approx(told, rel=1e-5)
    monkeypatch.setattr(type(policy), "terms", lambda self, batch: {})  # means of means are something else
    found, losses = gradients(policy, samples, batch, accumulate=4)
    assert distance(whole, found) > 1e-2


def test_bfloat16_adds_up_in_float32(samples):
    settings = {"backbone": {"width": 16, "layers": 1, "heads": 2}, "spacing": 0}
    policy = train_policy(frames(), samples.tokenizer, settings=settings, training=ONE, progress=False).train()
    batch = samples.batch(np.arange(12))
    exact, _ = gradients(policy, samples, batch)
    whole, _ = gradients(policy, samples, batch, precision="bf16")
    parts, _ = gradients(policy, samples, batch, precision="bf16", accumulate=4)
    assert {g.dtype for g in parts.values()} == {torch.float32}
    flat = [torch.cat([found[n].flatten() for n in exact]) for found in (exact, whole, parts)]
    assert 0 < (flat[1] - flat[0]).norm() / flat[0].norm() < 0.05
    assert (flat[2] - flat[0]).norm() / flat[0].norm() < 0.05


def test_an_evaluation_does_not_depend_on_its_batches(policy, samples, same_draws):
    held_out = samples.validation
    whole = evaluate(policy, held_out, most=23, batch_size=23)
    parts = evaluate(policy, held_out, most=23, batch_size=5)
    assert whole["samples"] == 23
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)


# -- the run ----------------------------------------------------------------------------------------------------------

RUN = {"steps": 9, "batch_size": 12, "learning_rate": 0.02, "log_every": 1, "eval_every": 4, "clip_norm": 0.1}


def test_a_run_in_parts_is_the_run_in_one_piece(samples, tmp_path):
    found = {}
    for accumulate in (1, 3):
        model, asked = Regressor(samples), []
        config = PolicyTrainConfig(**RUN, weight_ema=0.9, accumulate=accumulate)
        folder = RunFolder(tmp_path / str(accumulate), {})
        trainer = PolicyTrainer(model, samples, config, folder=folder, progress=False)
        drawn = trainer.sampler.samples

        def samples_of(step, drawn=drawn, asked=asked, **ranks):
            asked.append(drawn(step, **ranks))
            return asked[-1]

        trainer.sampler.samples = samples_of
        summary = trainer.run()
        lines = [json.loads(line) for line in (tmp_path / str(accumulate) / "log.jsonl").read_text().splitlines()]
        told = [(line["losses"]["l2"], line["gradient_norm"]) for line in lines if "losses" in line]
        found[accumulate] = ([a.indices.tolist() for a in asked], model.state_dict(), told, summary["validation"])
    assert found[1][0] == found[3][0]
    assert [len(indices) for indices in found[1][0]] == [12] * 9
    for name, value in found[1][1].items():
        assert torch.allclose(value, found[3][1][name], rtol=0, atol=1e-6)  # losses are summed in float32
    assert len(found[1][2]) == 9
    assert np.allclose(found[1][2], found[3][2], rtol=1e-5)
    assert min(norm for _, norm in found[1][2]) > RUN["clip_norm"]  # of the whole gradient, before it is clipped
    assert found[3][3]["losses"] == pytest.approx(found[1][3]["losses"], rel=1e-5)


def test_a_run_in_parts_that_was_stopped_ends_with_the_same_bits(samples, tmp_path, monkeypatch):
    config = PolicyTrainConfig(**RUN, accumulate=4)
    whole = Regressor(samples, dropout=0.3)
    PolicyTrainer(whole, samples, config, progress=False).run()
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 5)
        trainer = PolicyTrainer(
            Regressor(samples, 0.3), samples, config, folder=RunFolder(tmp_path / "run", {}), progress=False
        )
        with pytest.raises(TrainingStopped):
            trainer.run()
    resumed = Regressor(samples, 0.3)
    folder = RunFolder(tmp_path / "run", {}, resume=True)
    trainer = PolicyTrainer(resumed, samples, config, folder=folder, progress=False)
    assert trainer.resume()
    trainer.run()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


RANKS = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[2])
import actok
from actok.core import ConfigError
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import PolicyTrainConfig
from actok.training.policy_trainer import PolicyTrainer
from test_policy_accumulate import RUN, Regressor, frames

torch.set_num_threads(1)
data = PolicyData.build(frames(), actok.fit("bins", frames(), horizon=7, bins=11), progress=False)
rank = os.environ["RANK"]
found = {}
for accumulate in (1, 3, 4):
    try:
        model = Regressor(data)
        trainer = PolicyTrainer(model, data, PolicyTrainConfig(**RUN, accumulate=accumulate), progress=False)
    except ConfigError as error:
        found[accumulate] = str(error)
        continue
    synced, backward = [], trainer._backward
    def noted(losses):
        synced.append(trainer.model.require_backward_grad_sync)
        backward(losses)
    trainer._backward = noted
    trainer.run()
    found[accumulate] = [synced, [p.tolist() for p in model.parameters()]]
with open(sys.argv[1] + "/rank" + rank, "w") as stream:
    json.dump(found, stream)
"""


def test_two_processes_average_their_gradients_once_a_step(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, *command, here], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first["1"][0] == [True] * 9
    assert first["3"][0] == [False, False, True] * 9
    for one, other in zip(first["1"][1], first["3"][1], strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-6)
    assert "each of 2 processes has 6 of a batch's 12 samples, which cannot be taken in 4 parts" in first["4"]


# -- what is refused, and said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (5, "batch_size 12 cannot be taken in 5 parts of one size"),
        (24, "batch_size 12 cannot be taken in 24 parts"),
        (0, "accumulate is 0; give a whole number of at least 1"),
        (2.0, r"accumulate is 2\.0; give a whole number"),
    ],
)
def test_parts_that_cannot_be_are_refused(accumulate, message):
    with pytest.raises(ConfigError, match=message):
        PolicyTrainConfig(batch_size=12, accumulate=accumulate)


def test_a_run_is_resumed_in_as_many_parts(samples, tmp_path, monkeypatch):
    settings = {"backbone": {"width": 16, "layers": 1, "heads": 2}}
    options = {"settings": settings, "run": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 1)
        with pytest.raises(TrainingStopped):
            train_policy(frames(), samples.tokenizer, training={**ONE, "steps": 2}, **options)
    with pytest.raises(ConfigError, match=r"training\.accumulate was 1, now 2"):
        train_policy(frames(), samples.tokenizer, training={**ONE, "steps": 2, "accumulate": 2}, resume=True, **options)


def test_memory_that_does_not_suffice_is_told_with_the_remedy(samples, monkeypatch):
    def losses(self, batch):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Regressor, "losses", losses)
    trainer = PolicyTrainer(Regressor(samples), samples, PolicyTrainConfig(**RUN), progress=False)
    told = r"in step 1 with batches of 12 chunks; take it in more parts \(--train accumulate=2, 4, ...\), or make batch_size"
    with pytest.raises(TrainingError, match=told):
        trainer.run()
