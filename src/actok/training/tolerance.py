"""The search for the coarsest setting whose error stays within a tolerance that the user names in physical units."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm import tqdm

from actok.core import ActionTokenizer, ActokError, ChunkContext, ConfigError, DataError, FitPart, find_preset
from actok.evaluation.comparison import Comparison
from actok.evaluation.physical import group_values
from actok.signal.normalise import Normaliser

if TYPE_CHECKING:
    from actok.training.fitting import Material

# Written unit -> reported unit and factor.
UNITS: Mapping[str, tuple[str, float]] = {
    "mm": ("mm", 1.0),
    "cm": ("mm", 10.0),
    "m": ("mm", 1000.0),
    "deg": ("deg", 1.0),
    "degree": ("deg", 1.0),
    "degrees": ("deg", 1.0),
    "rad": ("deg", 180 / np.pi),
    "fraction": ("fraction", 1.0),
    "%": ("fraction", 0.01),
    "raw": ("raw", 1.0),
}
# Chunks judged per split: an even subsample of the held-out ones.
JUDGED = 2048

__all__ = ["Tolerance", "ToleranceError", "search"]


class ToleranceError(ActokError):
    """No setting of the sweep meets the tolerance; the message says how near the nearest came."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds on the error of held-out steps.

    Attributes:
        bounds: reported unit ("mm", "deg", "fraction", "raw") -> largest error allowed.
        percentile: of the steps at which each bound must hold.
    """

    bounds: Mapping[str, float]
    percentile: float = 99.0

    @classmethod
    def parse(cls, value: Any) -> Self:
        """From "2 mm, 1 deg" (at p99), "2 mm, p95", a mapping {"mm": 2, "percentile": 95}, or a Tolerance.

        Groups of the action space in a unit that is not named are left free. In delta and velocity spaces the bound is
        on the path accumulated over the chunk, not on each step. Raises ConfigError for a unit it does not know.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            items = [(str(unit), amount) for unit, amount in value.items()]
        elif isinstance(value, str):
            items = []
            for text in filter(None, (part.strip() for part in value.split(","))):
                match = re.fullmatch(r"(?:p(?P<percentile>[\d.]+))|(?P<amount>[\d.eE+-]+)\s*(?P<unit>[a-z%]+)", text)
                if match is None:
                    raise ConfigError(f"tolerance {text!r} cannot be read; write e.g. '2 mm, 1 deg, p99'")
                items.append(
                    ("percentile", match["percentile"]) if match["percentile"] else (match["unit"], match["amount"])
                )
        else:
            raise ConfigError(f"tolerance is a {type(value).__name__}; write e.g. '2 mm, 1 deg'")
        bounds: dict[str, float] = {}
        percentile = 99.0
        for unit, amount in items:
            try:
                number = float(amount)
            except (TypeError, ValueError):
                raise ConfigError(f"tolerance {amount!r} {unit} is no number; write e.g. '2 mm, 1 deg'") from None
            if unit == "percentile":
                percentile = number
            elif unit not in UNITS:
                raise ConfigError(f"tolerance unit {unit!r} is unknown; use one of {', '.join(UNITS)}")
            else:
                bounds[UNITS[unit][0]] = number * UNITS[unit][1]
        if not bounds or not all(0 < v < np.inf for v in bounds.values()) or not 0 < percentile <= 100:
            raise ConfigError(
                f"tolerance {value!r} has no bound above 0 at a percentile in (0, 100]; write e.g. '2 mm, 1 deg'"
            )
        return cls(bounds=bounds, percentile=percentile)

    def __str__(self) -> str:
        return ", ".join(f"{v:g} {u}" for u, v in self.bounds.items()) + f" at p{self.percentile:g}"


def search(
    name: str,
    materials: Sequence[Material],
    tolerance: Tolerance,
    settings: Mapping[str, Any],
    fit_parts: Callable[..., ActionTokenizer],
) -> tuple[ActionTokenizer, dict[str, Any]]:
    """The first setting of the preset's sweep, coarse to fine, that is within the tolerance on validation episodes.

    Returns the tokenizer and a report of JSON values: what was tried, the errors on validation, and on the test
    episodes, which took no part in the choice. Raises ToleranceError where none is within; DataError where there are
    too few episodes to hold any out.
    """
    if any(m.validation is None or m.test is None for m in materials):
        raise DataError("a tolerance needs episodes to choose on and to report on; give at least 3 episodes")
    sweep = _steps(name, settings)
    parts = [m.train for m in materials]
    tried: list[dict[str, Any]] = []
    for variants in tqdm(sweep, f"{name}: searching {tolerance}", unit="setting", delay=2, disable=None):
        within: list[tuple[float, ActionTokenizer, dict[str, Any]]] = []
        for variant in variants:
            setting = {**variant, **settings}
            try:
                tokenizer = fit_parts(name, parts, **setting)
            except ConfigError as error:
                if len(sweep) == len(variants) == 1:
                    raise
                # A setting that these data rule out (an alphabet larger than the vocabulary) is passed over, and said so.
                tried.append({"setting": setting, "refused": str(error)})
                continue
            errors, bits, excess = _judge_all(tokenizer, materials, "validation", tolerance)
            tried.append({"setting": setting, "bits_per_chunk": bits, "validation": errors, "worst_ratio": excess})
            if excess <= 1:
                within.append((bits, tokenizer, tried[-1]))
        if not within:
            continue
        bits, tokenizer, chosen = min(within, key=lambda found: found[0])  # min_max, the first, where they are equal
        test, _, test_excess = _judge_all(tokenizer, materials, "test", tolerance)
        verdict = "within" if test_excess <= 1 else f"NOT within (worst {test_excess:.2f} times the bound)"
        summary = (
            f"tolerance {tolerance}: {_settings_text(chosen['setting'])} is the coarsest of {len(sweep)} settings that meets"
            f" it on validation episodes ({bits:.0f} bits a chunk; {_errors_text(chosen['validation'])}); on test episodes"
            f" {verdict}: {_errors_text(test)}"
        )
        return tokenizer, {
            "bounds": dict(tolerance.bounds),
            "percentile": tolerance.percentile,
            "setting": chosen["setting"],
            "bits_per_chunk": bits,
            "validation": chosen["validation"],
            "test": test,
            "tried": tried,
            "summary": summary,
        }
    judged = [t for t in tried if "refused" not in t]
    if not judged:
        raise ToleranceError(f"no setting of {name} can be fitted on these data: {tried[-1]['refused']}")
    nearest = min(judged, key=lambda t: t["worst_ratio"])
    raise ToleranceError(
        f"no setting of {name} meets {tolerance}; the nearest, {_settings_text(nearest['setting'])}, is at"
        f" {nearest['worst_ratio']:.2f} times the bound ({_errors_text(nearest['validation'])} on validation episodes);"
        " allow more, or try another tokenizer"
    )


def _steps(name: str, settings: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The preset's sweep less what the user has set, each step once, with min_max and with the preset's normaliser.

    A normaliser that ends at the 1 % and 99 % quantiles saturates more than one step in a hundred as soon as there are
    two dimensions, so with it a codec that clamps can miss any bound at the 99th percentile, and meet it on validation
    episodes only to miss it on others; min_max saturates least, and is preferred where both cost the same.
    """
    preset = find_preset(name)
    sweep: list[dict[str, Any]] = []
    for step in preset.sweep or [{}]:
        left = {key: value for key, value in step.items() if key not in settings}
        if left not in sweep:
            sweep.append(left)
    if "normaliser" in settings or preset.settings.get("normaliser", "min_max") == "min_max":
        return [[setting] for setting in sweep]
    return [[{**setting, "normaliser": "min_max"}, setting] for setting in sweep]


def _judge_all(
    tokenizer: ActionTokenizer, materials: Sequence[Material], which: str, tolerance: Tolerance
) -> tuple[dict[str, dict[str, Any]], float, float]:
    """Errors by "dataset/group", mean bits a chunk, and the worst ratio of error to bound (inf if not all decode)."""
    errors: dict[str, dict[str, Any]] = {}
    bits, worst = [], 0.0
    names = [m.origin["name"] for m in materials]
    for number, material in enumerate(materials, 1):
        dataset = names[number - 1] if names.count(names[number - 1]) == 1 else f"{names[number - 1]}#{number}"
        part: FitPart = getattr(material, which)
        rows = np.linspace(0, len(part.actions) - 1, min(JUDGED, len(part.actions))).round().astype(np.int64)
        anchor = material.anchors[which]
        context = ChunkContext(
            embodiment=part.space.embodiment,
            anchor=None if anchor is None else anchor[rows],
            pad_mask=None if part.pad_mask is None else part.pad_mask[rows],
        )
        tokens = tokenizer.encode(part.actions[rows], context)
        decoded = tokenizer.decode(tokens)
        layout = tokenizer.layout_for(tokens.horizon, part.space.embodiment)
        bits.append(
            layout.bits if layout.fixed_length else float(tokens.lengths.mean() * np.log2(tokenizer.vocab_size))
        )
        comparison = Comparison(
            reference=part.actions[rows],
            reconstruction=decoded.actions,
            space=part.space,
            normaliser=Normaliser.make("quantile", material.train.statistics),
            pad_mask=context.pad_mask,
        )
        if not decoded.valid.all():
            worst = np.inf
        units = set()
        for values in group_values(comparison):
            on_path = values.path is not None
            error, unit = (values.path, values.path_unit) if on_path else (values.step, values.unit)
            if error is None or unit is None:
                continue
            units.add(unit)
            if not error.size:
                continue
            amount = float(np.percentile(error, tolerance.percentile))
            bound = tolerance.bounds.get(unit)
            errors[f"{dataset}/{values.group.name}"] = {
                "error": amount,
                "unit": unit,
                "of": "path" if on_path else "step",
                "bound": bound,
            }
            if bound is not None:
                worst = max(worst, amount / bound)
        if not units & tolerance.bounds.keys():
            raise ConfigError(
                f"tolerance {tolerance} bounds nothing: {dataset} is measured in {', '.join(sorted(units))};"
                " name one of these units, or an action space that states the physical units"
            )
        if idle := tolerance.bounds.keys() - units:
            warnings.warn(
                f"tolerance {tolerance}: nothing of {dataset} is measured in {', '.join(sorted(idle))}, but"
                f" in {', '.join(sorted(units))}; name an action space that states the unit, or leave that bound out",
                stacklevel=1,
            )
    return errors, float(np.mean(bits)), worst


def _errors_text(errors: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{name} {e['error']:.3g} {e['unit']}{' along the path' if e['of'] == 'path' else ''}"
        for name, e in errors.items()
    )


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items()) or "the preset's settings"
