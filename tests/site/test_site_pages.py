"What the site shows is staged by site/build.py; Sphinx only renders it. No browser needed."

import json
import os
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vggflow.common.equations import CORRECTIONS, EQUATIONS, STATEMENTS

ROOT = Path(__file__).parents[2]
NBS = ROOT / "nbs"
NOTEBOOKS = [nb for nb in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in nb.parts]
REGISTER = "pages/equations"
LINK = re.compile(
    r"\]\(([^)\s]+)\)"  # [text](page)
    r"|(?:href|src)=\"([^\"]+)\""
    r"|^`{3,}\{(?:image|figure)\} (\S+)"
    r"|^:(?:link|target|img-top): (\S+)",
    re.M,
)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    "The folder of the pages"
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, str(ROOT / "site/build.py"), "--stage", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(staged) -> dict:
    "Page -> its cells; a page of Markdown is one cell"
    found = {}
    for file in sorted(staged.rglob("*.ipynb")):
        found[name_of(file, staged)] = json.loads(file.read_text(encoding="utf8"))["cells"]
    for file in sorted(staged.rglob("*.md")):
        text = file.read_text(encoding="utf8")
        found[name_of(file, staged)] = [dict(cell_type="markdown", source=text)]
    return found


def name_of(file: Path, staged: Path) -> str:
    "A page's name, e.g. 1_theory/flow"
    return file.relative_to(staged).with_suffix("").as_posix()


def prose(cells: list) -> str:
    "What a page says, without the code that it shows"
    texts = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    for cell in cells:
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("data", {}).get("text/markdown", "")))
    return re.sub(
        r"^(```+|~~~+)(?!\{).*?^\1[ \t]*$", "", "\n\n".join(texts), flags=re.M | re.S
    )


def test_every_notebook_has_its_page(pages):
    names = {nb.relative_to(NBS).with_suffix("").as_posix() for nb in NOTEBOOKS}
    assert not names - pages.keys() - {"index"}


def test_every_page_is_in_one_menu(pages):
    listed = []
    for page, cells in pages.items():
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", joined(cells), re.M | re.S):
            entries = [line for line in tree.splitlines() if line and line[0] != ":"]
            entries = [re.sub(r".*<(.+)>", r"\1", entry) for entry in entries]
            folder = posixpath.dirname(page)
            listed += [posixpath.normpath(posixpath.join(folder, e)) for e in entries]
    assert sorted(listed) == sorted(pages.keys() - {"index"})


def joined(cells: list) -> str:
    "The text of a page"
    return "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")


def test_every_link_and_picture_is_there(pages, staged, tmp_path):
    copied = f"import build\nbuild.copy_as_they_are(build.Path({str(tmp_path)!r}))"
    assert asked(copied).returncode == 0
    dead = []
    for page, cells in pages.items():
        for found in LINK.finditer(prose(cells)):
            target = next(filter(None, found.groups())).partition("#")[0]
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            is_page = os.path.splitext(path)[0] in pages or path in pages
            is_file = (staged / path).is_file() or (tmp_path / path).is_file()
            if target and "://" not in target and not is_page and not is_file:
                dead.append(f"{page}: {target}")
    assert not dead, "\n".join(dead)


def asked(code: str, **variables) -> subprocess.CompletedProcess:
    "What a few lines say that use the modules of the site"
    lines = f"import sys; sys.path.insert(0, 'site')\n{code}"
    command = [sys.executable, "-c", lines]
    told = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=told)


def test_a_dead_link_is_refused():
    done = asked(
        "from places import on_the_site\n"
        "on_the_site('[a](none.ipynb)', 'nbs/1_theory/flow.ipynb', 'x.ipynb', set())"
    )
    last = done.stderr.splitlines()[-1]
    assert last.endswith("nbs/1_theory/flow.ipynb links to none.ipynb, which is not there")


def test_a_repository_on_the_web_gives_launch_links(pages):
    code = "from chapters import launch_links\nprint(*launch_links('nbs/start.ipynb'))"
    said = asked(code, VGGFLOW_REPOSITORY="me/vggflow").stdout
    assert "colab.research.google.com/github/me/vggflow/blob/main/nbs/start.ipynb" in said
    assert "mybinder.org/v2/gh/me/vggflow/main?labpath=nbs/start.ipynb" in said
    assert said.count("(untested)") == 2
    assert "(untested)" not in joined(pages["start"]), "no repository was named"


def test_every_picture_is_said_in_words(pages):
    for page, cells in pages.items():
        text = joined(cells)
        shown = len(re.findall(r"^`{3,}\{(?:image|figure)\}", text, re.M))
        assert len(re.findall(r"^:alt: \S", text, re.M)) == shown, page
        assert "![](" not in text, page
        for cell in cells:
            if any(
                "image/png" in output.get("data", {}) for output in cell.get("outputs", [])
            ):
                assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 20, page


def test_a_dark_page_turns_round_lines_and_never_images(pages):
    turned = {
        p for p in pages if p.startswith("figures/") and ":class: drawn" in joined(pages[p])
    }
    assert {"figures/fig05", "figures/modes", "figures/table1"} <= turned
    assert (
        not {"figures/fig01", "figures/fig02", "figures/fig17", "figures/prompts"} & turned
    )
    plots = {p: plot_classes(cells) for p, cells in pages.items()}
    assert plots["1_theory/flow"] == ["drawn", "drawn"]
    assert plots["7_commands/sample"] == [""]
    assert plots["1_theory/control"] == ["", "drawn", "drawn"], (
        "the first is painted by `heat`"
    )


def plot_classes(cells: list) -> list:
    "The class of each plot of a page"
    shown = [
        c
        for c in cells
        if any("image/png" in o.get("data", {}) for o in c.get("outputs", []))
    ]
    return [cell["metadata"]["mystnb"]["image"].get("classes", "") for cell in shown]


def test_the_site_hides_what_nbdev_hides(pages):
    for name, cells in pages.items():
        for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
            assert not cell["source"].startswith("#|"), f"{name}: a directive on the page"


def test_the_register_links_to_every_check(pages):
    table = joined(pages[REGISTER])
    links = re.findall(r'href="([^"#]+)\.html#([\w-]+)"', table)
    assert [anchor for _, anchor in links] == [*EQUATIONS, *STATEMENTS, *CORRECTIONS]
    for link, anchor in links:
        page = posixpath.normpath(posixpath.join(posixpath.dirname(REGISTER), link))
        assert f'<a id="{anchor}"></a>' in joined(pages[page]), (page, anchor)


def test_the_reference_has_every_exported_name(pages):
    import ast

    for module in sorted((ROOT / "vggflow").rglob("*.py")):
        name = ".".join(module.relative_to(ROOT / "vggflow").with_suffix("").parts)
        said = re.search(r"^__all__ = (\[.*?\])$", module.read_text(), re.M | re.S)
        names = ast.literal_eval(said[1]) if said and not name.startswith("_") else []
        for exported in names if not module.stem.startswith("_") else []:
            shown = re.search(
                rf"^`+\{{py:\w+\}} {exported}\b", joined(pages[f"api/{name}"]), re.M
            )
            assert shown, f"vggflow.{name}.{exported}"


def test_the_reference_links_to_cells_that_are_there(pages):
    for page in [page for page in pages if page.startswith("api/")]:
        for chapter, name in re.findall(
            r'class="source" href="\.\./([^"#]+)\.html#(source-\w+)"', joined(pages[page])
        ):
            assert f'<a id="{name}"></a>' in joined(pages[chapter]), (page, name)


def test_every_option_of_a_command_is_on_its_page(pages):
    from vggflow.cli import VERBS

    for verb, about in VERBS.items():
        text = joined(pages[f"commands/{verb}"])
        missing = [
            setting.help
            for setting in about.settings.values()
            if setting.help
            and " ".join(setting.help.split())[:25] not in text.replace("\\", "")
        ]
        assert not missing, (verb, missing)


def test_the_glossary_gives_every_word_its_meaning(pages):
    "As Sphinx reads it: a word, and its meaning further in"
    page = prose(pages["paths/glossary"]).partition("{glossary}")[2]
    entries = page.strip("`\n ").split("\n\n")
    assert len(entries) > 5
    for entry in entries:
        word, meaning = entry.split("\n")
        assert not word.startswith((" ", ":")) and meaning.startswith("  "), entry


def test_every_figure_has_its_page(pages):
    for record in sorted((ROOT / "figures").glob("*.json")):
        text = joined(pages[f"figures/{record.stem}"])
        profile = json.loads(record.read_text())["profile"]
        assert f"vggflow figures {record.stem} --profile {profile}" in text
        assert f"../figures/{record.stem}" in joined(pages["pages/gallery"])


def test_contents_name_chapters_that_exist():
    contents = tomllib.loads((ROOT / "site/contents.toml").read_text(encoding="utf8"))
    for floor in contents["floor"]:
        for name in floor.get("first", []):
            assert (NBS / floor["folder"] / f"{name}.ipynb").is_file(), (floor, name)
    keys = set(
        re.findall(r"^@\w+\{(\w+),", (ROOT / "site/references.bib").read_text(), re.M)
    )
    assert {*contents["first_mentions"].values()} <= keys


def test_pages_are_cited_from_the_bibliography(pages):
    keys = set(
        re.findall(r"^@\w+\{(\w+),", (ROOT / "site/references.bib").read_text(), re.M)
    )
    cited = {
        key
        for cells in pages.values()
        for key in re.findall(r"\{cite\}`(\w+)`", joined(cells))
    }
    assert cited <= keys and len(cited) > 10
