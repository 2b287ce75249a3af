"What an update costs: passes and operations beside the public preview's."

import json
from pathlib import Path

import pytest
import torch
from method_worlds import gaussian

from benchmarks.passes import operations, operations_of, parts, passes_of, passes_row
from benchmarks.recipes import make_samples, whole_update
from benchmarks.sd3 import build
from vggflow.methods.cost import (
    counted,
    flops,
    one_update,
    reference_update,
    update_passes,
)
from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.method import Samples
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import time_grid

ROOT = Path(__file__).parents[2]
REUSE = "VGG-Flow, reuse"


def reward(x, prompts=None):
    return x.sum(1)


def few_samples(flow):
    "Three samples, eight steps, four transitions of each"
    return Samples.draw(flow, None, time_grid(8), indices=range(3), transitions=4)


def passes(update):
    "For each sample and transition, without the sampling"
    flow = gaussian()
    whole, part = update_passes(flow, reward, update, few_samples(flow))
    return (whole - part).per(3 * 4)


CASES = {  # forward, backward, gradients of the reward
    "residual": (VGGFlow, {}, (2, 2, 2)),
    "large": (VGGFlow, VGGFlow.usual_options(large=True), (2, 2, 1)),
    "reuse": (VGGFlow, dict(reuse=True), (2, 2, 1)),
    "no correction": (VGGFlow, dict(correction=False), (2, 1, 1)),
    "trajectory": (VGGFlow, dict(mode="trajectory"), (2, 2, 2)),
    "exact": (VGGFlow, dict(mode="exact"), (3, 2, 2)),
    "PMP": (VGGFlowPMP, {}, (2 + 8 / 4, 1 + 8 / 4, 1 / 4)),
    "AM": (AdjointMatching, {}, (2 + 8 / 4, 1 + 8 / 4, 1 / 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_passes_of_a_method(name):
    cls, options, want = CASES[name]
    method = cls(**options)
    p = passes(lambda flow, reward, samples: one_update(flow, reward, method, samples))
    assert (p["forward"], p["backward"], p["reward_backward"]) == pytest.approx(want)


def test_the_reference_without_guidance_has_one_pass_for_each_velocity():
    want = dict(forward=8, backward=7, reward=3, reward_backward=3)
    assert passes(reference_update) == want


GUIDED = {  # With guidance 5: forward, backward, gradients of the reward
    "reference": (13, 11, 3),  # of the authors' preview, both branches counted
    "VGG-Flow": (3, 3, 2),
    "VGG-Flow, reuse": (3, 3, 1),
    "VGG-Flow, no correction": (3, 1, 1),
    "VGG-Flow-PMP": (3 + 2 * 20 / 5, 1 + 2 * 20 / 5, 1 / 5),
    "AM": (3 + 20 / 5, 1 + 20 / 5, 1 / 5),  # its adjoint is that of the prompt's branch
}


@pytest.mark.parametrize("name", GUIDED)
def test_passes_with_guidance_count_both_branches(name):
    row = passes_row(name, 5.0, steps=20, transitions=5)
    found = (row["forward"], row["backward"], row["reward_backward"])
    assert found == pytest.approx(GUIDED[name])


def test_a_tap_changes_nothing():
    flow = gaussian()

    def loss(reward):
        torch.manual_seed(1)
        method = VGGFlow()
        method.setup(flow, reward)
        return method.loss(flow, method.prepare(flow, reward, few_samples(flow)))[0]

    plain = loss(reward)
    with counted(flow, reward) as (_, tapped):
        assert torch.equal(plain, loss(tapped))


def test_operations_of_a_product():
    a, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert flops(lambda: a @ w) == 2 * 3 * 5 * 7
    assert flops(lambda: (a @ w).sum().backward()) == 2 * 2 * 3 * 5 * 7
    # forward, and the gradient of y; w is a constant here
    gradient = torch.func.grad(lambda y: (y @ w).sum())
    assert flops(lambda: gradient(a)) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("name", ["reference", "VGG-Flow", "VGG-Flow-PMP"])
def test_the_operations_of_a_whole_update_are_those_of_its_parts(name):
    "Counted in whole at a small size: the way in which the full size is counted"
    plan = dict(steps=3, transitions=1)
    part = parts(*build("tiny", 64, device="meta"))
    update, (flow, reward) = whole_update(name), build("tiny", 64)
    counted = flops(lambda: update(flow, reward, make_samples(flow, **plan)))
    made = operations_of(name, part, *passes_of(name, **plan), 1)["whole"]
    assert made == pytest.approx(counted, rel=0.03)


def test_one_reward_gradient_costs_under_a_third_of_the_reference():
    "With guidance 5, 20 steps, 5 transitions, counted now with parts of a small size"
    methods = ("reference", "VGG-Flow", REUSE)
    _, two, one = operations("small", 64, methods=methods, steps=20)
    assert 0.2 < one["training_ratio"] <= 0.30 and 0.3 < one["whole_ratio"] <= 0.43
    assert one["training_ratio"] < two["training_ratio"] < 0.4


def test_at_full_size_too_as_was_counted_last():
    "Stable Diffusion 3 medium, by `make bench`"
    found = json.loads((ROOT / "data/bench/passes.json").read_text())
    ours = [row for row in found["operations"] if row["method"] == REUSE]
    assert [row["resolution"] for row in ours] == [512, 1024]
    for row in ours:
        assert 0.2 < row["training_ratio"] <= 0.30 and 0.3 < row["whole_ratio"] <= 0.43
    counted = {row["method"]: row for row in found["passes"] if row["guidance"] == 5}
    for name, passes_before in GUIDED.items():
        kinds = ("forward", "backward", "reward_backward")
        row = [counted[name][kind] for kind in kinds]
        assert row == pytest.approx(passes_before), f"make bench again: {name}"
