"""Each way in which Lightning spreads a training over processes: one model per checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together

import onnxport
from onnxport.exporter.ownership import read_metadata

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.worker,
    pytest.mark.exhaustive,  # the strategy of most people is that of test_ddp
]

TESTS = str(Path(__file__).parent.parent)

TOGETHER = f"""
    import json, sys, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {TESTS!r})
    import torch, zoo
    from pathlib import Path
    from torch import nn
    from lightning.pytorch.callbacks import (
        EMAWeightAveraging, ModelPruning, StochasticWeightAveraging,
    )
    from onnxport import OnnxExport

    class Half(nn.Module):
        "Has a head that no batch reaches."
        def __init__(self):
            super().__init__()
            self.net, self.idle = zoo.cnn(), nn.Linear(3, 3)

        def forward(self, image):
            return self.net(image)

    class Uneven(torch.utils.data.Sampler):
        "Gives each process batches of its own size."
        def __init__(self, rank):
            self.size = 4 + 3 * rank

        def __iter__(self):
            return iter([list(range(self.size))] * 5)

        def __len__(self):
            return 5

    KINDS = {{
        "ema": lambda: EMAWeightAveraging(decay=0.5),
        "swa": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
        "prune": lambda: ModelPruning("l1_unstructured", amount=0.3, use_global_unstructured=True),
    }}

    def train(root, export, strategy="ddp", uneven=False, precision="32-true", extra=None):
        callback = OnnxExport(core="trace")
        saves = zoo.checkpoints(root, save_top_k=1, save_last=True, monitor="val_loss")
        trainer = zoo.trainer(
            root, saves, *([callback] if export else []), *([KINDS[extra]()] if extra else []),
            strategy=strategy, devices=2, epochs=3, use_distributed_sampler=not uneven,
            precision=precision,
        )
        torch.manual_seed(0)
        module = zoo.Classifier(Half() if "unused" in strategy else zoo.cnn())
        losses = []
        step = module.training_step
        module.training_step = lambda *given: losses.append(step(*given)) or losses[-1]
        batches = zoo.loader(32)
        if uneven:
            batches = torch.utils.data.DataLoader(batches.dataset, batch_sampler=Uneven(rank))
        trainer.fit(module, batches, zoo.loader(32, shuffle=False))
        said = dict(
            losses=[loss.item() for loss in losses],
            reports=[json.loads(report.to_json()) for report in callback.reports],
        )
        (root / f"rank{{trainer.global_rank}}.json").write_text(json.dumps(said))

    import os
    rank = int(os.environ["LOCAL_RANK"])
    for name, options in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1], name), **options)
"""
UNUSED = {"strategy": "ddp_find_unused_parameters_true"}
CASES: dict[str, dict[str, Any]] = {
    "unused parameters": UNUSED,
    "batches of other sizes": UNUSED | {"uneven": True},
    "averaged": {"extra": "ema"},
    "stochastic averages": {"extra": "swa"},
    "pruned": {"extra": "prune"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    cases = {name: case | {"export": True} for name, case in CASES.items()}
    cases |= {f"{name}, plain": case | {"export": False} for name, case in CASES.items()}
    for name in cases:
        (root / name).mkdir()
    together(textwrap.dedent(TOGETHER), root, 2, str(root), json.dumps(cases))
    return root


def assert_mirrored(folder: Path) -> None:
    checkpoints = {path.stem: path for path in folder.glob("*.ckpt")}
    models = {path.stem: path for path in folder.glob("*.onnx")}
    assert set(models) == set(checkpoints)
    for stem, model in models.items():
        state = torch.load(checkpoints[stem], weights_only=False)["state_dict"]
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)


@pytest.mark.parametrize("case", list(CASES))
def test_training_is_what_it_was(case: str, trained: Path) -> None:
    for rank in (0, 1):
        said = json.loads((trained / case / f"rank{rank}.json").read_text())
        plain = json.loads((trained / f"{case}, plain" / f"rank{rank}.json").read_text())
        assert said["losses"] == plain["losses"]
        assert bool(said["reports"]) == (rank == 0)
        assert all(report["ok"] for report in said["reports"])
    assert_mirrored(trained / case / "checkpoints")


STARTED = f"""
    import sys, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {TESTS!r})
    import zoo
    from pathlib import Path
    from onnxport import OnnxExport

    if __name__ == "__main__":
        root = Path(sys.argv[1])
        saves = zoo.checkpoints(root, save_top_k=1, save_last=True, monitor="val_loss")
        export = OnnxExport(core="trace")
        trainer = zoo.trainer(root, saves, export, strategy=sys.argv[2], devices=2, epochs=2)
        trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(32), zoo.loader(32, shuffle=False))
"""


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_that_the_trainer_starts(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(STARTED))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), strategy],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "onnxport failed" not in run.stderr
    assert len(list((tmp_path / "checkpoints").glob("*.onnx"))) == 2
    assert_mirrored(tmp_path / "checkpoints")
