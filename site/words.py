"Titles and summaries, the notation and the glossary of nbs/start.ipynb, llms.txt"

import json
import re
from functools import cache
from pathlib import Path

from places import CONTENTS, FLOORS, HERE, NBS, chapter_numbers, notebooks, page_of
from places import chapters as chapters_of

PAGES = HERE / "pages"


@cache
def cells(page: str) -> tuple:
    "The prose of a notebook, cell by cell"
    kept = json.loads((NBS / f"{page}.ipynb").read_text(encoding="utf8"))["cells"]
    return tuple("".join(c["source"]) for c in kept if c["cell_type"] == "markdown")


def title(page: str) -> str:
    "Number and title of a notebook"
    said = re.search(r"^# (.+)$", cells(page)[0], re.M)[1]
    said = CONTENTS["titles"].get(page) or said[0].upper() + said[1:].replace("_", " ")
    return f"{chapter_numbers().get(page, '')} {said}".strip()


def summary(page: str) -> str:
    "The line below the title"
    said = re.search(r"^> (.+)$", cells(page)[0], re.M)
    return said[1].replace("|", "\\|") if said else ""


def section(page: str, heading: str) -> str:
    "A section of a notebook, without its heading"
    found = [text for text in cells(page) if text.startswith(f"## {heading}")]
    if len(found) != 1:
        raise ValueError(f"nbs/{page}.ipynb has no section {heading!r}; the site shows it")
    return found[0].partition("\n")[2].strip()


def notation() -> str:
    "The page of symbols"
    head = "# Notation\n\n> Symbols of the book and their names in code\n\n"
    return f"{head}{section('start', 'Notation')}\n"


def glossary() -> str:
    "The page of words, as a glossary that other pages can refer to"
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section("start", "Words"), re.M)[1:]
    rows = [row for row in rows if not row[0].startswith("---")]
    terms = "\n\n".join(f"{word}\n  {meaning}" for word, meaning in sorted(rows))
    head = "# Glossary\n\n> Words that the book uses in one sense\n\n"
    return f"{head}```{{glossary}}\n{terms}\n```\n"


def others() -> list:
    "Notebooks that neither a floor nor a page by hand lists"
    placed = {page for floor in FLOORS for page in chapters_of(floor)}
    by_hand = "\n".join(f.read_text(encoding="utf8") for f in PAGES.rglob("*.md"))
    placed |= {*re.findall(r"^(?:\.\./)*([\w/]+)$", by_hand, re.M), "start"}
    found = [page_of(nb) for nb in notebooks() if nb.parent.name != "experiments"]
    return sorted(page for page in found if page not in placed)


# ----------------------------------------------------------------------------- llms.txt


def described(page: str, file: Path) -> str:
    "One line of llms.txt"
    text = file.read_text(encoding="utf8")
    if file.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    name = re.search(r"^# (.+)$", text, re.M)
    about = re.search(r"^> (.+)$", text, re.M)
    said = f": {about[1]}" if about else ""
    return f"- [{name[1] if name else page}]({page}.html){said}"


def llms_txt(pages: Path) -> str:
    "The site for those who read it by program: every page, in one file"
    files = {f.relative_to(pages).with_suffix("").as_posix(): f for f in staged(pages)}
    parts = [
        "# vggflow",
        "> Value gradient guidance for flow matching alignment (VGG-Flow, NeurIPS 2025), "
        "executable: derivations with checks, a package, and every figure from runs.",
    ]
    shown = set()
    for floor in FLOORS:
        listed = chapters_of(floor)
        shown |= {*listed}
        parts.append(f"## {floor['title']}")
        parts.append("\n".join(described(page, files[page]) for page in listed))
    others = {}
    for page in sorted(files.keys() - shown - {"index"}):
        others.setdefault(page.partition("/")[0], []).append(described(page, files[page]))
    for folder, lines in others.items():
        parts += [f"## {folder}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def staged(pages: Path) -> list:
    "Every page that was staged"
    found = [*pages.rglob("*.md"), *pages.rglob("*.ipynb")]
    return sorted(file for file in found if file.parent.name != "small")
