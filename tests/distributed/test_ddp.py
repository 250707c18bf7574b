"""Two real processes: nobody waits for ever, and each model is written once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import zoo
from onnxport import ExportError, OnnxExport

root = __import__("pathlib").Path(sys.argv[1])
module = {module}
callback = OnnxExport({options})
saves = zoo.checkpoints(root, save_top_k=1, save_last=True, monitor="val_loss")
trainer = zoo.trainer(root, saves, callback, strategy="ddp", devices=2, epochs=3)
outcome = "finished"
try:
    trainer.fit(module, zoo.loader(32), zoo.loader(32, shuffle=False))
except ExportError as error:
    outcome = "raised"
rank = trainer.global_rank
said = dict(outcome=outcome, reports=[json.loads(r.to_json()) for r in callback.reports])
(root / f"rank{{rank}}.json").write_text(json.dumps(said))
"""


def run(root: Path, module: str, options: str = "") -> list[dict]:  # type: ignore[type-arg]
    import json

    script = root / "train.py"
    tests = str(Path(__file__).parent.parent)
    script.write_text(SCRIPT.format(tests=tests, module=module, options=options))
    result = subprocess.run(
        [sys.executable, str(script), str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    files = [root / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), result.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def stems(root: Path, suffix: str) -> set[str]:
    return {path.name.removesuffix(suffix) for path in (root / "checkpoints").glob(f"*{suffix}")}


def test_each_model_is_written_once_by_rank_zero(tmp_path: Path) -> None:
    first, second = run(tmp_path, "zoo.Classifier(zoo.cnn())", "core='torchscript'")
    assert (first["outcome"], second["outcome"]) == ("finished", "finished")
    assert second["reports"] == []
    assert len(first["reports"]) >= 3
    assert all(report["ok"] for report in first["reports"]), first["reports"]
    assert stems(tmp_path, ".onnx") == stems(tmp_path, ".ckpt")
    # Lightning routes training_step through forward: its batch dict must not become the inputs.
    assert [spec["name"] for spec in first["reports"][0]["inputs"]] == ["image"]


def test_a_forward_that_is_never_called_is_still_noticed(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "zoo.NoForward(zoo.cnn())", "core='trace'")
    assert {report["target"] for report in first["reports"]} == {"net"}


@pytest.mark.parametrize(("on_error", "outcome"), [("warn", "finished"), ("raise", "raised")])
def test_a_failure_on_rank_zero_leaves_nobody_waiting(
    on_error: str, outcome: str, tmp_path: Path
) -> None:
    options = f"core='trace', on_error={on_error!r}"
    first, second = run(tmp_path, "zoo.Classifier(zoo.DataBranch())", options)
    assert first["outcome"] == second["outcome"] == outcome
    assert not any(report["ok"] for report in first["reports"])
