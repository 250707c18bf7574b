"""Write down which files the gate may install: ``requirements-ci.txt``, versions and hashes.

    .venv/bin/python .ci/lock.py

Versions are those of ``constraints.txt``; the files are those that pip chooses on this platform
(Linux, x86_64, Python 3.11, torch for the CPU).
"""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-ci.txt"
TOOLS = ("pip", "hatchling", "editables")
"""What installs, and what builds the package itself."""
HEAD = """\
# What the gate installs: these files and no others. Made by .ci/lock.py from constraints.txt, for
# Linux, x86_64, Python 3.11 and torch for the CPU. Whoever uses onnxport needs none of this.
"""


def main() -> None:
    """Ask pip, and write."""
    wanted = ["-c", "constraints.txt", "-e", ".[all]", "--group", "test", "--group", "lint", *TOOLS]
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
    LOCK.write_text(HEAD + "".join(sorted(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
