"""Two workers of Ray Train: the reported checkpoint has its model in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime
import pytest
import torch
from processes import TESTS

import onnxport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ray = pytest.importorskip("ray", reason="make test-scale installs it")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.worker,
]


def loop() -> Callable[[dict[str, Any]], None]:
    """Return what each worker runs; by value, because Ray's processes know no test."""

    def train(options: dict[str, Any]) -> None:
        """Run in each worker; the same callback as anywhere else."""
        import sys

        sys.path.insert(0, options["tests"])
        import lightning.pytorch as pl
        import zoo
        from ray.train.lightning import (
            RayDDPStrategy,
            RayLightningEnvironment,
            RayTrainReportCallback,
            prepare_trainer,
        )

        from onnxport import OnnxExport

        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices="auto",
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            callbacks=[RayTrainReportCallback(), OnnxExport(core="trace")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=False,
        )
        trainer = prepare_trainer(trainer)
        trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(32), zoo.loader(32, shuffle=False))

    return train


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_the_reported_checkpoint_has_its_model(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        loop(),
        train_loop_config={"tests": TESTS},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(name="run", storage_path=str(tmp_path)),
    ).fit()
    reported = [checkpoint for checkpoint, _ in result.best_checkpoints]
    assert len(reported) == 2
    for checkpoint in reported:
        with checkpoint.as_directory() as folder:
            (model,) = (tmp_path.__class__(folder)).glob("*.onnx")
            state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
            assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
            rows = {"image": torch.randn(7, 1, 8, 8).numpy()}
            (logits,) = onnxruntime.InferenceSession(model).run(None, rows)
            assert logits.shape == (7, 3)
