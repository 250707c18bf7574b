"""Faults of the tracking server; models must not suffer, nor training wait."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from servers import answering, free_port

from faults.catalogue import CATALOGUE, Fault, Outcome
from onnxport import Background, MLflow

if TYPE_CHECKING:
    from collections.abc import Callable
    from http.server import BaseHTTPRequestHandler

    from faults.catalogue import Site

HASTY = Background(drain_s=40.0)
_UNTOLD = "what the server should hold, until `onnxport sync` or the next start"


_asked: list[str] = []
"""What the server was asked since the injection began."""


def _status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.end_headers()

    return answer


def _body(content: bytes, length: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        request.wfile.write(content)

    return answer


def _hangs(_: BaseHTTPRequestHandler) -> None:
    time.sleep(30)


def _hangs_up(request: BaseHTTPRequestHandler) -> None:
    request.connection.close()


ANSWERS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "answers 500": _status(500),
    "answers 503": _status(503),
    "answers 401": _status(401),
    "answers 403": _status(403),
    "answers 404": _status(404),
    "answers 429": _status(429),
    "answers what is no JSON": _body(b"<html>"),
    "answers other JSON": _body(b'{"a": [1, 2]}'),
    "answers null": _body(b"null"),
    "answers half of it": _body(b'{"experiment', 4000),
    "hangs": _hangs,
    "hangs up": _hangs_up,
}


def _tracked(site: Site, uri: str) -> Outcome:
    options = MLflow(tracking_uri=uri, register="m")
    run = site.train(export=site.export(mlflow=options, background=HASTY))
    outcome = site.judge(run, "; ".join(_asked[:1]) or uri, again=False)
    if not all(report.ok for report in run.reports):
        outcome.problems.append(f"{[report.error for report in run.reports]}")
    last = {report.path: report for report in run.reports if Path(str(report.path)).exists()}
    if not all(report.tracking and report.tracking.missing for report in last.values()):
        outcome.problems.append("a report does not say that the server lacks the model")
    for note in site.checkpoints.glob(".*.tracking"):
        note.unlink()  # a server that is no server will never be told
    outcome.problems.extend(site.start_again())
    return outcome


def _answers(site: Site, answer: Callable[[BaseHTTPRequestHandler], None]) -> Outcome:
    _asked.clear()

    def noted(request: BaseHTTPRequestHandler) -> None:
        _asked.append(request.path)
        answer(request)

    with answering(noted) as uri:
        return _tracked(site, uri)


def _is_closed(site: Site) -> Outcome:
    _asked.clear()
    return _tracked(site, f"http://127.0.0.1:{free_port()}")


def _is_silent(site: Site) -> Outcome:
    _asked.clear()
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return _tracked(site, f"http://127.0.0.1:{server.getsockname()[1]}")


def _no_such_name(site: Site) -> Outcome:
    _asked.clear()
    return _tracked(site, "http://mlflow.invalid:5000")


def _register() -> None:
    area = "tracking server"
    for name, answer in ANSWERS.items():
        CATALOGUE.append(Fault(f"it {name}", area, _UNTOLD, partial(_answers, answer=answer), 5))
    CATALOGUE.append(Fault("its port is closed", area, _UNTOLD, _is_closed, 5))
    CATALOGUE.append(Fault("it takes connections and is silent", area, _UNTOLD, _is_silent, 5))
    CATALOGUE.append(Fault("its name is not known", area, _UNTOLD, _no_such_name, 5))


_register()
