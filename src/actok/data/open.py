"""One door to robot data in every format."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actok.core import ActionSpace, DataError, is_torch
from actok.data.episodes import EpisodeDataset
from actok.data.resolve import resolve_space

__all__ = ["open_dataset"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOOKED_FOR = (
    "meta/info.json (LeRobot), dataset_info.json or *.tfrecord* (RLDS), *.hdf5 or *.h5 (robomimic, LIBERO, robosuite),"
    " *.npz"
)


def open_dataset(
    source: Any, *, space: str | Path | ActionSpace | None = None, name: str | None = None
) -> EpisodeDataset:
    """Open robot demonstrations, whatever their format.

    Args:
        source: a folder or file (LeRobot v2.x and v3.0, RLDS / TFDS, HDF5 of robomimic, LIBERO or robosuite, npz), a
            glob of tfrecord files, the id of a LeRobot dataset on the Hugging Face Hub, a live LeRobotDataset, a dict
            of arrays, a list of episodes [T, D], or an array [E, T, D] or [T, D].
        space: what the actions mean: the name of a preset, the path of a TOML file, or an ActionSpace. None: as
            stored with the data or inferred; `space_origin` of the result says how. Where the file has a table
            [kinematics], joints come as end-effector poses (see `actok.data.kinematic`).
        name: for tables and messages; None: from the source.

    Raises DataError where the source is missing, damaged or of no known format, SpaceMismatchError where `space` has
    another number of dimensions than the data, ConfigError for a [kinematics] table that does not fit.
    """
    dataset = _open(source, space, name)
    if isinstance(space, (str, Path)):
        from actok.data.kinematic import stated_kinematics, with_kinematics

        if stated := stated_kinematics(space):
            return with_kinematics(dataset, stated.chains, rotation=stated.rotation, state=stated.state)
    return dataset


def _open(source: Any, space: str | Path | ActionSpace | None, name: str | None) -> EpisodeDataset:
    if isinstance(source, EpisodeDataset):
        return _renamed(source, space, name)
    if isinstance(source, (str, Path)):
        return _open_path(source, space, name)
    if hasattr(source, "root") and hasattr(source, "meta"):
        from actok.data.lerobot_read import LeRobotFolder

        title = name or str(getattr(source, "repo_id", None) or Path(source.root).name)
        chosen = getattr(source, "episodes", None)
        return LeRobotFolder(Path(source.root), space=space, name=title, episodes=chosen)
    if isinstance(source, (Mapping, list, tuple)) or is_torch(source) or hasattr(source, "__array__"):
        from actok.data.arrays import from_arrays

        return from_arrays(source, space=space, name=name)
    raise DataError(
        f"a {type(source).__name__} is no dataset; give a folder, a file, a Hub id, a LeRobotDataset, or arrays"
    )


def _renamed(dataset: EpisodeDataset, space: str | Path | ActionSpace | None, name: str | None) -> EpisodeDataset:
    if space is None and name is None:
        return dataset
    result = copy.copy(dataset)
    result.name = name or dataset.name
    if space is not None:
        result.space, result.space_origin = resolve_space(
            space, dim=dataset.space.dim, dataset=result.name, rate_hz=dataset.space.rate_hz
        )
    return result


def _open_path(source: str | Path, space: str | Path | ActionSpace | None, name: str | None) -> EpisodeDataset:
    path = Path(source).expanduser()
    text = str(source)
    if path.is_dir():
        return _open_folder(path, space, name)
    if path.is_file():
        return _open_file(path, space, name)
    if "tfrecord" in text and any(c in text for c in "*?["):
        from actok.data.rlds import RldsDataset

        return RldsDataset(path, space=space, name=name)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        from actok.data.lerobot_read import LeRobotFolder

        return LeRobotFolder(_download(source), space=space, name=name or source)
    raise DataError(f"{source} does not exist; give a folder, a file, or a Hub id such as 'lerobot/pusht'")


def _open_folder(folder: Path, space: str | Path | ActionSpace | None, name: str | None) -> EpisodeDataset:
    if (folder / "meta").is_dir() or (folder / "data").is_dir():
        from actok.data.lerobot_read import LeRobotFolder

        return LeRobotFolder(folder, space=space, name=name)
    if (folder / "dataset_info.json").is_file() or any(folder.glob("*.tfrecord*")):
        from actok.data.rlds import RldsDataset

        return RldsDataset(folder, space=space, name=name)
    versions = sorted(p.parent for p in folder.glob("*/dataset_info.json"))
    if len(versions) == 1:
        from actok.data.rlds import RldsDataset

        return RldsDataset(versions[0], space=space, name=name or folder.resolve().name)
    if versions:
        raise DataError(f"{folder} holds the versions {', '.join(v.name for v in versions)}; name one of these folders")
    if any(folder.glob("*.hdf5")) or any(folder.glob("*.h5")):
        from actok.data.hdf5 import Hdf5Dataset

        return Hdf5Dataset(folder, space=space, name=name)
    if any(folder.glob("*.npz")):
        from actok.data.arrays import open_npz

        return open_npz(folder, space=space, name=name)
    raise DataError(f"{folder} holds no known dataset; looked for {_LOOKED_FOR}")


def _open_file(path: Path, space: str | Path | ActionSpace | None, name: str | None) -> EpisodeDataset:
    if ".tfrecord" in path.name:
        from actok.data.rlds import RldsDataset

        return RldsDataset(path, space=space, name=name)
    if path.suffix in (".hdf5", ".h5"):
        from actok.data.hdf5 import Hdf5Dataset

        return Hdf5Dataset(path, space=space, name=name)
    if path.suffix == ".npz":
        from actok.data.arrays import open_npz

        return open_npz(path, space=space, name=name)
    raise DataError(f"{path} is of no known format; looked for {_LOOKED_FOR}")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Videos are left on the Hub: tokenizers need actions, and the videos are a hundred times larger.
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=["meta/**", "data/**"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{repo_id!r} is no local path and could not be had from the Hugging Face Hub ({first}); check the name,"
            " the network and your access"
        ) from None
