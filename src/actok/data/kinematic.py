"""A dataset of joint-space arms as a dataset of end-effector poses, by kinematic models.

`with_kinematics` takes chains; a space's TOML file can name them, and then every reader and every verb takes the poses:

    [kinematics]
    left_arm = { urdf = "vx300s.urdf", base = "base_link", tip = "gripper_link" }   # path from the file's folder
    right_arm = { urdf = "vx300s.urdf", base = "base_link", tip = "gripper_link" }
    state = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]  # of the proprioception, in the action's layout; optional
    rotation = "rot6d"                                      # format of the poses' rotations; optional
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import ActionSpace, ConfigError, DataError
from actok.core.spaces import Rotation
from actok.data.episodes import Episode, EpisodeDataset
from actok.data.spaces import find_space, kinematics_table
from actok.signal.end_effector import EndEffectorMap
from actok.signal.kinematics import KinematicChain

URDF_KEYS = ("urdf", "base", "tip")

__all__ = ["KinematicDataset", "StatedKinematics", "stated_kinematics", "with_kinematics"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StatedKinematics:
    """The [kinematics] table of a space's file, for `with_kinematics`.

    Attributes:
        space: the robot's own, in joints.
        chains: by joint group.
        rotation: format of the poses' rotations.
        state: which numbers of the proprioception are the state in the action's layout, None: all.
    """

    space: ActionSpace
    chains: Mapping[str, KinematicChain]
    rotation: Rotation
    state: Sequence[int] | None

    @property
    def map(self) -> EndEffectorMap:
        """From joints to poses, and back."""
        return EndEffectorMap(self.space, self.chains, rotation=self.rotation)


def stated_kinematics(name_or_path: str | Path) -> StatedKinematics | None:
    """What a preset or TOML file says of its arms' kinematics; None where it says nothing.

    Raises ConfigError for an entry that is no {urdf, base, tip}, and as `KinematicChain.from_urdf`.
    """
    table: dict[str, Any] = kinematics_table(name_or_path)
    if not table:
        return None
    rotation, state = table.pop("rotation", "rot6d"), table.pop("state", None)
    if state is not None and not (isinstance(state, list) and all(isinstance(i, int) for i in state)):
        raise ConfigError(f"{name_or_path}: [kinematics] has state {state!r}; give whole numbers")
    chains = {}
    for group, entry in table.items():
        if not isinstance(entry, Mapping) or sorted(entry) != sorted(URDF_KEYS):
            raise ConfigError(
                f"{name_or_path}: [kinematics] has {group} = {entry!r}; a joint group takes"
                ' { urdf = "FILE", base = "LINK", tip = "LINK" }'
            )
        urdf = Path(name_or_path).expanduser().parent / str(entry["urdf"])
        chains[group] = KinematicChain.from_urdf(urdf, str(entry["base"]), str(entry["tip"]))
    return StatedKinematics(space=find_space(name_or_path), chains=chains, rotation=rotation, state=state)


def with_kinematics(
    dataset: EpisodeDataset,
    chains: Mapping[str, KinematicChain],
    *,
    rotation: Rotation = "rot6d",
    state: Sequence[int] | None = None,
) -> KinematicDataset:
    """The dataset with the arms of `chains` as poses, absolute, in m and `rotation`; see `EndEffectorMap`.

    Absolute joints become the poses that they lead to. Steps (mode "delta") are added to the measured joints of their own
    frame, so that what a controller did not follow does not add up.

    Args:
        chains: by joint group, its name or a word of it: {"left": chain, "right": chain}.
        state: which numbers of the proprioception are the robot's state in the action's layout [D]; the others are left
            out, since a state of another layout is no anchor. None: all of them are.

    Raises ConfigError as `EndEffectorMap`, for a mode that single frames do not have ("relative": to which chunk's start?)
    and for a `state` of another length than D; episodes raise DataError where the proprioception does not fit.
    """
    return KinematicDataset(dataset, EndEffectorMap(dataset.space, chains, rotation=rotation), state)


class KinematicDataset(EpisodeDataset):
    """Reads episodes of `dataset` and converts them; `map` leads back to joints.

    A cache or a fingerprint takes it by its values: files alone do not say what the chains are.
    """

    def __init__(self, dataset: EpisodeDataset, map: EndEffectorMap, state: Sequence[int] | None = None) -> None:
        for name in map.chains:
            if map.space.group(name).mode == "relative":
                raise ConfigError(
                    f"joint group {name!r} of {dataset.name!r} is relative to the start of a chunk, which single frames do"
                    " not have; store absolute joints or steps (actok.signal.conversions.convert)"
                )
        if state is not None and len(state) != map.space.dim:
            raise ConfigError(
                f"state names {len(state)} numbers of the proprioception of {dataset.name!r}; name the"
                f" {map.space.dim} of the action's layout ({', '.join(map.space.names)})"
            )
        self.dataset, self.map, self.state = dataset, map, None if state is None else [int(i) for i in state]
        self.name, self.space = dataset.name, map.target
        used = ", ".join(f"{name} from {c.base} to {c.tip}" for name, c in map.chains.items())
        self.space_origin = f"{dataset.space_origin}; poses by forward kinematics ({used})"
        self.lengths, self.tasks = dataset.lengths, dataset.tasks

    def episode(self, index: int, *, images: bool = False) -> Episode:
        """See EpisodeDataset.episode."""
        episode = self.dataset.episode(index, images=images)
        state = self._state(episode)
        if self.map.needs_anchor and state is None:
            raise DataError(
                f"dataset {self.name!r} has steps of joints but no proprioception in episode {index}, to which they would"
                " add up to a pose; give the states, or absolute joints"
            )
        poses = self.map.there(episode.actions[:, None], state)[:, 0]
        return replace(
            episode,
            actions=poses.astype(np.float32),
            proprio=None if state is None else self.map.states(state).astype(np.float32),
        )

    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """See EpisodeDataset.view_sizes."""
        return self.dataset.view_sizes()

    def _state(self, episode: Episode) -> np.ndarray | None:
        """[T, D] in the action's layout."""
        if episode.proprio is None:
            return None
        width, dim = episode.proprio.shape[1], self.map.space.dim
        if self.state is None and width != dim:
            raise DataError(
                f"dataset {self.name!r}: the proprioception has {width} numbers, the actions {dim}; say which of them are"
                f" the state in the action's layout: state=range({dim}) if they are the first"
            )
        if self.state is not None and not all(0 <= i < width for i in self.state):
            bad = next(i for i in self.state if not 0 <= i < width)
            raise ConfigError(f"state names number {bad}; the proprioception of {self.name!r} has 0..{width - 1}")
        return episode.proprio if self.state is None else episode.proprio[:, self.state]
