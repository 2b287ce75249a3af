"A short form of the resumes in `make faults`: each method once, worlds and ways in turn"

import pytest
from faults.resumes import WAYS, WORLDS, Cell, is_resumed

from vggflow.methods.registry import METHODS
from vggflow.training import loop

CELLS = [
    Cell(WORLDS[number % len(WORLDS)], method, list(WAYS)[number % len(WAYS)])
    for number, method in enumerate(METHODS)
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_killed_at_a_random_moment_it_ends_as_if_not(cell, tmp_path):
    assert is_resumed(cell, tmp_path, alone=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_part_of_the_state_that_is_lost_is_noticed(tmp_path, monkeypatch):
    "The tooth: the optimiser's moments are not read again"
    cell = Cell("gaussian", "ReFL", "ema")
    assert is_resumed(cell, tmp_path / "a", alone=True)
    own = loop.load_parts

    def without_moments(state, update, parts):
        own(state, update, {**parts, "optimizer": {}} if parts else parts)

    monkeypatch.setattr(loop, "load_parts", without_moments)
    assert not is_resumed(cell, tmp_path / "b", alone=True)
