"A run from names: cards, commands, and what is known before the model is loaded."

import json
from importlib.util import find_spec

import pytest
import torch

from vggflow.training.run_directory import RunDirectory

TINY = dict(
    reward="mine.py:bright",
    prompts="a.txt",
    method="ReFL",
    updates=1,
    batch_size=2,
    steps=2,
    eval_every=0,
    lora_rank=2,
    progress=False,
)
BRIGHT = "def bright(images, prompts): return {}images.mean((1, 2, 3))\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with a tiny model, a reward, prompts and a card"
    from tiny_sd3 import make_tiny_sd3

    monkeypatch.chdir(tmp_path)
    make_tiny_sd3(tmp_path / "tiny", t5=False)
    (tmp_path / "a.txt").write_text("a cat\nan owl\n")
    (tmp_path / "mine.py").write_text(BRIGHT.format(""))
    card = {**TINY, "model": "tiny", "out": "run"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    return tmp_path


def command_of(folder):
    return RunDirectory(folder / "run").settings


def test_a_card_with_a_model_is_of_stable_diffusion_3(here, monkeypatch):
    "And its command means the same elsewhere"
    from vggflow import train

    assert train.main(["card.json", "--trust"]) == 0
    asked = command_of(here)
    record = json.loads((here / "run/config.json").read_text())
    assert asked["world"] == "sd3" and asked["reward"] == f"{here}/mine.py:bright"
    assert "out" not in asked
    assert (asked["model"], asked["prompts"]) == (str(here / "tiny"), str(here / "a.txt"))
    assert record["flow"]["model"] == "tiny" and record["prompts"] == ["a cat", "an owl"]
    assert set(record["about"]) == {"reward", "sources", "weights"}
    assert (here / "run/lora").is_dir()
    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    assert train.main(["../run/command.json", "--trust"]) == 0  # the same run
    assert command_of(here) == asked


def test_a_command_follows_what_may_change_and_another_run_is_told_early(here, monkeypatch):
    "Before the model is loaded"
    from vggflow import train
    from vggflow.commands.run import run
    from vggflow.worlds.sd3 import SD3Flow

    assert train.main(["card.json", "--trust"]) == 0
    asked = command_of(here)
    more = {**asked, "updates": 2, "micro_batch": 1}
    call = {**more, "out": str(here / "run"), "progress": False}
    run(**call)
    assert command_of(here) == more

    def loads(*args, **keywords):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SD3Flow, "from_pretrained", loads)
    for other, says in (
        (dict(lr=0.5), "config.lr"),
        (dict(method="VGG-Flow", transitions=2), "method.name"),
        (dict(lora_rank=4), "flow.lora_rank"),
        (dict(reward="redness"), "about.reward"),
        (dict(model=str(here / "other")), "flow.model"),
    ):
        with pytest.raises(ValueError, match=f"holds another run .*{says}"):
            run(**{**call, **other})
    (here / "mine.py").write_text(BRIGHT.format("-"))
    with pytest.raises(ValueError, match="about.sources.mine.py"):
        run(**call)
    with pytest.raises(ValueError, match="holds a run already"):
        run(**call, resume=False)
    assert command_of(here) == more


def test_a_model_goes_with_its_world():
    from vggflow.commands.run import run
    from vggflow.worlds.world import get_world

    names = [get_world("").name, get_world("", "m").name, get_world("gaussian").name]
    assert names == ["emoji", "sd3", "gaussian"]
    assert get_world("", "m").default_reward == "aesthetic"
    said = "model='m' goes with the world 'sd3', not with 'emoji'"
    with pytest.raises(ValueError, match=said):
        run("emoji", model="m")


def test_what_is_missing_is_said_before_a_world_is_built(monkeypatch):
    from vggflow.commands.run import run
    from vggflow.worlds.world import get_world

    def builds(*args, **keywords):
        raise AssertionError("the world was built")

    monkeypatch.setattr(type(get_world("gaussian")), "build", builds)
    if not find_spec("bitsandbytes"):
        with pytest.raises(ImportError, match="needs bitsandbytes"):
            run("gaussian", optimizer="adamw-8bit")
    if torch.cuda.is_available():
        return
    sd3 = dict(model="m", reward="redness")
    for world, more in (("emoji", {}), ("sd3", sd3)):
        with pytest.raises(ValueError, match="device 'cuda' is not here"):
            run(world, device="cuda", prompts=["a"], **more)
