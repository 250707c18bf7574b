"""Weights that are spread over processes (FSDP2, FSDP1, tensor parallelism): models are whole."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import onnxport
from onnxport.exporter.ownership import read_metadata

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.worker]

SCRIPT = """
    import json, os, signal, sys, time, warnings
    warnings.simplefilter("ignore")
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from torch import nn
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, fsdp
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, parallelize_module,
    )
    from torch.distributed.tensor import Replicate
    from onnxport import Background, OnnxExport
    from onnxport.worker.client import worker_for

    data, tensor, options = 1, 1, {}

    # FSDP1 takes a CPU if it is told to, and Lightning has no words for that. Weights that are on
    # their way to the CPU must not be there already (a segmentation fault, torch 2.13).
    class CPU:
        index, type = torch.device("cpu"), "cpu"

    class FSDP1(FSDPStrategy):
        def _setup_model(self, model):
            self.parallel_devices, devices = [CPU] * data, self.parallel_devices
            model = super()._setup_model(model)
            self.parallel_devices = devices
            return model

    def whole(module, world_size, rank0_only=True):
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel
        from torch.distributed.fsdp import FullOptimStateDictConfig, StateDictType
        return FullyShardedDataParallel.state_dict_type(
            module, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=rank0_only),
            FullOptimStateDictConfig(rank0_only=rank0_only),
        )

    fsdp._get_full_state_dict_context = whole

    def strategy():
        if options["flat"] is None:
            return ModelParallelStrategy(
                data_parallel_size=data, tensor_parallel_size=tensor,
                save_distributed_checkpoint=options["distributed"],
            )
        return FSDP1(
            state_dict_type="sharded" if options["distributed"] else "full",
            auto_wrap_policy={nn.Linear}, process_group_backend="gloo", **options["flat"],
        )

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
            self.norm, self.scale = nn.LayerNorm(32), 2.0
            self.register_buffer("offset", torch.ones(4))

        def configure_model(self):
            if tensor > 1:
                plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
                if options["norm"]:
                    plan = {"second": ColwiseParallel(output_layouts=Replicate())}
                parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
            if data > 1 and options["flat"] is None:
                for layer in (self.first, self.second, self):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def forward(self, features):
            hidden = self.first(features).relu()
            hidden = self.norm(hidden) if options["norm"] else hidden
            return self.second(hidden) * self.scale + self.offset

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            losses.append(loss.item())
            return loss

        def on_save_checkpoint(self, checkpoint):
            for name in options["without"]:
                del checkpoint["state_dict"][name]

        def on_train_end(self):
            # As the tuner does, for itself.
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir, ".lr_find_x.ckpt"))

        def configure_optimizers(self):
            return torch.optim.Adam(self.trainer.model.parameters(), 0.01)

    class Stops(Callback):
        "Stops the worker when the first model is there; nobody waits for the others."

        def on_train_epoch_start(self, trainer, module):
            if trainer.is_global_zero and trainer.current_epoch == 2:
                while not self.export.reports:
                    time.sleep(0.05)
                os.kill(worker_for(self.export.settings.background, 0).pid, signal.SIGSTOP)

    def train(root):
        saves = ModelCheckpoint(root / "c", save_top_k=1, monitor="loss", save_last=True)
        background = Background(drain_s=0.1) if options["stops"] else True
        export = OnnxExport(core="trace", when=options["when"], background=background)
        kept = [saves] if options["saves"] else []
        stops = Stops()
        stops.export = export
        kept += [stops] if options["stops"] else []
        trainer = pl.Trainer(
            accelerator="cpu", devices=data * tensor, max_epochs=3, logger=False,
            strategy=strategy(), default_root_dir=root, precision=options["precision"],
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*kept, *([export] if options["export"] else [])],
            enable_checkpointing=options["saves"],
        )
        trainer.fit(Net(), torch.utils.data.DataLoader(rows, 8))
        said = {"losses": losses, "reports": [json.loads(r.to_json()) for r in export.reports]}
        said["tried"] = [[r.ok, r.error] for r in export.preflight_reports]
        (root / f"rank{trainer.global_rank}.json").write_text(json.dumps(said))

    torch.manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(0, 4, (64,)))
    # One after the other in the same processes: starting them takes longer than training.
    for name, options in json.loads(sys.argv[2]).items():
        data, tensor, losses = options["data"], options["tensor"], []
        train(Path(sys.argv[1], name))
"""


def run(root: Path, processes: int, cases: dict[str, dict[str, Any]]) -> None:
    defaults = {"data": processes, "tensor": 1, "distributed": True, "norm": True}
    defaults |= {"export": True, "when": "checkpoint", "saves": True, "without": []}
    defaults |= {"stops": False, "flat": None, "precision": None}
    chosen = {name: defaults | options for name, options in cases.items()}
    for name in chosen:
        (root / name).mkdir()
    together(textwrap.dedent(SCRIPT), root, processes, str(root), json.dumps(chosen))


def state_of(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    if checkpoint.is_dir():
        whole = folder / f"{checkpoint.stem}.pt"
        dcp_to_torch_save(checkpoint, whole)
        checkpoint = whole
    content = torch.load(checkpoint, weights_only=False)
    return content["state_dict"] if "state_dict" in content else content["model"]  # FSDP1's


TENSOR = {"data": 1, "tensor": 2}
CASES: dict[str, dict[str, Any]] = {
    "fsdp, distributed": {},
    "fsdp, full": {"distributed": False},
    "tensor, distributed": {**TENSOR, "norm": False},
    "tensor, full": {**TENSOR, "distributed": False},
    "fsdp1, sharded": {"flat": {}},
    "fsdp1, full": {"flat": {"sharding_strategy": "SHARD_GRAD_OP"}, "distributed": False},
    "fsdp1, flat alone": {"flat": {"use_orig_params": False}, "precision": "bf16-mixed"},
}


PLAIN = {name: name for name in CASES} | {"fsdp, full": "fsdp, distributed"}
"""With which training without the callback a case is compared: how it saves makes no difference."""

AT_END: dict[str, dict[str, Any]] = {
    "end, distributed": {"when": "end"},
    "end, no checkpoint": {"saves": False},
    "end, fsdp1, no checkpoint": {"saves": False, "flat": {}, "distributed": False},
}


SHORT = "fsdp, distributed"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case, with the callback and without, trained by two processes."""
    root = tmp_path_factory.mktemp("sharded")
    run(root, 2, {SHORT: CASES[SHORT], f"{SHORT}, plain": CASES[SHORT] | {"export": False}})
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, with the callback and without, trained by two processes."""
    root = tmp_path_factory.mktemp("sharded")
    plain = {
        f"{name}, plain": CASES[name] | {"export": False} for name in dict.fromkeys(PLAIN.values())
    }
    others = {"lacking": {"without": ["first.weight"]}, "owed": {"stops": True}}
    others |= {"owed, fsdp1": {"stops": True, "flat": {}}}
    run(root, 2, CASES | plain | AT_END | others)
    return root


def test_models_of_spread_weights_are_whole(trained_once: Path, tmp_path: Path) -> None:
    assert_whole(trained_once / SHORT, trained_once / f"{SHORT}, plain", 2, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(CASES))
def test_models_are_whole_and_training_is_what_it_was(
    case: str, trained: Path, tmp_path: Path
) -> None:
    assert_whole(trained / case, trained / f"{PLAIN[case]}, plain", 2, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(AT_END))
def test_the_weights_of_the_end_are_whole(case: str, trained: Path, tmp_path: Path) -> None:
    first, second = said_by(trained / case, 2)
    (report,) = first["reports"]
    assert report["error"] is None
    assert second["reports"] == []
    assert report["weights_sha256"] == read_metadata(Path(report["path"]))["weights_sha256"]
    if AT_END[case].get("saves", True):
        state = state_of(Path(report["checkpoint"]), tmp_path)
        assert report["weights_sha256"] == onnxport.weights_sha256(state)
        assert report["epoch"] is not None


@pytest.mark.exhaustive
def test_a_checkpoint_without_a_tensor_that_is_spread_has_no_model_and_says_so(
    trained: Path,
) -> None:
    first, _ = said_by(trained / "lacking", 2)
    assert first["losses"] == said_by(trained / "fsdp, distributed, plain", 2)[0]["losses"]
    assert first["reports"]
    for report in first["reports"]:
        assert "does not hold 'first.weight'" in report["error"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["owed", "owed, fsdp1"])
def test_what_is_owed_is_made_from_the_parts_alone(
    case: str, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"  # a run may have been moved
    shutil.copytree(trained / case / "c", folder)
    missing = {path.stem for path in folder.glob("*.ckpt")} - {
        path.stem for path in folder.glob("*.onnx")
    }
    assert missing
    reports = onnxport.resume(folder)
    assert [report.error for report in reports if not report.ok] == []
    assert missing <= {Path(report.path).stem for report in reports}  # or one was saved anew
    for checkpoint in folder.glob("*.ckpt"):
        state = state_of(checkpoint, tmp_path)
        model = checkpoint.with_suffix(".onnx")
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)


@pytest.mark.exhaustive
def test_sharded_in_two_ways(tmp_path: Path) -> None:
    both = {"data": 2, "tensor": 2, "norm": False}
    run(tmp_path, 4, {"with": both, "plain": both | {"export": False}})
    assert_whole(tmp_path / "with", tmp_path / "plain", 4, tmp_path)


def assert_whole(root: Path, plain: Path, processes: int, folder: Path) -> None:
    """Compare a training's models with its checkpoints, and its losses with a plain one's."""
    first, *others = said_by(root, processes)
    without = said_by(plain, processes)
    assert [rank["losses"] for rank in (first, *others)] == [rank["losses"] for rank in without]
    assert all(rank["reports"] == rank["tried"] == [] for rank in others)
    assert first["tried"] == [[True, None]]  # before the first checkpoint
    assert [report["error"] for report in first["reports"] if not report["ok"]] == []
    checkpoints = {path.stem: path for path in (root / "c").glob("*.ckpt")}
    models = {path.stem: path for path in (root / "c").glob("*.onnx")}
    assert set(models) == set(checkpoints)
    assert "last" in models
    assert not list(root.glob("*.onnx"))  # what the tuner saves is no checkpoint
    for stem, model in models.items():
        state = state_of(checkpoints[stem], folder)
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    for report in first["reports"]:
        assert report["dynamic_axes"]["features"] == {"0": "batch"}


def said_by(root: Path, processes: int) -> list[dict[str, Any]]:
    files = [root / f"rank{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]
