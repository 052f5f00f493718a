"""Action spaces: validation, comparison, serialisation."""

import pytest

from actok.core import ActionGroup, ActionSpace, ConfigError, SpaceMismatchError


def arm(scale=0.05, **changes) -> ActionSpace:
    values = {
        "embodiment": "arm",
        "dim": 7,
        "rate_hz": 20.0,
        "groups": (
            ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta", unit="m", scale=scale),
            ActionGroup(
                name="rotation",
                kind="rotation",
                dims=(3, 4, 5),
                mode="delta",
                rotation="axis_angle",
                unit="rad",
                scale=0.5,
            ),
            ActionGroup(name="gripper", kind="gripper", dims=(6,), unit="fraction"),
        ),
    }
    return ActionSpace(**{**values, **changes})


def test_incremental_dimensions_are_those_of_delta_groups():
    assert arm().incremental == (True,) * 6 + (False,)


def test_names_default_to_group_and_index():
    assert arm().names == (
        "position.0", "position.1", "position.2", "rotation.0", "rotation.1", "rotation.2", "gripper",
    )  # fmt: skip


def test_round_trip_through_plain_values():
    space = arm(low=[-1.0] * 7, high=[1.0] * 7)
    assert ActionSpace.from_dict(space.to_dict()) == space


def test_differences_name_what_differs_but_not_rate_or_embodiment():
    assert arm().differences(arm(embodiment="other", rate_hz=5.0)) == []
    assert arm().differences(arm(scale=0.01)) == ["position scale: 0.05 against 0.01"]
    assert arm().differences(ActionSpace.raw(4)) == ["dimensions: 7 against 4"]
    assert any("form a group only in" in d for d in arm().differences(ActionSpace.raw(7)))


@pytest.mark.parametrize(("rate", "horizon"), [(None, 16), (5.0, 10), (20.0, 20), (30.0, 30), (50.0, 50), (80.0, 50)])
def test_default_horizon_is_a_second_within_bounds(rate, horizon):
    assert ActionSpace.raw(3, rate_hz=rate).default_horizon == horizon


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 8}, "each of 0..7 must occur once"),
        ({"names": ("a",)}, "1 names for 7"),
        ({"low": [0.0]}, "low has 1 values"),
        ({"rate_hz": 0.0}, "rate_hz is 0.0"),
    ],
)
def test_bad_spaces_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        arm(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "arm"}, "kind 'arm'"),
        ({"kind": "joint", "mode": "fast"}, "mode 'fast'"),
        ({"kind": "rotation"}, "rotation None"),
        ({"kind": "rotation", "rotation": "rot6d"}, "rot6d takes 6"),
        ({"kind": "joint", "rotation": "rot6d"}, "only kind 'rotation'"),
        ({"kind": "joint", "scale": -1.0}, "scale -1.0"),
    ],
)
def test_bad_groups_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ActionGroup(name="g", dims=(0, 1, 2), **values)


def test_unknown_key_in_a_dict_is_an_error():
    with pytest.raises(ConfigError, match="colour"):
        ActionSpace.from_dict({**arm().to_dict(), "colour": "red"})


def test_unknown_group_names_those_there_are():
    with pytest.raises(ConfigError, match="position"):
        arm().group("wrist")


def test_mismatch_error_is_a_value_error():
    assert issubclass(SpaceMismatchError, ValueError)
