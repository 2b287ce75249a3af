"""Seconds and peak memory of an update of each method at the size of Stable Diffusion 3.

    python -m benchmarks.gpu                        # a GPU: SD3-medium at 512 and 1024
    python -m benchmarks.gpu --size small --device cpu

Beside the reference, measured in the same run. Weights and prompts are random: nothing is
downloaded. No GPU has been measured by this project yet.
"""

import argparse
import json
import time

import torch

from benchmarks.measure import free_memory, paired, peak_memory, spread
from benchmarks.recipes import EVERY, RECIPES, make_samples, prepared_update
from benchmarks.sd3 import SIZES, build

# Dense bfloat16, operations a second, from vendors' data sheets
PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def clear(flow):
    "Free what an update leaves"
    for parameter in flow.trainable_parameters():
        parameter.grad = None
    free_memory()


def seconds_of(update, flow, reward, number, plan):
    "Seconds of one update, by the clock"
    clear(flow)
    samples = make_samples(flow, number, **plan)
    start = time.perf_counter()
    update(flow, reward, samples)
    if flow.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def highest(update, flow, reward, plan):
    "Peak memory of an update in GiB: of the GPU, or of the process above its rest"
    clear(flow)
    samples = make_samples(flow, **plan)
    if flow.device.type != "cuda":
        return peak_memory(lambda: update(flow, reward, samples)) / 1024
    torch.cuda.reset_peak_memory_stats()
    update(flow, reward, samples)
    return torch.cuda.max_memory_allocated() / 2**30


def measure_resolution(args, resolution, plan):
    "Rows of all methods at a resolution; one that runs out of memory is left out"
    dtype = getattr(torch, args.dtype)
    flow, reward = build(args.size, resolution, args.guidance, args.device, dtype)
    flow.gradient_checkpointing(args.checkpointing)
    found, memory = {}, {}
    for name in (EVERY[0], *(name for name in args.methods if name != EVERY[0])):
        update = prepared_update(name, flow, reward, args.checkpointing)
        try:
            memory[name] = highest(update, flow, reward, plan)
            found[name] = [
                seconds_of(update, flow, reward, number, plan)
                for number in range(args.repeats)
            ]
        except torch.OutOfMemoryError:
            print(f"{name} at {resolution}: out of memory, left out", flush=True)
    return [row_of(name, resolution, found, memory) for name in found]


def row_of(name, resolution, found, memory):
    "Seconds, memory, and their shares of the reference's where it fitted"
    row = dict(method=name, resolution=resolution, gib=memory[name])
    row["seconds"] = spread(found[name])
    if EVERY[0] in found:
        row["of_reference"] = paired(found[name], found[EVERY[0]])
        row["gib_of_reference"] = memory[name] / memory[EVERY[0]]
    return row


def make_parser():
    "The options"
    gpu = torch.cuda.is_available()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--size", choices=SIZES, default="medium", help="random weights of this size")
    add("--resolution", type=int, nargs="+", default=[512, 1024], help="pixels")
    add("--batch", type=int, default=1, help="samples")
    add("--transitions", type=int, default=5)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=5.0)
    add("--repeats", type=int, default=3, help="timed updates, after one for the memory")
    add("--methods", nargs="+", choices=EVERY, default=list(RECIPES), help="only these")
    recompute = "recompute activations of the transformer"
    add("--checkpointing", action="store_true", help=recompute)
    add("--device", default="cuda" if gpu else "cpu")
    kinds, kind = ("bfloat16", "float32"), "bfloat16" if gpu else "float32"
    add("--dtype", choices=kinds, default=kind, help="of the model; the reward is float32")
    return parser


def peak_of(name):
    "Operations a second of a card, where its data sheet is known"
    return next((rate for card, rate in PEAK.items() if card in name), None)


def measure(words=()):
    "The stage, with the options as in a shell"
    args = make_parser().parse_args(list(map(str, words)))
    plan = dict(batch=args.batch, steps=args.steps, transitions=args.transitions)
    rows = [row for side in args.resolution for row in measure_resolution(args, side, plan)]
    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    return dict(
        settings=vars(args), device=name, peak_flop_a_second=peak_of(name), rows=rows
    )


if __name__ == "__main__":
    import sys

    print(json.dumps(measure(sys.argv[1:]), indent=1))
