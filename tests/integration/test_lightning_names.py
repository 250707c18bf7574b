"""One callback for both names of Lightning, whichever was imported, in any order."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest

import onnxport
from onnxport import OnnxExport
from onnxport.callbacks.lightning import callback as written

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SCRIPT = """
{imports}
import sys, torch, warnings
warnings.simplefilter("ignore")
from torch import nn

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, _):
        return self(batch[0]).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), 4)
callback = OnnxExport(core="trace")
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                     default_root_dir=sys.argv[1], enable_progress_bar=False)
trainer.fit(Module(), data)
assert isinstance(callback, OnnxExport)
assert isinstance(callback, pl.Callback)
(report,) = callback.reports
assert report.ok, report.error
print("proven", report.path)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from onnxport import OnnxExport\nimport pytorch_lightning as pl",
        *(
            pytest.param(imports, marks=pytest.mark.exhaustive)
            for imports in (
                "import pytorch_lightning as pl\nfrom onnxport import OnnxExport",
                "from onnxport import OnnxExport\nimport lightning.pytorch as pl",
                "import lightning as pl\nfrom onnxport import OnnxExport",
                "import lightning\nimport pytorch_lightning as pl\nfrom onnxport import OnnxExport",
            )
        ),
    ],
)
def test_the_callback_belongs_to_the_lightning_that_was_imported(
    imports: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(imports=imports))
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "proven" in result.stdout, result.stderr


def test_a_callback_survives_pickling_and_keeps_its_options() -> None:
    callback = OnnxExport(core="trace", when="end", register="name")
    copy = pickle.loads(pickle.dumps(callback))  # noqa: S301 - our own bytes
    assert isinstance(copy, OnnxExport)
    assert copy.settings == callback.settings
    assert copy.reports == []


def test_the_class_is_a_callback_before_anything_is_made_of_it() -> None:
    assert issubclass(onnxport.OnnxExport, pl.Callback)
    assert issubclass(onnxport.callbacks.lightning.OnnxExport, pl.Callback)
    path = f"{onnxport.OnnxExport.__module__}.{onnxport.OnnxExport.__qualname__}"
    assert pydoc.locate(path) is onnxport.OnnxExport
    assert pickle.loads(pickle.dumps(onnxport.OnnxExport)) is onnxport.OnnxExport  # noqa: S301


def test_editors_are_shown_its_arguments() -> None:
    expected = inspect.signature(OnnxExport.__init__).parameters
    shown = inspect.signature(OnnxExport).parameters
    assert ["self", *shown] == list(expected)
    assert shown["when"] == expected["when"]
    assert inspect.signature(type(OnnxExport())).parameters == shown

    class Other(OnnxExport):
        def __init__(self, mine: int, **options: Any) -> None:
            super().__init__(**options)
            self.mine = mine

    assert list(inspect.signature(Other).parameters) == ["mine", "options"]


def test_whatever_was_made_of_it_at_whatever_time_is_an_instance_of_it() -> None:
    for kind in (OnnxExport, written.OnnxExport):
        for callback in (OnnxExport(), written.OnnxExport(), Mine()):
            assert isinstance(callback, kind)
            assert isinstance(callback, pl.Callback)
    assert not isinstance(OnnxExport(), Mine)
    assert issubclass(Mine, OnnxExport)
    assert issubclass(Mine, written.OnnxExport)
    assert not issubclass(pl.Callback, OnnxExport)


class Mine(OnnxExport):
    """A class of the user's, made when Lightning was imported."""

    def should_export(self, trainer: object, checkpoint: str) -> bool:
        return "best" in checkpoint


def test_a_subclass_survives_pickling_as_itself() -> None:
    copy = pickle.loads(pickle.dumps(Mine(core="trace")))  # noqa: S301
    assert isinstance(copy, Mine)
    assert copy.should_export(None, "best.ckpt")
    assert copy.settings == Mine(core="trace").settings


CLI = """
import sys
{imports}
import torch
from torch import nn

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, _):
        return self(batch[0]).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(8, 4))
        return torch.utils.data.DataLoader(data, 4)

cli = LightningCLI(Module, save_config_kwargs={{"overwrite": True}})
found = [callback for callback in cli.trainer.callbacks if hasattr(callback, "reports")]
print("proven", [report.ok for callback in found for report in callback.reports])
"""


LONG = "onnxport.callbacks.lightning.OnnxExport"


@pytest.mark.parametrize(
    ("framework", "path"),
    [
        ("lightning.pytorch", "onnxport.OnnxExport"),
        pytest.param("pytorch_lightning", LONG, marks=pytest.mark.exhaustive),
        pytest.param("lightning.pytorch", LONG, marks=pytest.mark.exhaustive),
        pytest.param("pytorch_lightning", "onnxport.OnnxExport", marks=pytest.mark.exhaustive),
    ],
)
def test_the_command_line_takes_the_callback_by_its_path(
    framework: str, path: str, tmp_path: Path
) -> None:
    pytest.importorskip("jsonargparse")
    script = tmp_path / "main.py"
    imports = f"import {framework} as pl\nfrom {framework}.cli import LightningCLI"
    script.write_text(CLI.format(imports=imports))

    def run(*arguments: str) -> None:
        command = [sys.executable, str(script), "fit", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert "proven [True]" in result.stdout, result.stderr

    quiet = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"]
    run(*quiet, f"--trainer.callbacks+={path}", "--trainer.callbacks.core=trace")
    saved = tmp_path / "config.yaml"
    assert "core: trace" in saved.read_text()
    run("--config", str(saved), "--trainer.max_epochs=1")
