"""URDFs for tests: the ViperX 300 of ALOHA, random chains, and what surrounds an arm in a real file."""

import numpy as np

# Public joint geometry of the ViperX 300 6DOF as in ALOHA's simulation: joint, origin in m, axis, limits in rad.
VIPERX = (
    ("waist", (0, 0, 0.079), (0, 0, 1), -3.14158, 3.14158),
    ("shoulder", (0, 0, 0.04805), (0, 1, 0), -1.85005, 1.25664),
    ("elbow", (0.05955, 0, 0.3), (0, 1, 0), -1.76278, 1.6057),
    ("forearm_roll", (0.2, 0, 0), (1, 0, 0), -3.14158, 3.14158),
    ("wrist_angle", (0.1, 0, 0), (0, 1, 0), -1.8675, 2.23402),
    ("wrist_rotate", (0.069744, 0, 0), (1, 0, 0), -3.14158, 3.14158),
)
INERTIAL = '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'


def joint(name, kind, parent, child, xyz=(0, 0, 0), rpy=(0, 0, 0), axis=None, low=None, high=None, more="") -> str:
    def three(values) -> str:
        return " ".join(repr(float(v)) for v in values)

    text = f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>'
    text += f'<origin xyz="{three(xyz)}" rpy="{three(rpy)}"/>'
    if axis is not None:
        text += f'<axis xyz="{three(axis)}"/>'
    if low is not None:
        text += f'<limit lower="{low!r}" upper="{high!r}" effort="1" velocity="1"/>'
    return f"{text}{more}</joint>"


def robot(links, joints) -> str:
    """MuJoCo reads it too: every link has a mass, and fixed joints keep their bodies."""
    bodies = "".join(f'<link name="{name}">{INERTIAL}</link>' for name in links)
    return (
        '<robot name="test"><mujoco><compiler fusestatic="false" discardvisual="false"/></mujoco>'
        f"{bodies}{''.join(joints)}</robot>"
    )


def viperx(count: int = 6) -> str:
    """Its first `count` joints between the links base and tip, with two fingers beside it, one copying the other."""
    links = ["base", *(f"link{i}" for i in range(1, count)), "tip", "finger", "mirror"]
    joints = [
        joint(name, "revolute", links[i], links[i + 1], xyz, (0, 0, 0), axis, low, high)
        for i, (name, xyz, axis, low, high) in enumerate(VIPERX[:count])
    ]
    joints.append(joint("finger", "prismatic", "tip", "finger", axis=(0, 1, 0), low=0.021, high=0.057))
    copied = '<mimic joint="finger" multiplier="-1"/>'
    joints.append(joint("mirror", "prismatic", "tip", "mirror", axis=(0, 1, 0), low=-0.057, high=-0.021, more=copied))
    return robot(links, joints)


def random_chain(seed: int, kinds: tuple[str, ...]) -> str:
    """Joints of these kinds between links l0, l1, ..., turned and shifted any way, axes of any length."""
    rng = np.random.default_rng(seed)
    joints = []
    for i, kind in enumerate(kinds):
        xyz, rpy = rng.uniform(-0.3, 0.3, 3), rng.uniform(-3, 3, 3)
        axis = None if kind == "fixed" else rng.normal(size=3)
        limited = kind in ("revolute", "prismatic")
        low, high = (-rng.uniform(0.5, 3), rng.uniform(0.5, 3)) if limited else (None, None)
        joints.append(joint(f"j{i}", kind, f"l{i}", f"l{i + 1}", xyz, rpy, axis, low, high))
    return robot([f"l{i}" for i in range(len(kinds) + 1)], joints)
