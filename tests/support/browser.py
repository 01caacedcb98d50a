"""Chromium without a window, as tests drive it: by Debian's chromium and chromium-driver, or what else there is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from urllib3.exceptions import HTTPError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WANTED = (
    "the tests of the page drive a browser. Debian: apt install chromium chromium-driver; Ubuntu: snap install "
    "chromium, apt install chromium-chromedriver"
)
PATIENCE_S = 20.0
ANSWER_S = 60.0  # for which the driver may work on what it was told
WIDE, PHONE = (1440, 900), (390, 844)
T = TypeVar("T")


class _Chrome(webdriver.Chrome):
    """A browser whose page may hang, as by a script without end: then it is killed, lest all tests wait for it."""

    def execute(self, *arguments: Any, **named: Any) -> Any:
        """Have the driver do something."""
        try:
            return super().execute(*arguments, **named)
        except HTTPError:
            if (process := self.service.process) is not None:
                driver = psutil.Process(process.pid)
                for each in [*driver.children(recursive=True), driver]:
                    each.kill()
            raise


class Browser:
    """A window, and the questions that tests have about what is in it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self._wait = WebDriverWait(driver, PATIENCE_S, poll_frequency=0.02)

    def open(self, url: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        """Load a page anew, in a window of this size, by a system whose colours are light or dark."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(url)

    def one(self, selector: str) -> WebElement:
        """The first element that fits."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """All that fit."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The visible text of all that fit."""
        return "\n".join(element.text for element in self.all(selector))

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that may await something."""
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{ {script} }})(...arguments).then(done, (e) => done({{ error: String(e) }}));",
            *arguments,
        )
        assert not (isinstance(found, dict) and "error" in found), found
        return found

    def until(self, check: Callable[[], T], what: str = "") -> T:
        """What a check gives once that is true."""
        return self._wait.until(lambda _: check(), what)

    def shows(self, selector: str, text: str) -> None:
        """Wait until a text is there to be read."""
        self.until(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def complaints(self) -> list[str]:
        """What the browser said about the page since the last time, but for answers that were errors."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in told if "Failed to load resource" not in message]


@contextmanager
def browser() -> Iterator[Browser]:
    """Start one; the test fails where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail(f"no {BROWSERS[0] if program is None else 'chromedriver'} is installed: {WANTED}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Without the sandbox, as tests may be root's; with the shared memory of files, as a container's may be small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = _Chrome(options=options, service=Service(driver))
    window.command_executor.client_config.timeout = ANSWER_S
    try:
        yield Browser(window)
    finally:
        with suppress(HTTPError):  # it was killed
            window.quit()
