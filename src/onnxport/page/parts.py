"""What a page is made of, as values: sections, figures, tables, notes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnxport.page.boxes import BoxView

__all__ = [
    "Cell",
    "Fact",
    "Figure",
    "Note",
    "Section",
    "Table",
    "axis",
    "label",
    "line",
    "log_axis",
]

Mark = Literal["", "ok", "bad", "best", "some", "faint"]
SERIES = 6
"""So many colours there are; further series begin again, with another dash."""
_DASHES = ("solid", "dash", "dot", "dashdot")
_LONGEST_LABEL = 60
_FEW_DECADES, _MOST_TICKS = 2, 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a table.

    Args:
        text: What is read.
        mark: How it is meant.
        bar: Length of the bar behind it, as a part of the longest, or ``None``.
    """

    text: str
    mark: Mark = ""
    bar: float | None = None


Row = tuple["Cell | str", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; its first column names the rows.

    Args:
        caption: What it shows.
        columns: Their heads.
        rows: A value for each column.
        words: Positions of the columns that hold words and not numbers, besides the first.
        at_once: So many rows are in view, the others are opened.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    words: frozenset[int] = frozenset()
    at_once: int = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart, and the same in words and numbers.

    Args:
        name: Its id in the page.
        title: What it shows.
        summary: What is to be seen in it, in a sentence.
        data: Plotly's traces.
        layout: Plotly's layout; what all charts share is added by the page.
        height: In pixels.
        table: Its numbers.
    """

    name: str
    title: str
    summary: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300
    table: Table | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One number of the page's head, or one line of where a model comes from."""

    name: str
    text: str
    more: str = ""
    mark: Mark = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A failure or a warning, once for all checkpoints that share it.

    Args:
        title: In a few words.
        text: In the words of the report.
        advice: The way out, or ``""``.
        where: At which checkpoints.
        attempts: What was tried, or ``None``.
        mark: ``"bad"`` for a failure.
    """

    title: str
    text: str
    advice: str = ""
    where: str = ""
    attempts: Table | None = None
    mark: Mark = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page.

    Args:
        name: Its id in the page.
        title: Its heading.
        lead: What is to be seen, in a sentence or two.
        figures: Its charts.
        tables: Its tables.
        facts: Names and texts.
        notes: Failures and warnings.
        boxes: The graph, or ``None``.
        missing: Why there is nothing to see, and how to get it, or ``""``.
    """

    name: str
    title: str
    lead: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[Fact, ...] = ()
    notes: tuple[Note, ...] = ()
    boxes: BoxView | None = field(default=None)
    missing: str = ""


def label(text: str) -> str:
    """Return a name for Plotly, which would read markup and entities in it."""
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def line(number: int) -> dict[str, Any]:
    """Return how the n-th series of a chart is drawn; the page knows the colours."""
    dash = _DASHES[number // SERIES % len(_DASHES)]
    return {"color": f"--series-{number % SERIES + 1}", "width": 2, "dash": dash}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title."""
    return {"title": {"text": label(title)}, **more}


def log_axis(
    title: str, drawn: Iterable[float | None], text: Callable[[float], str], **more: Any
) -> dict[str, Any]:
    """Return a logarithmic axis with as many ticks as can be read.

    Args:
        title: Its title.
        drawn: What is drawn along it.
        text: A tick in words.
        more: What else Plotly is told of it.
    """
    logs = [math.log10(value) for value in drawn if value is not None and 0 < value < math.inf]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    steps = (1, 2, 5) if high - low < _FEW_DECADES else (1,)
    stride = max(1, math.ceil((high - low) / _MOST_TICKS))
    decades = range(math.floor(low) - 1, math.ceil(high) + 2, stride)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    margin = 0.12 + 0.03 * (high - low)
    span = [low - margin, high + margin]
    ticktext = [text(tick) for tick in ticks]
    return axis(title, type="log", tickvals=ticks, ticktext=ticktext, range=span, **more)
