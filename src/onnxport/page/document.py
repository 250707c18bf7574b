"""From a run to one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from onnxport._files import replace_content
from onnxport._optional import optional_import
from onnxport.errors import OnnxportError, PublishError
from onnxport.page import origin, troubles
from onnxport.page.accuracy import by_output
from onnxport.page.boxes import view_of
from onnxport.page.head import head
from onnxport.page.latency import latency
from onnxport.page.parity import parity
from onnxport.page.parts import Cell, Section
from onnxport.page.providers import providers
from onnxport.page.sizes import by_size
from onnxport.page.stages import stages
from onnxport.page.timeline import timeline
from onnxport.page.variants import variants
from onnxport.page.wording import counted, name_of, spec_text, when_text

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Environment

    from onnxport.page.run import RunHistory

__all__ = ["PAGE", "render", "sections_of", "write_page"]

PAGE = "onnxport.html"
"""Name of the file."""
_OURS = b'<meta name="generator" content="onnxport">'
_HEAD_BYTES = 4096


def render(run: RunHistory) -> str:
    """Return the page of a run.

    Args:
        run: The run. Nothing that its reports say is trusted.

    Raises:
        MissingDependencyError: If plotly or jinja2 is not installed.
    """
    with optional_import(extra="page", needed_for="The page of a run"):
        from jinja2 import Environment, PackageLoader
        from plotly.offline import get_plotlyjs

    sections = sections_of(run)
    shown = [section for section in sections if not section.missing]
    charts = [figure for section in shown for figure in section.figures]
    environment = Environment(
        loader=PackageLoader("onnxport.page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda value: value if isinstance(value, Cell) else Cell(value)
    plotly = get_plotlyjs() if charts else ""
    script = _source(environment, "page.js")
    return environment.get_template("page.html").render(
        run=run,
        title=run.name or "a run",
        verdict=_verdict(run),
        period=_period(run),
        facts=head(run),
        sections=shown,
        missing=[section for section in sections if section.missing],
        style=_source(environment, "page.css"),
        script=script,
        policy=_policy(script, plotly),
        charts=_json({each.name: {"data": each.data, "layout": each.layout} for each in charts}),
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
    )


def write_page(run: RunHistory, path: Path) -> None:
    """Write the page of a run, so that a reader sees the old or the new one, never half of it.

    Args:
        run: The run.
        path: The file.

    Raises:
        MissingDependencyError: If plotly or jinja2 is not installed.
        PublishError: If another file has its name, or the disk does not take it.
    """
    content = render(run).encode(errors="replace")  # names of files may be no text
    try:
        if path.exists() and not _is_ours(path):
            raise PublishError(
                f"{path} was not written by onnxport and is left alone. Give another name with "
                "--output."
            )
        replace_content(path, content)
    except OSError as error:
        raise PublishError(f"{path} was not written: {error.strerror or error}.") from error


def sections_of(run: RunHistory) -> tuple[Section, ...]:
    """Return all that a page says, in order."""
    metadata, graph = _of_model(run)
    return (
        timeline(run),
        troubles.failures(run),
        by_output(run),
        by_size(run),
        parity(run),
        latency(run),
        variants(run),
        providers(run),
        graph,
        origin.interface(run),
        origin.origin(run, metadata),
        troubles.attempts(run),
        troubles.warnings(run),
        stages(run),
    )


def _of_model(run: RunHistory) -> tuple[dict[str, str], Section]:
    """Read what the shown model's file says of itself, and its graph."""
    name, title = "graph", "The graph, by module"
    if run.model is None:
        missing = "no model of this run lies in its folder: they were removed, or lie elsewhere."
        return {}, Section(name=name, title=title, missing=missing)
    # Here, because onnx takes half a second to import, and a run may have no model.
    from onnxport.exporter.model_facts import read_model
    from onnxport.exporter.ownership import read_metadata
    from onnxport.page.modules import boxes_of

    try:
        root = boxes_of(read_model(run.model))
    except (OnnxportError, OSError) as error:
        return {}, Section(name=name, title=title, missing=f"it cannot be read: {error}")
    report = next((each for each in run.proven if _is_of(run, each)), None)
    specs = (report.inputs, report.outputs) if report else ((), ())
    view = view_of(root, *([spec_text(each) for each in some] for some in specs))
    lead = (
        f"Of {name_of(report) if report else run.model.stem}: "
        f"{counted(root.operators.total(), 'operator')} and "
        f"{counted(root.parameters, 'parameter')}, sorted by the modules that they were made of, "
        "in the order in which they run. Open a box to look into it."
    )
    return read_metadata(run.model), Section(name=name, title=title, lead=lead, boxes=view)


def _is_of(run: RunHistory, report: Any) -> bool:
    return bool(run.model and report.path and run.model.name == report.path.rpartition("/")[2])


def _verdict(run: RunHistory) -> str:
    owed = f" {counted(run.owed, 'model')} more to be made." if run.owed else ""
    all_of_them = f"All {counted(len(run.reports), 'checkpoint')} have"
    if len(run.reports) == 1:
        all_of_them = "The checkpoint has"
    some = f"{len(run.proven):,} of {counted(len(run.reports), 'checkpoint')} have"
    return f"{some if run.failed or run.owed else all_of_them} a proven model.{owed}"


def _period(run: RunHistory) -> str:
    times = sorted(event.time for event in run.events if event.time is not None)
    if not times:
        return ""
    first, last = when_text(times[0]), when_text(times[-1])
    return first if first == last else f"{first} to {last}"


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None  # noqa: S101  # nosec - for the type checker
    return environment.loader.get_source(environment, name)[0]


def _policy(*scripts: str) -> str:
    """Return a policy that runs these scripts and no others, and asks no server for anything."""
    hashes = (base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in scripts)
    sources = " ".join(f"'sha256-{each.decode()}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """Return JSON that no HTML parser sees anything in."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    """Replace the numbers that JSON does not have; charts leave a gap there."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _OURS in file.read(_HEAD_BYTES)
