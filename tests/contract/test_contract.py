"""What every adapter promises, whatever framework it is for."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from contract.adapters import ADAPTERS, EVERY, KEPT, STEPS, WITH_AVERAGES, Net
from contract.checks import (
    assert_mirrored,
    assert_models_are_their_checkpoints,
    assert_same_training,
    train,
)
from processes import together
from servers import free_port

from onnxport import Background, ExportError, MLflow
from onnxport.worker.client import worker_for

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

each_adapter = pytest.mark.parametrize("adapter", list(ADAPTERS))


@each_adapter
def test_training_is_bit_identical(adapter: str, tmp_path: Path) -> None:
    run = train(adapter, tmp_path / "with")
    after = torch.rand(4)
    other = train(adapter, tmp_path / "without", options=None)
    assert torch.equal(after, torch.rand(4))  # the stream of random numbers is where it was
    assert_same_training(run, other)


@each_adapter
def test_each_checkpoint_has_its_model_and_each_model_its_checkpoint(
    adapter: str, tmp_path: Path
) -> None:
    run = train(adapter, tmp_path)
    assert [report.error for report in run.reports if not report.ok] == []
    assert len(run.reports) == STEPS // EVERY
    assert_models_are_their_checkpoints(run)
    assert_mirrored(run)
    last = run.reports[-1]
    assert last.global_step == STEPS
    assert [spec.shape for spec in last.inputs] == [("batch", 6)]
    assert [spec.shape for spec in last.outputs] == [("batch", 3)]  # and no loss


@pytest.mark.parametrize("adapter", WITH_AVERAGES)
def test_averaged_weights_are_those_of_the_checkpoint(adapter: str, tmp_path: Path) -> None:
    run = train(adapter, tmp_path / "averaged", ema=True)
    plain = train(adapter, tmp_path / "plain")
    assert [report.error for report in run.reports if not report.ok] == []
    assert_models_are_their_checkpoints(run)
    both = [next(iter(one.checkpoints.values()))["first.weight"] for one in (run, plain)]
    assert run.losses == plain.losses
    assert not torch.equal(*both)


@each_adapter
def test_frozen_layers_stay_frozen(adapter: str, tmp_path: Path) -> None:
    run = train(adapter, tmp_path / "with", net={"frozen": True})
    assert_same_training(
        run, train(adapter, tmp_path / "without", options=None, net={"frozen": True})
    )
    assert torch.equal(run.net.norm.running_mean, torch.zeros(16))
    assert_models_are_their_checkpoints(run)


@each_adapter
def test_an_export_that_fails_changes_nothing(adapter: str, tmp_path: Path) -> None:
    run = train(adapter, tmp_path / "with", net={"raises": True})
    plain = train(adapter, tmp_path / "without", options=None, net={"raises": True})
    assert_same_training(run, plain)
    assert {report.ok for report in run.reports} == {False}
    assert all("not in eval mode" in str(report.error) for report in run.reports)
    assert list(run.root.rglob("*.onnx")) == []


@each_adapter
def test_a_failure_ends_training_if_that_is_asked_for(adapter: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not in eval mode"):
        train(adapter, tmp_path, net={"raises": True}, options={"on_error": "raise"})


@each_adapter
def test_an_error_of_the_user_is_raised_as_it_is(adapter: str, tmp_path: Path) -> None:
    def during(_: Any, step: int) -> None:
        if step == EVERY + 1:
            raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        train(adapter, tmp_path, during=during)
    assert len(list(tmp_path.rglob("*.onnx"))) == 1


@each_adapter
def test_without_checkpoints_the_final_weights_become_a_model(adapter: str, tmp_path: Path) -> None:
    run = train(adapter, tmp_path, saves=False)
    (report,) = run.reports
    assert report.ok, report.error
    (model,) = tmp_path.rglob("*.onnx")
    assert report.path == str(model)
    net = Net()
    net.load_state_dict(run.net.state_dict())
    x = torch.randn(5, 6)
    session = onnxruntime.InferenceSession(model)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), net.eval()(x), atol=1e-5, rtol=1e-4)


@each_adapter
def test_a_server_that_is_down_is_said_and_no_more(adapter: str, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    run = train(adapter, tmp_path / "with", options={"mlflow": MLflow(tracking_uri=uri)})
    assert_same_training(run, train(adapter, tmp_path / "without", options=None))
    assert_models_are_their_checkpoints(run)
    kept = [report for report in run.reports if str(report.path) in map(str, run.checkpoints)]
    assert len(kept) == KEPT
    assert all(uri in str(report.tracking and report.tracking.missing) for report in kept)


@pytest.mark.worker
@each_adapter
def test_a_killed_worker_is_replaced(adapter: str, tmp_path: Path) -> None:
    background = Background(drain_s=120.0)

    def during(export: Any, step: int) -> None:
        end = time.monotonic() + 120.0
        if export is None or step != EVERY:
            return
        while not export.reports and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(worker_for(background, 0).pid, signal.SIGKILL)

    options = {"background": background}
    run = train(adapter, tmp_path / "with", options=options, during=during)
    assert_same_training(run, train(adapter, tmp_path / "without", options=None))
    assert_models_are_their_checkpoints(run)
    assert_mirrored(run)


# --- several processes ------------------------------------------------------------------------

SCRIPT = """
    import json, os, sys, torch, warnings
    warnings.simplefilter("ignore")
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from contract.adapters import ADAPTERS
    from contract.checks import assert_models_are_their_checkpoints, assert_mirrored, train
    torch.set_num_threads(1)
    os.environ.setdefault("RANK", os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo")
    first, said = torch.distributed.get_rank() == 0, {}
    for adapter in ADAPTERS:
        root = Path(sys.argv[1], adapter)
        run = train(adapter, root / "with", processes=2)
        plain = train(adapter, root / "without", processes=2, options=None)
        torch.distributed.barrier()
        if first:
            assert [report.error for report in run.reports if not report.ok] == [], adapter
            assert_models_are_their_checkpoints(run)
            assert_mirrored(run)
        said[adapter] = [run.losses, plain.losses, len(run.reports)]
        torch.distributed.barrier()
    Path(sys.argv[1], f"{int(first)}.json").write_text(json.dumps(said))
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_each_model_once(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    together(textwrap.dedent(SCRIPT), tmp_path, 2, str(tmp_path), str(tests))
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(said) == set(ADAPTERS)
        for adapter, (losses, plain, reports) in said.items():
            assert losses == plain, adapter
            assert bool(reports) == bool(rank), adapter  # the file of the first process is 1.json
