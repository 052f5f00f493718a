"""Tables for the compiled byte-pair encoder; None where numba is missing."""

from __future__ import annotations

from typing import Any


def build_matcher(bpe: Any) -> Any:
    """The compiled encoder of a BPE, or None."""
    return None
