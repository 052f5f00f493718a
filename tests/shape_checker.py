"""What checks the shapes in the library's signatures under test; see conftest.py."""

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
    return beartype(function) if function.__annotations__ else function
