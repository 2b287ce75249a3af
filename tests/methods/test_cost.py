"What an update costs: passes and operations beside the public preview's."

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_worlds import gaussian

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


def reward(x, prompts=None):
    return x.sum(1)


def make_samples(flow):
    "Three samples, eight steps, four transitions of each"
    return Samples.draw(flow, None, time_grid(8), indices=range(3), transitions=4)


def passes(update):
    "For each sample and transition, without the sampling"
    flow = gaussian()
    whole, part = update_passes(flow, reward, update, make_samples(flow))
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


def test_the_reference_has_the_passes_that_were_counted():
    want = dict(forward=13, backward=11, reward=3, reward_backward=3)
    assert passes(reference_update) == want


def test_a_tap_changes_nothing():
    flow = gaussian()

    def loss(reward):
        torch.manual_seed(1)
        method = VGGFlow()
        method.setup(flow, reward)
        return method.loss(flow, method.prepare(flow, reward, make_samples(flow)))[0]

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


def test_an_update_costs_a_third_of_the_reference(tmp_path):
    "The numbers that the README promises, by the benchmark at its small configuration"
    command = [sys.executable, ROOT / "benchmarks/sd3_gpu.py", "--size", "small"]
    command += ["--repeats", "0", "--steps", "8", "--transitions", "2"]
    command += ["--methods", "VGG-Flow", "VGG-Flow, reuse"]
    command += ["--device", "cpu", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = csv.DictReader((tmp_path / "sd3-cost-small-cpu.csv").open())
    reference, ours, reuse = rows

    def passes_of(row):
        return [float(row[k]) for k in ("forward", "backward", "reward_backward")]

    assert passes_of(reference) == [13, 11, 3]
    forward, backward, gradients = passes_of(ours)
    assert forward <= 3 and backward <= 3 and gradients == 2
    assert float(reuse["reward_backward"]) == 1
    for row in (ours, reuse):
        assert float(row["tflop_training_ratio"]) <= 0.30
        assert float(row["tflop_ratio"]) <= 0.45
