"""A dataset of joint-space arms as a dataset of end-effector poses, by kinematic models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from actok.core import ConfigError, DataError
from actok.core.spaces import Rotation
from actok.data.episodes import Episode, EpisodeDataset
from actok.signal.end_effector import EndEffectorMap
from actok.signal.kinematics import KinematicChain

__all__ = ["KinematicDataset", "with_kinematics"]


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
