"Every chapter has the form of the book: its opening, its headings, its ending, its links"

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from vggflow.experiments.cards import experiment_names, template_parameters

ROOT = Path(__file__).parents[2]
NBS = ROOT / "nbs"
CHAPTERS = sorted([*NBS.glob("[0-9]_*/*.ipynb"), *NBS.glob("emoji/*.ipynb")])
TEMPLATES = sorted(NBS.glob("experiments/*.ipynb"))
FLOORS = tomllib.loads((ROOT / "site/contents.toml").read_text(encoding="utf8"))["floor"]
WIDTH = 92  # characters of a line of code, in a cell or in a fence
FENCE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.M | re.S)
OPENING = re.compile(
    r"\*\*You will learn\*\* .+ "
    r"\*\*Needs\*\* (?:nothing|.*\]\().* "  # nothing, or a link
    r"\*\*Takes\*\* [^.]*(?:minute|hour)"
)
NEXT = re.compile(r"^\*\*Next:\*\* [^\]]*\]\(([\w./]+\.ipynb)\)", re.M)
OF_TEMPLATE = re.compile(
    r"\*\*(?:Draws|Runs)\*\* .+ \*\*From\*\* (.+) \*\*Takes\*\* [^.]*(?:second|minute)",
    re.S,
)


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


def sections(notebook: Path) -> list:
    "(level, title, what stands below) of every heading; code stands as one letter"
    cells = read(notebook)
    text = [FENCE.sub("x", part) if kind == "markdown" else "x" for kind, part in cells]
    parts = re.split(r"^(#+) (.+)$", "\n".join(text), flags=re.M)[1:]
    found = zip(parts[::3], parts[1::3], parts[2::3])
    return [(len(marks), title, body) for marks, title, body in found]


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_a_chapter_opens_with_what_it_gives_and_needs(notebook):
    cells = read(notebook)
    assert re.match(r"# .+\n+> .+", cells[0][1]), "a title, and a line that says what it is"
    prose = [text for kind, text in cells if kind == "markdown"]
    opening = " ".join(prose[1].split())
    assert OPENING.match(opening), "what it gives; nothing or a link; minutes or hours"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_a_chapter_ends_with_what_to_keep(notebook):
    _, ending = read(notebook)[-1]
    _, _, kept = ending.rpartition("## ")
    assert kept.startswith("What to keep\n"), "the last cell is not *What to keep*"
    assert re.search(r"^- ", kept, re.M), "points, a line each"
    assert NEXT.search(kept), "a link to the next chapter"


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor["folder"])
def test_the_next_chapter_is_the_next_of_the_floor(floor):
    folder = NBS / floor["folder"]
    assert sorted(floor["first"]) == sorted(nb.stem for nb in folder.glob("*.ipynb"))
    chapters = [folder / f"{name}.ipynb" for name in floor["first"]]
    targets = [NEXT.search(read(notebook)[-1][1])[1] for notebook in chapters]
    leads = [(folder / target).resolve() for target in targets]
    assert leads[:-1] == chapters[1:]
    assert leads[-1].parent != folder, "the last chapter leads to another floor"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=names)
def test_headings_go_down_one_level_at_a_time(notebook):
    levels = [level for level, *_ in sections(notebook)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert not [(a, b) for a, b in pairwise(levels) if b > a + 1], levels


@pytest.mark.parametrize("notebook", [*CHAPTERS, *TEMPLATES], ids=names)
def test_every_section_says_something(notebook):
    found = sections(notebook)
    next_levels = [*(level for level, *_ in found[1:]), 0]
    empty = [
        title
        for (level, title, body), next_level in zip(found, next_levels)
        if not body.strip() and next_level <= level
    ]
    assert not empty, empty


@pytest.mark.parametrize("notebook", TEMPLATES, ids=names)
def test_a_template_opens_with_what_it_makes_and_from_what(notebook):
    opening = OF_TEMPLATE.search(read(notebook)[0][1])
    assert opening, "what it draws or runs, from which parameters, how long"
    named = set(re.findall(r"`([\w-]+)`", opening[1]))
    known = {*template_parameters(notebook), *experiment_names()}
    assert named and not named - known, "parameters and experiments that are there"


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
