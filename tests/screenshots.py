"""`python -m tests.screenshots DIRECTORY`: pictures of the real page, light and dark; see `make screenshots`.

The demo's pipelines run a few times, so that the page has past runs. Then a browser opens the list of jobs, and the job
that failed. Names of this machine are replaced before the picture is taken.
"""

from __future__ import annotations

import io
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
SIZE = {"width": 1280, "height": 860}
RUNS = 4


def demo(directory: str, *words: str) -> subprocess.Popen[str]:
    """Start the demo, with the state and the page of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TAILSPAN_", "OTEL_"))}
    environ |= {"XDG_STATE_HOME": directory, "TAILSPAN_AGENT__LISTEN": f"127.0.0.1:{free_port()}", "TZ": "UTC"}
    command = [Path(sys.executable).with_name("tailspan"), "demo", "--dir", f"{directory}/demo", *words]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def picture(tab: Any, path: Path) -> None:
    """Take a picture of what the browser shows; its 256 colours are enough for a page, in a quarter of the bytes."""
    from PIL import Image

    tab.evaluate(
        """names => {
          const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (texts.nextNode())
            for (const [name, instead] of names)
              texts.currentNode.data = texts.currentNode.data.replaceAll(name, instead);
        }""",
        [[f"{ROOT}/agent/", "/opt/tailspan/"], [str(ROOT), "/opt/tailspan"], [platform.node(), "etl-1"]],
    )
    found = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    found.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def main(directory: Path) -> None:
    """Write the pictures.

    Args:
        directory: Where to write them.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as state, sync_playwright() as playwright:
        for _ in range(RUNS):
            demo(state, "--stay", "0").communicate()
        running = demo(state, "--stay", "1h")
        assert running.stdout is not None
        url = next(
            found[1] for line in running.stdout if (found := re.search(r"stays available .* at (http\S+)", line))
        )
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            for scheme, ending in (("light", ""), ("dark", "-dark")):
                context = browser.new_context(viewport=SIZE, color_scheme=scheme, timezone_id="UTC", locale="en-GB")
                tab = context.new_page()
                tab.set_default_timeout(180_000)
                tab.goto(url)
                tab.get_by_role("link", name="invoice-import").first.wait_for()
                picture(tab, directory / f"jobs{ending}.png")
                tab.get_by_role("link", name="invoice-import").first.click()
                tab.get_by_text("InvoiceError").first.wait_for()
                picture(tab, directory / f"job{ending}.png")
                context.close()
        finally:
            browser.close()
            running.terminate()
            running.communicate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
