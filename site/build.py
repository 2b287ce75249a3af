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
from places import FLOORS, HERE, NBS, OUT, ROOT, notebooks, on_the_site, page_of
from places import chapters as chapters_of


def write(path: Path, text: str):
    "Write a page"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def floor_page(floor: dict) -> str:
    "The page of a folder: its chapters with what they are about"
    title, about = floor["title"], floor["about"]
    pages = chapters_of(floor)
    rows = [
        f"| [{words.title(page)}](../{page}.ipynb) | {words.summary(page)} |"
        for page in pages
    ]
    listed = "\n".join(f"../{page}" for page in pages)
    return (
        f"# {title}\n\n> {about}\n\n| chapter | what it is about |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


def templates_page() -> str:
    "The page of the templates"
    text = (HERE / "pages/templates.md").read_text(encoding="utf8")
    pages = sorted(page_of(nb) for nb in notebooks() if nb.parent.name == "experiments")
    rows = [
        f"| [{words.title(page)}](../{page}.ipynb) | {words.summary(page)} |"
        for page in pages
    ]
    listed = "\n".join(f"../{page}" for page in pages)
    return (
        f"{text}\n" + "\n".join(rows) + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


def stage(to: Path):
    "Write every page, and copy the files that they show"
    needed = set()
    for notebook in notebooks():
        needed |= chapters.stage(notebook, to / notebook.relative_to(NBS))
    for floor in FLOORS:
        write(to / "book" / f"{floor['folder']}.md", floor_page(floor))
    write(to / "results/templates.md", templates_page())
    for name in gallery.records():
        write(to / "figures" / f"{name}.md", gallery.figure_page(name))
        needed |= {f"figures/{name}.{end}" for end in ("png", "pdf", "json")}
        needed |= {d["file"] for d in gallery.records()[name]["data"].values()}
    write(to / "api/index.md", reference.module_list())
    for module in reference.modules():
        write(to / "api" / f"{module}.md", reference.module_page(module))
    write(to / "commands/index.md", reference.command_list())
    for name in reference.command_names():
        write(to / "commands" / f"{name}.md", reference.command_page(name))
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
    write(to / "paths/notation.md", words.notation())
    write(to / "paths/glossary.md", words.glossary())
    needed |= {"figures/fig01.png", "data/emoji/samples.jpg"}


def with_others(text: str) -> str:
    "A page by hand; the section *Use* lists what no other page lists"
    pages = words.others()
    rows = [
        f"| [{words.title(page)}](../{page}.ipynb) | {words.summary(page)} |"
        for page in pages
    ]
    text = text.replace("OTHER_ROWS\n", "".join(f"{row}\n" for row in rows))
    return text.replace("OTHERS\n", "".join(f"../{page}\n" for page in pages))


def copy_notebooks(to: Path):
    "The notebooks themselves, to be taken away"
    for notebook in notebooks():
        target = to / notebook.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, target)


def render(pages: Path, html: Path):
    "Let Sphinx make the site"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-q",
        "-j",
        "auto",
    ]
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
    copy_notebooks(html / "notebooks")
    write(html / "llms.txt", words.llms_txt(pages))
    problems = links.problems(html)
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{html.relative_to(ROOT)}/index.html")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
