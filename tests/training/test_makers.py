"Which code made a run, also where it was continued by another"

import linecache

import pytest

from vggflow import VGGFlow, finetune
from vggflow.common.source import code_of
from vggflow.judging.rewards import get_reward
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.run_directory import RunDirectory

REWARD = """
def mine(images, prompts):
    return -((images - {aim}) ** 2).flatten(1).sum(1)
"""


def finetuned(folder, updates, aim):
    "A run of a reward in a file"
    file = folder / "mine.py"
    file.write_text(REWARD.format(aim=aim))
    flow = GaussianFlow([0.0, 0.0], 1.0)
    config = FinetuneConfig(updates=updates, batch_size=2, steps=4, transitions=2, lr=1e-3)
    reward = get_reward(f"{file}:mine")
    finetune(flow, reward, VGGFlow(beta=1.0), config, folder / "run", progress=False)
    return RunDirectory(folder / "run").record["made"]


def test_a_run_says_which_code_made_it(tmp_path):
    (made,) = finetuned(tmp_path, 1, aim=1.0)
    assert made["versions"]["torch"] and made["commit"]
    used = {"training.update", "methods.value_gradient", "theory.value", "mine.py"}
    assert used <= made["code"].keys()
    assert not {
        name for name in made["code"] if name.startswith(("commands", "worlds.sd3"))
    }
    assert finetuned(tmp_path, 2, aim=1.0) == [made]


def test_code_that_has_changed_is_said_and_noted(tmp_path):
    (first,) = finetuned(tmp_path, 1, aim=1.0)
    with pytest.warns(RuntimeWarning, match="other code than it began with: mine.py"):
        made = finetuned(tmp_path, 2, aim=2.0)
    assert made[0] == first and made[1]["code"]["mine.py"] != first["code"]["mine.py"]


def test_a_cell_of_a_notebook_has_no_file(tmp_path):
    "Jupyter keeps its source in memory, under the name of a file that is not there"
    name, text = str(tmp_path / "1234.py"), "def mine(x, prompts=None):\n    return x\n"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    cell = {"__name__": "__main__"}
    exec(compile(text, name, "exec"), cell)
    assert code_of(cell["mine"]) == {}
