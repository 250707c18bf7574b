"""The wheel that is built of this tree has all it needs, and what it installs is known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
USE = """
    import sys
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel
    import onnxport
    from onnxport import OnnxExport

    assert onnxport.__file__.startswith(sys.prefix), onnxport.__file__
    export = OnnxExport(core="trace")
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=1, logger=False,
                         callbacks=[ModelCheckpoint("c"), export], enable_progress_bar=False)
    trainer.fit(BoringModel())
    assert [report.ok for report in export.reports] == [True], export.reports
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("onnxport-*.whl")
    return found


def new_environment(folder: Path) -> Path:
    """Make an empty environment; return its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def used(python: Path, folder: Path) -> None:
    """Train with the callback there, and run the command."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [str(python), "-c", textwrap.dedent(USE)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = subprocess.run(
        [str(python.with_name("onnxport")), "resume", "c"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout.strip() == "No model is owed here.", said.stderr


def test_the_wheel_has_all_files_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("onnxport-")}
    source = ROOT / "src"
    templates = (source / "onnxport" / "page" / "templates").iterdir()
    sources = {str(path.relative_to(source)) for path in (*source.rglob("*.py"), *templates)}
    assert names - {"onnxport/py.typed"} == sources


@pytest.mark.exhaustive
def test_the_wheel_works_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    install = [str(python), "-m", "pip", "install", "-qq", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # What it needs, which is installed here; after its own packages, and without this tree, which
    # is there by way of a .pth file: such files work in folders of packages alone.
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    used(python, tmp_path)


@pytest.mark.exhaustive
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    install = [str(python), "-m", "pip", "install", "-qq", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, f"{wheel}[all]"], check=True)
    used(python, tmp_path)


def test_what_the_gate_installs_is_what_was_tested_together() -> None:
    lines = (ROOT / "requirements-ci.txt").read_text().splitlines()
    locked = {}
    for line in (line for line in lines if not line.startswith("#")):
        found = re.fullmatch(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert found, line
        locked[found[1]] = found[2].partition("+")[0]
    text = (ROOT / "constraints.txt").read_text()
    pinned = {
        name.lower().replace("_", "-"): version.partition("+")[0]
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    }
    assert "torch" in locked
    assert {name: version for name, version in locked.items() if name in pinned} == {
        name: version for name, version in pinned.items() if name in locked
    }
    assert set(locked) - set(pinned) <= {"pip", "editables"}
