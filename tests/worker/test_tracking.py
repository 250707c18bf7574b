"""Tracking beside training: by a process of its own, whatever the server does."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from faults.disk import Rule, mounted, why_not
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers import bad_server, free_port

from onnxport import Background, MLflow, OnnxExport
from onnxport.pipeline.report_files import read_report
from onnxport.tracking import outbox
from onnxport.tracking.job import jobs_in
from onnxport.tracking.outbox import ProcessOutbox

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.integration,
    pytest.mark.worker,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
]

OPTIONS = Background(drain_s=100)


class Scored(zoo.Classifier):
    """Logs a score that goes up and down."""

    def __init__(self) -> None:
        super().__init__(zoo.cnn())

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        self.log("acc", (0.2, 0.9, 0.3, 0.1)[self.current_epoch])


def fit(root: Path, *callbacks: Any, epochs: int = 3, logger: Any = False) -> Scored:
    torch.manual_seed(0)
    module = Scored()
    saves = zoo.checkpoints(root, monitor="acc", mode="max", save_top_k=2)
    trainer = zoo.trainer(root, saves, *callbacks, logger=logger, epochs=epochs)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return module


def models_of(store: str, experiment: str) -> list[Any]:
    return list(MlflowClient(store).search_logged_models([experiment]))


@contextmanager
def blocked() -> Iterator[list[float]]:
    """Collect how long each call of the outbox held training up."""
    spent: list[float] = []
    submit = ProcessOutbox.submit

    def timed(self: ProcessOutbox, *args: Any) -> None:
        start = time.perf_counter()
        submit(self, *args)
        spent.append(time.perf_counter() - start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessOutbox, "submit", timed)
        yield spent


def test_what_top_k_keeps_is_what_the_server_holds(store: str, tmp_path: Path) -> None:
    logger = MLFlowLogger("e", tracking_uri=store, artifact_location=(tmp_path / "a").as_uri())
    export = OnnxExport(core="trace", background=OPTIONS, register="n")
    fit(tmp_path, export, logger=logger, epochs=4)
    assert [report.error for report in export.reports if report.error] == []
    models = models_of(store, logger.experiment_id)
    assert {model.status for model in models} == {LoggedModelStatus.READY}
    names = {model.name for model in models}
    assert names >= {"epoch=1-step=6", "epoch=2-step=9"}
    # The first one has left the top two; if it was told in time, a version was made of it.
    assert all("mlflow.modelVersions" in m.tags for m in models if m.name == "epoch=0-step=3")
    assert names <= {"epoch=0-step=3", "epoch=1-step=6", "epoch=2-step=9"}
    assert [m.name for m in models if "onnxport.last" in m.tags] == ["epoch=2-step=9"]
    assert [m.name for m in models if "onnxport.best" in m.tags] == ["epoch=1-step=6"]
    kept = [r for r in export.reports if r.path and Path(r.path).exists()]
    assert [bool(report.tracking and report.tracking.model_id) for report in kept] == [True, True]
    for report in kept:
        saved = read_report(tmp_path / "checkpoints" / Path(str(report.path)).name)
        assert saved is not None
        assert saved.tracking == report.tracking
    assert list(jobs_in([tmp_path])) == []
    assert MlflowClient(store).get_run(logger.run_id).info.status == "FINISHED"


def test_a_removed_model_without_a_version_goes(store: str, tmp_path: Path) -> None:
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    fit(tmp_path, export, epochs=4)
    experiment = MlflowClient(store).get_experiment_by_name("onnxport").experiment_id
    names = sorted(model.name for model in models_of(store, experiment))
    assert names == ["epoch=1-step=6", "epoch=2-step=9"]
    (run,) = MlflowClient(store).search_runs([experiment])
    assert run.info.status == "FINISHED"


def test_training_is_bit_identical(store: str, tmp_path: Path) -> None:
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    with_tracking = fit(tmp_path / "on", export)
    assert with_tracking.losses == fit(tmp_path / "off").losses


class WaitsForFirst(Callback):
    """Trains on once there is a model: a busy machine may take long to start a worker."""

    def __init__(self, export: OnnxExport) -> None:
        self.export = export

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        end = time.monotonic() + 120.0
        while trainer.current_epoch > 0 and not self.export.reports and time.monotonic() < end:
            time.sleep(0.02)


SLOW = [pytest.param(how, marks=pytest.mark.exhaustive) for how in ("500", "slow")]


@pytest.mark.parametrize("how", ["hangs", *SLOW, "closed"])
def test_training_never_waits_for_the_server(how: str, tmp_path: Path) -> None:
    late = bad_server({"hangs": 30.0, "slow": 2.0}.get(how, 0.0))
    with nullcontext(f"http://127.0.0.1:{free_port()}") if how == "closed" else late as uri:
        options = Background(drain_s=20)
        export = OnnxExport(core="trace", background=options, mlflow=MLflow(tracking_uri=uri))
        with blocked() as spent:
            fit(tmp_path, export, WaitsForFirst(export), epochs=4)
    assert max(spent) < 1  # the figure is in benchmarks/tracking.py
    kept = [report for report in export.reports if report.ok and Path(report.path).exists()]
    assert len(kept) == 2
    for report in kept:
        assert uri in report.tracking.missing
        assert report.tracking.model_id is None
    left = list(jobs_in([tmp_path]))
    assert len(left) >= len(kept)


class KillTracking(Callback):
    """Kills the process that speaks to the server after each epoch."""

    def __init__(self, export: OnnxExport) -> None:
        self.export = export

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        process = self.export._run._announced.outbox._process
        if trainer.current_epoch < 2 and process is not None:
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.exhaustive
def test_a_process_that_is_killed_is_replaced(store: str, tmp_path: Path) -> None:
    export = OnnxExport(
        core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store, register="n")
    )
    fit(tmp_path, export, KillTracking(export))
    kept = [report for report in export.reports if Path(report.path).exists()]
    assert [report.tracking.missing for report in kept] == ["", ""]
    experiment = MlflowClient(store).get_experiment_by_name("onnxport").experiment_id
    assert {m.status for m in models_of(store, experiment)} == {LoggedModelStatus.READY}
    assert len(MlflowClient(store).search_runs([experiment])) == 1


def test_a_checkpoint_that_is_saved_after_training_is_told_too(store: str, tmp_path: Path) -> None:
    logger = MLFlowLogger("e", tracking_uri=store, artifact_location=(tmp_path / "a").as_uri())
    export = OnnxExport(core="trace", background=OPTIONS)
    trainer = zoo.trainer(tmp_path, export, logger=logger, epochs=1)
    trainer.fit(Scored(), zoo.loader(), zoo.loader(shuffle=False))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert [report.tracking.missing for report in export.reports] == [""] * len(export.reports)
    assert "after" in {model.name for model in models_of(store, logger.experiment_id)}
    assert list(jobs_in([tmp_path])) == []


def test_a_process_that_does_not_start_ends_no_training(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def refused(command: Any, *args: Any, **options: Any) -> Any:
        if "onnxport.tracking.server" in command:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", refused)
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    module = fit(tmp_path, export)
    assert len(module.losses) == 9
    kept = [report for report in export.reports if Path(str(report.path)).exists()]
    assert len(kept) == 2
    assert all("cannot be started" in report.tracking.missing for report in kept)
    assert len(list(jobs_in([tmp_path]))) >= len(kept)


class Kill(Callback):
    """Kills the process that speaks to the server, whenever there is one, until a step."""

    def __init__(self, export: OnnxExport, until: int) -> None:
        self.export, self.until, self.times = export, until, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        process = self.export._run._announced.outbox._process
        if process is not None and trainer.global_step < self.until:
            process.kill()
            self.times += 1
            time.sleep(0.3)


def test_a_process_that_dies_again_and_again_is_left_alone(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    start = subprocess.Popen

    def dying(command: Any, *args: Any, **options: Any) -> Any:
        if "onnxport.tracking.server" in command:
            begun.append(command)
            command = ["/bin/false"]
        return start(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    monkeypatch.setattr(outbox, "REST_S", 3600.0)
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    before = time.monotonic()
    fit(tmp_path, export)
    assert time.monotonic() - before < OPTIONS.drain_s
    kept = [report for report in export.reports if Path(str(report.path)).exists()]
    assert len(kept) == 2
    assert all("died too often" in report.tracking.missing for report in kept)
    assert len(begun) == 2 * outbox.MAX_STARTS  # once more at the end


@pytest.mark.exhaustive
def test_a_process_that_has_died_too_often_is_tried_at_the_end(store: str, tmp_path: Path) -> None:
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    fit(tmp_path, export, Kill(export, until=100))
    kept = [report for report in export.reports if Path(str(report.path)).exists()]
    assert [report.tracking.missing for report in kept] == ["", ""]
    assert list(jobs_in([tmp_path])) == []


class Listens(Callback):
    """Waits at the end of training, before anybody says that it is the end, for what is told."""

    def __init__(self, export: OnnxExport) -> None:
        self.export, self.told = export, False

    def on_train_epoch_end(self, trainer: Any, _: Any) -> None:
        if trainer.current_epoch == 3:
            end = time.monotonic() + 60.0
            while time.monotonic() < end and not self.told:
                time.sleep(0.05)
                reports = self.export.reports
                self.told = any(r.tracking and not r.tracking.missing for r in reports)


def test_a_process_that_has_died_too_often_is_started_again_after_a_rest(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "REST_S", 0.1)
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
    listens, kill = Listens(export), Kill(export, until=6)
    fit(tmp_path, export, kill, listens, epochs=4)
    assert kill.times >= outbox.MAX_STARTS
    assert listens.told
    assert list(jobs_in([tmp_path])) == []


@pytest.mark.exhaustive
@pytest.mark.skipif(why_not() != "", reason=why_not())
@pytest.mark.parametrize("operation", ["read", "getattr"])
def test_a_note_that_the_disk_does_not_give_is_carried_out_later(
    operation: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnxport.events")
    with mounted(tmp_path) as disk:
        export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
        disk.fail(Rule(operations=(operation,), match="*.tracking", times=2, error=errno.EIO))
        fit(disk.folder, export)
        assert len(disk.fired) == 2
        kept = [report for report in export.reports if Path(str(report.path)).exists()]
        assert [report.tracking.missing for report in kept] == ["", ""]
        assert list(jobs_in([disk.kept])) == []
    assert caplog.text.count("courier.started") == 1


@pytest.mark.exhaustive
def test_an_end_that_is_noticed_late_starts_no_second_process(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "onnxport.events")
    late, may_go_on = threading.Event(), threading.Event()

    class Late(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:  # not emit: others may log meanwhile
            if "courier.ended" in record.getMessage() and not late.is_set():
                late.set()
                may_go_on.wait(60.0)
            return True

    handler = Late()
    logging.getLogger("onnxport.events").addHandler(handler)
    try:
        export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))
        trainer = zoo.trainer(tmp_path, export, epochs=1)
        trainer.fit(Scored(), zoo.loader(), zoo.loader(shuffle=False))
        assert late.wait(60.0)
        close = ProcessOutbox.close

        def closed_late(self: ProcessOutbox, status: str) -> None:
            process = self._process  # of the second one, which lives
            may_go_on.set()
            time.sleep(0.5)
            assert self._process is process
            close(self, status)

        monkeypatch.setattr(ProcessOutbox, "close", closed_late)
        trainer.save_checkpoint(tmp_path / "after.ckpt")  # begins anew, and ends
    finally:
        may_go_on.set()
        logging.getLogger("onnxport.events").removeHandler(handler)
    assert caplog.text.count("courier.started") == 2


@pytest.mark.exhaustive
def test_a_process_that_dies_now_and_then_is_started_each_time(store: str, tmp_path: Path) -> None:
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=store))

    class KillWhenItHasWorked(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            end = time.monotonic() + 60.0
            while time.monotonic() < end and not told():
                time.sleep(0.05)
            export._run._announced.outbox._process.kill()

    def told() -> bool:
        last = export.reports[-1] if export.reports else None
        return last is not None and last.tracking is not None and not last.tracking.missing

    fit(tmp_path, export, KillWhenItHasWorked(), epochs=4)
    kept = [report for report in export.reports if Path(str(report.path)).exists()]
    assert [report.tracking.missing for report in kept if report.tracking.missing] == []
