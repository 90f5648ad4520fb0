"""Takes the screenshot of the search page in docs/serve.md.

    python tools/scenes/make_scenes.py --out runs/serve --train 0 --val 0
    amp serve --index runs/serve/index --photos runs/serve/images \
        --adapter runs/demo/action-aware/stage2/adapter.safetensors
    python tools/figures/serve.py

`make demo` trains the adapter. The last command needs Chromium and selenium, and runs while the server does.
"""

import io
import shutil
import time
from pathlib import Path
from urllib.parse import quote

from amp.errors import AmpError, exit_on_error, require

with exit_on_error():
    from jsonargparse import auto_cli
    from PIL import Image

    from amp.command_line import CommandLine


def main(
    address: str = "http://127.0.0.1:8000/",
    query: str = "A yellow dog tosses a ball to a man.",
    width: int = 1280,
    height: int = 860,
    dark: bool = False,
    out: Path = Path("docs/serve.png"),
) -> None:
    """Takes the screenshot.

    Args:
        address: Address of the server.
        query: Query to show.
        width, height: Size of the page in pixels; narrow pages are those of a phone.
        dark: Whether the browser prefers dark pages.
        out: PNG file.
    """
    webdriver = require("selenium.webdriver", "this figure")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise AmpError("chromium and chromedriver are missing, expected both; apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(f"{address}#q={quote(query)}")
        end = time.monotonic() + 30
        while not browser.execute_script("return [...document.images].length && document.body.dataset.answers > 0"):
            if time.monotonic() > end:
                raise AmpError(f"{address}: no answer to {query!r} after 30 s, expected photos; look at the server")
            time.sleep(0.1)
        time.sleep(1)  # images are loading
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.save(out, optimize=True)


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(main, as_positional=False, parser_class=CommandLine)
