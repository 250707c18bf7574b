"""What it costs to bring a model to MLflow: ours, and the code that everybody writes.

    TMPDIR=/dev/shm python benchmarks/tracking.py [--sizes 1,150,2300] [--repeat 5]

In memory, because what a disk adds to each way differs from minute to minute.

A real server over HTTP on this machine, with sqlite; a run that has ten metrics of 10,000 points.
Each way has a process of its own, as the one beside training is, in which MLflow is imported before
the clock starts; the first two take turns, and what was written is on the disk before the next one
begins.
The first publication of a process is told apart from those that follow:

- *ours*: what the process beside training does with the job of one checkpoint, a version in the
  registry included.
- *upload*: the bytes of the model alone, as an artifact of the run.
- *log_model*: ``mlflow.onnx.log_model(onnx.load(path), ...)`` in the run, with a name in the
  registry.

Then a training with a checkpoint each epoch, whose server is up, slow (2 s a request), hung, down,
or answers 500: how long the loop was held up by tracking, and how long the end of training waited.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lockstep_report import about
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from servers import bad_server, free_port, mlflow_server

import onnxport
from onnxport import Background, MLflow, OnnxExport
from onnxport.pipeline.report_files import read_report
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.job import Job, job_path, save_job
from onnxport.tracking.outbox import ProcessOutbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULTS = Path(__file__).parent / "results"
METRICS, POINTS = 10, 10_000
WAIT_S = 20.0
STATES = ("up", "slow", "hung", "down", "500")


# --- one publication, in a process of its own ----------------------------------------------------


def measured(work: Any) -> dict[str, float]:
    """Run something; return seconds, requests and the peak of resident memory that it added."""
    from requests.adapters import HTTPAdapter

    send, count = HTTPAdapter.send, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return send(*args, **options)

    HTTPAdapter.send = counted  # type: ignore[method-assign]
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "requests": count, "memory_mb": status("VmHWM") - before}


def status(name: str) -> float:
    """Return a line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def ours(path: Path, uri: str, run_id: str, experiment_id: str) -> Callable[[int], Any]:
    """Carry out the job of one checkpoint."""
    import mlflow.onnx  # noqa: F401 - before the clock

    from onnxport.tracking.courier import Courier

    found = read_report(path)
    assert found is not None
    address = RunAddress(
        uri=uri, run_id=run_id, experiment_id=experiment_id, options=MLflow(register="ours")
    )
    courier = Courier()

    def publish(step: int) -> Callable[[], None]:
        report = replace(found, global_step=step, metrics={"metric0": 0.5})
        content = Model.of_file(path, report, Provenance(metrics={"metric0": 0.5}))
        assert content is not None
        content = replace(content, place=f"{content.place[:8]}{step}")
        save_job(Job(model=path, place=content.place, address=address, content=content))

        def work() -> None:
            carried = courier.carry_out(job_path(path))
            assert carried.record is not None and not carried.record.missing, carried  # noqa: PT018

        return work

    return publish


def log_model(path: Path, uri: str, run_id: str, experiment_id: str) -> Callable[[int], Any]:  # noqa: ARG001
    """Do what hand-written callbacks do."""
    import mlflow
    import mlflow.onnx
    import onnx

    mlflow.set_tracking_uri(uri)
    return lambda step: (
        lambda: mlflow.onnx.log_model(
            onnx.load(path),
            name=f"model-{step}",
            run_id=run_id,
            step=step,
            registered_model_name="obvious",
        )
    )


def upload(path: Path, uri: str, run_id: str, experiment_id: str) -> Callable[[int], Any]:  # noqa: ARG001
    """Upload the bytes."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)

    def work(step: int) -> None:
        for file in (path, path.with_name(f"{path.name}.data")):
            if file.exists():
                client.log_artifact(run_id, str(file), f"bytes-{step}")

    return lambda step: lambda: work(step)


WAYS = {"ours": ours, "log_model": log_model, "upload": upload}


class OneWay:
    """A process that publishes in one way, a line of its input at a time."""

    def __init__(self, way: str, *arguments: Any) -> None:
        command = [sys.executable, __file__, "--one", way, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def publish(self, step: int) -> dict[str, float]:
        """Publish once; return what it cost.

        Args:
            step: Its number.

        Raises:
            RuntimeError: If the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.sync()
        self._process.stdin.write(f"{step}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("the process has ended")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(way: str, *arguments: str) -> None:
    """Publish at each line of the input."""
    path, *others = arguments
    publish = WAYS[way](Path(path), *others)
    for line in sys.stdin:
        print(json.dumps(measured(publish(int(line)))), flush=True)


# --- what is published ---------------------------------------------------------------------------


def make_model(folder: Path, megabytes: float) -> Path:
    """Export a model of a size."""
    width = int((megabytes * 1e6 / 4 / 2) ** 0.5)
    module = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    path = folder / f"model-{megabytes:g}.onnx"
    report = onnxport.export(module, torch.randn(3, width), path, core="trace")
    assert report.ok, report.error
    return path


def make_run(uri: str) -> tuple[str, str]:
    """Make a run with long histories."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    experiment = client.create_experiment("benchmark")
    run_id = client.create_run(experiment).info.run_id
    for metric in range(METRICS):
        for begin in range(0, POINTS, 1000):
            points = [
                Metric(f"metric{metric}", 0.5, 1_700_000_000_000 + step, step)
                for step in range(begin, begin + 1000)
            ]
            client.log_batch(run_id, metrics=points)
    return run_id, experiment


def publications(sizes: list[float], repeat: int) -> list[dict[str, Any]]:
    """Measure each way for each size; one way after the other, again and again."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="onnxport-tracking-") as name:
        folder = Path(name)
        with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as uri:
            run_id, experiment = make_run(uri)
            step = 0
            for size in sizes:
                path = make_model(folder, size)
                found: dict[str, list[dict[str, float]]] = {}
                # By itself what needs several times the memory: it would slow the others down.
                for ways, tries in (("ours", "upload"), repeat), (("log_model",), min(repeat, 2)):
                    processes = {way: OneWay(way, path, uri, run_id, experiment) for way in ways}
                    for _ in range(tries + 1):
                        for way, process in processes.items():
                            step += 1
                            found.setdefault(way, []).append(process.publish(step))
                            print(f"{size:g} MB {way}: {found[way][-1]}", flush=True)
                            for file in (folder / "artifacts").rglob("model*.onnx*"):
                                file.unlink()  # the disk, or memory, is not to fill up
                    for process in processes.values():
                        process.close()
                rows += [{"mb": size, "way": way, "runs": runs} for way, runs in found.items()]
                for file in folder.glob("model-*"):
                    file.unlink()
    return rows


# --- what training feels -------------------------------------------------------------------------


class Small(pl.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, 64) for (N, 64)."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Take a moment."""
        time.sleep(0.05)
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


@contextmanager
def server_that_is(state: str, folder: Path) -> Iterator[str]:
    """Run a server in a state."""
    if state == "up":
        with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as uri:
            yield uri
        return

    if state == "down":
        yield f"http://127.0.0.1:{free_port()}"
        return
    with bad_server({"slow": 2.0, "hung": 600.0}.get(state, 0.0)) as uri:
        yield uri


def training(state: str) -> dict[str, Any]:
    """Train with a checkpoint each epoch; return how long tracking held it up."""
    spent: list[float] = []
    ends: list[float] = []

    class Timed(ProcessOutbox):
        def submit(self, *args: Any) -> None:
            start = time.perf_counter()
            super().submit(*args)
            spent.append(time.perf_counter() - start)

        def drain(self, *args: Any) -> None:
            start = time.perf_counter()
            super().drain(*args)
            ends.append(time.perf_counter() - start)

    from onnxport.callbacks import announced

    announced.ProcessOutbox = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="onnxport-tracking-") as name:
        folder = Path(name)
        with server_that_is(state, folder) as uri:
            export = OnnxExport(
                background=Background(drain_s=WAIT_S),
                mlflow=MLflow(tracking_uri=uri, register="n"),
            )
            data = torch.utils.data.TensorDataset(torch.randn(160, 64))
            trainer = pl.Trainer(
                max_epochs=12,
                callbacks=[export, ModelCheckpoint(dirpath=folder / "c", save_top_k=-1)],
                logger=False,
                accelerator="cpu",
                default_root_dir=folder,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            start = time.perf_counter()
            trainer.fit(Small(), torch.utils.data.DataLoader(data, 8))
            fit = time.perf_counter() - start
    stalls = [report.seconds["stall"] for report in export.reports]
    told = sum(not report.tracking.missing for report in export.reports if report.tracking)
    return {
        "state": state,
        "fit_s": fit,
        "end_s": sum(ends),
        "submit_max_ms": 1000 * max(spent),
        "stall_median_ms": 1000 * statistics.median(stalls),
        "stall_max_ms": 1000 * max(stalls),
        "models": len(export.reports),
        "told": told,
    }


# --- the results ---------------------------------------------------------------------------------


def table(content: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    about_lines = [
        f"- {content['system']}, {content['cpu']}, {content['cores']} cores, {content['memory']}",
        "- Python "
        + content["python"]
        + "; "
        + ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
        f"- {content['date']}; files in {content['folder']}",
    ]
    lines = ["# Tracking: what it costs to bring a model to MLflow", "", *about_lines, ""]
    lines += [__doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [
        "| MB | way | first, s | then, s | requests | peak memory +, MB | then / upload |",
        "|" + "---|" * 7,
    ]
    for size in dict.fromkeys(row["mb"] for row in content["publications"]):
        rows = {row["way"]: row["runs"] for row in content["publications"] if row["mb"] == size}
        plain = _median(rows["upload"], "seconds")
        for way, runs in rows.items():
            seconds = _median(runs, "seconds")
            lines.append(
                f"| {size:g} | {way} | {runs[0]['seconds']:.3g} | {seconds:.3g} | "
                f"{_median(runs, 'requests'):.0f} | {max(run['memory_mb'] for run in runs):.0f} | "
                f"{seconds / plain:.2f} |"
            )
    lines += [
        "",
        (
            "Medians of all but the first; the most memory of any. The end of training waits at "
            f"most {WAIT_S:g} s here."
        ),
        "",
    ]
    lines += [
        "| server | handing over, max ms | stall, median (max) ms | end waited, s | models, told |",
        "|" + "---|" * 5,
    ]
    lines += [
        f"| {row['state']} | {row['submit_max_ms']:.1f} | {row['stall_median_ms']:.1f} "
        f"({row['stall_max_ms']:.1f}) | {row['end_s']:.1f} | {row['models']}, {row['told']} |"
        for row in content["trainings"]
    ]
    return "\n".join(lines) + "\n"


def _median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs[1:])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1,150,2300", help="of models, in MB")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if options.one:
        serve(*options.one)
        return
    content: dict[str, Any] = about() | {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "folder": tempfile.gettempdir(),
    }
    content["publications"] = publications(
        [float(size) for size in options.sizes.split(",")], options.repeat
    )
    content["trainings"] = []
    for state in STATES:
        content["trainings"].append(training(state))
        print(content["trainings"][-1], flush=True)
    (RESULTS / "tracking.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "tracking.md").write_text(table(content))
    print(table(content))


if __name__ == "__main__":
    main()
