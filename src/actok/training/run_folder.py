"""The folder of a training run: what it is (run.json), how it went (log.jsonl), where it stands (checkpoints)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actok.core import ConfigError, MissingExtraError
from actok.core.files import write_bytes
from actok.core.provenance import circumstances
from actok.training.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint, write_checkpoint

RUN, LOG, CHECKPOINTS = "run.json", "log.jsonl", "checkpoints"
FORMAT = "actok.run"
PACKAGES = ("numpy", "torch", "accelerate", "safetensors")
# Settings of a run that change nothing in what it computes, so that a resumed run may have others.
FREE = ("checkpoint_every", "log_every", "track")

__all__ = ["RunFolder", "check_run"]


def check_run(path: str | Path, *, resume: bool = False) -> None:
    """Raise ConfigError where `RunFolder` would refuse the folder whatever the run is; nothing is written.

    What reads data first asks before it does. Of several processes the first one asks, as it is the one that writes.
    """
    if os.environ.get("RANK", "0") == "0":
        _check(Path(path), _read(Path(path)), resume)


class RunFolder:
    """A training run on disk. Only the first process of a run writes.

    Args:
        path: the folder.
        identity: everything that the outcome depends on, as JSON values: a run is resumed with the same only.
        resume: go on where the folder's run stands; it starts anew where it has not begun.
        main: whether this is the first process.

    Raises:
        ConfigError: the folder holds something else, or an unfinished run and `resume` is False, or a run of another
            identity, whose differences are named.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], *, resume: bool = False, main: bool = True
    ) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        if main:
            self._open(resume)

    def _open(self, resume: bool) -> None:
        known = _read(self.path)
        _check(self.path, known, resume)
        if known is not None and resume:
            if found := _differences(known["identity"], self.identity):
                raise ConfigError(
                    f"the run in {self.path} cannot be resumed as another: {'; '.join(found[:3])}"
                    f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}; give the same again, or start anew in"
                    " another folder (--run)"
                )
            return
        if known is not None:
            (self.path / LOG).unlink(missing_ok=True)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        self._write({"format": FORMAT, "identity": self.identity, **circumstances(PACKAGES), "finished": None})

    def _write(self, body: Mapping[str, Any]) -> None:
        write_bytes(self.path / RUN, json.dumps(body, indent=1) + "\n")

    # -- while it runs --------------------------------------------------------------------------------------------

    def log(self, line: Mapping[str, Any]) -> None:
        """One more line of log.jsonl."""
        with open(self.path / LOG, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def save(self, checkpoint: Checkpoint) -> None:
        """One more checkpoint."""
        write_checkpoint(self.path / CHECKPOINTS, checkpoint)

    def latest(self) -> Checkpoint | None:
        """Where the run stands, None at its beginning."""
        found = latest_checkpoint(self.path / CHECKPOINTS)
        return None if found is None else read_checkpoint(found)

    def rewind(self, step: int) -> None:
        """Drop the lines of the log after that step, which will be run again, and one that a crash has cut off."""
        path = self.path / LOG
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (found := _whole(line)) is not None and found["step"] <= step]
            write_bytes(path, "".join(f"{line}\n" for line in kept))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note that the run is complete."""
        self._write({**(_read(self.path) or {}), "finished": dict(summary)})


def _read(path: Path) -> dict[str, Any] | None:
    """What run.json says, None where there is no run."""
    try:
        body = json.loads((path / RUN).read_bytes())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) and body.get("format") == FORMAT else None


def _check(path: Path, known: Mapping[str, Any] | None, resume: bool) -> None:
    """Refuse what is no run, and a run that would be lost."""
    if known is None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} holds something else than a training run; name a new folder (--run)")
    elif not resume and not known.get("finished"):
        raise ConfigError(
            f"{path} holds an unfinished run; go on with it (--resume), or delete it, or name another folder (--run)"
        )


def _whole(line: str) -> dict[str, Any] | None:
    """A line of the log, None where a crash has cut it off."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found


def check_trackers(names: tuple[str, ...], folder: RunFolder | None) -> None:
    """Refuse trackers that accelerate would leave out silently, and a log without a folder."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"there is no tracker {name!r}; choose one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise MissingExtraError(name, "tensorboard" if name == "tensorboard" else "torch", "tracking")
    if names and folder is None:
        raise ConfigError(f"tracking with {', '.join(names)} needs a run folder; give one (run=, --run)")


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested JSON values, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            difference
            for key in dict.fromkeys([*then, *now])
            if key not in FREE
            for difference in _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [d for i, (a, b) in enumerate(zip(then, now, strict=True)) for d in _differences(a, b, f"{name}[{i}]")]
    return [] if then == now else [f"{name} was {_short(then)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
