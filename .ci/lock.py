"""Write down which files the gate may install, with versions and hashes.

    .venv/bin/python .ci/lock.py

``requirements-ci.txt`` is the environment: versions are those of ``constraints.txt``; the files are
those that pip chooses on this platform (Linux, x86_64, Python 3.11, torch for the CPU).
``requirements-openvino.txt`` is the second ONNX Runtime that tests prove models with; it has the
module's name, so it gets a folder of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-ci.txt"
TOOLS = ("pip", "hatchling", "editables")
"""What installs, and what builds the package itself."""
HEAD = """\
# What the gate installs: these files and no others. Made by .ci/lock.py from constraints.txt, for
# Linux, x86_64, Python 3.11 and torch for the CPU. Whoever uses onnxport needs none of this.
"""


OPENVINO = ROOT / "requirements-openvino.txt"
OPENVINO_WANTED = ("--no-deps", "onnxruntime-openvino==1.24.1")
OPENVINO_HEAD = """\
# A second ONNX Runtime, for tests on OpenVINO, in a folder of its own. Made by .ci/lock.py.
"""


def main() -> None:
    """Ask pip, and write."""
    wanted = ["-c", "constraints.txt", "-e", ".[all]", "--group", "test", "--group", "lint"]
    wanted += ["--group", "docs", *TOOLS]
    LOCK.write_text(HEAD + _locked(wanted), encoding="utf-8")
    OPENVINO.write_text(OPENVINO_HEAD + _locked(OPENVINO_WANTED), encoding="utf-8")


def _locked(wanted: Iterable[str]) -> str:
    """Return a line for each file that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *wanted]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = []
    for found in json.loads(said)["install"]:
        archive = found["download_info"].get("archive_info")
        if archive is None:  # the package itself
            continue
        name, version = found["metadata"]["name"].lower(), found["metadata"]["version"]
        digest = archive.get("hashes", {}).get("sha256")
        if digest is None:
            file = Path(unquote(urlsplit(found["download_info"]["url"]).path))
            digest = sha256(file.read_bytes()).hexdigest()
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}\n")
    return "".join(sorted(lines))


if __name__ == "__main__":
    main()
