"""Names -> classes, lazily: presets are TOML files found by glob, third parties add entry points.

Listing reads text only; a class is imported when it is asked for. A preset file:

    summary = "one line"                              # shown by `actok list`
    target = "actok.tokenizers.bins:BinsTokenizer"    # module:Class
    paper = "RT-1 (arXiv 2212.06817)"
    [settings]                                        # fields of the class's config
    bins = 256
    [training]                                        # learned tokenizers only: fields of actok.training.TrainConfig
    steps = 3000
    [alignment]                                       # learned tokenizers trained on a teacher's features: fields of
    contrast = 0.5                                    # actok.alignment.AlignmentConfig
    [[sweep]]                                         # optional: settings from coarse to fine, for rate-distortion
    bins = 16                                         # curves and for the search of fit(tolerance=...)
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from actok.core.config import parse_assignments
from actok.core.errors import ConfigError, MissingExtraError

CONFIGS = Path(__file__).parent.parent / "configs"
ENTRY_POINT_GROUP = "actok.tokenizers"

__all__ = [
    "CONFIGS",
    "Preset",
    "find_class",
    "find_preset",
    "list_tokenizers",
    "load_target",
    "read_toml",
    "split_settings",
    "suggest",
    "tokenizer_presets",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named tokenizer with settings; `target` is "module:Class"."""

    name: str
    summary: str
    target: str
    paper: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    sweep: Sequence[Mapping[str, Any]] = ()


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises ConfigError with the path and the parser's words."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


def suggest(name: str, known: list[str]) -> str:
    """'; did you mean "x"?' or the list of what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"


@cache
def tokenizer_presets() -> Mapping[str, Preset]:
    """All presets by name: the packaged ones, then entry points of the group "actok.tokenizers"."""
    found = {}
    for path in sorted((CONFIGS / "tokenizers").glob("*.toml"), key=lambda p: p.stem):
        values = read_toml(path)
        try:
            found[path.stem] = Preset(name=path.stem, **values)
        except TypeError as error:
            raise ConfigError(
                f"{path}: {error}; a preset has summary, target, paper, settings, training, alignment, sweep"
            ) from None
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in found:
            source = point.dist.name if point.dist else "entry point"
            found[point.name] = Preset(name=point.name, summary=f"from {source}", target=point.value)
    return found


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ConfigError with the nearest one."""
    presets = tokenizer_presets()
    if name not in presets:
        raise ConfigError(f"no tokenizer is called {name!r}; {suggest(name, list(presets))}")
    return presets[name]


def split_settings(text: str) -> tuple[str, dict[str, Any]]:
    """("fast", {"scale": 20}) from "fast:scale=20"; several settings are separated by colons.

    What does not begin with a preset's name and a colon is returned as it is, without settings.
    """
    name, *pairs = text.split(":")
    return (name, parse_assignments(pairs)) if pairs and name in tokenizer_presets() else (text, {})


def load_target(target: str) -> Any:
    """Import "module:attribute". Raises MissingExtraError where torch is missing, or what else the module says it needs."""
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except MissingExtraError:
        raise
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise MissingExtraError("torch", "torch", "a learned tokenizer") from error
        raise ConfigError(f"{target} cannot be imported: {error}; check the preset's target") from error


def find_class(kind: str) -> Any:
    """The tokenizer class whose artifacts are of that kind. Raises ConfigError where no preset leads to one.

    A preset named like the kind is tried first; the others are imported only if it does not answer.
    """
    presets = tokenizer_presets()
    first = [presets[kind].target] if kind in presets else []
    missing = ""
    for target in first + sorted({p.target for p in presets.values()} - set(first)):
        try:
            candidate = load_target(target)
        except (MissingExtraError, ConfigError) as error:  # a broken package hides none but its own
            missing = f" ({error})"
            continue
        if candidate.kind == kind:
            return candidate
    raise ConfigError(
        f"no installed tokenizer reads artifacts of kind {kind!r}; install the package that wrote it{missing}"
    )


def list_tokenizers() -> list[str]:
    """Names that `fit` takes, sorted."""
    return sorted(tokenizer_presets())
