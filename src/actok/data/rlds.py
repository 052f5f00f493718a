"""RLDS datasets as TensorFlow Datasets stores them (Open X-Embodiment, BridgeData, DROID), without TensorFlow.

An episode is one tf.train.Example; `features.json` says how its flat lists fold back into steps and tensors.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from actok.core import ActionSpace, DataError
from actok.data.episodes import Episode, EpisodeDataset, require_finite
from actok.data.resolve import resolve_space
from actok.data.tfrecord import TFRecordFile, feature_values, parse_example

# The parts of a dict of actions in the order in which they are concatenated; others of floating type follow in
# alphabetical order. Integer parts (terminate_episode) are no motion and are left out.
ACTION_PARTS = (
    "world_vector",
    "rotation_delta",
    "gripper_closedness_action",
    "base_displacement_vector",
    "base_displacement_vertical_rotation",
)
STATE_KEYS = ("steps/observation/state", "steps/observation/proprio")
TEXT_KEYS = (
    "steps/language_instruction",
    "steps/observation/natural_language_instruction",
    "steps/natural_language_instruction",
    "steps/observation/language_instruction",
)
_SHARD = re.compile(r"(?P<dataset>.+)-(?P<split>[\w]+)\.tfrecord-(?P<number>\d{5,})-of-(?P<count>\d{5,})")

__all__ = ["ACTION_PARTS", "RldsDataset", "TensorSpec", "read_features"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One leaf of features.json: kind "tensor", "text" or "image", with the shape and dtype of one step's value."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = "none"

    @property
    def size(self) -> int:
        """Numbers in one step's value."""
        return int(np.prod(self.shape))


class RldsDataset(EpisodeDataset):
    """The episodes of all shards, split by split in the order of dataset_info.json.

    The action is `steps/action`, a tensor or a dict of tensors (see ACTION_PARTS); proprioception is
    `steps/observation/state`, else `.../proprio`. The checksum of a record is verified when it is read.

    Attributes:
        splits: split name -> range of episode indices.
        action_keys: the flat keys that the action is concatenated from, in order.
    """

    def __init__(self, source: Path, *, space: str | Path | ActionSpace | None = None, name: str | None = None) -> None:
        """`source`: the folder of dataset_info.json, a tfrecord file, or a glob of such."""
        folder, shards = _find(Path(source))
        self.features = read_features(folder / "features.json")
        info, stated = _read_info(folder / "dataset_info.json")
        self.name = name or str(info.get("name") or shards[0].name.split(".")[0])
        self.action_keys = self._action_keys(folder)
        self._dim = sum(self.features[key].size for key in self.action_keys)
        self._state_key = next((k for k in STATE_KEYS if self._is_float(k)), None)
        self._text_key = next((k for k in TEXT_KEYS if k in self.features), None)
        self._records: list[tuple[TFRecordFile, int]] = []
        self._open: TFRecordFile | None = None
        self.splits: dict[str, range] = {}
        self.source_files = shards
        self._lengths: list[int] = []
        self._index(shards, stated, complete=Path(source) == folder)
        if not self._records:
            raise DataError(f"dataset {self.name!r} is empty: {len(shards)} tfrecord files hold no record")
        self.lengths = np.array(self._lengths, np.int64)
        self.space, self.space_origin = resolve_space(
            space, dim=self._dim, dataset=self.name, names=self._names(), robot=None, rate_hz=None
        )

    # -- opening --------------------------------------------------------------------------------------------------

    def _is_float(self, key: str) -> bool:
        spec = self.features.get(key)
        return spec is not None and spec.kind == "tensor" and spec.dtype.startswith(("float", "bfloat"))

    def _action_keys(self, folder: Path) -> list[str]:
        if "steps/action" in self.features:
            keys = ["steps/action"] if self._is_float("steps/action") else []
        else:
            parts = [k for k in self.features if k.startswith("steps/action/") and self._is_float(k)]
            known = [f"steps/action/{p}" for p in ACTION_PARTS]
            keys = [k for k in known if k in parts] + sorted(k for k in parts if k not in known)
        if not keys:
            floats = [k for k in self.features if k.startswith("steps/") and self._is_float(k)]
            raise DataError(
                f"{folder / 'features.json'} has no floating point 'steps/action'; it has {', '.join(floats) or 'none'}"
            )
        return keys

    def _names(self) -> list[str] | None:
        if len(self.action_keys) == 1:
            return None
        found = []
        for key in self.action_keys:
            size, short = self.features[key].size, key.rsplit("/", 1)[-1]
            found += [short] if size == 1 else [f"{short}.{i}" for i in range(size)]
        return found

    def _index(self, shards: list[Path], stated: Mapping[str, list[int]], complete: bool) -> None:
        by_split: dict[str, list[Path]] = {}
        for shard in shards:
            match = _SHARD.fullmatch(shard.name)
            by_split.setdefault(match["split"] if match else shard.name, []).append(shard)
        order = [*(s for s in stated if s in by_split), *(s for s in by_split if s not in stated)]
        bar = tqdm(total=len(shards), desc=self.name, unit="file", delay=2, leave=False)
        for split in order:
            first = len(self._records)
            expected = stated.get(split, [])
            if complete and expected and len(expected) != len(by_split[split]):
                raise DataError(
                    f"dataset {self.name!r}: split {split!r} has {len(by_split[split])} of {len(expected)} shards;"
                    " download the others, or open the files by a glob"
                )
            for shard in by_split[split]:
                file = TFRecordFile(shard)
                match = _SHARD.fullmatch(shard.name)
                number = int(match["number"]) if match else 0
                if number < len(expected) and len(file) != expected[number]:
                    raise DataError(
                        f"{shard} holds {len(file)} episodes, dataset_info.json states {expected[number]}; download it"
                        " again"
                    )
                for record in range(len(file)):
                    self._records.append((file, record))
                    self._lengths.append(self._length(file, record))
                file.release()
                bar.update()
            self.splits[split] = range(first, len(self._records))
        bar.close()

    def _length(self, file: TFRecordFile, record: int) -> int:
        """Steps of an episode, from the size of its action list alone: images are not touched."""
        where = f"{file.path}, record {record}"
        key = self.action_keys[0]
        flat = parse_example(file.peek(record), where)
        values = self._raw(flat, key, where)
        width = self.features[key].size if isinstance(values, np.ndarray) else 1
        if not len(values) or len(values) % width:
            raise DataError(f"{where}: {key} holds {len(values)} values, no multiple of {width}; download it again")
        return len(values) // width

    # -- reading --------------------------------------------------------------------------------------------------

    def episode(self, index: int, *, images: bool = False) -> Episode:
        """See EpisodeDataset.episode. Images need the extra `video`."""
        flat, where = self._read(index)
        steps = int(self.lengths[index])
        actions = self._actions(flat, steps, where)
        require_finite(actions, np.array([0, steps]), self.name, index)
        state = None if self._state_key is None else self._tensor(flat, self._state_key, steps, where)
        return Episode(
            index=index,
            actions=actions,
            proprio=None if state is None else state.reshape(steps, -1).astype(np.float32),
            instruction=self._text(flat, where),
            images=self._images(flat, steps, where) if images else {},
        )

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """See EpisodeDataset.all_actions."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        frames = np.empty((offsets[-1], self._dim), np.float32)
        for index in tqdm(range(len(self)), desc=self.name, unit="episode", delay=2, leave=False):
            flat, where = self._read(index)
            frames[offsets[index] : offsets[index + 1]] = self._actions(flat, int(self.lengths[index]), where)
        require_finite(frames, offsets, self.name)
        return frames, offsets

    def _read(self, index: int) -> tuple[dict[str, memoryview], str]:
        if not 0 <= index < len(self):
            raise DataError(f"dataset {self.name!r} has episodes 0..{len(self) - 1}, not {index}")
        file, record = self._records[index]
        if self._open is not file:
            if self._open is not None:
                self._open.release()
            self._open = file
        where = f"{file.path}, record {record}"
        return parse_example(file.record(record), where), where

    def _actions(self, flat: Mapping[str, memoryview], steps: int, where: str) -> np.ndarray:
        parts = [self._tensor(flat, key, steps, where).reshape(steps, -1) for key in self.action_keys]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _raw(self, flat: Mapping[str, memoryview], key: str, where: str) -> Any:
        if key not in flat:
            raise DataError(f"{where} has no {key!r}, though features.json lists it; download the dataset again")
        return feature_values(flat[key], where)

    def _tensor(self, flat: Mapping[str, memoryview], key: str, steps: int, where: str) -> np.ndarray:
        spec = self.features[key]
        values = self._raw(flat, key, where)
        if isinstance(values, list):  # a tensor a step, stored as bytes
            try:
                inflate = zlib.decompress if spec.encoding == "zlib" else bytes
                values = np.concatenate([np.frombuffer(inflate(v), spec.dtype) for v in values])
            except (ValueError, TypeError, zlib.error) as error:
                raise DataError(f"{where}: {key} cannot be decoded ({error}); download the file again") from None
        if len(values) != steps * spec.size:
            raise DataError(
                f"{where}: {key} holds {len(values)} values for {steps} steps of shape {spec.shape}; download it again"
            )
        return values.reshape(steps, *spec.shape)

    def _text(self, flat: Mapping[str, memoryview], where: str) -> str:
        if self._text_key is None or self._text_key not in flat:
            return ""
        values = self._raw(flat, self._text_key, where)
        return str(values[0], "utf-8", "replace") if isinstance(values, list) and values else ""

    def _images(self, flat: Mapping[str, memoryview], steps: int, where: str) -> dict[str, np.ndarray]:
        from actok.data.video import decode_image

        views = {}
        for key in self._image_keys:
            stored = self._raw(flat, key, where)
            if not isinstance(stored, list) or len(stored) != steps:
                raise DataError(f"{where}: {key} holds {len(stored)} images for {steps} steps; download it again")
            view = key.removeprefix("steps/").removeprefix("observation/")
            views[view] = np.stack([decode_image(bytes(image), f"{where}, {key}") for image in stored])
        return views

    @cached_property
    def _image_keys(self) -> list[str]:
        # Depth images have one channel and are no views.
        return [
            k for k, s in self.features.items() if s.kind == "image" and k.startswith("steps/") and s.shape[-1:] == (3,)
        ]


def _find(source: Path) -> tuple[Path, list[Path]]:
    """Folder of the metadata, and the shards."""
    if source.is_dir():
        shards = sorted(source.glob("*.tfrecord*"))
        if not shards:
            raise DataError(f"{source} holds no *.tfrecord* file, only metadata; download the dataset's shards")
        return source, shards
    if source.is_file():
        return source.parent, [source]
    shards = sorted(source.parent.glob(source.name))
    if not shards:
        raise DataError(f"{source} matches no file; check the pattern")
    return source.parent, shards


def read_features(path: Path) -> dict[str, TensorSpec]:
    """Flat key (`steps/observation/state`) -> spec of the leaves of features.json.

    Raises DataError where the file is missing or damaged. Leaves of kinds that hold no tensor, text or image are left
    out.
    """
    found: dict[str, TensorSpec] = {}

    def walk(node: Mapping[str, Any], key: str) -> None:
        if "featuresDict" in node:
            for child, inner in node["featuresDict"]["features"].items():
                walk(inner, f"{key}/{child}" if key else child)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], key)
        elif "tensor" in node:
            tensor = node["tensor"]
            found[key] = TensorSpec(
                kind="tensor",
                shape=_shape(tensor.get("shape")),
                dtype=str(tensor.get("dtype", "")),
                encoding=str(tensor.get("encoding", "none")),
            )
        elif "text" in node:
            found[key] = TensorSpec(kind="text")
        elif "image" in node:
            found[key] = TensorSpec(kind="image", shape=_shape(node["image"].get("shape")), dtype="uint8")

    try:
        walk(_read_json(path), "")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} does not describe features ({error!r}); download it again") from None
    return found


def _shape(stored: Mapping[str, Any] | None) -> tuple[int, ...]:
    return tuple(int(n) for n in (stored or {}).get("dimensions", []))


def _read_info(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """dataset_info.json, and the episodes of each shard that it states for each split; nothing where it is missing."""
    info = _read_json(path) if path.is_file() else {}
    try:
        splits = info.get("splits", [])
        return info, {str(s["name"]): [int(n) for n in s.get("shardLengths", [])] for s in splits}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not as TFDS writes it ({type(error).__name__}: {error}); download it again"
        ) from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing; it lies beside the tfrecord files of a TFDS dataset, copy it there"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); download it again") from None
