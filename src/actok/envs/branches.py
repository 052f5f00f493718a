"""Which branch of a scripted policy fired: its sub-task, read off the policy's own source.

Scripted policies decide where to go by a chain of conditions; each outcome is one sub-task ("above the object",
"grasp", "carry"). The function here compiles a twin of the deciding function that returns the index of the outcome
instead of the position. Nothing is traced at run time, so profilers, debuggers and coverage see no difference.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Branches", "branches_of"]

_VARIABLE = "branch_that_fired"


@dataclass(frozen=True, kw_only=True)
class Branches:
    """`count` outcomes of a function, and `which`, its twin: same arguments, returns the index of the outcome."""

    count: int
    which: Callable[..., int]


def branches_of(function: Callable[..., Any], *, by: str) -> Branches:
    """The outcomes of a Python function, numbered in the order of its source.

    `by` is "return", where every return statement is an outcome, or "condition", where every leaf of its if-chains is
    one (an if without else has an empty else). The twin runs the function's statements: give it copies of arrays that
    the function changes in place. Raises OSError where the source is not installed.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    count = _number_returns(definition) if by == "return" else _number_leaves(definition)
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(ast.fix_missing_locations(tree), f"<branches of {function.__qualname__}>", "exec"), namespace)
    return Branches(count=count, which=namespace[definition.name])


def _number_returns(definition: ast.FunctionDef) -> int:
    transformer = _Returns(lambda index: ast.Constant(index))
    definition.body = [transformer.visit(statement) for statement in definition.body]
    return transformer.count


def _number_leaves(definition: ast.FunctionDef) -> int:
    count = 0

    def assign() -> ast.stmt:
        nonlocal count
        count += 1
        return ast.Assign(targets=[ast.Name(_VARIABLE, ast.Store())], value=ast.Constant(count - 1))

    def mark(body: list[ast.stmt]) -> list[ast.stmt]:
        conditions = [statement for statement in body if isinstance(statement, ast.If)]
        for condition in conditions:
            condition.body = mark(condition.body)
            condition.orelse = mark(condition.orelse)
        return body if conditions else [assign(), *body]

    definition.body = mark(definition.body)
    transformer = _Returns(lambda index: ast.Name(_VARIABLE, ast.Load()))
    definition.body = [transformer.visit(statement) for statement in definition.body]
    return count


class _Returns(ast.NodeTransformer):
    """Replaces the value of each return statement of a function, not of functions inside it."""

    def __init__(self, value: Callable[[int], ast.expr]) -> None:
        self.count = 0
        self._value = value

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        self.count += 1
        return ast.Return(self._value(self.count - 1))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        return node
