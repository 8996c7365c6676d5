"""`samf serve` as a process of its own, and Chromium to look at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER_SECONDS = 600  # of one command: drawing without a graphics card is slow


def note(text: str) -> None:
    """Write what was measured into the file that $SAMF_MEASURED names."""
    if path := os.environ.get("SAMF_MEASURED"):
        with open(path, "a") as file:
            file.write(f"{text}\n")


class Served:
    """A page in a process, with a temporary folder of its own."""

    def __init__(self, folder: Path, *options: str, **environment: str):
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "samf.cli.main", "serve", "--port", "0", *options]
        variables = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=self.log.open("w"))
        self.address = self._wait()

    def _wait(self) -> str:
        for _ in range(1200):
            if found := re.search(r"http://\S+", self.log.read_text()):
                return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.25)
        raise AssertionError(f"the page did not start:\n{self.log.read_text()[-3000:]}")

    def files(self) -> list[str]:
        """Visitors' files that are there."""
        found = [path for path in self.temporary.rglob("*") if path.is_file() and "phantoms" not in path.parts]
        return [str(path) for path in found if path.name != "in_use"]

    def none_left(self, seconds: float = 60) -> bool:
        for _ in range(int(seconds * 4)):
            if not self.files():
                return True
            time.sleep(0.25)
        return False

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def chromium(downloads: Path, width: int = 1440, height: int = 1000, dark: bool = False, webgl: bool = True):
    """A headless browser that asks for nothing outside and keeps what the page says."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and its driver are not installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    flags = ["headless=new", "no-sandbox", "disable-gpu", "enable-unsafe-swiftshader", "disable-background-networking"]
    flags += ["disable-component-update", "disable-dev-shm-usage", "no-first-run", f"window-size={width},{height}"]
    for flag in [*flags, *([] if webgl else ["disable-3d-apis"])]:
        options.add_argument(f"--{flag}")
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.command_executor._client_config.timeout = DRIVER_SECONDS
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    return browser


def until(browser, script: str, seconds: float = 600):
    """The value of an expression in the page, as soon as it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda b: b.execute_script(f"return {script}"))
