"""The border between a caller's arrays (NumPy or torch) and the library's NumPy maths. Never imports torch itself."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from actok.core.errors import DataError, TokenError

__all__ = ["as_float_batch", "as_ids", "is_torch", "like", "to_numpy"]


def is_torch(x: Any) -> bool:
    """True where `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy view (or copy, from another device or bfloat16) of an array-like."""
    if is_torch(x):
        x = x.detach().cpu()
        return x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy()
    return np.asarray(x)


def like(array: np.ndarray, reference: Any) -> Any:
    """`array` as a torch tensor on the reference's device where the reference is one, else unchanged.

    A floating-point result takes a floating-point reference's dtype, so bf16 in gives bf16 out.
    """
    if not is_torch(reference):
        return array
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.is_floating_point() and reference.is_floating_point():
        tensor = tensor.to(reference.dtype)
    return tensor.to(reference.device)


def as_float_batch(x: Any, name: str = "actions") -> np.ndarray:
    """A finite float32 array [B, T, D] from [B, T, D] or [T, D] (a batch of one).

    Raises DataError naming dtype, shape, or the first non-finite value and where it stands.
    """
    array = to_numpy(x)
    if array.dtype.kind != "f":
        raise DataError(f"{name} have dtype {array.dtype}; give floating point values, e.g. {name}.astype(np.float32)")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise DataError(f"{name} have shape {array.shape}; give [batch, time, dimensions] or [time, dimensions]")
    if 0 in array.shape:
        raise DataError(f"{name} have shape {array.shape}, so nothing is left to encode; give at least one step")
    array = np.ascontiguousarray(array, dtype=np.float32)
    # One pass that stays in cache: a sum is non-finite if any member is (or overflows, hence the second look).
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(array.sum(dtype=np.float64))
    if suspicious:
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            b, t, d = (int(i) for i in bad[0])
            raise DataError(
                f"{name} hold {array[b, t, d]} at chunk {b}, step {t}, dimension {d} ({len(bad)} non-finite values"
                " in all); drop or repair these steps before encoding"
            )
    return array


def as_ids(ids: Any, name: str = "ids") -> tuple[np.ndarray, np.ndarray]:
    """Flat int64 ids and offsets [B + 1] from a list of sequences, [B, N], or one sequence [N].

    Raises TokenError for values that are not integers or not one- or two-dimensional.
    """
    if is_torch(ids) or isinstance(ids, np.ndarray):
        array = to_numpy(ids)
        if array.ndim == 1 and array.dtype != object:
            array = array[None]
        if array.ndim == 2:
            if array.dtype.kind not in "iu":
                raise TokenError(f"{name} have dtype {array.dtype}; token ids are integers")
            offsets = np.arange(array.shape[0] + 1, dtype=np.int64) * array.shape[1]
            return np.ascontiguousarray(array, dtype=np.int64).reshape(-1), offsets
        if array.dtype != object:
            raise TokenError(f"{name} have shape {array.shape}; give [batch, tokens] or a list of sequences")
        ids = list(array)
    if not isinstance(ids, (list, tuple)):
        raise TokenError(f"{name} are of type {type(ids).__name__}; give a list of integer sequences or an array")
    if ids and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        ids = [ids]  # one flat sequence
    parts = []
    for row, sequence in enumerate(ids):
        part = to_numpy(sequence)
        if part.size == 0:
            part = np.zeros(0, np.int64)
        if part.ndim != 1 or part.dtype.kind not in "iu":
            raise TokenError(
                f"{name}[{row}] has dtype {part.dtype} and shape {part.shape}; give a one-dimensional integer sequence"
            )
        parts.append(part.astype(np.int64))
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    return (np.concatenate(parts) if parts else np.zeros(0, np.int64)), offsets
