"""Runs what a page of the documentation shows, block by block, as its reader would.

As a program: ``python tests/pages.py RESULTS FOLDER PAGE...`` runs each page in a folder of its own
below FOLDER, which holds ``digits.py`` of the tutorial, and writes what went wrong to RESULTS.

A comment before a block says what is done with it: ``<!-- file: name -->`` writes it to a file,
``<!-- not run: reason -->`` leaves it out. Otherwise Python goes on from the blocks before it,
``console`` blocks run each line after ``$``, and a ``text`` block, or what follows a command, is
what must have been printed last; ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable

DOCS = Path(__file__).parents[1] / "docs"
PORT = "5001"
"""The port that pages show; a free one is used in its place."""
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>file|not run): (?P<value>[^\n]+?) -->\n+)?"
    r"^(?P<fence>`{3,})(?P<kind>[^\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what a comment before it says."""

    kind: str
    text: str
    line: int
    mark: str | None = None
    value: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, but for directives of the site."""
    source = page.read_text(encoding="utf-8")
    found = [
        Block(
            kind=match["kind"].strip(),
            text=match["text"],
            line=source.count("\n", 0, match.start("text")),
            mark=match["mark"],
            value=match["value"],
        )
        for match in _FENCE.finditer(source)
    ]
    return [block for block in found if not block.kind.startswith("{")]


def matches(expected: str, printed: str) -> bool:
    """Tell whether what was printed ends as a page shows; ``...`` stands for anything.

    Before it may come what others print: a summary of the module, a progress bar.
    """
    pattern = r"(?:[^\n]*\n)*?"
    for line in expected.rstrip().splitlines():
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += re.escape(line.rstrip()).replace(r"\.\.\.", r"[^\n]*?") + r"[ ]*\n"
    return re.fullmatch(pattern, printed.rstrip() + "\n") is not None


class Reader:
    """Does what a page says, in one folder."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.scope: dict[str, Any] = {"__name__": "__main__"}
        self.port = str(free_port())
        self.servers: list[subprocess.Popen[bytes]] = []
        self.printed = ""
        self.wrong: list[str] = []

    def read(self) -> None:
        """Run all blocks.

        Raises:
            AssertionError: If something else is printed than the page shows.
        """
        try:
            for block in blocks_of(self.page):
                if block.mark == "file":
                    path = self.folder / str(block.value)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(block.text, encoding="utf-8")
                elif block.mark is None:
                    self._do(block)
            assert not self.wrong, "\n\n".join(self.wrong)
        finally:
            for server in self.servers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGTERM)
                server.wait()

    def _do(self, block: Block) -> None:
        if block.kind == "python":
            self.printed = self._python(block)
        elif block.kind == "text":
            self._require(block.text, self.printed, f"line {block.line}")
        elif block.kind == "console":
            for command, expected in commands_of(block.text):
                printed = self._command(command)
                if expected:
                    self._require(expected, printed, command)
        else:
            raise AssertionError(f"line {block.line}: nobody runs a block of {block.kind!r}")

    def _require(self, expected: str, printed: str, where: str) -> None:
        expected = expected.replace(PORT, self.port)
        if not matches(expected, printed):
            self.wrong.append(f"{where}: the page shows\n{expected}\nprinted is\n{printed}")

    def _python(self, block: Block) -> str:
        text = block.text.replace(PORT, self.port)
        name = str(self.folder / f"block-{block.line}.py")
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        Path(name).write_text(text, encoding="utf-8")  # exporters look at sources
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, name, "exec"), self.scope)  # noqa: S102 - our own page
        return printed.getvalue()

    def _command(self, command: str) -> str:
        command = command.replace(PORT, self.port)
        words = shlex.split(command)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
            return ""
        if words[:2] in (["onnxport", "serve"], ["mlflow", "server"]):
            self._serve(words)
            return ""
        if words[0] == "onnxport":
            return _onnxport(words[1:])
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            check=False,
            text=True,
            capture_output=True,
            cwd=self.folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        if done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout

    def _serve(self, words: list[str]) -> None:
        """Start a server, and wait until it answers.

        Raises:
            AssertionError: If it does not.
        """
        ours = ["-c", "from onnxport.cli import main; main()"]
        command = [sys.executable, *(ours if words[0] == "onnxport" else ["-m", "mlflow"])]
        log = (self.folder / "server.log").open("wb")
        server = subprocess.Popen(
            [*command, *words[1:]], stdout=log, stderr=log, start_new_session=True
        )
        self.servers.append(server)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and server.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2),
            ):
                return
            time.sleep(0.2)
        text = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"the server did not start:\n{text[-3000:]}")


def commands_of(text: str) -> list[tuple[str, str]]:
    """Return each command of a block, and the lines that follow it."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ ").partition("  # ")[0], ""))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def _onnxport(words: list[str]) -> str:
    from typer.testing import CliRunner

    from onnxport.cli import _app

    result = CliRunner().invoke(_app(), words)
    if result.exit_code not in {0, 1} or isinstance(result.exception, Exception):
        raise AssertionError(f"onnxport {words}: {result.exit_code}\n{result.output}")
    return result.output


def read_elsewhere(pages: Iterable[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Do what pages say in a process of its own, which ends its servers whatever happens here."""
    results = folder / "results.json"
    paths = [str(DOCS.parent / "src"), str(DOCS.parent / "tests")]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, __file__, results, folder / "pages", *pages],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            process.wait()
        except BaseException:
            process.terminate()
            raise
    found: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    return found


class _Ended(BaseException):
    """Whoever waits for the pages waits no more."""


def _end(*_: object) -> None:
    raise _Ended


def main() -> None:
    """Run pages.

    Raises:
        _Ended: If nobody waits for them any more.
    """
    signal.signal(signal.SIGTERM, _end)
    results, folder, *pages = (Path(word).resolve() for word in sys.argv[1:])
    (digits,) = [b for b in blocks_of(DOCS / "tutorial.md") if b.value == "digits.py"]
    found: dict[str, dict[str, Any]] = {}
    for page in pages:
        place = folder / f"{page.parent.name}-{page.stem}"
        place.mkdir(parents=True)
        (place / "digits.py").write_text(digits.text, encoding="utf-8")
        environment, before = dict(os.environ), Path.cwd()
        os.chdir(place)
        sys.path.insert(0, str(place))
        begun, error = sum(os.times()[:4]), ""
        try:
            Reader(page, place).read()
        except _Ended:
            raise
        except BaseException:  # noqa: BLE001 - it is written down, and the next page has its turn
            error = traceback.format_exc()
        sys.path.remove(str(place))
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        logging.getLogger("onnxport").setLevel(logging.NOTSET)
        found[str(page)] = {"error": error, "cpu_s": round(sum(os.times()[:4]) - begun, 1)}
        results.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
