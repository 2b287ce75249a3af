"""The notebooks as web pages: stage copies for a reader, then let Jupyter Book render them.

Staging drops what nbdev hides, takes the directives off the exported cells and marks them,
numbers the chapters by their floor, names the checking cells, and makes the page of the
register from the notebooks. Nothing is executed and nothing is fetched.
"""

import ast
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
OUT = ROOT / "_site"
sys.path.insert(0, str(ROOT))
from vggflow.common.equations import (  # noqa: E402
    CORRECTIONS,
    EQUATIONS,
    STATEMENTS,
    equation_name,
    equation_table,
    equation_totals,
)

ITEMS = {*EQUATIONS, *STATEMENTS, *CORRECTIONS}
REGISTER = "pages/equations"
VERDICT_CLASSES = {
    "holds": "holds",
    "holds with a condition": "condition",
    "printed form corrected": "corrected",
}
GLOB = re.compile(r'( *)- glob: "([^"]+)"(?:\n +first: \[([^\]]*)\])?')


def source(cell):
    return "".join(cell["source"])


def markdown(text):
    return dict(cell_type="markdown", metadata={}, source=text)


def place(notebook):
    "A page's folder and name: 1_theory/flow"
    return notebook.relative_to(NBS).with_suffix("").as_posix()


def notebooks():
    found = sorted(NBS.rglob("*.ipynb"))
    return [nb for nb in found if ".ipynb_checkpoints" not in nb.parts]


# Reading order and numbers


def in_reading_order(pattern, first):
    "Pages of a folder: those named first, then the others by name"
    named = [name.strip() for name in first.split(",")] if first else []
    found = {nb.stem: place(nb) for nb in sorted(NBS.glob(pattern + ".ipynb"))}
    order = [name for name in named if name in found]
    return [found[name] for name in [*order, *[n for n in found if n not in order]]]


def expanded_toc(text):
    "The table of contents with every folder written out"

    def files(match):
        indent, pattern, first = match.groups()
        pages = in_reading_order(pattern, first)
        return "\n".join(f"{indent}- file: {page}" for page in pages)

    return GLOB.sub(files, text)


def chapter_numbers():
    "Number of every chapter, floor and place in the reading order: 1_theory/flow is 1.1"
    numbers = {}
    for _, pattern, first in GLOB.findall((HERE / "_toc.yml").read_text()):
        floor = re.match(r"(\d)_", pattern)
        if floor:
            for k, page in enumerate(in_reading_order(pattern, first), 1):
                numbers[page] = f"{floor[1]}.{k}"
    return numbers


# Cells


def directives(text):
    "The nbdev directives at the top of a cell, and the rest"
    top = re.match(r"(?:#\|[^\n]*(?:\n|$))*", text)[0]
    return [line[2:].split() for line in top.splitlines()], text[len(top) :].lstrip("\n")


def check_label(tags):
    "A line above a cell that the register knows, with the anchor that its table links to"
    known = [tag for tag in tags if tag.removesuffix("-teeth") in ITEMS]
    if not known:
        return []
    names = ", ".join(equation_name(tag.removesuffix("-teeth")) for tag in known)
    kind = "teeth" if known[0].endswith("-teeth") else "check"
    anchors = "".join(f'<a id="{tag}"></a>' for tag in known)
    link = f'<a href="../{REGISTER}.html#{known[0]}">{kind} of {html.escape(names)}</a>'
    return [markdown(f'<div class="register {kind}">{anchors}{link}</div>')]


def joined_outputs(outputs):
    "Lines printed one after the other in one block"
    joined = []
    for output in outputs:
        stream = output["output_type"] == "stream"
        if stream and joined and joined[-1].get("name") == output["name"]:
            text = "".join(joined[-1]["text"]) + "".join(output["text"])
            joined[-1] = dict(joined[-1], text=text)
        else:
            joined.append(output)
    return joined


def only_imports(text):
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(text).body)


def stage_cell(cell, module):
    "The cells that a page shows for one cell of the notebook"
    if cell["cell_type"] != "code":
        return [dict(cell, metadata={}, source=source(cell))]
    words, text = directives(source(cell))
    names = [word[0] for word in words if word]
    started = re.match(r"if __name__ == ['\"]__main__['\"] and", text)
    if "hide" in names or "default_exp" in names or started:
        return []
    tags = cell["metadata"].get("tags", [])
    shown = [tag for tag in tags if tag == "parameters"]
    if module and "export" in names:
        shown.append("export")
    if only_imports(text):
        shown.append("hide-input")
    outputs = joined_outputs(cell["outputs"])
    staged = dict(cell, source=text, outputs=outputs, metadata=dict(tags=shown))
    return [*check_label(tags), staged]


# Pages


def head_of_module(module, notebook):
    where = notebook.relative_to(ROOT)
    says = f"exports <code>vggflow.{module}</code> · <code>{where}</code>"
    return markdown(f'<p class="module">{says}</p>')


SHOWN = re.compile(r"\]\(((?:\.\./)*)\.\./((?:figures|data)/[^)\s]+)\)")


def site_path(text):
    "Figures and data lie in the folder of the pages, one level below that of nbs/"
    return SHOWN.sub(r"](\1\2)", text)


def stage(notebook, to):
    "Write the page of one notebook; returns the files of the repository that it shows"
    page = json.loads(notebook.read_text(encoding="utf8"))
    text = "\n".join(source(cell) for cell in page["cells"])
    module = re.search(r"#\|\s*default_exp (\S+)", text)
    cells = [part for cell in page["cells"] for part in stage_cell(cell, module)]
    number = chapter_numbers().get(place(notebook))
    if number:
        cells[0]["source"] = cells[0]["source"].replace("# ", f"# {number} ", 1)
    if module:
        cells.insert(1, head_of_module(module[1], notebook))
    if place(notebook) == REGISTER:
        cells = with_register(cells)
    page["cells"] = [
        dict(cell, id=f"c{k}", source=site_path(cell["source"]))
        for k, cell in enumerate(cells)
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(page), encoding="utf8")
    return {file for _, file in SHOWN.findall(text)}


# The register


def page_of_chapter(name):
    "Place of the chapter that the register names: flow is 1_theory/flow"
    found = [p for nb in notebooks() if (p := place(nb)).endswith("/" + name)]
    return min(found)  # a chapter stands before a page or an experiment of the same name


def link_to_chapter(name, anchor, text):
    page = os.path.relpath(page_of_chapter(name), Path(REGISTER).parent)
    return f'<a href="{page}.html{anchor}">{html.escape(text)}</a>'


def chapter_title(name):
    number = chapter_numbers().get(page_of_chapter(name), "")
    return f"{number} {name}".strip()


def register_row(row):
    "One row of the register's table"
    chapters = [name for name in row["chapter"].split(", ") if name]
    item = row["item"]
    name = html.escape(equation_name(item))
    if chapters:
        name = link_to_chapter(chapters[0], f"#{item}", equation_name(item))
    where = "<br>".join(link_to_chapter(c, "", chapter_title(c)) for c in chapters)
    verdict = VERDICT_CLASSES.get(row["verdict"], "missing")
    note = f"<br><small>{html.escape(row['note'])}</small>" if row["note"] else ""
    # one line for each checking cell
    columns = [row[key].replace(", ", "<br>") for key in ("kind", "error", "tol")]
    columns = [name, where, *columns, str(row["teeth"])]
    cells = "".join(f"<td>{column}</td>" for column in columns)
    badge = f'<span class="verdict {verdict}">{row["verdict"]}</span>{note}'
    return f'<tr id="{item}">{cells}<td>{badge}</td></tr>'


def register_table(rows):
    head = ("equation", "chapter", "kind of check", "error", "allowed", "teeth", "verdict")
    parts = {
        "Equations": EQUATIONS,
        "Propositions, remarks and the algorithm": STATEMENTS,
        "Corrections outside the numbered equations": CORRECTIONS,
    }
    body = ""
    for title, known in parts.items():
        body += f'<tr class="part"><th colspan="{len(head)}">{title}</th></tr>'
        body += "".join(register_row(row) for row in rows if row["item"] in known)
    names = "".join(f"<th>{name}</th>" for name in head)
    table = f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="table register">{table}</table></div>'


def with_register(cells):
    "Put the table where the notebook computes it"
    rows = equation_table(NBS)
    table = markdown(f"{equation_totals(rows)}.\n\n{register_table(rows)}")
    return [table if cell["cell_type"] == "code" else cell for cell in cells]


# The site


def copy_mathjax():
    "The part of MathJax that the pages load"
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    mathjax = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    to = OUT / "html" / "_static" / "mathjax"
    (to / "input").mkdir(parents=True, exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", to)
    for part in ("output/chtml/fonts", "input/tex/extensions"):
        shutil.copytree(mathjax / part, to / part, dirs_exist_ok=True)


def stage_all(to):
    "All pages, and the figures and tables that they show"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    needed = set()
    for notebook in notebooks():
        needed |= stage(notebook, to / notebook.relative_to(NBS))
    for name in sorted(needed):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    shutil.copy(HERE / "_config.yml", to)
    (to / "_toc.yml").write_text(expanded_toc((HERE / "_toc.yml").read_text()))
    (to / "_static").mkdir()
    shutil.copy(HERE / "site.css", to / "_static")


def main():
    pages = OUT / "src"
    stage_all(pages)
    jupyter_book = Path(sys.executable).parent / "jupyter-book"
    command = [jupyter_book, "build", "-q", str(pages), "--path-output", str(OUT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(OUT / "html", ignore_errors=True)
    shutil.move(OUT / "_build" / "html", OUT / "html")
    copy_mathjax()
    print(f"{OUT.relative_to(ROOT)}/html/index.html")


if __name__ == "__main__":
    main()
