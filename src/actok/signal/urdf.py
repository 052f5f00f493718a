"""The joints between two links of a robot, read from a URDF (https://wiki.ros.org/urdf/XML/joint).

Fixed, revolute, continuous and prismatic joints; origins as xyz in m and rpy in rad (extrinsic x, y, z). Everything that
does not move a link against another (inertia, shapes, soft limits of safety controllers, transmissions) is passed over.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actok.core.errors import ConfigError
from actok.signal.rotations import to_matrix

__all__ = ["UrdfJoint", "joints_between"]

MOVING = ("revolute", "continuous", "prismatic")


@dataclass(frozen=True, kw_only=True, eq=False)
class UrdfJoint:
    """One joint.

    Attributes:
        name: as the URDF has it.
        kind: "fixed", "revolute", "continuous" or "prismatic".
        origin: float64 [4, 4], where the joint's frame stands in its parent link at the value 0.
        axis: float64 [3], length 1, in the joint's frame.
        low, high: limits in rad or m; infinite for "continuous".
    """

    name: str
    kind: str
    origin: np.ndarray
    axis: np.ndarray
    low: float
    high: float


def joints_between(source: str | Path, base: str, tip: str) -> list[UrdfJoint]:
    """The joints from the link `base` to the link `tip`, in this order.

    Args:
        source: path of a URDF, or its text (which begins with "<").

    Raises ConfigError naming what cannot be read: no such file, no XML, a xacro file, an unknown link, links that no
    joints lead between, a loop, and joints on the way that are floating, planar, coupled to another (mimic), without
    limits or without an axis.
    """
    robot, where = _parse(source)
    links = [link.get("name", "") for link in robot.findall("link")]
    for link in (base, tip):
        if link not in links:
            raise ConfigError(f"{where} has no link {link!r}; it has {', '.join(links) or 'none'}")
    above: dict[str, tuple[str, ET.Element]] = {}
    for joint in robot.findall("joint"):
        name, child = joint.get("name", ""), _link(joint, "child", where)
        if child in above:
            raise ConfigError(
                f"{where}: link {child!r} hangs on two joints, {above[child][1].get('name')!r} and {name!r}"
            )
        above[child] = (_link(joint, "parent", where), joint)
    found: list[ET.Element] = []
    link = tip
    while link != base:
        if link not in above:
            raise ConfigError(
                f"{where}: no joints lead from {base!r} to {tip!r}; above {tip!r} stand"
                f" {', '.join(reversed([tip, *(_link(j, 'parent', where) for j in found)][1:])) or 'no links'}: name one"
                " of them as the base"
            )
        link, joint = above[link]
        if joint in found:
            raise ConfigError(f"{where}: joint {joint.get('name')!r} is part of a loop; a chain has none")
        found.append(joint)
    return [_joint(joint, where) for joint in reversed(found)]


def _parse(source: str | Path) -> tuple[ET.Element, str]:
    text, where = str(source), "the URDF"
    if isinstance(source, Path) or not text.lstrip().startswith("<"):
        where = text
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read ({error}); give the path of a URDF, or its text") from None
    try:
        robot = ET.fromstring(text.lstrip())
    except ET.ParseError as error:
        raise ConfigError(f"{where} is no XML ({error}); give a URDF") from None
    if any("ros.org/wiki/xacro" in element.tag for element in robot.iter()):
        raise ConfigError(f"{where} is a xacro file; expand it first: xacro FILE > arm.urdf")
    if robot.tag != "robot":
        raise ConfigError(f"{where} describes a <{robot.tag}>, no <robot>; give a URDF")
    return robot, where


def _link(joint: ET.Element, role: str, where: str) -> str:
    element = joint.find(role)
    name = None if element is None else element.get("link")
    if not name:
        raise ConfigError(f"{where}: joint {joint.get('name')!r} names no {role} link")
    return name


def _joint(joint: ET.Element, where: str) -> UrdfJoint:
    name, kind = joint.get("name", ""), joint.get("type", "")
    title = f"{where}: joint {name!r}"
    if kind not in ("fixed", *MOVING):
        raise ConfigError(f"{title} is {kind or 'of no type'}; a chain takes fixed, {', '.join(MOVING)} joints")
    mimic = joint.find("mimic")
    if mimic is not None:
        raise ConfigError(
            f"{title} copies {mimic.get('joint')!r} (mimic), so it has no value of its own; end the chain before it, or"
            " make it fixed"
        )
    origin = np.eye(4)
    stated = joint.find("origin")
    if stated is not None:
        origin[:3, 3] = _three(stated, "xyz", title)
        origin[:3, :3] = to_matrix(np.array(_three(stated, "rpy", title)), "euler_xyz")
    axis, low, high = np.array([1.0, 0.0, 0.0]), -math.inf, math.inf
    if kind != "fixed":
        element = joint.find("axis")
        if element is not None:
            axis = np.array(_three(element, "xyz", title))
        length = float(np.linalg.norm(axis))
        if length < 1e-6:
            raise ConfigError(f"{title} has the axis {axis.tolist()}, which has no direction; give another")
        axis = axis / length
        if kind != "continuous":
            low, high = _limits(joint, title)
    return UrdfJoint(name=name, kind=kind, origin=origin, axis=axis, low=low, high=high)


def _limits(joint: ET.Element, title: str) -> tuple[float, float]:
    limit = joint.find("limit")
    try:
        low, high = (0.0 if limit is None else float(limit.get(side, "0")) for side in ("lower", "upper"))
    except ValueError:
        raise ConfigError(f"{title} has a limit that is no number; correct it") from None
    if not low < high:
        raise ConfigError(
            f"{title} has no range between its limits {low:g} and {high:g}; state lower and upper, or make it continuous"
            " (or fixed)"
        )
    return low, high


def _three(element: ET.Element, key: str, title: str) -> list[float]:
    text = element.get(key, "0 0 0")
    try:
        values = [float(v) for v in text.split()]
    except ValueError:
        values = []
    if len(values) != 3 or not np.isfinite(values).all():
        raise ConfigError(f"{title}: {key}={text!r} of <{element.tag}> are not three finite numbers; correct it")
    return values
