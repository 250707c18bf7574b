"""Numbers, times and names as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from onnxport.report import known_as

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxport.report import ExportReport
    from onnxport.signature import TensorSpec

__all__ = [
    "clipped",
    "counted",
    "duration_text",
    "error_text",
    "name_of",
    "number_text",
    "part_text",
    "shape_text",
    "size_text",
    "sizes_text",
    "spec_text",
    "when_text",
]

NOTHING = "–"  # noqa: RUF001 - as tables have it
_LONGEST = 2000


def size_text(count: int) -> str:
    """Return a number of bytes as people write it.

    Example:
        >>> size_text(512), size_text(1 << 20), size_text(5 << 29)
        ('512 B', '1.0 MiB', '2.5 GiB')
    """
    if count < 1 << 10:
        return f"{count} B"
    power = min(3, (count.bit_length() - 1) // 10)
    return f"{count / (1 << 10 * power):.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def number_text(value: float | None) -> str:
    """Return a metric.

    Example:
        >>> number_text(0.95666664), number_text(None), number_text(3.0)
        ('0.9567', '–', '3')
    """  # noqa: RUF002 - as tables have it
    return NOTHING if value is None else f"{value:.4g}"


def error_text(value: float | None) -> str:
    """Return an error or a budget.

    Example:
        >>> error_text(0.0), error_text(4.77e-07)
        ('0', '4.8e-07')
    """
    return NOTHING if value is None else f"{value:.2g}"


def part_text(ratio: float | None) -> str:
    """Return which part of a budget is used.

    Example:
        >>> part_text(0.0696), part_text(1e-6), part_text(0), part_text(float("inf"))
        ('7.0 %', '< 0.1 %', 'exact', 'all of it')
    """
    if ratio is None or math.isnan(ratio):
        return NOTHING
    if ratio == 0:
        return "exact"
    if math.isinf(ratio):
        return "all of it"
    return "< 0.1 %" if ratio < 0.001 else f"{ratio * 100:.3g} %" if ratio >= 1 else _percent(ratio)  # noqa: PLR2004


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.1f} %"


def duration_text(seconds: float | None) -> str:
    """Return a duration.

    Example:
        >>> duration_text(0.00042), duration_text(0.031), duration_text(4.2), duration_text(195)
        ('0.42 ms', '31 ms', '4.2 s', '3 min 15 s')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"  # noqa: PLR2004
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    return f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"


def when_text(seconds: float | None) -> str:
    """Return a time, without asking for anybody's time zone.

    Example:
        >>> when_text(1767225600.0)
        '2026-01-01 00:00 UTC'
    """
    try:
        return f"{datetime.fromtimestamp(seconds or math.nan, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return NOTHING


def counted(count: int, one: str, many: str = "") -> str:
    """Return how many there are of something.

    Example:
        >>> counted(1, "checkpoint"), counted(2000, "run"), counted(3, "child", "children")
        ('1 checkpoint', '2,000 runs', '3 children')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def sizes_text(sizes: dict[str, int]) -> str:
    """Return the sizes of symbolic dimensions.

    Example:
        >>> sizes_text({"batch": 2, "sequence": 17})
        'batch 2, sequence 17'
    """
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def shape_text(shape: Iterable[int | str]) -> str:
    """Return a shape.

    Example:
        >>> shape_text(("batch", 3))
        '[batch, 3]'
    """
    return clipped(f"[{', '.join(map(str, shape))}]", 200)


def spec_text(spec: TensorSpec) -> str:
    """Return an input or output with its type and shape."""
    return f"{clipped(spec.name, 60)} {clipped(spec.dtype, 30)}{shape_text(spec.shape)}"


def name_of(report: ExportReport) -> str:
    """Return what people call a checkpoint: the name of its file, or its step."""
    file = report.checkpoint or report.path
    if file:
        return clipped(known_as(file, suffix=False), 80)
    return NOTHING if report.global_step is None else f"step {report.global_step}"


def clipped(text: str, longest: int = _LONGEST) -> str:
    """Cut what is too long to be read."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
