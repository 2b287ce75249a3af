"The notebooks as pages: what nbdev hides is hidden, what it exports is marked and linked"

import ast
import html
import json
import os
import re
from pathlib import Path

import gallery
import register
from markup import menu
from pictures import DRAWN, paints
from places import ROOT, on_the_site, page_of
from prose import Prose
from words import title

PATHS = [f"paths/{name}" for name in ("reader", "regenerator", "engineer")]
PATHS += ["paths/notation", "paths/glossary"]
REPOSITORY = os.environ.get("VGGFLOW_REPOSITORY", "")  # OWNER/NAME on GitHub


def source(cell: dict) -> str:
    "The text of a cell"
    return "".join(cell["source"])


def markdown(text: str) -> dict:
    "A cell of prose"
    return dict(cell_type="markdown", metadata={}, source=text)


def directives(
    text: str,  # Of a code cell
) -> tuple:  # (words of each directive, the rest)
    "The nbdev directives at the top of a cell, and the rest"
    top = re.match(r"(?:#\|[^\n]*(?:\n|$))*", text)[0]
    return [line[2:].split() for line in top.splitlines()], text[len(top) :].lstrip("\n")


# ----------------------------------------------------------------------------- cells


def joined_outputs(outputs: list) -> list:
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


def only_imports(text: str) -> bool:
    "Whether a cell does nothing but import"
    body = ast.parse(re.sub(r"^[%!].*", "", text, flags=re.M)).body
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def only_shows(cell: dict, text: str) -> bool:
    "Whether a cell does nothing but show prose that the package made"
    kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
    return text.startswith("Markdown(") and "text/markdown" in kinds


def definitions(text: str) -> list:
    "Names of the functions and classes that a cell defines"
    body = ast.parse(re.sub(r"^[%!].*", "", text, flags=re.M)).body
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def anchors(text: str) -> list:
    "An anchor for each definition, to which the reference links"
    names = definitions(text)
    ids = "".join(f'<a id="source-{name}"></a>' for name in names)
    return [markdown(f'<div class="anchors">{ids}</div>')] if names else []


def alternative(
    text: str,  # Of the cell that draws
    heading: str,  # Of the section in which it stands
) -> str:
    "What a plot is, in words: its section and what its axes say"
    said = f"Plot in the section “{heading}”"
    titles = re.findall(r'(?:title|suptitle)[=(]\s*"([^"{}]+)"', text)
    axes = re.findall(r'\b([xy]label)[=(]\s*"([^"{}]+)"', text)
    parts = [f"titles: {', '.join(dict.fromkeys(titles))}"] if titles else []
    parts += dict.fromkeys(f"{name[0]} axis: {words}" for name, words in axes)
    words = "; ".join([said, *parts]).replace("$", "").replace("\\", "")
    return html.escape(words, quote=False).replace('"', "'")


class Page:
    "The cells of one page, made one after the other"

    def __init__(self, notebook: Path):
        self.notebook = notebook
        self.name = page_of(notebook)
        self.home = notebook.relative_to(ROOT).as_posix()
        self.prose = Prose(self.name)
        self.needed = set()  # files of the repository that it shows
        self.painters = set()  # functions that paint
        self.heading = ""
        self.module = ""

    def moved(self, text: str) -> str:
        "Prose with its links made for the site"
        return on_the_site(text, self.home, f"{self.name}.ipynb", self.needed)

    def cells(self, cell: dict) -> list:
        "What the page shows for one cell of the notebook"
        if cell["cell_type"] != "code":
            return [self.text(source(cell))]
        words, text = directives(source(cell))
        names = [word[0] for word in words if word]
        started = re.match(r"if __name__ == ['\"]__main__['\"] and", text)
        if "default_exp" in names:
            self.module = words[names.index("default_exp")][1]
        if "hide" in names or "default_exp" in names or started or not text.strip():
            return []
        return self.code(cell, names, text)

    def text(self, text: str) -> dict:
        "A cell of prose"
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        self.heading = headings[-1] if headings else self.heading
        return markdown(self.prose(self.moved(text)))

    def code(self, cell: dict, names: list, text: str) -> list:
        "A cell of code, with its anchors and the name of what it checks"
        tags = cell["metadata"].get("tags", [])
        shown = [tag for tag in tags if tag == "parameters"]
        exports = self.module and "export" in names
        shown += ["export"] if exports else []
        shown += ["hide-input"] if only_imports(text) else []
        shown += ["remove-input"] if "echo:" in names or only_shows(cell, text) else []
        outputs = [self.output(output) for output in joined_outputs(cell["outputs"])]
        metadata = dict(tags=shown, mystnb=dict(image=self.picture(text)))
        made = dict(cell, source=text, outputs=outputs, metadata=metadata)
        before = anchors(text) if exports else []
        return [*before, *register.check_label(tags, self.name), made]

    def picture(self, text: str) -> dict:
        "What a plot is, in words; its class, where it is lines on white"
        about = dict(alt=alternative(text, self.heading))
        if not paints(text, self.painters):
            return dict(about, classes=DRAWN)
        self.painters |= set(definitions(text))
        return about

    def output(self, output: dict) -> dict:
        "An output, with the links of its prose made for the site"
        data = output.get("data", {})
        if "text/markdown" not in data:
            return output
        text = self.moved("".join(data["text/markdown"]))
        return dict(output, data={"text/markdown": text})

    def head(self) -> str:
        "The line below the title: module, notebook, places to run it"
        up = "../" * self.name.count("/")
        parts = []
        if self.module:
            name = f"<code>vggflow.{self.module}</code>"
            parts.append(f'exports <a href="{up}api/{self.module}.html">{name}</a>')
        file = f"{up}notebooks/{self.name}.ipynb"
        parts.append(f'<a href="{file}" download>notebook</a> <code>{self.home}</code>')
        if REPOSITORY:
            parts += launch_links(self.home)
        return f'<p class="module">{" · ".join(parts)}</p>'


def launch_links(home: str) -> list:
    "Places on the web that run a notebook of a repository on GitHub"
    colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{home}"
    binder = f"https://mybinder.org/v2/gh/{REPOSITORY}/main?labpath={home}"
    links = {"Colab": colab, "Binder": binder}
    return [f'<a href="{link}">{name}</a> (untested)' for name, link in links.items()]


# ----------------------------------------------------------------------------- pages


def stage(
    notebook: Path,
    to: Path,  # Where the page is written
) -> set:  # Files of the repository that it shows
    "Write the page of one notebook"
    kept = json.loads(notebook.read_text(encoding="utf8"))
    page = Page(notebook)
    cells = [part for cell in kept["cells"] for part in page.cells(cell)]
    cells[0]["source"] = with_head(cells[0]["source"], page)
    cells = special(page.name, cells)
    kept["cells"] = [dict(cell, id=f"c{k}") for k, cell in enumerate(cells)]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(kept), encoding="utf8")
    return page.needed


def with_head(text: str, page: Page) -> str:
    "The first cell with the title's number, and the line of the module below the summary"
    text = re.sub(r"^# .+$", f"# {title(page.name)}", text, count=1, flags=re.M)
    head = re.match(r"# .+\n*(?:>.+\n?)*", text)[0]
    return f"{head.rstrip()}\n\n{page.head()}\n\n{text[len(head) :].strip()}".rstrip()


def special(name: str, cells: list) -> list:
    "What some pages have besides their cells"
    if name == register.PAGE:
        return register.with_table(cells)
    if name == "start":
        return [*cells, markdown(menu(PATHS))]
    if name == gallery.PAGE:
        return [cell for cell in cells if cell["cell_type"] != "code"] + [
            markdown(gallery.overview())
        ]
    if name.startswith("experiments/"):
        shown = gallery.of_template(name.partition("/")[2])
        return [cells[0], *([markdown(shown)] if shown else []), *cells[1:]]
    return cells
