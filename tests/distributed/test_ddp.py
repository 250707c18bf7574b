"""Two real processes: nobody waits for ever, and each model is written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import together

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import zoo
from pathlib import Path
from onnxport import ExportError, OnnxExport

def train(root, module, options):
    callback = OnnxExport(**options)
    saves = zoo.checkpoints(root, save_top_k=1, save_last=True, monitor="val_loss")
    trainer = zoo.trainer(root, saves, callback, strategy="ddp", devices=2, epochs=3)
    outcome = "finished"
    try:
        trainer.fit(eval(module), zoo.loader(32), zoo.loader(32, shuffle=False))
    except ExportError as error:
        outcome = "raised"
    said = dict(outcome=outcome, reports=[json.loads(r.to_json()) for r in callback.reports])
    (root / f"rank{{trainer.global_rank}}.json").write_text(json.dumps(said))

for name, (module, options) in json.loads(sys.argv[2]).items():
    train(Path(sys.argv[1], name), module, options)
"""
BRANCH = "zoo.Classifier(zoo.DataBranch())"
CASES = {
    "plain": ("zoo.Classifier(zoo.cnn())", {"core": "torchscript"}),
    "no forward": ("zoo.NoForward(zoo.cnn())", {"core": "trace"}),
    "warn": (BRANCH, {"core": "trace", "on_error": "warn"}),
    "raise": (BRANCH, {"core": "trace", "on_error": "raise"}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, one after the other in the same two processes."""
    root = tmp_path_factory.mktemp("ddp")
    for name in CASES:
        (root / name).mkdir()
    tests = str(Path(__file__).parent.parent)
    together(SCRIPT.format(tests=tests), root, 2, str(root), json.dumps(CASES))
    return root


def said_by(root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def stems(root: Path, suffix: str) -> set[str]:
    return {path.name.removesuffix(suffix) for path in (root / "checkpoints").glob(f"*{suffix}")}


def test_each_model_is_written_once_by_rank_zero(trained: Path) -> None:
    first, second = said_by(trained / "plain")
    assert (first["outcome"], second["outcome"]) == ("finished", "finished")
    assert second["reports"] == []
    assert len(first["reports"]) >= 2  # a checkpoint that was removed before its turn has none
    assert all(report["ok"] for report in first["reports"]), first["reports"]
    assert stems(trained / "plain", ".onnx") == stems(trained / "plain", ".ckpt")
    # Lightning routes training_step through forward: its batch dict must not become the inputs.
    assert [spec["name"] for spec in first["reports"][0]["inputs"]] == ["image"]


def test_a_forward_that_is_never_called_is_still_noticed(trained: Path) -> None:
    first, _ = said_by(trained / "no forward")
    assert {report["target"] for report in first["reports"]} == {"net"}


@pytest.mark.parametrize(("on_error", "outcome"), [("warn", "finished"), ("raise", "raised")])
def test_a_failure_on_rank_zero_leaves_nobody_waiting(
    on_error: str, outcome: str, trained: Path
) -> None:
    first, second = said_by(trained / on_error)
    assert first["outcome"] == second["outcome"] == outcome
    assert not any(report["ok"] for report in first["reports"])
