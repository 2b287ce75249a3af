"A process forked from this one, which has imported what takes long to import"

import multiprocessing
import sys
from functools import cache

from vggflow.experiments.warm import USUAL, import_for, may_fork


@cache
def context():
    "Where processes come from; where nothing forks, each imports for itself"
    if not may_fork():
        return multiprocessing.get_context("spawn")
    import_for(*USUAL)
    return multiprocessing.get_context("fork")


def end_with(fn, args: tuple):
    "Be a process that calls a function and ends with the status that it gives"
    sys.exit(fn(*args))


def status_of(fn, *args) -> int:
    "Exit status of a process that calls a function; what it prints the test has printed"
    process = context().Process(target=end_with, args=(fn, args))
    process.start()
    process.join(timeout=900)
    process.kill()  # where it has not ended; its status is not 0 then
    process.join()
    return process.exitcode
