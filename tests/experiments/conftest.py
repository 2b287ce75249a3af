import pytest
from toy_checkout import make_checkout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A small checkout, which is the project's for the length of a test"
    monkeypatch.setenv("VGGFLOW_ROOT", str(tmp_path))
    return make_checkout(tmp_path)
