"""What a policy reads of an observation, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import (
    ConfigError,
    DataError,
    SpaceMismatchError,
)
from actok.policies.base import PolicyObservation
from actok.policies.presets import find_policy_preset, policy_presets
from actok.policies.prompt import StateRange, prompts
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.vla import VLA, VLAConfig
from actok.training.policy_stages import policy_train_config
from policy_models import (
    GROUPS,
    SPACE,
    TASKS,
    B,
    P,
    observation,
    policy_of,
    tokenizer_of,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_what_the_policy_was_not_trained_on_is_refused():
    policy = policy_of("bins", views=("front",))
    seen = observation(views=("front",))
    with pytest.raises(DataError, match="state of 5 numbers"):
        policy.act(replace(seen, proprio=None))
    with pytest.raises(DataError, match="state of 5 numbers"):
        policy.act(replace(seen, proprio=np.zeros((B, 4), np.float32)))
    broken = seen.proprio.copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="observation 1 holds nan at 2"):
        policy.act(replace(seen, proprio=broken))
    with pytest.raises(DataError, match="looks through front; the images given are: side"):
        policy.act(replace(seen, images={"side": seen.images["front"]}))
    with pytest.raises(DataError, match="no instruction"):
        policy.act(replace(seen, instruction=["a", " ", "b"]))
    with pytest.raises(DataError, match="instructions are 'push'; give a list"):
        policy.act(replace(seen, instruction="push"))
    with pytest.raises(DataError, match="instructions are none"):
        policy.act(PolicyObservation(instruction=[], proprio=seen.proprio[:0]))
    other = replace(SPACE, groups=(replace(GROUPS[0], mode="absolute"), GROUPS[1]))
    with pytest.raises(SpaceMismatchError, match="absolute"):
        policy.check(other)
    with pytest.raises(SpaceMismatchError, match="20 Hz, not at 5"):
        policy.check(SPACE, rate_hz=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ("flow",)}, "flow_expert"),
        ({"heads": ("tokens", "diffusion")}, "diffusion"),
        ({"state": "pixels"}, "pixels"),
        ({"spacing": 3}, "spacing is 3"),
        ({"block": 0}, "block is 0"),
        ({"speaks": True, "heads": ("flow",), "flow_expert": 8}, "speaks"),
        ({"concludes": True, "heads": ("flow",), "flow_expert": 8}, "concludes"),
        ({"concludes": "yes"}, "concludes is 'yes'"),
        ({"temperature": -1.0}, "temperature"),
        ({"vocabulary": "text"}, "vocabulary is 'text'; choose one of added, tail, range"),
        ({"vocabulary": "range"}, "give both vocabulary=range and id_range"),
        ({"id_range": (5, 90)}, "give both vocabulary=range and id_range"),
        ({"vocabulary": "range", "id_range": (5, 9.5)}, "two whole numbers"),
        ({"vocabulary": "range", "id_range": (5,)}, "two whole numbers"),
        ({"vocabulary": "range", "id_range": (5, 9)}, "the range from 5 to before 9 is too small"),
        ({"reserved": 4}, "reserved is 4 and vocabulary 'added'"),
        ({"vocabulary": "tail", "reserved": 20, "token_expert": 8}, "set token_expert=0"),
        ({"vocabulary": "tail"}, r"leave them above it \(reserved=\d+\)"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        policy_of("bins", **settings)


@pytest.mark.parametrize("state", ["text", "vector"])
def test_states_beyond_the_range_of_the_training_are_counted(state):
    policy = policy_of("bins", state=state)
    seen = observation()
    far = seen.proprio.copy()
    far[1, :3] = (1.5, -2.0, 7.0)
    assert policy.act(seen).state_beyond.tolist() == [0, 0, 0]
    assert policy.act(replace(seen, proprio=far)).state_beyond.tolist() == [0, 3, 0]


@pytest.mark.parametrize("state", ["text", "vector"])
def test_the_state_is_read_by_its_range(state):
    """In other units with the range in the same units, all is as before; in other units alone, not."""
    policy, seen = policy_of("bins", state=state), observation()
    see = policy._look(seen).embeds
    other = replace(seen, proprio=4 * seen.proprio + np.arange(P, dtype=np.float32))
    assert not torch.allclose(policy._look(other).embeds, see, atol=1e-3)
    policy.state = StateRange(low=np.arange(P) - 4.0, high=np.arange(P) + 4.0)
    assert torch.allclose(policy._look(other).embeds, see, atol=1e-5)


def test_views_are_shown_in_the_policys_order_whatever_that_of_the_images():
    policy = policy_of("bins", views=("front", "side"))
    seen = observation(views=("front", "side"))
    see = policy._look(seen).embeds
    front, side = seen.images["front"], seen.images["side"]
    assert torch.equal(policy._look(replace(seen, images={"side": side, "front": front, "top": side})).embeds, see)
    direct = policy.backbone.prefix(prompts(seen.instruction, seen.proprio, policy.state, 256), [front, side])
    assert torch.equal(see, direct.embeds)
    swapped = policy._look(replace(seen, images={"front": side, "side": front})).embeds
    assert not torch.allclose(swapped, see, atol=1e-3)


def test_a_blind_policy_is_refused():
    backbone = TinyVLM.create(TinyConfig(width=24, layers=1, heads=3), TASKS)
    with pytest.raises(ConfigError, match="would see nothing"):
        VLA.create(backbone, tokenizer_of("bins"), VLAConfig(state="none"))
    with pytest.raises(ConfigError, match="no range of proprioception"):
        VLA.create(backbone, tokenizer_of("bins"), VLAConfig())


# -- the prompt ---------------------------------------------------------------------------------------------------


def test_the_state_is_written_in_bins_of_its_range():
    state = StateRange(low=np.array([0.0, -1.0, 2.0]), high=np.array([10.0, 1.0, 2.0]))
    given = np.array([[0.0, 1.0, 2.0], [4.999, -5.0, 3.0], [10.0, 0.0, 2.0]])
    found = prompts(["a", " b  c", "d"], given, state, 4)
    assert found[0] == "Task: a, State: 0 3 2;"
    assert found[1] == "Task: b c, State: 1 0 3;"  # beyond the range: the last bin
    assert found[2] == "Task: d, State: 3 2 2;"
    assert np.allclose(state.unit(given)[:, 0], [-1, -0.0002, 1])


@pytest.mark.parametrize("name", sorted(policy_presets()))
def test_presets_are_what_their_classes_take(name):
    from actok.core import build_config

    preset = find_policy_preset(name)
    config = build_config(VLAConfig, preset.policy, name)
    assert config.heads
    assert preset.summary
    trained = policy_train_config(preset.training, {}, name)
    if name.startswith("fastervla-"):
        assert [stage.train for stage in trained.stages] == [("expert",), ("expert", "language")]
        assert (trained.learning_rate, trained.weight_decay, trained.warmup_steps) == (2.5e-5, 1e-10, 1000)
        assert (config.spacing, config.temperature, config.top_k, config.state) == (2, 0.8, 50, "text")
        assert config.token_expert
    if "flow" in config.heads:
        assert config.insulate
        assert config.heads == ("flow", "tokens")
    if preset.backbone.get("kind") == "tiny":
        sizes = {k: v for k, v in preset.backbone.items() if k != "kind"}
        assert build_config(TinyConfig, sizes, name).width > 0
