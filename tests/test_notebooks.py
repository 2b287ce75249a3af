"Every notebook runs, as `nbdev-test` runs it, in a process of its own"

from pathlib import Path

import pytest
from forked import status_of
from nbdev.test import test_nb as passes

passes.__test__ = False
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)


def run(notebook: Path) -> int:
    "Exit status of a notebook; a cell that fails is said on stderr"
    passed, _ = passes(notebook, basepath=ROOT)
    return int(not passed)


def names(notebook: Path) -> str:
    "Folder and name"
    return f"{notebook.parent.name}/{notebook.stem}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names)
def test_notebook_runs(notebook):
    if notebook.parent.name == "playground":
        pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    assert status_of(run, notebook) == 0
