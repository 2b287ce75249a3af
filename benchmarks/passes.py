"""Passes and operations of an update of each method, beside the reference's.

Nothing is timed: the counts are the same on every machine. The passes are those of whole
updates of a tiny model; the operations are of one pass of each kind at full size, on the
device that holds no numbers, times the passes.
"""

from functools import cache

import torch

from benchmarks.recipes import EVERY, REFERENCE, make_samples, whole_update
from benchmarks.sd3 import build
from vggflow.methods.cost import flops, update_passes

CORRECTED = ("VGG-Flow", "VGG-Flow, reuse")  # They have a correction network that learns


@cache
def passes_of(name, guidance=5.0, batch=1, **plan):
    "Passes of an update and of its sampling, for each sample"
    flow, reward = build("tiny", 64, guidance)
    samples = make_samples(flow, batch=batch, **plan)
    whole, part = update_passes(flow, reward, whole_update(name), samples)
    return whole.per(batch), part.per(batch)


def passes_row(name, guidance=5.0, transitions=5, **plan):
    "Passes for each sample and transition, sampling taken out"
    whole, part = passes_of(name, guidance, transitions=transitions, **plan)
    kinds = ("forward", "backward", "reward_backward")
    each = {kind: round((whole[kind] - part[kind]) / transitions, 3) for kind in kinds}
    return dict(method=name, guidance=guidance, **each)


def forward_and_back(fn, *inputs):
    "Operations of a call without gradients, and of its backward pass"
    with torch.no_grad():
        forward = flops(lambda: fn(*inputs))
    both = flops(lambda: fn(*inputs).float().sum().backward())
    return forward, both - forward


def parts(flow, reward):
    "Operations of one pass of each kind, for one sample"
    correction = flow.make_correction()
    x, prompt = flow.prior(1).to(flow.device), ["a cat"]
    t, hints = torch.full((1,), 0.5, device=x.device), (torch.zeros_like(x),) * 2
    y = x.clone().requires_grad_()
    forward, adapter = forward_and_back(flow.model_velocity, x, t, prompt)
    with flow.adapter_off():
        state = forward_and_back(flow.model_velocity, y, t, prompt)[1]
    seen = forward_and_back(lambda y: reward(flow.decode(y), prompt), y)
    looks = forward_and_back(correction, x, t, prompt, hints)
    return dict(
        forward=forward,
        back_to_adapter=adapter,
        back_to_state=state,
        reward=seen[0],
        reward_backward=seen[1],
        correction=looks[0],
        correction_backward=looks[1],
    )


def to_the_adapter(name, transitions):
    "Backward passes of a sample that end at the adapter or a value network, not a state"
    each = {REFERENCE: 5, "DRaFT": None, "ReFL": None}.get(name, 1)
    return float("inf") if each is None else each * transitions


def operations_of(name, part, whole, sampling, transitions=5):
    "Operations of an update and its sampling, from parts and passes"
    adapter = min(whole["backward"], to_the_adapter(name, transitions))
    looks = transitions * (name in CORRECTED)
    sampled = sampling["forward"] * part["forward"] + sampling["reward"] * part["reward"]
    total = (
        whole["forward"] * part["forward"]
        + adapter * part["back_to_adapter"]
        + (whole["backward"] - adapter) * part["back_to_state"]
        + whole["reward"] * part["reward"]
        + whole["reward_backward"] * part["reward_backward"]
        + looks * (3 * part["correction"] + part["correction_backward"])
    )
    return dict(whole=total, sampling=sampled, training=total - sampled)


def operations(size, resolution, guidance=5.0, transitions=5, methods=EVERY, **plan):
    "A row for each method, in units of 1e12, with its shares of the reference's"
    part = parts(*build(size, resolution, guidance, "meta"))
    rows = []
    for name in methods:
        counts = passes_of(name, guidance, transitions=transitions, **plan)
        made = operations_of(name, part, *counts, transitions)
        rows.append({kind: count / 1e12 for kind, count in made.items()})
    named = zip(methods, rows)
    return [
        dict(method=name, resolution=resolution, **row, **shares(row, rows[0]))
        for name, row in named
    ]


def shares(row, reference):
    "Shares of the reference's operations"
    return {f"{kind}_ratio": row[kind] / reference[kind] for kind in ("training", "whole")}


def measure(size, resolutions, guidances=(5.0, 1.0)):
    "The stage: passes at each guidance, operations at each resolution"
    rows = [passes_row(name, w) for w in guidances for name in EVERY]
    counts = [row for side in resolutions for row in operations(size, side)]
    plan = dict(steps=20, transitions=5, guidance=5)
    trained = trained_megabytes(size)
    return dict(plan=plan, passes=rows, operations=counts, trained_megabytes=trained)


def trained_megabytes(size):
    "What processes send each other: gradients of adapter and correction, in float32"
    flow, _ = build(size, 64, device="meta")
    trained = [*flow.trainable_parameters(), *flow.make_correction().parameters()]
    return sum(p.numel() for p in trained) * 4 / 1e6
