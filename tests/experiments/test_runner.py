"The strict runner: what it refuses, what it leaves, and how it speaks to a kernel"

import tempfile

import pytest
from toy_checkout import write_notebook

from vggflow.experiments.cards import template_path
from vggflow.experiments.notebooks import run_notebook


def test_refuses_undeclared(checkout):
    says = "no parameter of toy called 'updats'; did you mean 'updates'"
    with pytest.raises(ValueError, match=says):
        run_notebook(template_path("toy"), checkout / "x.ipynb", dict(updats=3))
    assert not list(checkout.glob("x*"))


def test_failure_keeps_the_notebook_and_says_where(checkout):
    parameters = dict(bad=True, out=str(checkout))
    with pytest.raises(RuntimeError, match="OSError: the disk is full .*x.failed.ipynb"):
        run_notebook(template_path("toy"), checkout / "x.ipynb", parameters)
    assert [path.name for path in checkout.glob("x*")] == ["x.failed.ipynb"]


ASK = """
from ipykernel.connect import get_connection_info
print('by', get_connection_info(unpack=True)['transport'])
"""


@pytest.mark.parametrize("long,transport", [(False, "ipc"), (True, "tcp")])
def test_kernels_share_no_port(tmp_path, monkeypatch, long, transport):
    "Two kernels that start at once may pick one port; a socket's path may be too long"
    if long:
        deep = tmp_path / ("x" * 90)
        deep.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
    template = write_notebook(tmp_path / "a.ipynb", "seed: int = 0  # Seed", ASK)
    done = run_notebook(template, tmp_path / "b.ipynb", {})
    assert f"by {transport}" in done.read_text()
