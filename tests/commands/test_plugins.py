"A method, a model and a reward of a user's own: one file, nothing of the package changed"

import json
from pathlib import Path

import pytest
from PIL import Image

OWN = """
import torch
from torch import nn
from vggflow import FlowModel, Method, sample


class Climb(Method):
    "The reward of what the last step leads to"

    def __init__(self, strength: float = 1.0):
        super().__init__(strength=strength)
        self.strength = strength

    def loss(self, flow, items):
        times = items.times
        with torch.no_grad():
            x = sample(flow, items.x0, times, items.cond).x[-2]
        v = flow.velocity(x, times[-2].expand(len(x)), items.cond)
        images = flow.decode(x + (times[-1] - times[-2]) * v)
        reward = items.reward(images, items.cond).mean()
        return -self.strength * reward, dict(reward=reward.item())


class Dots(FlowModel):
    "Images of 8 x 8 pixels that contract to grey"

    def __init__(self):
        super().__init__()
        self.push = nn.Parameter(torch.zeros(3, 1, 1))

    def prior(self, n, cond=None, generator=None):
        return torch.randn(n, 3, 8, 8, generator=generator)

    def base_velocity(self, x, t, cond=None):
        return -x

    def velocity(self, x, t, cond=None):
        return self.push - x

    def decode(self, x):
        return torch.sigmoid(x)


def make_dots(**settings):
    return Dots()


def warm(images, prompts):
    return (images[:, 0] - images[:, 2]).mean((1, 2))
"""
FEW = (
    "--updates 3 --batch-size 4 --steps 3 --transitions 2 --eval-every 0 --quiet --lr 1e-2"
)
JUDGED = "--images-per-prompt 2 --perceptual none --clip none --quiet"


@pytest.fixture
def own(here):
    "A working directory with a user's file"
    Path("my.py").write_text(OWN)
    return here


def rewards_of(folder):
    "Name of a set -> its mean reward"
    sets = json.loads(Path(folder, "evaluation.json").read_text())["sets"]
    return {name: numbers["reward"] for name, numbers in sets.items()}


def test_a_method_of_ones_own_is_trained_and_evaluated(own, call):
    line = "finetune --method my.py:Climb --option strength=3 --reward my.py:warm"
    status, _, err = call(f"{line} --prompts 'a cat' --out r {FEW}")
    assert status == 0, err
    record = json.loads(Path("r/config.json").read_text())
    assert record["method"]["name"] == "Climb" and record["method"]["strength"] == 3
    status, _, err = call(f"evaluate --run r --trust --out e {JUDGED}")
    assert status == 0, err
    assert set(rewards_of("e")) == {"finetuned", "base"}


def test_a_model_and_a_reward_of_ones_own_are_trained_drawn_and_evaluated(own, call):
    line = "finetune --model my.py:make_dots --method ReFL --reward my.py:warm"
    status, _, err = call(f"{line} --prompts 'a dot' --out r {FEW} --lr 0.3")
    assert status == 0, err
    status, _, err = call(
        "sample 'a dot' --run r --trust --n 2 --compare --scale 1 --out d.png"
    )
    assert status == 0, err
    assert Image.open("d.png").size == (4 * 8, 8)
    status, _, err = call(f"evaluate --run r --trust --out e {JUDGED}")
    assert status == 0, err
    rewards = rewards_of("e")
    assert rewards["finetuned"] > rewards["base"] + 0.05


FAULTS = [
    ("--method my.py:Clib", "method 'my.py:Clib'", "my.py has no 'Clib'", "'Climb'"),
    ("--method no.py:Climb", "method 'no.py:Climb'", "there is no file no.py", ""),
    ("--method bad.py:Climb", "method 'bad.py:Climb'", "bad.py, line 2", "NameError"),
    ("--reward my.py:wram", "my.py:wram", "my.py has no 'wram'", "'warm'"),
    ("--reward bad.py:warm", "bad.py:warm", "bad.py, line 2", "NameError"),
    ("--model my.py:make_dot --reward redness", "my.py:make_dot", "has no", "'make_dots'"),
    ("--model bad.py:make --reward redness", "bad.py:make", "line 2", "NameError"),
]


@pytest.mark.parametrize("words,what,where,why", FAULTS)
def test_a_fault_of_ones_own_file_is_named(own, call, words, what, where, why):
    "Which file, which name, and why, in one line, before anything is written"
    Path("bad.py").write_text("import torch\nx = nothing_of_that_name\n")
    status, _, err = call(f"finetune {words} --out r --prompts 'a cat' {FEW}")
    assert status == 2 and err.count("\n") == 1, err
    for text in (what, where, why):
        assert text in err
    assert not Path("r/config.json").exists()


def test_a_method_of_ones_own_has_a_colour_of_its_own(own, monkeypatch):
    "Rows of `my.py:Climb` are drawn under their own label, in no colour of the paper"
    from vggflow.experiments import style

    shown = style.series_colors(["ReFL", "my.py:Climb"])
    assert len({str(c) for c in shown.values()}) == 2
    assert style.color("my.py:Climb") not in style.COLORS.values()
