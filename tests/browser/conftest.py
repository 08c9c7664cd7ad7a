"""A headless Chromium, and a small study with its report and its MLflow server, made once."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
OUTPUT = Path(__file__).parent / "output"
HEIGHT = 1000
WIDTHS = (1400, 800)
STUDY = """
name: small
task: {factory: "momentum_tuner.tasks:rosenbrock"}
optimizers: [sgd, momentum]
space: {learning_rate: {low: 1.0e-4, high: 2.0e-2, log: true}, momentum: {low: 0.0, high: 0.99}}
budget: {trials: 6, epochs: 4}
confirm: {seeds: 3}
"""


class Browser:
    """A page of Chromium that nothing but the tests' addresses reaches."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium")
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # A named driver: selenium then looks for none on the network.
        self.driver = webdriver.Chrome(options=options, service=Service(_program("chromedriver")))

    def open(self, address: str, width: int = WIDTHS[0], *, dark: bool = False) -> None:
        """Open a page anew; what earlier ones logged is forgotten."""
        self.driver.get("about:blank")
        self.resize(width)
        self.media(dark=dark)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(address)

    def resize(self, width: int) -> None:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def media(self, *, dark: bool = False, media: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def run(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def wait_for(self, happened: Callable[[], object], what: str, seconds: float = 60.0):
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + seconds
        while True:
            try:
                found = happened()
            except StaleElementReferenceException:  # the page drew it anew meanwhile
                found = None
            if found:
                return found
            if time.monotonic() > deadline:
                self.shoot(f"failed-{what.replace(' ', '-')}", whole=False)
                raise AssertionError(f"no {what} after {seconds:.0f} s in: {self.text()[:3000]}")
            time.sleep(0.2)

    def wait_for_words(self, *words: str) -> str:
        self.wait_for(lambda: all(word in self.text() for word in words), f"page with {words[0]}")
        return self.text()

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def shoot(self, name: str, *, whole: bool = True) -> None:
        """Keep a picture of the page, all of it or what the window shows."""
        OUTPUT.mkdir(exist_ok=True)
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height if whole else HEIGHT, "scale": 1}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole, "clip": clip})
        (OUTPUT / f"{name}.png").write_bytes(base64.b64decode(found["data"]))

    def shoot_at_each_width(self, name: str) -> None:
        for width in WIDTHS:
            self.resize(width)
            time.sleep(0.5)  # MLflow's pages move into their new places
            self.shoot(f"{name}-{width}", whole=False)


def _program(name: str) -> str:
    """Where it is; on a machine that must have it, its absence is a failure."""
    found = shutil.which(name)
    if found is None:
        reason = f"there is no {name} (on Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.driver.quit()


@dataclass(frozen=True)
class Small:
    """A finished study, in a folder of its own."""

    folder: Path
    mlflow: str

    @property
    def report(self) -> str:
        return (self.folder / "small-report.html").as_uri()

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.folder / 'momentum_tuner.db'}"

    def page(self, *parts: str, **query: object) -> str:
        """An address of MLflow's pages."""
        asked = urllib.parse.urlencode({name: json.dumps(value) for name, value in query.items()})
        return f"{self.mlflow}/#/" + "/".join(parts) + (f"?{asked}" if asked else "")


def _command(folder: Path, *arguments: str) -> subprocess.Popen:
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MOMENTUM_TUNER_", "MLFLOW_"))}
    with (folder / f"{arguments[0]}.log").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "momentum_tuner", *arguments],
            cwd=folder,
            env={**mine, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def small(browser, tmp_path_factory) -> Iterator[Small]:
    """The study, run as people run it, and `ui` on its store. (It needs the browser: without one nothing is run.)"""
    folder = tmp_path_factory.mktemp("small")
    (folder / "study.yaml").write_text(STUDY)
    for arguments in (("run", "study.yaml", "--workers", "1"), ("report", "small")):
        assert _command(folder, *arguments).wait(200) == 0, (folder / f"{arguments[0]}.log").read_text()
    port = _free_port()
    server = _command(folder, "ui", "--port", str(port))
    try:
        found = Small(folder, f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{found.mlflow}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "ui.log").read_text()
                time.sleep(0.1)
        yield found
    finally:
        ui = psutil.Process(server.pid)
        for process in [*ui.children(recursive=True), ui]:  # at once: there is nothing to save
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(30)
