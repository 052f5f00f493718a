"""Settings of a policy's training, and which parameters learn in which part of it."""

import pytest
import torch

import actok
from actok.core import (
    ConfigError,
)
from actok.core.registry import CONFIGS
from actok.policies.presets import find_policy_preset
from actok.training.policy import train_policy
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import PolicyTrainConfig, policy_train_config, trained_names
from actok.training.policy_trainer import PolicyTrainer
from policy_demos import FEW, TINY, T, frames, regressor, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bins():
    return actok.fit("bins", frames(), horizon=T, bins=11)


@pytest.fixture
def samples(bins):
    return PolicyData.build(frames(), bins, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantise_after": 0}, "quantise_after is no setting of a policy"),
        ({"anneal_codebooks": True}, "anneal_codebooks is no setting of a policy"),
        ({"compile": True}, "compile is no setting of a policy"),
        ({"stages": [{"share": 0.5}]}, "shares of the stages are 0.5; let them add up to 1"),
        ({"stages": [{"share": 0.0}]}, "share of a stage is 0.0"),
        ({"stages": [{"share": 1.0, "train": ["("]}]}, "no regular expression"),
        ({"stages": [{"part": 1.0}]}, "a stage has no setting 'part'"),
        ({"stages": "expert"}, "stages are 'expert'"),
        ({"steps": 1, "stages": [{"share": 0.5}, {"share": 0.5}]}, "2 stages do not fit in 1 steps"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_training_settings_that_mean_nothing_for_a_policy(given, message):
    with pytest.raises(ConfigError, match=message):
        policy_train_config({"steps": 5}, given, "'it'")


@pytest.mark.parametrize("steps", [3, 10, 997])
@pytest.mark.parametrize("shares", [(1.0,), (0.3, 0.7), (0.001, 0.999), (0.999, 0.0005, 0.0005)])
def test_stages_cover_all_steps_in_order_each_with_one_at_least(steps, shares):
    config = PolicyTrainConfig(steps=steps, stages=tuple({"share": s} for s in shares))
    found = [config.stage_at(step) for step in range(steps)]
    assert found == sorted(found)
    assert set(found) == set(range(len(shares)))
    for number, share in enumerate(shares):
        assert abs(found.count(number) - share * steps) <= len(shares)


def test_a_stage_trains_what_it_names_and_nothing_else(samples):
    stages = [{"share": 0.5, "train": ["flow"]}, {"share": 0.5, "train": [r"backbone\.0\.weight"]}]
    config = PolicyTrainConfig(steps=10, batch_size=8, stages=stages, weight_decay=0.5)
    policy = regressor(samples)
    seen = {}
    trainer = PolicyTrainer(policy, samples, config, progress=False)
    before = trainer._begin

    def begin(step):
        seen[step] = weights(policy)
        before(step)

    trainer._begin = begin
    trainer.run()
    seen[10] = weights(policy)

    def moved(a: int, b: int) -> set[str]:
        return {name for name in seen[a] if not torch.equal(seen[a][name], seen[b][name])}

    assert moved(0, 5) == {"parts.flow.weight", "parts.flow.bias"}
    assert moved(5, 10) == {"backbone.0.weight"}
    assert all(p.requires_grad for p in policy.parameters())
    with pytest.raises(
        ConfigError, match=r"'tokens', which stands for no parameter .* groups backbone, language, expert, flow"
    ):
        trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": "tokens"}]).stages)


def test_groups_of_a_whole_policy(bins):
    settings = {**TINY, "heads": ["tokens", "flow"], "token_expert": 16, "flow_expert": 8, "state": "vector"}
    policy = train_policy(
        frames(), bins, settings=settings, views=["image"], training=FEW | {"steps": 1}, progress=False
    )
    groups = ("backbone", "language", "vision", "embeddings", "expert", "tokens", "flow", "state")
    found = {
        group: trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": group}]).stages)[0]
        for group in groups
    }
    every = {name for name, _ in policy.named_parameters()}
    assert found["backbone"] | found["expert"] == every
    assert not found["backbone"] & found["expert"]
    assert found["tokens"] | found["flow"] | found["state"] == found["expert"]
    assert not found["tokens"] & found["flow"]
    assert found["state"] == {n for n in every if n.startswith("state_in.")}
    assert found["vision"] | found["language"] == found["backbone"]
    assert found["vision"] == {n for n in every if n.startswith("backbone.stem.")}
    assert found["embeddings"] == {"backbone.table"}


@pytest.mark.parametrize("preset", [p.stem for p in (CONFIGS / "policies").glob("*.toml")])
@pytest.mark.parametrize("state", ["text", "vector"])
def test_every_presets_stages_train_all_that_is_new(bins, preset, state):
    found = find_policy_preset(preset)
    settings = {**found.policy, "spacing": 0, "state": state, "backbone": {"kind": "tiny", **TINY["backbone"]}}
    for width in ("token_expert", "flow_expert"):
        settings[width] = 8 if settings.get(width) else 0
    stages = [{**stage, "share": stage["share"]} for stage in found.training.get("stages", [])]
    policy = train_policy(
        frames(),
        bins,
        settings=settings,
        views=["image"],
        training=FEW | {"steps": 2, "stages": stages},
        progress=False,
    )
    ever = frozenset().union(*trained_names(policy, PolicyTrainConfig(stages=stages).stages))
    new = {name for name, _ in policy.named_parameters() if not name.startswith("backbone.")} | {"backbone.table"}
    assert new <= ever
    assert any(name.startswith("state_in.") for name in new) == (state == "vector")


@pytest.mark.parametrize(
    ("settings", "train", "left"),
    [
        ({"state": "vector", "token_expert": 8}, ["tokens", "language"], "no stage trains state_in.* add 'state'"),
        (
            {"heads": ["flow"], "flow_expert": 8, "state": "vector"},
            ["state"],
            "no stage trains parts.flow.* add 'flow'",
        ),
        ({"state": "vector"}, ["expert"], r"no stage trains backbone\.table.* add 'embeddings'"),
        ({"state": "text"}, [r"backbone\.blocks"], r"no stage trains backbone\.table.* add 'embeddings'"),
    ],
)
def test_stages_that_leave_something_random_are_refused(bins, settings, train, left):
    training = FEW | {"stages": [{"share": 1, "train": train}]}
    with pytest.raises(ConfigError, match=left):
        train_policy(frames(), bins, settings={**TINY, **settings}, training=training, progress=False)
