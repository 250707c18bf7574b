"""A model that is being made while its checkpoint changes never gets its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from onnxport import Example
from onnxport.callbacks.owed import note, note_anew, sweep, ticket
from onnxport.config import ExportOptions
from onnxport.exporter.writer import withdraw_staged
from onnxport.pipeline import CheckpointGoneError, ExportJob, GivenModule, Pipeline
from onnxport.report import Provenance

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("stage", ["plan", "export", "prove", "publish"])
def test_a_model_is_not_published_once_its_checkpoint_changes(stage: str, tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "last.ckpt", tmp_path / "last.onnx"
    checkpoint.touch()
    note(path, "", Provenance(checkpoint=str(checkpoint)))
    job = ExportJob(
        source=GivenModule(nn.Linear(3, 2).eval()),
        examples=(Example((torch.randn(4, 3),)),),
        path=path,
        options=ExportOptions(core="trace"),
        ticket=ticket(path),
    )
    begun: list[str] = []

    def change(name: str, _: str | None) -> None:
        begun.append(name)
        if name == stage:  # as training does before a save
            note_anew(path, "", str(checkpoint))
            withdraw_staged(path)

    pipeline = Pipeline()
    pipeline.tell = change
    with pytest.raises(CheckpointGoneError):
        pipeline.run(job)
    assert stage in begun
    sweep([tmp_path])
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", ".last.onnx.pending"}
