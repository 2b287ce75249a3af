"The register of equations: a label above each checking cell, and the table of all of them"

import html
import os
import sys
from pathlib import Path

from places import NBS, ROOT, chapter_numbers, page_of_chapter

sys.path.insert(0, str(ROOT))
from vggflow.common.equations import (  # noqa: E402
    CORRECTIONS,
    EQUATIONS,
    STATEMENTS,
    equation_name,
    equation_table,
    equation_totals,
)

PAGE = "pages/equations"
ITEMS = {*EQUATIONS, *STATEMENTS, *CORRECTIONS}
VERDICTS = {  # what a verdict is called in the style sheet
    "holds": "holds",
    "holds with a condition": "condition",
    "printed form corrected": "corrected",
}
HEAD = ("equation", "chapter", "kind of check", "error", "allowed", "teeth", "verdict")


def check_label(
    tags: list,  # Of a cell
    page: str,  # Where it stands
) -> list:  # One cell of prose, or none
    "A line above a cell that the register knows, with the anchor that its table links to"
    known = [tag for tag in tags if tag.removesuffix("-teeth") in ITEMS]
    if not known:
        return []
    names = ", ".join(equation_name(tag.removesuffix("-teeth")) for tag in known)
    kind = "teeth" if known[0].endswith("-teeth") else "check"
    ids = "".join(f'<a id="{tag}"></a>' for tag in known)
    near = os.path.relpath(PAGE, Path(page).parent)
    item = known[0].removesuffix("-teeth")
    link = f'<a href="{near}.html#{item}">{kind} of {html.escape(names)}</a>'
    text = f'<div class="register {kind}">{ids}{link}</div>'
    return [dict(cell_type="markdown", metadata={}, source=text)]


def link_to_chapter(name: str, anchor: str, text: str) -> str:
    "A link from the register to a chapter"
    near = os.path.relpath(page_of_chapter(name), Path(PAGE).parent)
    return f'<a href="{near}.html{anchor}">{html.escape(text)}</a>'


def chapter_title(name: str) -> str:
    "Number and name of a chapter"
    number = chapter_numbers().get(page_of_chapter(name), "")
    return f"{number} {name}".strip()


def table_row(row: dict) -> str:
    "One row of the register"
    chapters = [name for name in row["chapter"].split(", ") if name]
    item = row["item"]
    name = html.escape(equation_name(item))
    if chapters:
        name = link_to_chapter(chapters[0], f"#{item}", equation_name(item))
    where = "<br>".join(link_to_chapter(c, "", chapter_title(c)) for c in chapters)
    verdict = VERDICTS.get(row["verdict"], "missing")
    note = f"<br><small>{html.escape(row['note'])}</small>" if row["note"] else ""
    # one line for each checking cell
    columns = [row[key].replace(", ", "<br>") for key in ("kind", "error", "tol")]
    columns = [name, where, *columns, str(row["teeth"])]
    cells = "".join(f"<td>{column}</td>" for column in columns)
    badge = f'<span class="verdict {verdict}">{row["verdict"]}</span>{note}'
    return f'<tr id="{item}">{cells}<td>{badge}</td></tr>'


def table(rows: list) -> str:
    "The register as HTML"
    parts = {
        "Equations": EQUATIONS,
        "Propositions, remarks and the algorithm": STATEMENTS,
        "Corrections outside the numbered equations": CORRECTIONS,
    }
    body = ""
    for title, known in parts.items():
        body += f'<tr class="part"><th colspan="{len(HEAD)}">{title}</th></tr>'
        body += "".join(table_row(row) for row in rows if row["item"] in known)
    names = "".join(f"<th>{name}</th>" for name in HEAD)
    inside = f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="table register">{inside}</table></div>'


def with_table(cells: list) -> list:
    "The page of the register, with the table where the notebook computes it"
    rows = equation_table(NBS)
    text = f"{equation_totals(rows)}.\n\n{table(rows)}"
    made = dict(cell_type="markdown", metadata={}, source=text)
    return [made if cell["cell_type"] == "code" else cell for cell in cells]
