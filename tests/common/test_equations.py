"""The register of equations: every item of the paper is checked in a notebook, with teeth, and the pages say so."""

import ast, importlib.util, json, re
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
CHAPTERS = sorted(NBS.glob("0*.ipynb"))
ITEMS = [*EQUATIONS, *STATEMENTS, *CORRECTIONS]


def cells_of(nb):
    return [c for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == "code"]


def lines(c):
    return len("".join(c["source"]).splitlines())


@pytest.fixture(scope="module")
def register():
    return {r["item"]: r for r in equation_table(NBS)}


def test_the_register_knows_the_whole_paper():
    assert EQUATIONS == [f"eq-{n:02d}" for n in range(1, 46)]
    assert STATEMENTS == [
        "prop-2",
        "prop-3",
        "prop-4",
        "prop-5",
        "remark-1",
        "remark-6",
        "algorithm-1",
    ]
    assert len(CORRECTIONS) == 9


@pytest.mark.parametrize("item", ITEMS)
def test_is_checked_with_teeth(item, register):
    r = register[item]
    assert r["verdict"] != "missing", f"{item}: no cell is tagged {item}"
    assert r["verdict"] in VERDICTS and r["teeth"] > 0, (
        f"{item}: no cell tagged {item}-teeth calls noticed"
    )
    for e, tol in zip(r["error"].split(", "), r["tol"].split(", ")):
        assert float(e) <= float(tol), f"{item}: printed error {e}, allowed {tol}"
    if item in CORRECTIONS:
        assert r["verdict"] == "printed form corrected" and r["note"]


def test_every_check_printed_an_error_that_it_allows():
    for tag, chapter, c in tagged_cells(NBS):
        if tag.endswith("-teeth"):
            continue
        row = read_check(chapter, c)
        assert float(row["error"]) <= float(row["tol"]), f"{chapter}, {tag}: {row}"


def test_a_check_comes_before_its_teeth_and_ends_its_cell():
    seen = {}
    for k, (tag, chapter, c) in enumerate(tagged_cells(NBS)):
        seen.setdefault(tag, k)
        body = ast.parse("".join(c["source"]))
        last = body.body[-1]
        calls = lambda tree: {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        if tag.endswith("-teeth"):
            assert "noticed" in calls(body), (
                f"{chapter}: the cell tagged {tag} notices nothing"
            )
        else:
            assert "checked" in calls(last), (
                f"{chapter}: the cell tagged {tag} does not end with checked"
            )
    for tag, k in seen.items():
        if tag.endswith("-teeth"):
            assert seen.get(tag.removesuffix("-teeth"), k) < k, (
                f"{tag} stands before its check"
            )


def copy_without(tag, folder):
    "The notebooks with one tag taken away"
    folder.mkdir()
    for nb in NBS.glob("*.ipynb"):
        d = json.loads(nb.read_text())
        for c in d["cells"]:
            if tag in c["metadata"].get("tags", []):
                c["metadata"]["tags"].remove(tag)
        (folder / nb.name).write_text(json.dumps(d))
    return folder


@pytest.mark.parametrize(
    "item", ["eq-12", "eq-45", "prop-4", "algorithm-1", "correction-fig-9"]
)
def test_a_removed_tag_is_reported(item, tmp_path, monkeypatch, capsys):
    from vggflow.cli import main

    checks, teeth = (
        copy_without(item, tmp_path / "nbs"),
        copy_without(f"{item}-teeth", tmp_path / "teeth"),
    )
    assert item in {r["item"] for r in unchecked(equation_table(checks))}
    assert item in {r["item"] for r in unchecked(equation_table(teeth))}
    (tmp_path / "experiments.toml").touch()
    monkeypatch.setenv("VGGFLOW_ROOT", str(tmp_path))
    assert main(["equations", "--missing"]) == 1 and "missing" in capsys.readouterr().out


def test_a_check_without_its_printed_line_is_refused(tmp_path):
    nb = next(
        n
        for n in CHAPTERS
        if any("eq-01" in c["metadata"].get("tags", []) for c in cells_of(n))
    )
    d = json.loads(nb.read_text())
    for c in d["cells"]:
        if c["cell_type"] == "code":
            c["outputs"] = []
    (tmp_path / nb.name).write_text(json.dumps(d))
    with pytest.raises(ValueError, match="no printed result"):
        equation_table(tmp_path)


def test_the_command_finds_nothing_missing(capsys):
    from vggflow.cli import main

    assert main(["equations", "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n| ") == len(ITEMS)


def test_the_page_is_in_step():
    out = [
        o
        for c in cells_of(NBS / "equations.ipynb")
        for o in c["outputs"]
        if "text/markdown" in o.get("data", {})
    ]
    assert len(out) == 1
    assert "".join(out[0]["data"]["text/markdown"]) == equation_report(
        equation_table(NBS), markdown=True
    ), "nbs/pages/equations.ipynb shows an older register: run make register"


@pytest.mark.parametrize("nb", CHAPTERS, ids=lambda p: p.stem)
def test_cells_and_functions_are_short(nb):
    for c in cells_of(nb):
        source = "".join(c["source"])
        assert lines(c) <= 25, f"a code cell of {lines(c)} lines: {source[:80]}"
        if "#| export" not in source:
            continue
        for f in ast.walk(ast.parse(source)):
            if isinstance(f, ast.FunctionDef):
                assert f.end_lineno - f.lineno < 25, (
                    f"{f.name} has {f.end_lineno - f.lineno + 1} lines"
                )


# The site: what it shows is made by site/build.py, which needs nothing but this package; Jupyter Book only renders it.


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "The notebooks as the site stages them"
    spec = importlib.util.spec_from_file_location(
        "site_build", NBS.parent / "site" / "build.py"
    )
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    to = tmp_path_factory.mktemp("pages")
    for nb in NBS.rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in nb.parts:
            build.stage(nb, to / nb.relative_to(NBS))
    return {
        p.relative_to(to).with_suffix("").as_posix(): json.loads(p.read_text())["cells"]
        for p in to.rglob("*.ipynb")
    }


def test_site_hides_what_nbdev_hides(pages):
    for name, cells in pages.items():
        for c in cells:
            if c["cell_type"] == "code":
                assert not "".join(c["source"]).startswith("#|"), (
                    f"{name}: a directive on the page"
                )


def test_site_links_the_register_to_every_check(pages):
    table = "\n".join(c["source"] for c in pages["equations"])
    links = re.findall(r'href="(\w+)\.html#([\w-]+)"', table)
    assert [a for _, a in links] == ITEMS
    for page, anchor in links:
        assert any(
            f'<a id="{anchor}"></a>' in c["source"]
            for c in pages[page]
            if c["cell_type"] == "markdown"
        ), (page, anchor)


def test_every_notebook_has_its_place_on_the_site():
    toc = (NBS.parent / "site" / "_toc.yml").read_text()
    places = re.findall(r'(?:glob|file|root): "?([^"\s]+)', toc)
    for nb in NBS.rglob("*.ipynb"):
        if ".ipynb_checkpoints" in nb.parts:
            continue
        where = nb.relative_to(NBS).with_suffix("")
        assert (
            sum(where.match(p) and len(Path(p).parts) == len(where.parts) for p in places)
            == 1
        ), f"{where} is not in site/_toc.yml"
