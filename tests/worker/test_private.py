"""What worker and courier are told is nobody else's: no port, no name, no file to be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.worker, pytest.mark.exhaustive]

SCRIPT = """
    import json, os, sys, threading, time
    from pathlib import Path
    os.umask(0)  # whoever relies on it, has nothing to rely on
    import zoo
    from faults.ground import workers_of
    from onnxport import MLflow, OnnxExport

    root, temporary = Path(sys.argv[1]), Path(os.environ["TMPDIR"])
    found = {"open": set(), "sockets": set(), "workers": 0, "seen": set()}

    def inodes(pid):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:"):
                yield target[8:-1]

    def look():
        while True:
            time.sleep(0.01)
            workers = workers_of()
            found["workers"] = max(found["workers"], len(workers))
            for path in temporary.rglob("*"):
                name = str(path.relative_to(temporary))
                found["seen"].add(name)
                try:
                    found_there = path.lstat()
                    mode, size = found_there.st_mode, found_there.st_size
                    shut = (temporary / Path(name).parts[0]).lstat().st_mode & 0o077 == 0
                except OSError:
                    continue
                if not shut:
                    found["open"].add(f"{name} {mode & 0o777:o} {size}")
            try:
                ours = {inode for pid in [os.getpid(), *workers] for inode in inodes(pid)}
            except OSError:  # a worker has ended
                continue
            for table, inode, listens in (("tcp", 9, "0A"), ("tcp6", 9, "0A")):
                for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[inode] in ours and words[3] == listens:
                        found["sockets"].add(line)
            for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
                words = line.split()
                if len(words) > 7 and words[6] in ours:  # it has a name
                    found["sockets"].add(line)

    threading.Thread(target=look, daemon=True).start()
    store = MLflow(tracking_uri=f"sqlite:///{root}/mlflow.db")
    trainer = zoo.trainer(root, zoo.checkpoints(root, save_top_k=-1),
                          OnnxExport(core="trace", mlflow=store), epochs=3)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    print(json.dumps({key: sorted(value) if isinstance(value, set) else value
                      for key, value in found.items()}))
"""


def test_nothing_of_the_worker_is_open_to_others(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)]),
    }
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "run")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["workers"] > 0
    assert any(name.startswith("onnxport-") for name in found["seen"])
    assert found["sockets"] == []
    # Not ours: what torch and MLflow leave. A lock of ours holds nothing.
    ours = [name for name in found["open"] if name.startswith(("onnxport", "tmp", ".onnxport"))]
    assert [name for name in ours if ".lock " not in name or not name.endswith(" 0")] == []
