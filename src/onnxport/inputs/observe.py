"""Watch which calls a module really gets in training and validation."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from onnxport._torch_compat import compiled_graphs, is_compiled_forward, plain_name
from onnxport.inputs.record import Recorder, address
from onnxport.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

__all__ = ["Observer", "is_compiled", "quiet_hook", "unobserved"]

logger = logging.getLogger(__name__)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` left its marks on this very module."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    attributes = vars(module)
    return (
        attributes.get("_compiled_call_impl") is not None
        or "_orig_mod" in attributes["_modules"]
        or any(isinstance(v, FunctionType) and is_compiled_forward(v) for v in attributes.values())
    )


_pauses: list[None] = []


@contextmanager
def unobserved() -> Iterator[None]:
    """Runs in the block are our own, and no observer of any session takes them for training's."""
    _pauses.append(None)
    try:
        yield
    finally:
        _pauses.pop()


def _is_paused() -> bool:
    return bool(_pauses)


class _Hook:
    """A hook that is nothing to whoever saves the module: hyperparameters may hold it.

    A local function could not be pickled, and the save would end training.

    Args:
        function: What the hook does.
    """

    _onnxport_observes = True
    """A copy of the module is made without it, see ``exporter.hooks``."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        self._function(*given)

    def __copy__(self) -> _Hook:
        return self

    def __deepcopy__(self, _: Any) -> _Hook:
        return self

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything and does nothing, and whoever reads it needs nothing but Python.
        return getattr, (nullcontext(), "__exit__")


def quiet_hook(function: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that is not called in runs of our own, and is nothing to who saves the module.

    Args:
        function: What it does.
    """
    return _Hook(lambda *given: None if _is_paused() else function(*given))


class _Seen(BaseException):
    """Ends a rehearsal; no ``except Exception`` of the user's may catch it."""


class Observer:
    """Records the outermost calls of a module and of its children until enough was seen.

    A hook inside of what ``torch.compile`` compiles would be compiled too, may break the graph, and
    is never run. So where something is compiled only a root that is not gets hooks, and
    :meth:`rehearse` watches a copy.

    Args:
        root: The module in training; ``""`` is its name.
        targets: Names of the submodules to watch; default: the root and its children, so that a
            root whose ``forward`` is never called is noticed.
        is_redirected: Tells whether a call of the root is not a call of its ``forward`` (a training
            framework may route ``training_step`` through it).
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        targets: tuple[str, ...] | None = None,
        is_redirected: Callable[[nn.Module], bool] = lambda _: False,
    ) -> None:
        self._root = root
        self._is_redirected = is_redirected
        self._watched = dict(_outer_modules(root)) if targets is None else _named(root, targets)
        self._recorders: dict[str, Recorder] = {}
        self._handles: list[RemovableHandle] = []
        self._watching = False
        self._compiled = False
        self._traced = False
        self._graphs = 0
        self._inside: list[bool] = []
        self._batch: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether calls are being watched for."""
        return self._watching

    @property
    def needs_rehearsal(self) -> bool:
        """Whether calls may go unseen because something is compiled."""
        return self._watching and self._compiled and not self._is_sure()

    @property
    def recorders(self) -> dict[str, Recorder]:
        """The modules that were called from outside, in order of their first call."""
        return self._recorders

    def start(self) -> None:
        """Install the hooks."""
        self._watching = True
        self._graphs = compiled_graphs()
        self._compiled = self._traced or any(map(is_compiled, self._root.modules()))
        for name, module in self._watched.items():
            if self._takes_hooks(module):
                self._handles += self._watch(name, module)

    def _takes_hooks(self, module: nn.Module) -> bool:
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if not self._compiled:
            return True
        return module is self._root and not is_compiled(module) and not self._traced

    def stop(self) -> None:
        """Remove the hooks."""
        self._watching = False
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inside.clear()

    def begin_batch(self, batch: Any) -> None:
        """Note which tensors come from the data loader; also the start of a step."""
        self._inside.clear()
        if self._is_sure() and self._recorders[self.choose() or ""].full:
            self.stop()
            return
        if self._watching and self._handles:
            self._look_for_compilers()
        self._batch = _addresses(batch)

    def _look_for_compilers(self) -> None:
        """Take hooks off what is compiled since the start, if need be after it was traced.

        Removing them makes a function that was traced with them compile once more. That must not
        happen again and again: torch gives up after a few times.
        """
        self._traced = self._traced or (compiled_graphs() > self._graphs and not self._is_sure())
        late = not self._compiled and any(map(is_compiled, self._root.modules()))
        if self._traced or late:
            self._unhook()
            self.start()

    def rehearse(
        self, module: nn.Module, batch: Any, step: Callable[[], Any], *, hurry: bool = False
    ) -> None:
        """Watch a copy of the root in place of the root.

        Args:
            module: The copy; hooks are put on it and removed.
            batch: What the step gets.
            step: Runs a step of the copy. It is left as soon as the root's ``forward``, or each
                target, was called; what it raises is of no interest.
            hurry: Leave the step also when a child was called with data of the batch.
        """
        live, self._root, self._batch = self._root, module, _addresses(batch)
        handles: list[RemovableHandle] = []
        try:
            for name in self._watched:
                copied = module.get_submodule(plain_name(name))
                if not isinstance(copied, torch.jit.ScriptModule):
                    handles += self._watch(name, copied, lambda: self._is_enough(hurry=hurry))
            step()
        except _Seen:
            pass
        except Exception:
            logger.debug("A rehearsal was left.", exc_info=True)
        finally:
            self._root = live
            self._inside.clear()
            for handle in handles:
                handle.remove()

    def _is_sure(self) -> bool:
        """Tell whether no later call could change what :meth:`choose` returns."""
        known = [name for name, recorder in self._recorders.items() if recorder.examples]
        return "" in known or ("" not in self._watched and set(known) >= set(self._watched))

    def _is_enough(self, *, hurry: bool) -> bool:
        fed = any(recorder.touched_batch for recorder in self._recorders.values())
        return self._is_sure() or (hurry and fed)

    def choose(self) -> str | None:
        """Return the name of what should be exported, or ``None`` if nothing was called.

        The root, if its ``forward`` was called; else the first child that was called with data of
        the batch; else the first child that was called.
        """
        called = {name: rec for name, rec in self._recorders.items() if rec.examples}
        fed = [name for name, recorder in called.items() if recorder.touched_batch]
        return "" if "" in called else next(iter([*fed, *called]), None)

    def _watch(
        self, name: str, module: nn.Module, is_enough: Callable[[], bool] = lambda: False
    ) -> Iterator[RemovableHandle]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or _is_paused():
                return
            counts = not (module is self._root and self._is_redirected(module))
            if counts and not any(self._inside):
                self._record(name, args, kwargs)
                if is_enough():
                    raise _Seen
            self._inside.append(counts)

        def after(*_: Any) -> None:
            if not torch.compiler.is_compiling() and not _is_paused() and self._inside:
                self._inside.pop()

        # First of all hooks: what the user's own hooks change is part of the module.
        yield module.register_forward_pre_hook(_Hook(before), with_kwargs=True, prepend=True)
        yield module.register_forward_hook(_Hook(after), always_call=True)

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self._recorders.setdefault(name, Recorder())
        try:
            recorder.record(args, kwargs, self._batch)
        except Exception:
            logger.warning("A call of %r could not be recorded.", name or "forward", exc_info=True)


def _outer_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "", root
    yield from _callable_children(root, "")


def _callable_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children; containers that are never called themselves give theirs."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _addresses(batch: Any) -> set[int]:
    try:
        return {address(tensor) for _, tensor in flatten(batch)[1]}
    except Exception:  # a batch may be any object of the user's
        logger.debug("The tensors of a batch could not be listed.", exc_info=True)
        return set()


def _named(root: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: root.get_submodule(name) for name in targets}
