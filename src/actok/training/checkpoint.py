"""Checkpoints: safetensors and JSON in a folder of their own, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actok.core import ArtifactError

FACTS = "state.json"
VERSION = 1
KEPT = 2
NAME = re.compile(r"step-(\d+)")

__all__ = ["Checkpoint", "latest_checkpoint", "read_checkpoint", "write_checkpoint"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A training run after `step` steps.

    Attributes:
        step: how many are done.
        tensors: group ("model", "heads", "ema", "optimizer", "best") -> name -> tensor, on the CPU.
        facts: JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N` beside its name, rename it, then delete all but the last two. Returns its path.

    Raises ArtifactError where the disk does not take it; what was there stays.
    """
    from safetensors.torch import save

    target = folder / f"step-{checkpoint.step:09d}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=folder))
    try:
        hashes = {}
        for group, tensors in checkpoint.tensors.items():
            # Clones, since safetensors refuses tensors that share memory.
            content = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
            hashes[group] = hashlib.sha256(content).hexdigest()
            _write(temporary / f"{group}.safetensors", content)
        facts = {"version": VERSION, "step": checkpoint.step, "sha256": hashes, **checkpoint.facts}
        _write(temporary / FACTS, json.dumps(facts, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise ArtifactError(
            f"the checkpoint {target} cannot be written ({error.strerror}); make room, then go on with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder, None where there is none."""
    found = _all(folder)
    return found[-1] if found else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote. Raises ArtifactError naming a file that is missing, truncated or edited."""
    from safetensors.torch import load

    try:
        facts = json.loads((path / FACTS).read_bytes())
        if facts["version"] != VERSION:
            raise ArtifactError(f"{path} is a checkpoint of version {facts['version']}, this actok reads {VERSION}")
        tensors = {}
        for group, expected in facts["sha256"].items():
            content = (path / f"{group}.safetensors").read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise ArtifactError(
                    f"{path / group}.safetensors is truncated or edited (sha256 differs); delete {path} to resume from the"
                    " checkpoint before it"
                )
            tensors[group] = load(content)
        return Checkpoint(step=facts["step"], tensors=tensors, facts=facts)
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path} is no complete checkpoint ({error}); delete it to resume from the one before it"
        ) from error


def _all(folder: Path) -> list[Path]:
    """Checkpoints in the order of their steps."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
