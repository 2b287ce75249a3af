"""Passes and operations of an update of each method, beside the reference's.

Nothing is timed: the counts are the same on every machine. Operations are those of Stable
Diffusion 3 medium and a ViT-H/14 reward, of whole updates on tensors without numbers.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.recipes import EVERY, REFERENCE, make_samples, whole_update
from benchmarks.sd3 import build
from vggflow.methods.cost import flops, sampling, update_passes


class NumbersAreOne(TorchDispatchMode):
    "Every number that is read from a tensor without numbers is 1"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = func is torch.ops.aten._local_scalar_dense.default
        if read and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def passes_of(name, guidance, batch=2, **plan):
    "Passes of an update for each sample and transition, its sampling taken out"
    flow, reward = build("small", 64, guidance)
    samples = make_samples(flow, batch=batch, **plan)
    whole, part = update_passes(flow, reward, whole_update(name), samples)
    shares = (whole - part).per(batch * samples.transitions)
    counts = {kind: round(n, 3) for kind, n in shares.items() if kind != "reward"}
    return dict(method=name, guidance=guidance, **counts)


def operations_of(name, flow, reward, **plan):
    "Operations of an update and of its sampling, in units of 1e12"
    samples = make_samples(flow, **plan)
    update = whole_update(name)
    total = flops(lambda: update(flow, reward, samples))
    part = flops(lambda: sampling(flow, reward, samples))
    return dict(whole=total / 1e12, sampling=part / 1e12, training=(total - part) / 1e12)


def operations(size, resolution, guidance=5.0, methods=EVERY, **plan):
    "A row for each method, with its shares of the reference's operations"
    rows = []
    for name in methods:
        with NumbersAreOne():
            flow, reward = build(size, resolution, guidance, "meta")
            counts = operations_of(name, flow, reward, **plan)
        rows.append(dict(method=name, size=size, resolution=resolution, **counts))
    return [dict(row, **shares(row, rows[0])) for row in rows]


def shares(row, reference):
    "Shares of the reference's operations"
    assert reference["method"] == REFERENCE
    return {f"{kind}_ratio": row[kind] / reference[kind] for kind in ("training", "whole")}
