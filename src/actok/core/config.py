"""From settings (preset, keyword arguments, `--set key=value`) to a validated config dataclass."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from actok.core.errors import ConfigError

__all__ = ["build_config", "merge_settings", "parse_assignments"]


def parse_assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """{"bins": 64, "normaliser": "min_max"} from ["bins=64", "normaliser=min_max"]; values are TOML, else text.

    A dotted key reaches into a table: "quantizer.codes=512" is {"quantizer": {"codes": 512}}.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"setting {pair!r} has no '='; write key=value")
        *tables, name = key.strip().split(".")
        try:
            found: Any = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found = value.strip()
        for inner in [name, *reversed(tables)]:
            found = {inner: found}
        settings = merge_settings(settings, found)
    return settings


def merge_settings(settings: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with those of `override`. Tables are merged key by key, unless their `kind` differs: then replaced."""
    merged = dict(settings)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            other_kind = "kind" in value and "kind" in old and value["kind"] != old["kind"]
            merged[key] = dict(value) if other_kind else merge_settings(old, value)
    return merged


def build_config(config_class: type, settings: Mapping[str, Any], owner: str) -> Any:
    """An instance of a config dataclass. Raises ConfigError for an unknown key, with the nearest known one."""
    known = [f.name for f in fields(config_class)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(known) or 'no settings'}"
            raise ConfigError(f"{owner} has no setting {key!r}; {hint}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return config_class(**values)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise ConfigError(f"{owner} cannot take {given} ({error}); check the types") from None
