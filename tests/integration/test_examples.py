"""Every example runs as the docs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_the_main_job_ends_with_a_served_champion(tmp_path: Path) -> None:
    said = run("digits.py", tmp_path / "demo")
    assert "served champion, 1 test image(s): equal to PyTorch" in said
    assert "served champion, 5 test image(s): equal to PyTorch" in said
    assert "champion" in said
    assert "mlflow ui --backend-store-uri sqlite:///" in said
    folder = tmp_path / "demo" / "checkpoints"
    models = {path.stem for path in folder.glob("*.onnx")}
    assert models == {path.stem for path in folder.glob("*.ckpt")}
    assert len(models) == 2


FRAMEWORKS = {
    "accelerate_digits.py": ("the champion reads", 2),
    "fabric_digits.py": ("the champion reads", 3),
    "huggingface_digits.py": ("the champion reads", 3),
    "huggingface_text.py": ("Fit the estimator to the training samples. -> ", 2),
    "ignite_digits.py": ("the champion reads", 2),
    "loop_digits.py": ("the champion reads", 3),
}
"""What each says in the end, and how many checkpoints it keeps."""


IN_SHORT = ("huggingface_text.py",)
"""The others take as long, and what they show is under the contract."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in IN_SHORT))
        for name in FRAMEWORKS
    ],
)
def test_with_each_framework_a_champion_answers(name: str, tmp_path: Path) -> None:
    sentence, kept = FRAMEWORKS[name]
    assert sentence in run(name, tmp_path / "demo")
    made = (tmp_path / "demo").rglob("*.onnx")
    assert len([path for path in made if "artifacts" not in str(path)]) == kept


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"digits.py", *FRAMEWORKS}
