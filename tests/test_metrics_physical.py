"""Errors in millimetres and degrees against SciPy's rotations and hand computation."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from actok.core import ActionGroup, ActionSpace
from actok.evaluation.comparison import Comparison
from actok.evaluation.physical import group_errors, group_values, position_error, reported_unit
from actok.signal.normalise import Normaliser

B, T = 3, 5


def compare(space: ActionSpace, reference, reconstruction, **masks) -> Comparison:
    return Comparison(
        reference=reference,
        reconstruction=reconstruction,
        space=space,
        normaliser=Normaliser.identity(space.dim),
        **masks,
    )


def one(kind: str, size: int, *, rate_hz: float | None = None, **group) -> ActionSpace:
    g = ActionGroup(name="g", kind=kind, dims=tuple(range(size)), **group)
    return ActionSpace(embodiment="e", dim=size, groups=(g,), rate_hz=rate_hz)


def test_position_is_euclidean_in_millimetres():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, B, T, 3))
    (found,) = group_errors(compare(one("position", 3, unit="m", scale=0.05), a, b))
    distance = 50 * np.linalg.norm(a - b, axis=-1)
    assert (found.unit, found.measure, found.path) == ("mm", "euclidean", None)
    assert found.step.mean == pytest.approx(distance.mean())
    assert found.step.p95 == pytest.approx(np.quantile(distance, 0.95))
    assert found.step.maximum == pytest.approx(distance.max())


def test_commands_beyond_the_limits_are_compared_as_executed():
    groups = (ActionGroup(name="g", kind="position", dims=(0,), mode="delta", unit="m", scale=0.05),)
    space = ActionSpace(embodiment="e", dim=1, groups=groups, low=(-1.0,), high=(1.0,))
    reference = np.array([[[3.75], [-3.75], [0.5]]])
    comparison = compare(space, reference, np.array([[[1.0], [-0.9], [0.5]]]))
    (found,) = group_errors(comparison)
    assert found.step.maximum == pytest.approx(5.0)  # (1 - 0.9) x 50 mm; 3.75 and 1 move the arm alike
    assert found.path.maximum == pytest.approx(5.0)
    np.testing.assert_allclose(position_error(comparison), [[0, 0.005, 0]], atol=1e-12)


def test_unknown_scale_is_raw_never_millimetres():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, B, T, 3))
    (found,) = group_errors(compare(one("position", 3, unit="m"), a, b))
    assert found.unit == "raw"
    assert found.step.mean == pytest.approx(np.linalg.norm(a - b, axis=-1).mean())
    (rotation,) = group_errors(compare(one("rotation", 3, unit="rad", rotation="axis_angle"), a, b))
    assert (rotation.unit, rotation.measure) == ("raw", "absolute")
    assert rotation.step.mean == pytest.approx(np.abs(a - b).mean())


@pytest.mark.parametrize(
    ("name", "size", "read"),
    [
        ("axis_angle", 3, Rotation.from_rotvec),
        ("quaternion_xyzw", 4, Rotation.from_quat),
        ("euler_xyz", 3, lambda v: Rotation.from_euler("xyz", v)),
        ("rot6d", 6, None),
    ],
)
def test_rotation_is_geodesic_in_degrees(name, size, read):
    rng = np.random.default_rng(1)
    if read is None:
        first, second = (Rotation.random(B * T, random_state=s) for s in (3, 5))
        a, b = (r.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(B, T, 6) for r in (first, second))
        scale = None
    else:
        a, b = rng.normal(size=(2, B, T, size))
        scale = 0.5 if name in ("axis_angle", "euler_xyz") else None
        first, second = (read((x * (scale or 1.0)).reshape(-1, size)) for x in (a, b))
    expected = np.degrees((first.inv() * second).magnitude())
    (found,) = group_errors(compare(one("rotation", size, rotation=name, unit="rad", scale=scale), a, b))
    assert (found.unit, found.measure) == ("deg", "geodesic")
    assert found.step.mean == pytest.approx(expected.mean(), rel=1e-9)
    assert found.step.maximum == pytest.approx(expected.max(), rel=1e-9)


def test_joints_are_judged_one_by_one_in_degrees():
    a = np.zeros((1, 1, 2))
    b = np.array([[[0.1, -0.3]]])
    (found,) = group_errors(compare(one("joint", 2, unit="rad", scale=2.0), a, b))
    assert found.step.mean == pytest.approx(np.degrees(0.4))
    assert found.step.maximum == pytest.approx(np.degrees(0.6))


def test_steps_are_also_judged_along_the_path():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, B, T, 3))
    pad = np.zeros((B, T), bool)
    pad[1, 2:] = True
    a[pad] = b[pad] = 0
    space = one("position", 3, unit="m", scale=0.01, mode="delta")
    (found,) = group_errors(compare(space, a, b, pad_mask=pad))
    walked = 10 * np.linalg.norm(np.cumsum(a - b, axis=1), axis=-1)
    assert found.path.mean == pytest.approx(walked[~pad].mean())
    assert found.path_end == pytest.approx(np.mean([walked[0, -1], walked[1, 1], walked[2, -1]]))
    assert (found.unit, found.path_unit) == ("mm", "mm")


def test_the_path_of_rotation_steps_is_their_composition():
    rng = np.random.default_rng(4)
    a, b = 0.4 * rng.normal(size=(2, B, T, 3))
    space = one("rotation", 3, unit="rad", scale=0.5, rotation="axis_angle", mode="delta")
    (found,) = group_errors(compare(space, a, b))
    angles = []
    for i in range(B):
        x = y = Rotation.identity()
        for t in range(T):
            x, y = x * Rotation.from_rotvec(0.5 * a[i, t]), y * Rotation.from_rotvec(0.5 * b[i, t])
            angles.append(np.degrees((x.inv() * y).magnitude()))
    assert found.path.mean == pytest.approx(np.mean(angles), rel=1e-9)
    assert found.path.maximum == pytest.approx(np.max(angles), rel=1e-9)


def test_velocity_is_integrated_at_the_control_rate():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, B, T, 2))
    (found,) = group_errors(compare(one("joint", 2, unit="rad/s", scale=1.0, mode="velocity", rate_hz=20.0), a, b))
    assert (found.unit, found.path_unit) == ("deg/s", "deg")
    assert found.step.mean == pytest.approx(np.degrees(np.abs(a - b)).mean())
    assert found.path.mean == pytest.approx(np.degrees(np.abs(np.cumsum(a - b, axis=1) / 20)).mean())
    (unknown,) = group_errors(compare(one("joint", 2, unit="rad/s", scale=1.0, mode="velocity"), a, b))
    assert unknown.unit == "deg/s"
    assert unknown.path is None


def test_masks_and_undecodable_chunks_leave_the_figures():
    space = ActionSpace(
        embodiment="e",
        dim=3,
        groups=(
            ActionGroup(name="p", kind="position", dims=(0, 1), unit="m", scale=1.0),
            ActionGroup(name="g", kind="gripper", dims=(2,), unit="fraction", scale=1.0),
        ),
    )
    a, b = np.zeros((B, T, 3)), np.zeros((B, T, 3))
    b[0], b[1], b[2, :, 0], b[2, :, 2] = np.nan, 9.0, 3e-3, 0.25
    dof = np.ones((B, 3), bool)
    dof[1] = False, True, False
    position, gripper = group_errors(compare(space, a, b, dof_mask=dof))
    assert (position.step.mean, position.step.maximum) == (pytest.approx(3.0), pytest.approx(3.0))
    assert (gripper.unit, gripper.step.mean) == ("fraction", 0.25)
    (values, _) = group_values(compare(space, a, b, dof_mask=dof))
    assert values.step.shape == (T,)
    nothing = group_errors(compare(space, a, np.full_like(a, np.nan)))
    assert [g.step for g in nothing] == [None, None]


def test_reported_units():
    def unit(**group):
        return reported_unit(ActionGroup(name="g", kind=group.pop("kind"), dims=(0,), **group))

    assert unit(kind="position", unit="m", scale=0.05) == ("mm", 50.0)
    assert unit(kind="joint", unit="rad", scale=1.0) == ("deg", pytest.approx(57.29577951))
    assert unit(kind="gripper", unit="fraction", scale=0.5) == ("fraction", 0.5)
    assert unit(kind="position", unit="m") == ("raw", 1.0)
