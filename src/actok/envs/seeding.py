"""Simulators that draw from NumPy's global generator, made reproducible without a trace left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["global_generator"]


@contextmanager
def global_generator(seed: int) -> Iterator[None]:
    """NumPy's global generator at a seed (any whole number from 0) for the moment; afterwards it is where it was."""
    before = np.random.get_state()  # noqa: NPY002
    bits = np.random.MT19937(np.random.SeedSequence(seed))
    np.random.set_state(np.random.RandomState(bits).get_state())  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
