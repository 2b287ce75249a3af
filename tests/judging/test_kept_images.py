"Before the first update images are read, not drawn, and no number changes"

import threading
import time

import pytest
import torch

from vggflow.judging import evaluation
from vggflow.judging.evaluation import Evaluator
from vggflow.judging.kept_images import images_file, kept_images
from vggflow.worlds.emoji import load_emoji
from vggflow.worlds.sd3 import SD3Flow

PROMPTS = ["a cat", "an owl"]


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def flow():
    return load_emoji()


@pytest.fixture
def drawings(monkeypatch):
    "How often images were drawn"
    calls, draw = [], evaluation.draw

    def counted(*args, **kwargs):
        calls.append(kwargs["seed"])
        return draw(*args, **kwargs)

    monkeypatch.setattr(evaluation, "draw", counted)
    return calls


def numbers(flow, cache, **how):
    how = dict(dict(images_per_prompt=2, steps=2), **how)
    return Evaluator(flow, brightness, PROMPTS, cache=cache, **how)(flow)


def test_numbers_are_the_same_and_drawn_once(flow, drawings, tmp_path):
    without = numbers(flow, False)
    assert len(drawings) == 1 and not any(tmp_path.iterdir())
    assert numbers(flow, tmp_path) == without and len(drawings) == 2
    assert numbers(flow, tmp_path) == without and len(drawings) == 2
    assert without["reward_std"] > 0


@pytest.mark.parametrize("other", [dict(seed=1), dict(steps=3), dict(images_per_prompt=3)])
def test_what_decides_the_images_names_them(flow, other, drawings, tmp_path):
    numbers(flow, tmp_path)
    assert numbers(flow, tmp_path, **other) == numbers(flow, False, **other)
    assert len(drawings) == 3


def test_another_model_or_machine_has_other_images(flow, tmp_path, monkeypatch):
    def name():
        return images_file(tmp_path, flow, PROMPTS, (2,))

    first = name()
    assert name() == first
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert name() != first
    monkeypatch.undo()
    weight = flow.transformer.proj_out.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
        assert name() != first
        weight[0, 0] -= 1e-3
    monkeypatch.setattr(flow, "guidance_scale", 2.0)
    assert name() != first


def test_what_has_learned_is_drawn(drawings, tmp_path):
    flow = load_emoji()
    numbers(flow, tmp_path)
    with torch.no_grad():
        flow.trainable_parameters()[1][0] = 0.1  # more than a rounding of the reward
    learned = numbers(flow, tmp_path)
    assert len(drawings) == 2
    assert learned == numbers(flow, False) != numbers(load_emoji(), tmp_path)


def test_a_velocity_of_ones_own_is_drawn(flow, monkeypatch):
    assert flow.is_base()
    monkeypatch.setattr(SD3Flow, "velocity", lambda self, x, t, cond=None: x, raising=False)
    assert not flow.is_base()


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:-1] + b"\x7f", bytes])
def test_a_damaged_file_is_drawn_again(flow, damage, drawings, tmp_path):
    first = numbers(flow, tmp_path)
    (file,) = tmp_path.glob("images-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole) if damage is not bytes else b"")
    assert numbers(flow, tmp_path) == first and len(drawings) == 2
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_no_hindrance(flow, drawings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert numbers(flow, tmp_path / "file" / "cache") == numbers(flow, False)


def test_two_runs_at_once_draw_once(tmp_path):
    calls = []

    def draw():
        calls.append(1)
        time.sleep(0.2)
        return torch.full((1, 3, 2, 2), 0.5)

    def run():
        assert kept_images(tmp_path / "images.safetensors", draw).mean() == 0.5

    runs = [threading.Thread(target=run) for _ in range(3)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert len(calls) == 1
