"""MLflow's Dockerfile for the champion, executed without Docker: each step, in a fresh environment.

What is the image's own business is left out: packages of its system, rights, nginx.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from registered import register
from servers import ask, running
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.integration,
    pytest.mark.exhaustive,  # installs MLflow anew
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

MODEL = Path("/opt/ml/model")
"""MLflow's code has this path in it."""
SERVER = "http://127.0.0.1:8000"
"""Where it listens for nginx, in its code, too."""
OF_THE_SYSTEM = ("apt", "chmod", "rm -rf /var/lib/apt", "printf")


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """Return instructions with their arguments, lines that go on joined."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The image's place for the model, for as long as the test runs."""
    if MODEL.parent.exists():
        pytest.skip(f"{MODEL.parent} is in use")
    try:
        MODEL.parent.symlink_to(tmp_path / "ml")
    except OSError as error:
        pytest.skip(f"{MODEL.parent} cannot be made: {error}")
    (tmp_path / "ml").mkdir()
    yield tmp_path
    MODEL.parent.unlink()


def generate(folder: Path, store: str) -> Path:
    """Let MLflow write the Dockerfile of the champion; return its folder."""
    mlflow = [sys.executable, "-m", "mlflow", "models", "generate-dockerfile"]
    subprocess.run(
        [*mlflow, "-m", "models:/scored@champion", "-d", "image"],
        cwd=folder,
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
        check=True,
        capture_output=True,
    )
    return folder / "image"


def fresh_environment(folder: Path) -> dict[str, str]:
    """Make a Python with nothing in it; return the variables with which it is found."""
    subprocess.run([sys.executable, "-m", "venv", folder / "python"], check=True)
    path = f"{folder / 'python' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ours = ("PYTHON", "VIRTUAL", "MLFLOW")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PATH": path, "DISABLE_NGINX": "true", "HOME": str(folder)}


def build(image: Path, environment: dict[str, str]) -> list[str]:
    """Execute the steps; return the command that the image starts with."""
    entry: list[str] = []
    for instruction, arguments in steps((image / "Dockerfile").read_text()):
        if instruction == "FROM":
            version = ".".join(map(str, sys.version_info[:2]))
            assert arguments.startswith(f"python:{version}")
        elif instruction == "COPY":
            source, target = arguments.split()
            shutil.copytree(image / source, target)
        elif instruction == "ENV":
            name, _, value = arguments.partition("=")
            environment[name] = value
        elif instruction == "RUN" and not arguments.startswith(OF_THE_SYSTEM):
            said(["/bin/sh", "-c", arguments], environment)
        elif instruction == "ENTRYPOINT":
            entry = json.loads(arguments)
        else:
            assert instruction in {"RUN", "WORKDIR"}, f"{instruction} {arguments}"
    return entry


def said(command: list[str], environment: dict[str, str]) -> str:
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_steps_of_the_dockerfile_make_a_server_that_answers_as_pytorch_does(
    root: Path, store: str
) -> None:
    torch.manual_seed(0)
    module, rows = nn.Linear(6, 3).eval(), torch.randn(5, 6)
    register(store, root, module, {"input": rows})
    environment = fresh_environment(root)
    entry = build(generate(root, store), environment)
    installed = said(["python", "-m", "pip", "list"], environment)
    assert re.search(r"^onnxruntime ", installed, flags=re.MULTILINE)
    assert not re.search(r"^(torch|onnxport|lightning) ", installed, flags=re.MULTILINE)
    with running(entry, SERVER, "ping", root / "container.log", environment):
        found = ask(SERVER, {"inputs": {"input": rows.tolist()}})
    with torch.no_grad():
        expected = module(rows).numpy()
    np.testing.assert_allclose(np.array(found["output"]), expected, rtol=1e-4, atol=1e-5)
