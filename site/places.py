"Where things lie: folders of the repository, pages of the site, and links between them"

import os
import re
import tomllib
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
OUT = ROOT / "_site"
CONTENTS = tomllib.loads((HERE / "contents.toml").read_text(encoding="utf8"))
FLOORS = CONTENTS["floor"]


def page_of(
    notebook: Path,
) -> str:  # E.g. 1_theory/flow
    "The page of a notebook"
    return notebook.relative_to(NBS).with_suffix("").as_posix()


@cache
def notebooks() -> tuple:
    "Every notebook that has a page; index.ipynb is the README, and the site has a home"
    found = sorted(NBS.rglob("*.ipynb"))
    shown = [nb for nb in found if ".ipynb_checkpoints" not in nb.parts]
    return tuple(nb for nb in shown if page_of(nb) != "index")


def chapters(
    floor: dict,  # From contents.toml
) -> list:  # Pages in reading order
    "The chapters of a folder: those named first, then the others by name"
    found = {
        nb.stem: page_of(nb) for nb in notebooks() if nb.parent.name == floor["folder"]
    }
    first = [name for name in floor.get("first", []) if name in found]
    return [
        found[name] for name in [*first, *(name for name in found if name not in first)]
    ]


@cache
def chapter_numbers() -> dict:
    "Page -> number, floor and place in the reading order: 1_theory/flow is 1.1"
    numbers = {}
    for floor in FLOORS:
        digit = re.match(r"([1-9])_", floor["folder"])
        for place, page in enumerate(chapters(floor), 1) if digit else ():
            numbers[page] = f"{digit[1]}.{place}"
    return numbers


@cache
def page_of_chapter(name: str) -> str:
    "The page that a short name means: flow is 1_theory/flow, before any experiment of it"
    return min(page for nb in notebooks() if (page := page_of(nb)).endswith(f"/{name}"))


# ----------------------------------------------------------------------------- links

LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
SHOWN = ("figures", "data", "benchmarks", "site")  # folders whose files a page may show
WHOLE = "playground/analytic.html"  # a page that is one already: it is opened, not rendered


def site_path(
    target: str,  # As a file of the repository, e.g. nbs/start.ipynb
) -> str | None:  # Where the site has it; None where it has not
    "The place of a file of the repository among the pages"
    folder, _, rest = target.partition("/")
    if target in ("nbs/index.ipynb", "README.md"):
        return "index.md"
    if folder == "nbs" and (NBS / rest).is_file():
        return rest
    if target in ("CHANGELOG.md", "CONTRIBUTING.md"):
        return f"use/{target.lower()}"
    if target == f"site/{WHOLE}":
        return WHOLE
    if folder in SHOWN and (ROOT / target).is_file():
        return target
    return None


def on_the_site(
    text: str,  # Markdown
    home: str,  # Where it stands in the repository, e.g. nbs/1_theory/flow.ipynb
    page: str,  # Where it stands on the site, e.g. 1_theory/flow.ipynb
    needed: set,  # Files that must be copied are added
) -> str:
    "The same text with its links made for the site; raises ValueError for a dead one"

    def moved(match):
        label, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match[0]
        full = os.path.normpath(os.path.join(os.path.dirname(home), path))
        there = site_path(full)
        if there is None:
            raise ValueError(f"{home} links to {target}, which is not there")
        if there == full:
            needed.add(there)
        near = os.path.relpath(there, os.path.dirname(page) or ".")
        if there == WHOLE:
            return f'<a href="{near}">{label[1:-1]}</a>'
        return f"{label}({near}{'#' + anchor if anchor else ''})"

    return LINK.sub(moved, text)
