"""Find the submodules whose Python decides by data, and compile just these."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from onnxport.exporter.scripting import script

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["branches", "scripted_parts"]

logger = logging.getLogger(__name__)


def branches(module: nn.Module) -> bool:
    """Tell whether a module's own ``forward`` has a branch or loop that may depend on data.

    Questions that have one answer for one model (``if self.training``, ``is None``,
    ``isinstance``, loops over ``self.layers``) do not count.
    """
    if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith(
        "torch.nn."
    ):
        return False
    try:
        source = textwrap.dedent(inspect.getsource(type(module).forward))
        tree = ast.parse(source)
    except (OSError, TypeError, AttributeError, SyntaxError):
        return False
    return any(_decides(node) for node in ast.walk(tree))


def _decides(node: ast.AST) -> bool:
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        return not _is_constant(node.test)
    if isinstance(node, ast.For):
        return not _is_constant(node.iter)
    return False


_ANSWERED_BY_TYPE = frozenset({"isinstance", "hasattr", "callable", "torch.jit.is_scripting"})
_PASSED_THROUGH = frozenset({"range", "zip", "enumerate", "reversed", "len", "getattr"})


def _is_constant(node: ast.expr) -> bool:
    """Tell whether an expression has one value for one model: attributes of self, None, types."""
    if isinstance(node, ast.Compare) and all(
        isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops
    ):
        return True
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        return function in _ANSWERED_BY_TYPE or (
            function in _PASSED_THROUGH and all(_is_constant(part) for part in node.args)
        )
    parts = _parts(node)
    if parts is not None:
        return all(_is_constant(part) for part in parts)
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Subscript) and not _is_constant(node.slice):
            return False
        node = node.value
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id == "self")


def _parts(node: ast.expr) -> list[ast.expr] | None:
    """Return what an expression is combined from, or ``None`` for a simple one."""
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    return None


@contextmanager
def scripted_parts(module: nn.Module) -> Iterator[int]:
    """Replace the submodules that branch by compiled ones, and put them back.

    The outermost one that branches and compiles is taken; where one does not compile, those inside
    of it are tried. Gives how many were replaced.
    """
    with ExitStack() as undo, torch.no_grad():
        yield sum(_script_below(module, undo))


def _script_below(module: nn.Module, undo: ExitStack) -> Iterator[int]:
    for name, child in list(module._modules.items()):  # noqa: SLF001 - each name of a shared child
        if child is None or isinstance(child, torch.jit.ScriptModule):
            continue
        compiled = _compiled(child) if branches(child) else None
        if compiled is None:
            yield from _script_below(child, undo)
            continue
        undo.callback(module._modules.__setitem__, name, child)  # noqa: SLF001
        module._modules[name] = compiled  # noqa: SLF001 - a script module passes setattr's checks too
        yield 1


def _compiled(module: nn.Module) -> nn.Module | None:
    try:
        return script(module)
    except Exception:
        logger.debug("%s does not compile", type(module).__name__, exc_info=True)
        return None
