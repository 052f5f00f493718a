"""Which action space a dataset is in: named by the caller, stored with the data, or inferred; always said in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from actok.core import ActionSpace, DataError, SpaceMismatchError

__all__ = ["common_rate", "resolve_space"]


def resolve_space(
    given: str | Path | ActionSpace | None,
    *,
    dim: int,
    dataset: str,
    names: Sequence[str] | None = None,
    robot: str | None = None,
    rate_hz: float | None = None,
    stored: ActionSpace | None = None,
) -> tuple[ActionSpace, str]:
    """The action space of a dataset and where it came from, in words.

    What the caller gives wins, then what is stored with the dataset, then what its names, robot and title tell. A rate
    that the data states wins over the space's own, and the words say so. Raises SpaceMismatchError where the space has
    another number of dimensions than the data.
    """
    from actok.data.spaces import find_space, infer_space

    if isinstance(given, ActionSpace):
        space, origin = given, "given by the caller"
    elif given is not None:
        space, origin = find_space(given), f"{given}, named by the caller"
    elif stored is not None:
        space, origin = stored, "stored with the dataset"
    else:
        space, origin = infer_space(dim, names=names, robot=robot, rate_hz=rate_hz, dataset=dataset)
    if space.dim != dim:
        raise SpaceMismatchError(
            f"dataset {dataset!r} has actions of {dim} dimensions, action space {space.embodiment!r} ({origin}) has"
            f" {space.dim}; name a space of {dim} dimensions"
        )
    if rate_hz is not None and space.rate_hz != rate_hz:
        if space.rate_hz is not None:
            origin += f"; rate {rate_hz:g} Hz from the data instead of {space.rate_hz:g} Hz"
        space = replace(space, rate_hz=rate_hz)
    return space, origin


def common_rate(rates: Iterable[tuple[str, float | None]], dataset: str) -> float | None:
    """The one control rate of several files, given as (file, Hz). Raises DataError naming two files that differ."""
    first: tuple[str, float] | None = None
    for file, rate in rates:
        if rate is None:
            continue
        if not rate > 0:
            raise DataError(f"{file} states a control rate of {rate} Hz; correct it to a rate above 0")
        if first is not None and first[1] != rate:
            raise DataError(
                f"dataset {dataset!r} mixes control rates: {first[0]} has {first[1]:g} Hz, {file} has {rate:g} Hz;"
                " open them as separate datasets"
            )
        first = first or (file, rate)
    return None if first is None else first[1]
