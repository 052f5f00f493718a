"""HDF5 demonstrations of robomimic, LIBERO and robosuite: `data/demo_N/actions` and metadata as JSON attributes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import ActionSpace, ActokError, DataError, MissingExtraError, SpaceMismatchError
from actok.data.episodes import Episode, EpisodeDataset, require_finite
from actok.data.resolve import common_rate, resolve_space

# Observations that make up the proprioception, concatenated in this order; the first set that is complete is taken.
# robomimic's are per robot (robot0, robot1, ...); LIBERO's are the end effector's pose and the fingers.
ROBOMIMIC_STATE = ("robot{}_eef_pos", "robot{}_eef_quat", "robot{}_gripper_qpos")
LIBERO_STATE = ("ee_states", "gripper_states")
# What robosuite's OSC_POSE makes of a command of 1 unless a configuration says otherwise: metres and radians.
OSC_DEFAULT = (0.05, 0.05, 0.05, 0.5, 0.5, 0.5)

__all__ = ["Hdf5Dataset"]


class Hdf5Dataset(EpisodeDataset):
    """The demonstrations of one file, or of all files of a folder (in the order of their names), by demo number.

    The start state is the first row of `states`; the simulator's model is large and read by `model_file` alone. The
    control rate is `control_freq` of the environment's arguments, unknown where they do not state it.
    """

    def __init__(self, source: Path, *, space: str | Path | ActionSpace | None = None, name: str | None = None) -> None:
        source = Path(source)
        files = [source] if source.is_file() else sorted([*source.glob("*.hdf5"), *source.glob("*.h5")])
        self.name = name or source.stem
        if not files:
            raise DataError(f"{source} holds no *.hdf5 or *.h5 file; give at least one")
        self.source_files = files
        self._demos: list[tuple[_File, str]] = []
        lengths: list[int] = []
        opened = [_File(path) for path in files]
        for file in opened:
            if file.dim != opened[0].dim:
                raise SpaceMismatchError(
                    f"dataset {self.name!r} mixes action spaces: {opened[0].path} has {opened[0].dim} dimensions,"
                    f" {file.path} has {file.dim}; open them as separate datasets"
                )
            self._demos += [(file, demo) for demo in file.demos]
            lengths += file.lengths
        self.lengths = np.array(lengths, np.int64)
        robots = {file.robot for file in opened}
        self.space, self.space_origin = resolve_space(
            space,
            dim=opened[0].dim,
            dataset=self.name,
            robot=robots.pop() if len(robots) == 1 else None,
            rate_hz=common_rate(((str(f.path), f.rate_hz) for f in opened), self.name),
        )

    def episode(self, index: int, *, images: bool = False) -> Episode:
        """See EpisodeDataset.episode."""
        file, demo = self._locate(index)
        with file.open() as stored:
            group = stored["data"][demo]
            actions = file.actions(group)
            if len(actions) != self.lengths[index]:
                raise DataError(
                    f"{file.path} changed since it was opened: {demo} has {len(actions)} steps; open it again"
                )
            require_finite(actions, np.array([0, len(actions)]), self.name, index)
            observed = group.get("obs", {})
            return Episode(
                index=index,
                actions=actions,
                proprio=_proprio(observed, len(actions), f"{file.path}, {demo}"),
                instruction=file.instruction,
                task=file.task,
                success=_success(group),
                start_state={"states": group["states"][0]} if "states" in group else {},
                images=_views(observed, len(actions)) if images else {},
            )

    def model_file(self, index: int) -> str | None:
        """The simulator's model of an episode (MJCF as text, or its file name), None where there is none."""
        file, demo = self._locate(index)
        with file.open() as stored:
            return _text(stored["data"][demo].attrs.get("model_file"))

    def _locate(self, index: int) -> tuple[_File, str]:
        if not 0 <= index < len(self):
            raise DataError(f"dataset {self.name!r} has episodes 0..{len(self) - 1}, not {index}")
        return self._demos[index]


class _File:
    """One HDF5 file: what it says about all of its demonstrations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.open() as stored:
            root = stored.get("data")
            demos = [key for key in root if re.fullmatch(r"demo_\d+", key)] if hasattr(root, "keys") else []
            if not demos:
                raise DataError(
                    f"{path} has no group data/demo_N, only {', '.join(stored) or 'nothing'}; robomimic, LIBERO and"
                    " robosuite files are known"
                )
            self.demos = sorted(demos, key=lambda key: int(key.rpartition("_")[2]))
            widths = set()
            self.lengths = []
            for demo in self.demos:
                group = root[demo]
                if "actions" not in group:
                    raise DataError(f"{path}, {demo} has no 'actions', only {', '.join(group)}; drop the demonstration")
                shape = group["actions"].shape
                if len(shape) != 2 or 0 in shape:
                    raise DataError(f"{path}, {demo} has actions of shape {shape}; give [steps, dimensions]")
                stated = group.attrs.get("num_samples")
                if stated is not None and int(stated) != shape[0]:
                    raise DataError(
                        f"{path}, {demo} has {shape[0]} actions, its num_samples states {stated}; correct the file"
                    )
                widths.add(shape[1])
                self.lengths.append(shape[0])
            if len(widths) != 1:
                raise DataError(f"{path} mixes actions of {sorted(widths)} dimensions; split it by robot")
            self.dim = widths.pop()
            self._describe(root.attrs)

    def _describe(self, attributes: Mapping[str, Any]) -> None:
        args = _json(attributes, "env_args", self.path)
        environment = args.get("env_kwargs") or _json(attributes, "env_info", self.path)
        problem = _json(attributes, "problem_info", self.path)
        text = problem.get("language_instruction", "")
        # LIBERO stores the words quoted, or as a list of words in older files.
        self.instruction = (" ".join(text) if isinstance(text, list) else str(text)).strip().strip('"')
        names = (args.get("env_name"), environment.get("env_name"), _text(attributes.get("env")))
        self.task = str(next((n for n in names if n), ""))
        rate = environment.get("control_freq")
        self.rate_hz = None if rate is None else float(rate)
        self.robot = _robot(environment)

    @contextmanager
    def open(self) -> Any:
        """The file, with the errors of h5py and of an unknown layout inside as DataError."""
        try:
            import h5py
        except ImportError:
            raise MissingExtraError("h5py", "hdf5", "reading HDF5 demonstrations") from None
        try:
            with h5py.File(self.path, "r") as stored:
                yield stored
        except ActokError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path} is not laid out as robomimic, LIBERO and robosuite do ({type(error).__name__}: {error});"
                " correct the file"
            ) from None
        except (OSError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.path} cannot be read as HDF5 ({reason}); the file is damaged, download it again"
            ) from None

    def actions(self, group: Any) -> np.ndarray:
        """float32 [T, D] of a demonstration."""
        actions: np.ndarray = group["actions"][()]
        if actions.dtype.kind != "f":
            raise DataError(f"{self.path}: actions have dtype {actions.dtype}; give floating point values")
        return actions.astype(np.float32)


def _robot(environment: Mapping[str, Any]) -> str | None:
    """Robot, and for robosuite's usual controller the fact: "robosuite/Panda" commands poses at the default scale."""
    robots = environment.get("robots")
    found = [robots] if isinstance(robots, str) else list(robots or [])
    if not found:
        return None
    name = "_".join(dict.fromkeys(str(r) for r in found))
    controllers = environment.get("controller_configs") or {}
    controllers = controllers if isinstance(controllers, Sequence) else [controllers]
    usual = bool(controllers) and all(
        c.get("type") == "OSC_POSE" and c.get("control_delta", True) and tuple(c.get("output_max") or ()) == OSC_DEFAULT
        for c in controllers
    )
    return f"robosuite/{name}" if usual else name


def _proprio(observed: Any, steps: int, where: str) -> np.ndarray | None:
    keys: list[str] = []
    number = 0
    while all(part.format(number) in observed for part in ROBOMIMIC_STATE):
        keys += [part.format(number) for part in ROBOMIMIC_STATE]
        number += 1
    if not keys and all(part in observed for part in LIBERO_STATE):
        keys = list(LIBERO_STATE)
    if not keys:
        return None
    parts = [observed[key][()].reshape(len(observed[key]), -1) for key in keys]
    if short := [k for k, p in zip(keys, parts, strict=True) if len(p) != steps]:
        raise DataError(
            f"{where}: obs/{short[0]} has another number of rows than the {steps} actions; correct the file"
        )
    return np.concatenate(parts, axis=1).astype(np.float32)


def _views(observed: Any, steps: int) -> dict[str, np.ndarray]:
    found = {}
    for key in observed:
        stored = observed[key]
        if (
            getattr(stored, "ndim", 0) == 4
            and stored.dtype == np.uint8
            and stored.shape[3] == 3
            and len(stored) == steps
        ):
            found[key] = stored[()]
    return found


def _success(group: Any) -> bool | None:
    """The demonstration's own attribute `success`, None where it has none: rewards do not say it without a threshold."""
    stated = group.attrs.get("success")
    return None if stated is None else bool(stated)


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)


def _json(attributes: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    text = _text(attributes.get(key))
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: attribute {key!r} is no JSON ({error}); correct the file") from None
    return value if isinstance(value, dict) else {}
