"""One callback for both names of Lightning, whichever was imported, in any order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from onnxport import OnnxExport

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
        "import pytorch_lightning as pl\nfrom onnxport import OnnxExport",
        "from onnxport import OnnxExport\nimport lightning.pytorch as pl",
        "import lightning as pl\nfrom onnxport import OnnxExport",
        "import lightning\nimport pytorch_lightning as pl\nfrom onnxport import OnnxExport",
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
    assert (copy.options, copy.cadence) == (callback.options, callback.cadence)
    assert copy.reports == []
