"""DeepSpeed's stages 1 to 3. Lightning gives it GPUs only; the engine itself also runs on a CPU."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from processes import TESTS, together

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("deepspeed", reason="make test-scale installs it")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.worker]

SCRIPT = f"""
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, {TESTS!r})
    import lightning.pytorch.strategies.deepspeed as strategies
    import torch, zoo
    from pathlib import Path
    from lightning.pytorch.accelerators import CPUAccelerator
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    import onnxport
    from onnxport import OnnxExport
    from onnxport.exporter.ownership import read_metadata

    strategies.CUDAAccelerator = CPUAccelerator
    strategies._validate_device_index_selection = lambda devices: None

    class OnCPU(strategies.DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)

    class Net(zoo.Classifier):
        def configure_model(self):
            if self.net is None:
                torch.manual_seed(0)
                self.net = zoo.cnn()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    def equal(model):
        checkpoint = str(model.with_suffix(".ckpt"))
        state = get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag="checkpoint")
        return onnxport.weights_sha256(state) == read_metadata(model)["weights_sha256"]

    def train(root, stage, export, when):
        callback = OnnxExport(core="trace", when=when)
        saves = zoo.checkpoints(root, save_top_k=1, save_last=True)
        trainer = zoo.trainer(
            root, saves, *([callback] if export else []), devices=2, epochs=3,
            strategy=OnCPU(stage=stage, process_group_backend="gloo"),
        )
        module = Net(None if stage == 3 else zoo.cnn())
        trainer.fit(module, zoo.loader(32))
        trainer.strategy.barrier()
        models = sorted(root.rglob("*.onnx")) if trainer.is_global_zero else []
        said = dict(
            losses=module.losses, models={{model.stem: equal(model) for model in models}},
            reports=[json.loads(report.to_json()) for report in callback.reports],
        )
        (root / f"rank{{trainer.global_rank}}.json").write_text(json.dumps(said))

    for name, options in json.loads(sys.argv[2]).items():
        root = Path(sys.argv[1], name)
        torch.manual_seed(0)
        train(root, **options)
"""
CASES: dict[str, dict[str, Any]] = {
    f"stage {stage}, {when}": {"stage": stage, "export": True, "when": when}
    for stage in (1, 2, 3)
    for when in ("checkpoint", "end")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deepspeed")
    plain = {
        f"plain {stage}": CASES[f"stage {stage}, end"] | {"export": False} for stage in (1, 2, 3)
    }
    for name in CASES | plain:
        (root / name).mkdir()
    together(textwrap.dedent(SCRIPT), root, 2, str(root), json.dumps(CASES | plain))
    return root


@pytest.mark.parametrize("case", list(CASES))
def test_models_hold_what_the_checkpoints_hold(case: str, trained: Path) -> None:
    first, second = (
        json.loads((trained / case / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    plain = trained / f"plain {CASES[case]['stage']}"
    for rank, said in enumerate((first, second)):
        assert said["losses"] == json.loads((plain / f"rank{rank}.json").read_text())["losses"]
    assert [report["error"] for report in first["reports"] if not report["ok"]] == []
    assert second["reports"] == []
    checkpoints = {path.stem for path in (trained / case / "checkpoints").glob("*.ckpt")}
    expected = checkpoints if CASES[case]["when"] == "checkpoint" else checkpoints - {"last"}
    assert first["models"] == dict.fromkeys(expected, True)
