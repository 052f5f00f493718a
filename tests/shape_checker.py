"""What checks the shapes in the library's signatures under test; see conftest.py."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable[..., Any])


def states_shape(annotation: Any) -> bool:
    """True where a jaxtyping array stands anywhere in the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(states_shape, get_args(annotation)))


def checked(function: F) -> F:
    """beartype for the annotations that state a shape. All others are mypy's: tests give wrong values on purpose."""
    annotations = function.__annotations__
    function.__annotations__ = {name: a for name, a in annotations.items() if states_shape(a)}
    if function.__annotations__:
        return beartype(function)
    if "return" in annotations:
        _leave_alone(function.__qualname__)
    return function


def _leave_alone(name: str) -> None:
    """Mark the function that jaxtyping is wrapping, so that calls pass straight through: half of all states no shape.

    jaxtyping hands over a stand-in for the parameters and one for the result too; the function itself is a local of the
    caller. Where another version has it elsewhere, calls are only slower.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "jaxtyped":
        frame = frame.f_back
    wrapped, signature = (frame.f_locals.get(k) for k in ("fn", "full_signature")) if frame else (None, None)
    if getattr(wrapped, "__qualname__", None) != name or signature is None:
        return
    if not any(
        map(states_shape, (signature.return_annotation, *(p.annotation for p in signature.parameters.values())))
    ):
        wrapped.__no_type_check__ = True
