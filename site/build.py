"""The site: pages are staged from notebooks, records and signatures; Sphinx renders them.

Nothing is executed and nothing is fetched. `_site/src` has what is staged,
`_site/html` the site.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import chapters
import gallery
import links
import reference
import words
from markup import menu, table
from places import FLOORS, HERE, NBS, OUT, ROOT, WHOLE, notebooks, on_the_site, page_of
from places import chapters as chapters_of


def write(path: Path, text: str):
    "Write a page"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def listing(pages: list) -> tuple:
    "Notebooks with what they are about: the rows of a table, and their names for a menu"
    rows = [[f"[{words.title(p)}](../{p}.ipynb)", words.summary(p)] for p in pages]
    return rows, [f"../{page}" for page in pages]


def floor_page(floor: dict) -> str:
    "The page of a folder: its chapters with what they are about"
    rows, names = listing(chapters_of(floor))
    shown = table(("chapter", "what it is about"), rows)
    return f"# {floor['title']}\n\n> {floor['about']}\n\n{shown}\n\n{menu(names)}"


def templates_page() -> str:
    "The page of the templates"
    text = (HERE / "pages/templates.md").read_text(encoding="utf8")
    pages = sorted(page_of(nb) for nb in notebooks() if nb.parent.name == "experiments")
    rows, names = listing(pages)
    return f"{text}\n{table(('template', 'what it does'), rows)}\n\n{menu(names)}"


def made_pages() -> dict:
    "Page -> text, of the pages that are made from data"
    made = {f"book/{floor['folder']}": floor_page(floor) for floor in FLOORS}
    made |= {f"figures/{name}": gallery.figure_page(name) for name in gallery.records()}
    made |= {f"api/{name}": reference.module_page(name) for name in reference.modules()}
    names = reference.command_names()
    made |= {f"commands/{name}": reference.command_page(name) for name in names}
    made["results/templates"] = templates_page()
    made["api/index"] = reference.module_list()
    made["commands/index"] = reference.command_list()
    made["paths/notation"] = words.notation()
    made["paths/glossary"] = words.glossary()
    return made


def stage(to: Path):
    "Write every page, and copy the files that they show"
    needed = set()
    for notebook in notebooks():
        needed |= chapters.stage(notebook, to / notebook.relative_to(NBS))
    for name in gallery.records():
        needed |= {*gallery.files_of(name).values(), f"figures/{name}.png"}
    for name, text in made_pages().items():
        write(to / f"{name}.md", text)
    stage_by_hand(to, needed)
    for name in sorted(needed):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    gallery.write_thumbnails(to / "figures/small")


def stage_by_hand(to: Path, needed: set):
    "The pages that are written by hand, and files of the repository that are pages"
    for page in sorted((HERE / "pages").rglob("*.md")):
        where = page.relative_to(HERE / "pages")
        if where.name not in ("api.md", "commands.md", "templates.md"):
            write(to / where, with_others(page.read_text(encoding="utf8")))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        page = f"use/{name.lower()}"
        text = on_the_site((ROOT / name).read_text(encoding="utf8"), name, page, needed)
        write(to / page, text)
    needed |= {"figures/fig01.png", "data/emoji/samples.jpg"}


def with_others(text: str) -> str:
    "A page by hand; the section *Use* lists what no other page lists"
    rows, names = listing(words.others())
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    text = text.replace("OTHER_ROWS\n", "".join(lines))
    return text.replace("OTHERS\n", "".join(f"{name}\n" for name in names))


def copy_as_they_are(html: Path):
    "The page that is one already, and the notebooks themselves, to be taken away"
    write(html / WHOLE, (HERE / WHOLE).read_text(encoding="utf8"))
    for notebook in notebooks():
        target = html / "notebooks" / notebook.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, target)


def render(pages: Path, html: Path):
    "Let Sphinx make the site"
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "auto", "-b", "html"]
    command += ["-c", str(HERE), "-d", str(OUT / "doctrees"), str(pages), str(html)]
    subprocess.run(command, check=True)


def main() -> int:
    "Build the site and look at its links; the exit status is 1 where one is dead"
    if sys.argv[1:2] == ["--stage"]:  # the pages alone, which needs no Sphinx
        stage(Path(sys.argv[2]))
        return 0
    pages, html = OUT / "src", OUT / "html"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.rmtree(html, ignore_errors=True)
    stage(pages)
    render(pages, html)
    copy_as_they_are(html)
    write(html / "llms.txt", words.llms_txt(pages))
    problems = links.problems(html)
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{html.relative_to(ROOT)}/index.html")
    return int(bool(problems))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"[site] {error}")
