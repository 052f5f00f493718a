"""Which data, and where work files and pages go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actok.core import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# Closed-form presets, and the published FAST+ files below DATA_ROOT; without them these are left out.
CLOSED_FORM = ("bins", "fast", "beast", "dct", "pca")
FAST_PLUS = "fast_plus"
METAWORLD = "metaworld"
EPISODES = 50
SEED = 0

# name -> (path below DATA_ROOT, action space where the data do not tell)
OTHERS: Mapping[str, tuple[str, str | None]] = {
    "robosuite": ("sim/robosuite_state", None),
    "aloha_sim": ("sim/aloha_sim", None),
    "libero": ("sim/libero_state", None),
    "unitree_g1_inspire": ("real/unitree_g1_inspire", None),
    "bridge_widowx": ("real/bridge_widowx", None),
    "adroit_door_human": ("real/adroit_door_human", None),
    "robosuite_human_lift": ("real/robosuite_human/lift.hdf5", None),
    "robosuite_human_handover": ("real/robosuite_human/handover_two_panda.hdf5", None),
}
# Shares of a batch where several are trained on: about the square roots of their sizes, so that small sets count too.
RATIOS: Mapping[str, int] = {
    "metaworld": 37,
    "robosuite": 14,
    "aloha_sim": 10,
    "libero": 9,
    "unitree_g1_inspire": 15,
    "bridge_widowx": 2,
    "adroit_door_human": 6,
    "robosuite_human_lift": 3,
    "robosuite_human_handover": 4,
}

__all__ = [
    "CLOSED_FORM",
    "EPISODES",
    "FAST_PLUS",
    "METAWORLD",
    "OTHERS",
    "RATIOS",
    "ROOT",
    "SEED",
    "Places",
    "Source",
    "portable",
    "slim",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: its name on the pages, where it is, and its action space where the data do not tell."""

    name: str
    path: str
    space: str | None = None

    def identity(self) -> dict[str, Any]:
        """Names and sizes of its files: enough to notice that a trained tokenizer saw other data."""
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        listed = [[str(p.relative_to(path.parent)), p.stat().st_size] for p in files]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        return {"name": self.name, "space": self.space, "files": len(files), "sizes": digest}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders and data of one making of the results.

    Attributes:
        work: work files.
        pages: the generated pages.
        data_root: folder with the data sets of OTHERS, or None.
        scale: factor on all training steps; 1 but in a trial of the command, whose files are kept apart.
    """

    work: Path = ROOT / "runs" / "results"
    pages: Path = ROOT / "docs" / "results"
    data_root: Path | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError(f"scale is {self.scale!r}; give a number above 0, at most 1")

    @property
    def trained(self) -> Path:
        """Trained tokenizers and their runs."""
        return self.work / "learned" if self.scale == 1 else self.work / f"trial-{self.scale:g}" / "learned"

    @property
    def judged(self) -> Path:
        """Measured units of the learned pages."""
        return self.trained.parent / "bench-learned"

    @property
    def learned_pages(self) -> Path:
        """The pages on learned tokenizers."""
        return self.pages / "learned" if self.scale == 1 else self.trained.parent / "pages"

    @property
    def sources(self) -> dict[str, Source]:
        """The data sets at hand, by name; Meta-World first."""
        found = {METAWORLD: Source(name=METAWORLD, path=str(self.work / METAWORLD))}
        if self.data_root is not None:
            for name, (path, space) in OTHERS.items():
                if (self.data_root / path).exists():
                    found[name] = Source(name=name, path=str(self.data_root / path), space=space)
        return found

    @property
    def fast_plus(self) -> str | None:
        """Folder of the published FAST+ files, None where they are not at hand."""
        folder = None if self.data_root is None else self.data_root / FAST_PLUS
        return str(folder) if folder is not None and folder.exists() else None


def slim(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables rest on, without example chunks, curves over every code and points of sweeps' histograms."""
    units = []
    for unit in results["results"]:
        metrics = {k: v for k, v in (unit.get("metrics") or {}).items() if k not in ("examples", "codes")}
        units.append({**unit, "metrics": metrics})
    datasets = [{k: v for k, v in d.items() if k != "examples"} for d in results["datasets"]]
    return {**results, "datasets": datasets, "results": units}


def portable(text: str, data_root: Path | None) -> str:
    """Without the folders of the machine it was made on, in this checkout or another that shares the work files."""
    text = re.sub(r"(?<![\w.-])/[^\s\",]*?/(?=runs/results/)", "", text.replace(f"{ROOT}/", ""))
    return text if data_root is None else text.replace(str(data_root), "DATA_ROOT")
