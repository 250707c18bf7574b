"""Compile a module's source by TorchScript, with more of Python than its compiler takes.

TorchScript refuses numbers that are globals of the user's file, and its exporter refuses membership
in a tuple of constants, which torch's own recurrent cells ask for. Both are written out in the
syntax tree on its way to the compiler; the source itself is never touched.
"""

from __future__ import annotations

import ast
import copy
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from onnxport._torch_compat import forget_half_compiled_types, rewritten_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["rewrite", "script", "without_raising_properties"]

_NUMBERS = (bool, int, float, str)


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """Compile a module and everything that its ``forward`` calls.

    Args:
        module: A copy that belongs to the export.
    """
    try:
        with rewritten_sources(rewrite), without_raising_properties(module):
            compiled: torch.jit.ScriptModule = torch.jit.script(module)
            return compiled
    except Exception:
        # The next attempt would be told that the class is defined already, and not what is wrong.
        forget_half_compiled_types()
        raise


def rewrite(function: Callable[..., Any], tree: ast.Module) -> ast.Module:
    """Write out what the compiler cannot look up.

    Args:
        function: The function.
        tree: Its syntax tree; a changed one is returned, with all positions kept.
    """
    known = _numbers_outside(function) if _has_code(function) else {}
    rewritten: ast.Module = _Rewriter(known).visit(tree)
    return ast.fix_missing_locations(rewritten)


def _has_code(function: Any) -> bool:
    return hasattr(inspect.unwrap(function), "__code__")


def _numbers_outside(function: Any) -> Mapping[str, Any]:
    """Return the numbers and strings that a function reads from its module or its closure."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False)
    closed = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    names = {name: plain.__globals__.get(name) for name in plain.__code__.co_names} | closed
    # A name that is assigned in the function is its own.
    own = set(plain.__code__.co_varnames)
    return {
        name: value for name, value in names.items() if name not in own and type(value) in _NUMBERS
    }


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a cell that is filled later
        return False


class _Rewriter(ast.NodeTransformer):
    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known = known

    @override
    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self._known:
            return ast.copy_location(_constant(self._known[node.id]), node)
        return node

    @override
    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        options = node.comparators[0]
        if (
            len(node.ops) > 1
            or not isinstance(node.ops[0], (ast.In, ast.NotIn))
            or not isinstance(options, (ast.Tuple, ast.List, ast.Set))
            or not options.elts
            or not all(isinstance(option, ast.Constant) for option in options.elts)
        ):
            return node
        inside = isinstance(node.ops[0], ast.In)
        equal: ast.cmpop = ast.Eq() if inside else ast.NotEq()
        tests: list[ast.expr] = [
            ast.copy_location(ast.Compare(copy.deepcopy(node.left), [equal], [option]), node)
            for option in options.elts
        ]
        if len(tests) == 1:
            return tests[0]
        return ast.copy_location(ast.BoolOp(ast.Or() if inside else ast.And(), tests), node)

    @override
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # Annotations and decorators are read by another part of the compiler.
        node.body = [self.visit(statement) for statement in node.body]
        return node


def _constant(value: Any) -> ast.expr:
    """Write a value; a negative number is an operator and a number in Python's grammar."""
    if type(value) in {int, float} and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


@contextmanager
def without_raising_properties(module: nn.Module) -> Iterator[nn.Module]:
    """Hide properties that cannot be read, on a copy that belongs to the export.

    The script compiler reads every attribute, ``forward`` uses it or not, and a property that
    raises (one that needs a trainer, say) would end it.
    """
    kinds = [(submodule, type(submodule)) for submodule in module.modules()]
    for submodule, kind in kinds:
        hidden = {name: None for name in _properties(kind) if _raises(submodule, name)}
        if hidden:
            submodule.__class__ = type(kind.__name__, (kind,), hidden | {"__doc__": kind.__doc__})
    try:
        yield module
    finally:
        for submodule, kind in kinds:  # a class that was made here cannot be pickled
            if type(submodule) is not kind:
                submodule.__class__ = kind


def _properties(kind: type) -> list[str]:
    return [name for name, value in inspect.getmembers_static(kind) if isinstance(value, property)]


def _raises(module: nn.Module, name: str) -> bool:
    try:
        getattr(module, name)
    except AttributeError:
        return False  # the compiler takes it for missing
    except Exception:  # noqa: BLE001 - a property is user code
        return True
    return False
