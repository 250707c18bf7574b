"""Take the pictures of the README and of the docs: ``python docs/screenshots.py [page]``.

With ``page``, those of the page of a run alone; without, those of the demo, too.

Needs Chromium on the PATH (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PAGE_WIDTH = 1412
"""The page without MLflow's assistant, which opens at the right."""
AS_TRAINING = "?workflowType=machine_learning"
"""MLflow's pages for those who train, and not for those who watch agents."""
# Without these, Chromium looks for Google's hosts and waits.
CHROMIUM = [
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars", "--virtual-time-budget=20000"),
]


@contextlib.contextmanager
def mlflow_ui(store: str) -> Iterator[str]:
    """Serve MLflow's pages on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", store]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        url = f"http://127.0.0.1:{port}"
        for _ in range(150):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
                break
            time.sleep(0.2)
        try:
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def photograph(url: str, image: Path, height: int) -> None:
    """Save a page as a picture."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *CHROMIUM,
                f"--user-data-dir={profile}",
                f"--window-size=1900,{height}",
                f"--screenshot={image}",
                url,
            ],
            check=True,
            capture_output=True,
        )
    with Image.open(image) as picture:
        cropped = picture.crop((0, 0, PAGE_WIDTH, picture.height))
    cropped.save(image, optimize=True)
    print(image.relative_to(DOCS.parent))


def photograph_page() -> None:
    """Take the pictures of the page of a run: desktop and phone, light and dark."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from real_run import trained, write_history  # the run that the tests look at
    from reports import measured

    from onnxport.page.document import PAGE, write_page
    from onnxport.page.folder import history_of

    os.environ["ONNXPORT_BACKGROUND"] = "0"  # a model for each checkpoint, before it is removed
    with tempfile.TemporaryDirectory() as root, sync_playwright() as playwright:
        folder = Path(root) / "glyphs"
        write_history(folder, measured(trained(folder, epochs=8, layers=4)))
        write_page(history_of(folder), folder / PAGE)
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for device, width, height in (("desktop", 1280, 1500), ("phone", 375, 1700)):
            for theme in ("light", "dark"):
                size = {"width": width, "height": height}
                page = browser.new_page(viewport=size, color_scheme=theme)
                page.set_default_timeout(120_000)
                page.goto((folder / PAGE).as_uri())
                page.wait_for_selector("html[data-charts=drawn]")
                image = IMAGES / f"page-{device}-{theme}.png"
                page.screenshot(path=image)
                page.close()
                compress(image)


def compress(image: Path) -> None:
    """Keep the colours that a picture really has."""
    with Image.open(image) as picture:
        few = picture.convert("RGB").quantize(colors=192, dither=Image.Dither.NONE)
    few.save(image, optimize=True)
    print(image.relative_to(DOCS.parent))


def main() -> None:
    """Take the pictures that were asked for."""
    IMAGES.mkdir(exist_ok=True)
    if sys.argv[1:] != ["page"]:
        photograph_demo()
    photograph_page()


def photograph_demo() -> None:
    """Take the pictures of the demo and of MLflow's pages."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, DOCS.parent / "examples/digits.py", folder], check=True)
        shutil.copyfile(Path(folder) / "reports.svg", IMAGES / "reports.svg")
        store = f"sqlite:///{folder}/mlflow.db"
        client = MlflowClient(tracking_uri=store)
        champion = client.get_model_version_by_alias("digits", "champion")
        key = champion.tags["onnxport.key"]
        (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
        (model,) = client.search_logged_models(
            [experiment.experiment_id], filter_string=f"tags.`onnxport.key` = '{key}'"
        )
        models = f"experiments/{experiment.experiment_id}/models"
        with mlflow_ui(store) as url:
            photograph(f"{url}/#/models/digits{AS_TRAINING}", IMAGES / "registry.png", 1100)
            photograph(f"{url}/#/{models}{AS_TRAINING}", IMAGES / "models.png", 560)
            one = f"{url}/#/{models}/{model.model_id}{AS_TRAINING}"
            photograph(one, IMAGES / "model.png", 1100)


if __name__ == "__main__":
    main()
