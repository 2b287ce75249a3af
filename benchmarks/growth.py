"""How the CPU seconds of an update of VGG-Flow grow, and what two processes gain.

Batch, steps and transitions in the emoji world; resolution and parameters with small
Stable Diffusions 3 of random weights. Every value is measured once a round, and each
ratio is to the first value of its row, in the same round.
"""

import torch

from benchmarks.measure import interleaved, paired, spread
from benchmarks.processes import two_processes
from benchmarks.sd3 import SMALL, build
from benchmarks.updates import emoji, one_case

METHOD = "VGG-Flow, reuse"


def along(name, values, rounds, plan):
    "Rows of one setting of the plan"
    flow, reward = emoji()
    cases = {v: one_case(METHOD, flow, reward, {**plan, name: v}) for v in values}
    return rows_of(name, cases, rounds)


def along_random(name, models, rounds, plan):
    "Rows of a property of small Stable Diffusions 3 with random weights"
    cases = {v: one_case(METHOD, *model, plan) for v, model in models.items()}
    return rows_of(name, cases, rounds)


def sized(sides):
    "Side of the images in pixels -> (flow, reward)"
    return {side: build("tiny", side, 1.0) for side in sides}


def layered(counts):
    "Parameters of the transformer -> (flow, reward), by its number of layers"
    models = {}
    for count in counts:
        shape = dict(SMALL, transformer=dict(SMALL["transformer"], num_layers=count))
        flow, reward = build(shape, 64, 1.0)
        models[sum(p.numel() for p in flow.transformer.parameters())] = flow, reward
    return models


def rows_of(name, cases, rounds):
    "Seconds of each value, and their ratio to the first one's"
    found = interleaved(cases, rounds)
    first = found[next(iter(cases))]
    return [
        dict(along=name, value=v, seconds=spread(own), of_first=paired(own, first))
        for v, own in found.items()
    ]


def measure(rounds, batch, steps, transitions, resolution, layers, process_rounds, plan):
    "The stage"
    torch.set_num_threads(1)
    rows = along("batch", batch, rounds, plan)
    rows += along("steps", steps, rounds, plan)
    rows += along("transitions", transitions, rounds, plan)
    one = {**plan, "batch": 1}
    rows += along_random("resolution", sized(resolution), rounds, one)
    rows += along_random("parameters", layered(layers), rounds, one)
    together = two_processes(process_rounds, plan["batch"], plan["steps"])
    return dict(method=METHOD, plan=plan, rows=rows, processes=together)
