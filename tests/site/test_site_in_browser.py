"The built site in Chromium, a few pages of it; `make site-test` walks all of them"

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-site/bin/python"
HTML = ROOT / "_site/html"
FEW = ("index", "1_theory/flow", "figures/fig05", "api/theory.flow", "commands/finetune")


def reason_to_skip() -> str:
    "What this machine lacks; '' where it lacks nothing"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return "no Chromium on this machine"
    if not (HTML / "index.html").is_file() or not PYTHON.is_file():
        return "the site is not built: make site-test"
    sources = [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "site").rglob("*.*")]
    built = (HTML / "index.html").stat().st_mtime
    if any(file.stat().st_mtime > built for file in sources):
        return "the site is older than its sources: make site"
    ask = subprocess.run([PYTHON, "-c", "import playwright, axe_playwright_python"])
    return "no playwright in .venv-site: make site-test" if ask.returncode else ""


def test_pages_in_a_browser():
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [PYTHON, ROOT / "tests/site/walk.py", HTML, *FEW]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
