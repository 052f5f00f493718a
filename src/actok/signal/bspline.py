"""Uniform clamped B-splines over a chunk: control points by least squares, and the curve at any number of steps.

Step t of T lies at u = t / (T - 1) in [0, 1] (u = 0 where T = 1). The knots are equally spaced and repeated degree + 1
times at both ends, so the curve starts at the first control point, ends at the last, and stays in the convex hull of
its control points (de Boor, A Practical Guide to Splines, chapters IX and XI).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy.interpolate import BSpline

from actok.core.errors import ConfigError

# Weight of the squared differences of neighbouring control points. It decides what the steps leave open (fewer steps
# than bases: the curve goes on as evenly as it can) or nearly open (as many steps as bases, where without it control
# points far outside the data cancel each other and quantise badly). Elsewhere it moves the curve by a few 1e-6 at most.
SMOOTHING = 1e-7

__all__ = ["SMOOTHING", "clamped_knots", "control_points", "curve", "design_matrix"]


def clamped_knots(bases: int, degree: int) -> Float[np.ndarray, "{bases}+{degree}+1"]:
    """[bases + degree + 1] knots on [0, 1]. Raises ConfigError where there are fewer than degree + 1 bases."""
    if degree < 0 or bases <= degree:
        raise ConfigError(f"a spline of degree {degree} with {bases} bases does not exist; give at least degree + 1")
    inner = np.linspace(0.0, 1.0, bases - degree + 1)
    return np.concatenate([np.zeros(degree), inner, np.ones(degree)])


@lru_cache(maxsize=256)
def design_matrix(steps: int, bases: int, degree: int) -> Float[np.ndarray, "{steps} {bases}"]:
    """Read-only [T, K]: value of each basis function at each step; rows sum to 1 and nothing is negative."""
    u = np.linspace(0.0, 1.0, steps)  # a single step lies at 0
    matrix = BSpline.design_matrix(u, clamped_knots(bases, degree), degree).toarray()
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=256)
def _solver(steps: int, bases: int, degree: int, free: int) -> Float[np.ndarray, "{free} {steps}+1"]:
    """Read-only [free, T + 1]: maps (residual of the T steps, fixed first control point) to the free control points."""
    design = design_matrix(steps, bases, degree)
    differences = np.sqrt(SMOOTHING) * np.diff(np.eye(bases), axis=0)
    # What the fixed point contributes stands on the right-hand side: in the design (subtracted by the caller through
    # the last column) and in the first difference.
    system = np.concatenate([design, differences])
    right = np.concatenate([np.eye(steps), np.zeros((bases - 1, steps))])
    fixed = -system[:, : bases - free].sum(1, keepdims=True)
    solution = np.linalg.lstsq(system[:, bases - free :], np.concatenate([right, fixed], axis=1), rcond=None)[0]
    solution.flags.writeable = False
    return solution


def control_points(
    chunks: Float[np.ndarray, "B T D"], bases: int, degree: int, start: Float[np.ndarray, "B D"] | None = None
) -> Float[np.ndarray, "B {bases} D"]:
    """Least-squares control points float64 [B, K, D] of chunks [B, T, D].

    With `start` [B, D] the first control point, and so the curve at u = 0, is that value, and the others are fitted
    given it. Fewer steps than bases are met all but exactly by the evenest control points that do.
    """
    y = np.asarray(chunks, np.float64)
    if start is None:
        return np.matmul(_solver(y.shape[1], bases, degree, bases)[:, :-1], y)
    first = np.asarray(start, np.float64)[:, None]
    if bases == 1:
        return first
    solver = _solver(y.shape[1], bases, degree, bases - 1)
    return np.concatenate([first, np.matmul(solver, np.concatenate([y, first], axis=1))], axis=1)


def curve(controls: Float[np.ndarray, "B K D"], steps: int, degree: int) -> Float[np.ndarray, "B {steps} D"]:
    """The curves [B, T, D] of control points [B, K, D] at T steps."""
    return np.matmul(design_matrix(steps, controls.shape[1], degree), controls)
