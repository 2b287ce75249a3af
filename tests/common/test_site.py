"What the site shows is made by site/build.py from the notebooks; the site only renders it."

import importlib.util
import json
import posixpath
import re
from pathlib import Path

import pytest

from vggflow.common.equations import CORRECTIONS, EQUATIONS, STATEMENTS

NBS = Path(__file__).parents[2] / "nbs"
NOTEBOOKS = [nb for nb in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in nb.parts]
REGISTER = "pages/equations"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Cells of the notebooks as the site stages them, by folder and name"
    file = NBS.parent / "site" / "build.py"
    spec = importlib.util.spec_from_file_location("site_build", file)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    staged = tmp_path_factory.mktemp("pages")
    pages = {}
    for notebook in NOTEBOOKS:
        place = notebook.relative_to(NBS)
        build.stage(notebook, staged / place)
        cells = json.loads((staged / place).read_text(encoding="utf8"))["cells"]
        pages[place.with_suffix("").as_posix()] = cells
    return pages


def test_site_hides_what_nbdev_hides(pages):
    for name, cells in pages.items():
        for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
            source = "".join(cell["source"])
            assert not source.startswith("#|"), f"{name}: a directive on the page"


def test_site_links_the_register_to_every_check(pages):
    table = "\n".join(cell["source"] for cell in pages[REGISTER])
    links = re.findall(r'href="([^"#]+)\.html#([\w-]+)"', table)
    assert [anchor for _, anchor in links] == [*EQUATIONS, *STATEMENTS, *CORRECTIONS]
    for link, anchor in links:
        page = posixpath.normpath(posixpath.join(posixpath.dirname(REGISTER), link))
        prose = [cell["source"] for cell in pages[page] if cell["cell_type"] == "markdown"]
        assert any(f'<a id="{anchor}"></a>' in text for text in prose), (page, anchor)


def test_every_notebook_has_its_place_on_the_site():
    toc = (NBS.parent / "site" / "_toc.yml").read_text()
    places = re.findall(r'(?:glob|file|root): "?([^"\s]+)', toc)
    for notebook in NOTEBOOKS:
        where = notebook.relative_to(NBS).with_suffix("")
        fits = [
            p for p in places if where.match(p) and len(Path(p).parts) == len(where.parts)
        ]
        assert len(fits) == 1, f"{where} is not in site/_toc.yml once: {fits}"


def test_every_link_between_chapters_leads_somewhere():
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
        for cell in [cell for cell in cells if cell["cell_type"] == "markdown"]:
            for link in re.findall(r"\]\(([\w./-]+\.ipynb)", "".join(cell["source"])):
                assert (notebook.parent / link).is_file(), (
                    f"{notebook.name} links to {link}"
                )
