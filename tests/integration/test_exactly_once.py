"""Requests that are lost before or after the server saw them: nothing is missing, nothing twice."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from requests.adapters import HTTPAdapter
from torch import nn

import onnxport
from onnxport.config import MLflow
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.courier import Courier
from onnxport.tracking.job import Job, save_job
from onnxport.tracking.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.report import ExportReport

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

METRICS = {
    "onnx/max_abs_err",
    "onnx/size_mb",
    "onnx/latency_ms_p50",
    "onnx/export_s",
    "acc",
    "loss",
}


class Network:
    """Counts requests, and loses those that it is told to.

    Args:
        lose: Tells of the n-th request whether it is lost: ``"before"`` the server sees it,
            ``"after"`` it was carried out, or not (``""``).
    """

    def __init__(self, lose: Callable[[int], str]) -> None:
        self.lose = lose
        self.count = 0
        self.lost = 0
        self.answered: list[str] = []
        self._one_at_a_time = threading.Lock()

    def send(self, adapter: HTTPAdapter, request: Any, **options: Any) -> Any:
        with self._one_at_a_time:  # some of them are sent side by side
            how = self.lose(self.count)
            self.count += 1
            self.lost += bool(how)
        if how == "before":
            raise requests.exceptions.ConnectionError("lost before (injected)")
        response = SEND(adapter, request, **options)
        if how == "after":
            response.close()
            raise requests.exceptions.ConnectionError("lost after (injected)")
        self.answered.append(f"{request.method} {request.path_url}")
        return response


SEND = HTTPAdapter.send


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network(lambda _: "")

    def send(adapter: HTTPAdapter, request: Any, **options: Any) -> Any:
        return made.send(adapter, request, **options)

    monkeypatch.setattr(HTTPAdapter, "send", send)
    return made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return onnxport.export(nn.Linear(4, 2), torch.zeros(3, 4), path, core="trace")


class Training:
    """A run in its own experiment, whose checkpoints become jobs."""

    def __init__(self, uri: str, name: str, folder: Path, report: ExportReport) -> None:
        self.client = MlflowClient(uri)
        self.name, self.folder, self.report = name, folder, report
        self.address = RunAddress(
            uri=uri, fit=name, options=MLflow(experiment=name, register=name, policy="all")
        )
        self.jobs: list[Path] = []

    def checkpoint(self, score: float) -> Path:
        """Note a model with a score."""
        step = len(self.jobs) + 1
        path = self.folder / f"{self.name}-{step}.onnx"
        path.write_bytes(Path(str(self.report.path)).read_bytes())
        metrics = {"acc": score, "loss": 1 - score}
        report = replace(self.report, path=str(path), global_step=step, metrics=metrics)
        origin = Provenance(metrics=metrics, monitor="acc", mode="max", global_step=step)
        content = Model.of_file(path, report, origin)
        assert content is not None
        job = Job(model=path, place=content.place, address=self.address, content=content)
        self.jobs.append(save_job(job))
        return self.jobs[-1]

    def assert_exactly_once(self, best: int) -> None:
        """Look at everything that the server holds."""
        client = self.client
        experiment = client.get_experiment_by_name(self.name).experiment_id
        (run,) = client.search_runs([experiment])
        models = client.search_logged_models([experiment], max_results=1000)
        assert {model.status for model in models} == {LoggedModelStatus.READY}
        steps = sorted(int(model.params["global_step"]) for model in models)
        assert steps == list(range(1, len(self.jobs) + 1))
        for model in models:
            assert len(model.metrics) == len(METRICS)
            assert {metric.key for metric in model.metrics} == METRICS
            files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
            assert {"MLmodel", "model.onnx", "requirements.txt"} <= files
        for key in METRICS:
            history = client.get_metric_history(run.info.run_id, key)
            assert sorted(point.step for point in history) == [step - 1 for step in steps]
        versions = client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        assert len(versions) == len(self.jobs)
        linked = {model.model_id for model in models}
        assert {
            version.source.rpartition("/models/")[2].partition("/")[0] for version in versions
        } == (linked)
        champion = client.get_model_version_by_alias(self.name, "champion")
        assert champion.tags["onnxport.key"].split(":")[1] == str(best)
        assert [m.params["global_step"] for m in models if "onnxport.best" in m.tags] == [str(best)]
        assert [m.params["global_step"] for m in models if "onnxport.last" in m.tags] == [
            str(len(self.jobs))
        ]
        marked = {m.params["global_step"] for m in models if "onnxport.marked" in m.tags}
        assert marked == {str(best), str(len(self.jobs))}
        assert not any(job.exists() for job in self.jobs)
        onnx.checker.check_model(self.folder / f"{self.name}-1.onnx")


def carry_out(job: Path) -> int:
    """Try until it is done, each time as a new process would; return the number of tries."""
    for tries in range(1, 500):
        carried = Courier().carry_out(job)
        assert carried.token
        if not carried.left:
            assert carried.record is not None
            assert carried.record.missing == ""
            return tries
    pytest.fail("never done")


@pytest.mark.exhaustive
@pytest.mark.parametrize("shift", [0, 1])
def test_each_request_is_lost_once(
    shift: int, server: str, network: Network, report: ExportReport, tmp_path: Path
) -> None:
    whole = Training(server, f"whole-{shift}", tmp_path, report)
    carry_out(whole.checkpoint(0.5))
    counts = []
    for score in (0.6, 0.7, 0.8):
        network.count = 0
        carry_out(whole.checkpoint(score))
        counts.append(network.count)
    requests_each = min(counts)  # two threads may ask for the same thing once each, or once
    assert requests_each > 15
    training = Training(server, f"each-{shift}", tmp_path, report)
    lost = 0
    for place in range(requests_each):
        how = ("before", "after")[(place + shift) % 2]
        # The health of a server is asked without this library, so that each try has them all.
        network.count, network.lost = 0, 0
        network.lose = lambda count, place=place, how=how: how if count == place else ""
        carry_out(training.checkpoint(0.5 + len(training.jobs) / 1000))
        lost += network.lost
    network.lose = lambda _: ""
    assert lost == requests_each
    training.assert_exactly_once(best=len(training.jobs))


def test_who_sees_a_model_ready_sees_it_whole_and_who_sees_a_version_sees_it_ready(
    server: str, network: Network, report: ExportReport, tmp_path: Path
) -> None:
    training = Training(server, "order", tmp_path, report)
    carry_out(training.checkpoint(0.5))
    network.answered.clear()
    carry_out(training.checkpoint(0.6))
    said = network.answered

    def places(*words: str) -> list[int]:
        return [n for n, request in enumerate(said) if all(word in request for word in words)]

    files, (whole,) = places("PUT", "/artifacts/"), places("PUT", "/MLmodel")
    (weights,), (metrics,) = places("PUT", "/model.onnx"), places("log-batch")
    (ready,) = [
        n for n, line in enumerate(said) if line.startswith("PATCH") and "/tags" not in line
    ]
    (version,), alias = places("model-versions/create"), places("POST", "/alias")
    assert max(files) == whole
    assert max(weights, metrics) < whole < ready < version < min(alias)


def test_a_job_that_the_server_refuses_holds_up_no_other(
    server: str, network: Network, report: ExportReport, tmp_path: Path
) -> None:
    refused = Training(server, "refused", tmp_path, report)
    gone = refused.client.create_run(refused.client.create_experiment("gone"))
    refused.client.delete_run(gone.info.run_id)
    refused.address = replace(
        refused.address, run_id=gone.info.run_id, experiment_id=gone.info.experiment_id
    )
    good = Training(server, "good", tmp_path, report)
    answers: list[dict[str, Any]] = []
    told = Server(Courier(), answers.append)
    network.count = 0
    network.lose = lambda _: "before"
    for job in (refused.checkpoint(0.5), good.checkpoint(0.6), good.checkpoint(0.7)):
        told._carry_out(str(job), server, "")
    assert [answer["left"] for answer in answers] == [True] * 3
    assert network.count == 1  # the others are not tried: the server is down
    network.lose = lambda _: ""
    told._try_again()
    assert [answer["left"] for answer in answers[3:]] == [True, False, False]
    assert "must be in the 'active' state" in answers[3]["record"]["missing"]
    good.assert_exactly_once(best=2)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_five_hundred_requests_are_lost_at_random(
    server: str, network: Network, report: ExportReport, tmp_path: Path
) -> None:
    generator = random.Random(7)  # noqa: S311 - chance that can be repeated
    training = Training(server, "random", tmp_path, report)
    network.lose = lambda _: generator.choice(["before", "after", *[""] * 12])
    scores = []
    while network.lost < 500:
        scores.append(generator.random())
        carry_out(training.checkpoint(scores[-1]))
    network.lose = lambda _: ""
    training.assert_exactly_once(best=scores.index(max(scores)) + 1)
