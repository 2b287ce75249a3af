"""A run on one process and on two, of one thread each, connected by gloo.

Both processes stay for all of it. Each round does, one after the other: an update by the
first process alone while the second waits; the same update shared by both; and an update
by each for a run of its own. Seconds are those of a clock, since waiting is what counts.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import paired, spread
from benchmarks.recipes import fresh_method
from benchmarks.updates import emoji
from vggflow.training.config import FinetuneConfig
from vggflow.training.interrupts import Interrupts
from vggflow.training.processes import Processes, launched
from vggflow.training.update import TrainingState, draw_samples, take_step


def make_step(processes, batch, steps):
    "A function that makes an update of a run shared by `processes`"
    flow, reward = emoji()
    transitions = min(5, steps)
    config = FinetuneConfig(
        batch_size=batch, steps=steps, transitions=transitions, shift=1.0, lr=1e-3
    )
    method = fresh_method("VGG-Flow, reuse")
    state = TrainingState(flow, reward, method, config, Interrupts(processes))

    def step():
        samples = draw_samples(flow, config, ["a cat"], state.update, processes)
        take_step(state, reward, samples)
        state.update += 1

    return step


def timed(both, step, mine=True):
    "Seconds until all processes are through a step that those with `mine` make"
    both.accelerator.wait_for_everyone()
    start = time.perf_counter()
    if mine:
        step()
    both.accelerator.wait_for_everyone()
    return time.perf_counter() - start


def measure_rounds(rounds, batch, steps):
    "Seconds of each round: alone, shared, and two runs at once; a first one warms up"
    both = Processes(launched())
    alone = make_step(Processes(), batch, steps)
    half = make_step(Processes(), batch // 2, steps)
    shared = make_step(both, batch, steps)
    found = dict(alone=[], half=[], shared=[], runs=[])
    for number in range(rounds + 1):
        row = dict(
            alone=timed(both, alone, both.main),
            half=timed(both, half, both.main),
            shared=timed(both, shared),
            runs=timed(both, alone),
        )
        for name, value in row.items() if number else ():
            found[name].append(value)
    return found, both.main


def free_port():
    "A port that nobody listens on"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(rank, port, words):
    "One of two processes, as a launcher starts it"
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    place |= dict(MASTER_PORT=port, OMP_NUM_THREADS=1, ACCELERATE_USE_CPU="true")
    environment = dict(os.environ, **{name: str(value) for name, value in place.items()})
    command = [sys.executable, "-m", "benchmarks.processes", *map(str, words)]
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])


def two_processes(rounds, batch=8, steps=20):
    "Seconds and efficiencies, measured by two processes that are started here"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        words = (out, "--rounds", rounds, "--batch", batch, "--steps", steps)
        port = free_port()
        started = [start(rank, port, words) for rank in range(2)]
        try:
            failed = any([process.wait(600) for process in started])
        finally:
            for process in started:
                process.kill()
        if failed:
            raise RuntimeError("two processes: one of them failed, see above")
        return summary(json.loads(out.read_text()), batch)


def summary(found, batch):
    "Efficiencies: 1 where two processes take half of the time, or make twice the runs"
    twice = [2 * value for value in found["shared"]]
    halves = [2 * value for value in found["half"]]
    return dict(
        batch=batch,
        seconds={name: spread(values) for name, values in found.items()},
        efficiency=paired(found["alone"], twice),
        efficiency_of_half_a_batch=paired(found["alone"], halves),
        efficiency_of_two_runs=paired(found["alone"], found["runs"]),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    for name, usual in dict(rounds=3, batch=8, steps=20).items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, main = measure_rounds(args.rounds, args.batch, args.steps)
    if main:
        Path(args.out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
