"""Time and memory of an update of each method in the emoji world, on one thread.

Beside the reference, and beside the floor: counted operations at the rate at which this
machine multiplies matrices in the same round. Every method is measured once a round."""

import torch

from benchmarks.measure import (
    cpu_seconds,
    interleaved,
    matrix_rate,
    paired,
    peak_memory,
    spread,
)
from benchmarks.recipes import EVERY, REFERENCE, make_samples, prepared_update
from vggflow.methods.cost import flops
from vggflow.worlds.world import get_world


def emoji(guidance=1.0, **options):
    "(flow, reward) of the emoji world"
    built = get_world("emoji").build(guidance_scale=guidance, **options)
    return built.flow, built.reward


def update_cases(flow, reward, methods, **plan):
    "Name -> an update to call: as often as wanted, each time with new samples"
    return {name: one_case(name, flow, reward, plan) for name in methods}


def one_case(name, flow, reward, plan):
    "An update of a method that has been set up"
    update, made = prepared_update(name, flow, reward), []

    def case():
        for parameter in flow.trainable_parameters():
            parameter.grad = None
        samples = make_samples(flow, len(made), shift=1.0, **plan)
        made.append(name)
        update(flow, reward, samples)

    return case


def rows_of(guidance, rounds, methods=EVERY, **plan):
    "A row for each method"
    flow, reward = emoji(guidance)
    cases = update_cases(flow, reward, methods, **plan)
    rates = []

    def clock(case):
        rates.append(matrix_rate())
        return cpu_seconds(case)

    seconds = interleaved(cases, rounds, clock)
    rate = spread(rates)["median"]
    return [
        dict(
            row_of(name, seconds, rate, flops(case)),
            guidance=guidance,
            mib=round(peak_memory(case), 1),
        )
        for name, case in cases.items()
    ]


def row_of(name, seconds, rate, operations):
    "Seconds, their share of the reference's, and the floor's share of them"
    found = spread(seconds[name])
    return dict(
        method=name,
        seconds=found,
        of_reference=paired(seconds[name], seconds[REFERENCE]),
        gflop=round(operations / 1e9, 4),
        gflop_a_second=round(operations / 1e9 / found["median"], 2),
        matrix_gflop_a_second=round(rate / 1e9, 2),
        floor_share=round(operations / rate / found["median"], 4),
    )


def measure(rounds, batch, steps, guidances, methods=EVERY):
    "The stage"
    torch.set_num_threads(1)
    plan = dict(batch=batch, steps=steps)
    rows = [row for w in guidances for row in rows_of(w, rounds, methods, **plan)]
    return dict(plan=dict(plan, transitions=5), rows=rows)
