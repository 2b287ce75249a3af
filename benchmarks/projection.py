"""The paper's runs on 8, 64 and 512 GPUs: computed from counted operations, not measured.

A run shares its batch over some GPUs, which add up the gradients of adapter and correction
once an update; runs know nothing of each other. How many GPUs a run gets is chosen for the
shortest time of all runs. Evaluations, loading and waiting for the slowest are left out.
"""

import math

ASSUMED = dict(
    peak_flop_a_second=989e12,  # Dense bfloat16 of an H100, from its data sheet
    utilisation=0.4,  # Of the peak, by the whole update
    link_bytes_a_second=50e9,  # Of each GPU to the others: 400 Gbit/s
    latency=50e-6,  # Seconds of each round of messages
    batch=32,  # Samples of an update, the paper's
    updates=400,
    runs=57,  # The paper's: five methods on three rewards, and its sweeps, 3 seeds each
)


def update_seconds(tflop, megabytes, gpus):
    "Seconds of an update of one run on some GPUs, computing and sending"
    samples = math.ceil(ASSUMED["batch"] / gpus)
    rate = ASSUMED["peak_flop_a_second"] * ASSUMED["utilisation"]
    compute = samples * tflop * 1e12 / rate
    if gpus == 1:
        return compute, 0.0
    sent = 2 * (gpus - 1) / gpus * megabytes * 1e6 / ASSUMED["link_bytes_a_second"]
    return compute, sent + 2 * math.ceil(math.log2(gpus)) * ASSUMED["latency"]


def all_runs(tflop, megabytes, gpus, each):
    "A row: hours of all runs on `gpus`, `each` of them for a run"
    compute, send = update_seconds(tflop, megabytes, each)
    waves = math.ceil(ASSUMED["runs"] / (gpus // each))
    hours = waves * ASSUMED["updates"] * (compute + send) / 3600
    alone = ASSUMED["runs"] * ASSUMED["updates"] / 3600
    ideal = alone * sum(update_seconds(tflop, megabytes, 1)) / gpus
    return dict(
        gpus=gpus,
        gpus_for_a_run=each,
        update_seconds=round(compute + send, 4),
        sending=round(send / (compute + send), 5),
        hours=round(hours, 3),
        efficiency=round(ideal / hours, 3),
    )


def project(tflop, megabytes, gpus=(1, 8, 64, 512)):
    "The best row for each number of GPUs"
    shares = [n for n in range(1, ASSUMED["batch"] + 1) if ASSUMED["batch"] % n == 0]
    best = []
    for count in gpus:
        rows = [all_runs(tflop, megabytes, count, n) for n in shares if n <= count]
        best.append(min(rows, key=lambda row: row["hours"]))
    return best


def measure(operations, megabytes, method="VGG-Flow, reuse"):
    "The stage, from the rows of the stage of passes"
    ours = [row for row in operations if row["method"] == method]
    rows = [
        dict(resolution=row["resolution"], **best)
        for row in ours
        for best in project(row["whole"], megabytes)
    ]
    return dict(method=method, assumed=ASSUMED, megabytes=megabytes, rows=rows)
