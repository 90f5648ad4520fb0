"""Headless Chromium, driven by selenium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ESCAPE, ENTER, RIGHT, LEFT, DOWN = "\ue00c", "\ue007", "\ue014", "\ue012", "\ue015"


@contextmanager
def chromium(profile: Path) -> Iterator:
    """Starts a browser with a new profile. Skips if it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver, e.g. apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "window-size=1280,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


def press(browser, keys: str) -> None:
    """Presses keys, wherever the focus is."""
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(keys).perform()
