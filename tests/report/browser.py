"""A report in headless Chromium: what a reader's browser makes of it, and its pictures.

``python -m tests.report.browser REPORT.html --output FOLDER`` takes the pictures of the documentation.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DESKTOP", "PHONE", "Opened", "chromium", "executable", "open_report"]

DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}
_FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def executable() -> str | None:
    """Return the path of Chromium, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@dataclass
class Opened:
    """A drawn page (Playwright's), what went wrong in it, and what it asked the network for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium (Playwright's ``Browser``)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), args=_FLAGS, chromium_sandbox=False
        )
        try:
            yield browser
        finally:
            browser.close()


def open_report(browser: Any, path: Path, **device: Any) -> Opened:
    """Open a report, with options of Playwright's ``new_context``, and wait till it is drawn or fails."""
    opened = Opened(browser.new_context(**device).new_page())
    page = opened.page
    page.on("console", lambda told: told.type in ("error", "warning") and opened.errors.append(told.text))
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.add_init_script("addEventListener('error', () => document.documentElement.id = 'failed')")
    page.goto(path.absolute().as_uri())
    page.wait_for_selector("[data-drawn], #failed", state="attached")
    return opened


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, device, height in (("desktop", DESKTOP, 1830), ("phone", PHONE, 1500)):
            opened = open_report(browser, options.report, **device, device_scale_factor=1.25)
            clip = {"x": 0, "y": 0, "width": device["viewport"]["width"], "height": height}
            opened.page.screenshot(path=options.output / f"report-{name}.png", full_page=True, clip=clip)


if __name__ == "__main__":
    main()
