"Seconds of this process and of its children, matrix rates, memory, and their spread"

import ctypes
import gc
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

import torch

RESET = Path("/proc/self/clear_refs")  # Linux: 5 sets the highest memory back


def spread(values):
    "Median, lowest and highest of some measurements, and how many there are"
    values = [round(value, 6) for value in values]
    middle = round(statistics.median(values), 6)
    return dict(median=middle, low=min(values), high=max(values), n=len(values))


def cpu_seconds(fn):
    "CPU seconds of this process in a call: what others do counts little"
    start = time.process_time()
    fn()
    return time.process_time() - start


def child_seconds(command, **options):
    "CPU seconds of a command and all that it starts and waits for"

    def used():
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    start = used()
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return used() - start


def interleaved(cases, rounds, clock=cpu_seconds):
    "Measure every case once a round, in turn: name -> values; a first round warms up"
    names, found = list(cases), {name: [] for name in cases}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            value = clock(cases[name])
            if number:
                found[name].append(value)
    return found


def paired(values, others):
    "Spread of the ratios of two rows of measurements, round by round"
    return spread([a / b for a, b in zip(values, others)])


def matrix_rate(side=1024, times=2):
    "Operations a second of products of square matrices, as they are run now"
    a, b = torch.randn(side, side), torch.randn(side, side)
    seconds = cpu_seconds(lambda: [a @ b for _ in range(times)])
    return 2 * side**3 * times / seconds


def free_memory():
    "Give back what is not used"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if RESET.exists():
        ctypes.CDLL(None).malloc_trim(0)


def resident(kind):
    "VmRSS or VmHWM of this process, in MiB; nan where Linux does not say it"
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line for line in lines if line.startswith(kind)]
    return int(found[0].split()[1]) / 1024 if found else float("nan")


def peak_memory(fn):
    "MiB above those at rest in a call; nan where they cannot be read"
    free_memory()
    if not os.access(RESET, os.W_OK):
        return float("nan")
    RESET.write_text("5")
    rest = resident("VmRSS")
    fn()
    return max(0.0, resident("VmHWM") - rest)
