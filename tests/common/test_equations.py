"Every item of the paper is checked in a notebook, with teeth, and the page says so."

import ast
import json
import shutil
from pathlib import Path

import pytest

from vggflow.common.equations import (
    CORRECTIONS,
    EQUATIONS,
    STATEMENTS,
    VERDICTS,
    equation_report,
    equation_table,
    read_check,
    tagged_cells,
    unchecked,
)

NBS = Path(__file__).parents[2] / "nbs"
CHAPTERS = [
    nb for folder in ("1_theory", "2_methods") for nb in (NBS / folder).glob("*.ipynb")
]
ITEMS = [*EQUATIONS, *STATEMENTS, *CORRECTIONS]


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def called(tree):
    "Names of the functions that are called"
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {func.id for func in calls if isinstance(func, ast.Name)}


@pytest.fixture(scope="module")
def register():
    return {row["item"]: row for row in equation_table(NBS)}


def test_the_register_knows_the_whole_paper():
    assert EQUATIONS == [f"eq-{n:02d}" for n in range(1, 46)]
    propositions = ["prop-2", "prop-3", "prop-4", "prop-5"]
    assert STATEMENTS == [*propositions, "remark-1", "remark-6", "algorithm-1"]
    assert len(CORRECTIONS) == 9


@pytest.mark.parametrize("item", ITEMS)
def test_is_checked_with_teeth(item, register):
    row = register[item]
    assert row["verdict"] != "missing", f"{item}: no cell is tagged {item}"
    assert row["verdict"] in VERDICTS
    assert row["teeth"] > 0, f"{item}: no cell tagged {item}-teeth calls noticed"
    for error, tol in zip(row["error"].split(", "), row["tol"].split(", ")):
        assert float(error) <= float(tol), f"{item}: printed error {error}, allowed {tol}"
    if item in CORRECTIONS:
        assert row["verdict"] == "printed form corrected" and row["note"]


def test_every_check_printed_an_error_that_it_allows():
    checks = [(tag, ch, cell) for tag, ch, cell in tagged_cells(NBS) if "teeth" not in tag]
    assert len(checks) >= len(ITEMS)
    for tag, chapter, cell in checks:
        row = read_check(chapter, cell)
        assert float(row["error"]) <= float(row["tol"]), f"{chapter}, {tag}: {row}"


def test_a_check_ends_its_cell_and_teeth_notice_something():
    for tag, chapter, cell in tagged_cells(NBS):
        tree = ast.parse("".join(cell["source"]))
        if tag.endswith("-teeth"):
            assert "noticed" in called(tree), f"{chapter}: {tag} notices nothing"
        else:
            last = called(tree.body[-1])
            assert "checked" in last, f"{chapter}: {tag} does not end with checked"


def test_a_check_comes_before_its_teeth():
    first = {}
    for place, (tag, _, _) in enumerate(tagged_cells(NBS)):
        first.setdefault(tag, place)
    for tag in [tag for tag in first if tag.endswith("-teeth")]:
        assert first[tag.removesuffix("-teeth")] < first[tag], (
            f"{tag} stands before its check"
        )


def copy_without(tag, folder):
    "The notebooks with one tag taken away"
    for notebook in NBS.rglob("*.ipynb"):
        book = json.loads(notebook.read_text(encoding="utf8"))
        for cell in book["cells"]:
            tags = cell["metadata"].get("tags", [])
            if tag in tags:
                tags.remove(tag)
        copy = folder / notebook.relative_to(NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(book))
    return folder


@pytest.mark.parametrize(
    "item", ["eq-12", "eq-45", "prop-4", "algorithm-1", "correction-fig-9"]
)
def test_a_removed_tag_is_reported(item, tmp_path, monkeypatch, capsys):
    from vggflow.cli import main

    checks = copy_without(item, tmp_path / "nbs")
    teeth = copy_without(f"{item}-teeth", tmp_path / "teeth")
    for folder in (checks, teeth):
        assert [row["item"] for row in unchecked(equation_table(folder))] == [item]
    (tmp_path / "experiments.toml").touch()
    monkeypatch.setenv("VGGFLOW_ROOT", str(tmp_path))
    assert main(["equations", "--missing"]) == 1
    assert "missing" in capsys.readouterr().out


def test_a_check_without_its_printed_line_is_refused(tmp_path):
    book = json.loads((NBS / "1_theory" / "flow.ipynb").read_text(encoding="utf8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    (tmp_path / "flow.ipynb").write_text(json.dumps(book))
    with pytest.raises(ValueError, match="no printed result"):
        equation_table(tmp_path)


def test_an_unknown_tag_is_refused(tmp_path):
    shutil.copy(NBS / "1_theory" / "flow.ipynb", tmp_path)
    text = (tmp_path / "flow.ipynb").read_text(encoding="utf8")
    (tmp_path / "flow.ipynb").write_text(
        text.replace('"eq-01"', '"eq-91"'), encoding="utf8"
    )
    with pytest.raises(ValueError, match="unknown tag 'eq-91'"):
        equation_table(tmp_path)


def test_the_command_finds_nothing_missing(capsys):
    from vggflow.cli import main

    assert main(["equations", "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n| ") == len(ITEMS)


def test_the_page_is_in_step():
    cells = code_cells(NBS / "pages" / "equations.ipynb")
    data = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    shown = ["".join(d["text/markdown"]) for d in data if "text/markdown" in d]
    wanted = equation_report(equation_table(NBS), markdown=True)
    stale = "nbs/pages/equations.ipynb shows an older register: run make register"
    assert shown == [wanted], stale


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
def test_cells_are_short(notebook):
    for cell in code_cells(notebook):
        lines = "".join(cell["source"]).splitlines()
        most = 60 if any(line.startswith("class ") for line in lines) else 30
        assert len(lines) <= most, f"a code cell of {len(lines)} lines: {lines[:2]}"
