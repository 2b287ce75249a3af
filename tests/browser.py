"A page in Chromium, for tests that are skipped where there is none"

import os
import shutil
from contextlib import contextmanager

import pytest

# nothing but the page is asked for
QUIET = "--no-sandbox --disable-gpu --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
WIDTHS = (1280, 390)  # of a desk and of a phone


def chromium() -> str:
    "Where Chromium is; skips the test where it or its driver is not installed"
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return found


@contextmanager
def opened(url: str, width: int = 1280, height: int = 900):
    "A page and the list of its errors: of scripts, of the console, of what did not load"
    where = chromium()
    from playwright.sync_api import sync_playwright

    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=QUIET.split())
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.goto(url)
        yield page, errors
        browser.close()


def too_wide(page) -> int:
    "Pixels by which a page is wider than its window"
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
