"Every chapter has the form of the book: its opening, its headings, its ending, its links"

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parents[2] / "nbs"
CHAPTERS = sorted([*NBS.glob("[0-9]_*/*.ipynb"), *NBS.glob("emoji/*.ipynb")])
WIDTH = 92  # characters of a line of code, in a cell or in a fence
FENCE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.M | re.S)
OPENING = ("**You will learn**", "**Needs**", "**Takes**")
NEXT = re.compile(r"^(?:\*\*)?Next:(?:\*\*)? (?=.*\]\((?:\.\./)?[\w/]+\.ipynb\))", re.M)


def names(notebook: Path) -> str:
    "Folder and name"
    return f"{notebook.parent.name}/{notebook.stem}"


def read(notebook: Path) -> list:
    "(kind, text) of every cell, without those that nbdev hides"
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return [(kind, text) for kind, text in found if shown(kind, text)]


def shown(kind: str, text: str) -> bool:
    "Whether a reader sees a cell"
    hidden = re.match(r"(?:#\|.*\n)*#\|\s*(?:hide|default_exp)", text)
    starts = re.search(r"^if __name__ == ", text, re.M)
    return kind == "markdown" or not (hidden or starts)


def headings(notebook: Path) -> list:
    "(level, text) of every heading"
    prose = [FENCE.sub("", text) for kind, text in read(notebook) if kind == "markdown"]
    found = re.findall(r"^(#+) (.+)$", "\n\n".join(prose), re.M)
    return [(len(marks), text) for marks, text in found]


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_a_chapter_opens_with_what_it_gives_and_needs(notebook):
    cells = read(notebook)
    assert re.match(r"# .+\n+> .+", cells[0][1]), "a title, and a line that says what it is"
    prose = [text for kind, text in cells if kind == "markdown"]
    missing = [words for words in OPENING if words not in prose[1]]
    assert not missing, f"the prose after the title does not say {missing}"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_a_chapter_ends_with_what_to_keep(notebook):
    titles = [text for level, text in headings(notebook) if level == 2]
    assert "What to keep" in titles
    after = titles[titles.index("What to keep") + 1 :]
    assert after in ([], ["Details"]), f"after *What to keep* only *Details*: {after}"
    ending = [text for _, text in read(notebook) if "## What to keep" in text]
    assert len(ending) == 1 and re.search(r"^- ", ending[0], re.M), "points, a line each"
    assert NEXT.search(ending[0]), "a link to the next chapter"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_headings_go_down_one_level_at_a_time(notebook):
    levels = [level for level, _ in headings(notebook)]
    assert levels.count(1) == 1 and levels[0] == 1
    steps = [(a, b) for a, b in zip(levels, levels[1:]) if b > a + 1]
    assert not steps, headings(notebook)


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_code_in_prose_never_wraps(notebook):
    for kind, text in read(notebook):
        code = (
            [match[0] for match in FENCE.finditer(text)] if kind == "markdown" else [text]
        )
        wide = [line for part in code for line in part.splitlines() if len(line) > WIDTH]
        assert not wide, wide


def test_links_between_chapters_lead_somewhere():
    dead = []
    for notebook in sorted(NBS.rglob("*.ipynb")):
        for kind, text in read(notebook):
            targets = re.findall(r"\]\(([\w./-]+)[#)]", text) if kind == "markdown" else []
            dead += [f"{notebook.name}: {t}" for t in targets if not there(notebook, t)]
    assert not dead, dead


def there(notebook: Path, target: str) -> bool:
    "Whether a link from a notebook leads to a file of the repository"
    return (notebook.parent / target).exists()
