"""results.json: what was measured and under which conditions. Tables and report are derived from it alone."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import DataError
from actok.core.files import write_bytes
from actok.core.provenance import circumstances, cpu_model, package_versions, thread_settings

FORMAT = "actok.benchmark"
SCHEMA_VERSION = 1
# What a measured figure depends on; a change in any of these files makes kept units stale.
CODE = (
    "core",
    "signal",
    "nn",
    "quantizers",
    "tokenizers",
    "alignment",
    "backbones",
    "data",
    "envs",
    "evaluation",
    "training",
    "configs",
    "benchmark/measure.py",
    "benchmark/semantics.py",
)
PACKAGES = ("numpy", "scipy", "scikit-learn", "tokenizers", "numba", "torch", "matplotlib", "mujoco", "metaworld")

__all__ = ["FORMAT", "SCHEMA_VERSION", "UnitStore", "code_hash", "plain", "provenance", "read_results", "write_results"]


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NumPy numbers as JSON values; a non-finite number becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def write_results(results: Mapping[str, Any], path: Path) -> Path:
    """Write atomically."""
    return write_bytes(path, json.dumps(plain(results), indent=1, allow_nan=False) + "\n")


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json (or the folder that holds it). Raises DataError where it is none, or of a newer version."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as benchmark results: {error}") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise DataError(f"{path} does not hold benchmark results; give a results.json written by actok bench")
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, this actok reads {SCHEMA_VERSION}; run the benchmark again"
        )
    return results


def provenance(seed: int) -> dict[str, Any]:
    """Under which conditions the figures came about: versions, machine, threads, commit, command, time."""
    return {**circumstances(PACKAGES), "seed": seed, "code": code_hash()[:16]}


@cache
def code_hash() -> str:
    """sha256 over the package's files that figures depend on."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for entry in CODE:
        target = package / entry
        files: Iterable[Path] = sorted(target.rglob("*.*")) if target.is_dir() else [target]
        for path in files:
            if path.suffix in (".py", ".toml") and path.is_file():
                digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def module_hash(module: str) -> str | None:
    """sha256 of a module's file: what a third party's tokenizer depends on. None where there is no such file."""
    try:
        spec = importlib.util.find_spec(module)
        return hashlib.sha256(Path(str(spec and spec.origin)).read_bytes()).hexdigest()
    except (ImportError, ValueError, OSError):
        return None


class UnitStore:
    """Finished (dataset, tokenizer, settings, seed) units, one JSON file each, so that a stopped run can go on.

    A key covers everything a figure depends on: the chunks themselves, the settings, seed, code, package versions,
    threads and processor.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh

    def key(self, **facts: Any) -> str:
        """Hash of the facts together with code, package versions, threads and processor."""
        machine = {"cpu": cpu_model(), "packages": package_versions(PACKAGES), "threads": thread_settings()}
        body = {"schema": SCHEMA_VERSION, "code": code_hash(), **machine, **plain(facts)}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """A kept unit; None where there is none, where it cannot be read, or where everything is to be made afresh."""
        if self.fresh:
            return None
        try:
            unit = json.loads((self.folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None
        return unit if isinstance(unit, dict) else None

    def put(self, key: str, unit: Mapping[str, Any]) -> None:
        """Keep a finished unit."""
        write_bytes(self.folder / f"{key}.json", json.dumps(plain(unit), allow_nan=False) + "\n")
