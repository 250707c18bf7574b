"""The graph of a model as it is looked at: stacks of equal layers are one box, and few are open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onnxport.page.modules import INPUT, OUTSIDE, Box
from onnxport.page.wording import clipped, counted, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["BoxView", "view_of"]

_MOST_BOXES, _MOST_OPERATORS = 600, 8
_OPEN_TO = 10
"""Inner boxes are in view where there are no more of them."""
_ALIKE = 0.05
"""Layers of a stack differ by small constants that the first one holds for all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxView:
    """A box of the picture.

    Args:
        title: Its path within the box around it.
        kind: Its class, or ``""``.
        count: How many equal ones there are, one after the other.
        text: How much is in it, of all of them together.
        operators: How many nodes there are of each operator, or ``""`` where boxes in it say so.
        takes: Where its values come from, if not from the box before it.
        part: Its part of all weights.
        children: Boxes in it.
        is_module: Whether it is one, and not a run of operators.
        is_open: Whether the boxes in it are in view.
    """

    title: str
    kind: str = ""
    count: int = 1
    text: str = ""
    operators: str = ""
    takes: str = ""
    part: float = 0.0
    children: tuple[BoxView, ...] = ()
    is_module: bool = True
    is_open: bool = False


def view_of(root: Box, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> BoxView:
    """Return the picture of a graph.

    Args:
        root: The module that was exported, see :func:`~onnxport.page.modules.boxes_of`.
        inputs: What goes in, in words.
        outputs: What comes out.
    """
    view = _Viewer(max(1, root.bytes)).view(root, "", depth=0)
    first = BoxView(title=f"in: {', '.join(inputs)}", is_module=False)
    last = BoxView(title=f"out: {', '.join(outputs)}", is_module=False)
    children = (*((first,) if inputs else ()), *view.children, *((last,) if outputs else ()))
    return replace(view, children=children)


class _Viewer:
    """Draws boxes until there are too many to look at."""

    def __init__(self, whole: int) -> None:
        self._whole = whole
        self._left = _MOST_BOXES

    def view(
        self,
        box: Box,
        around: str,
        *,
        depth: int,
        count: int = 1,
        takes: str = "",
        title: str = "",
    ) -> BoxView:
        self._left -= 1
        inner = box.children
        leaf = not inner or (len(inner) == 1 and not inner[0].is_module)
        children = () if leaf else tuple(self._inner(box, depth))
        return BoxView(
            title=title or (_title(box, around) if box.is_module else _operators(box)),
            kind=clipped(box.kind, 60),
            count=count,
            text=_amount(box, count),
            operators=_operators(box) if leaf and box.is_module else "",
            takes=takes,
            part=min(1.0, box.bytes * count / self._whole) if depth else 0.0,
            children=children,
            is_module=box.is_module,
            is_open=depth == 0 or (depth == 1 and len(children) <= _OPEN_TO),
        )

    def _inner(self, box: Box, depth: int) -> Iterator[BoxView]:
        for first, count in _stacks(box.children):
            if self._left <= 0:
                yield BoxView(title="…", text="and more than can be looked at", is_module=False)
                return
            child = box.children[first]
            title = _title(child, box.name) if child.is_module else ""
            if count > 1:
                title = f"{title} … {_title(box.children[first + count - 1], box.name)}"
            takes = _takes(box, first)
            yield self.view(child, box.name, depth=depth + 1, count=count, takes=takes, title=title)


def _stacks(boxes: Sequence[Box]) -> Iterator[tuple[int, int]]:
    """Yield where equal boxes begin, and how many there are, one after the other."""
    first = 0
    while first < len(boxes):
        count = 1
        while first + count < len(boxes) and _are_alike(boxes[first], boxes[first + count]):
            count += 1
        yield first, count
        first += count


def _are_alike(one: Box, other: Box) -> bool:
    if not (one.children and other.children and one.is_module and other.is_module):
        return False
    near = abs(one.parameters - other.parameters) <= _ALIKE * max(one.parameters, other.parameters)
    return near and one.shape == other.shape


def _title(box: Box, around: str) -> str:
    name = box.name.removeprefix(f"{around}.") if around else box.name
    return clipped(name or box.kind or "model", 80)


def _operators(box: Box) -> str:
    most = box.operators.most_common(_MOST_OPERATORS)
    texts = [name if count == 1 else f"{name} ×{count:,}" for name, count in most]  # noqa: RUF001
    more = len(box.operators) - len(most)
    return clipped(", ".join(texts) + (f" and {more} others" if more > 0 else ""), 400)


def _amount(box: Box, count: int) -> str:
    texts = [counted(box.operators.total() * count, "operator")]
    if box.parameters:
        texts.append(counted(box.parameters * count, "parameter"))
        texts.append(size_text(box.bytes * count))
    return " · ".join(text.replace(" ", "\u00a0") for text in texts)


def _takes(box: Box, at: int) -> str:
    """Say where the values of a box come from, unless that is the box before it alone."""
    child = box.children[at]
    plain = {at - 1} if at else {INPUT, OUTSIDE}
    if not child.sources or child.sources <= plain:
        return ""
    names = []
    for source in sorted(child.sources, reverse=True):
        if source in {INPUT, OUTSIDE}:
            names.append("the input" if source == INPUT else "what goes in here")
        else:
            other = box.children[source]
            names.append(_title(other, box.name) if other.is_module else _operators(other))
    more = len(names) - 4
    return clipped(" and ".join(names[:4]) + (f" and {more} more" if more > 0 else ""), 300)
