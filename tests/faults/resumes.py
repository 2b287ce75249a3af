"""Kill every method in every world at a random moment, call again, compare to the last bit.

python -m faults.resumes          # alone and on two processes, into data/bench/resumes.json
python -m faults.resumes emoji    # only cells with this word in their name"""

import argparse
import copy
import datetime
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from forked import status_of
from short_runs import outcome
from tiny_flux import make_tiny_flux
from tiny_sd3 import make_tiny_sd3
from tiny_z_image import make_tiny_z_image
from two_processes import start_two, status_of_all

from vggflow.common.files import read_json, write_json
from vggflow.common.provenance import git_commit, versions
from vggflow.methods.registry import METHODS
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune

FILE = Path(__file__).parents[2] / "data/bench/resumes.json"
PROMPTS = ["a cat", "a dog"]
WAYS = dict(plain={}, ema=dict(ema=0.5), micro=dict(micro_batch=1, forward_batch=1))
PIPELINES = dict(sd3=make_tiny_sd3, flux=make_tiny_flux, z_image=make_tiny_z_image)
SMALL = dict(lora_rank=2, image_size=16, max_sequence_length=16, guidance_scale=2.0)
WORLDS = ("gaussian", "emoji", *PIPELINES)


def pale(x, prompts=None):
    "A reward of images, or of points"
    return x.flatten(1).mean(1)


@cache
def first_flow(world: str):
    "A world's flow, as it is before any run"
    torch.manual_seed(0)
    if world == "gaussian":
        return GaussianFlow([0.0, 0.0], 0.6)
    if world == "emoji":
        from vggflow.worlds.emoji import load_emoji

        return load_emoji(lora_rank=2)
    from vggflow.worlds.world import load_model

    with tempfile.TemporaryDirectory() as folder:
        PIPELINES[world](Path(folder) / world)
        return load_model(str(Path(folder) / world), device="cpu", **SMALL)


@dataclass(frozen=True)
class Cell:
    "A run that is killed and goes on"

    world: str  # One of `WORLDS`
    method: str  # Name of its class
    way: str  # One of `WAYS`

    @property
    def name(self) -> str:
        return f"{self.world} {self.method} {self.way}"

    def train(self, out, clock) -> dict:
        "Three updates; what two runs must have in common"
        method = clock.watched(METHODS[self.method]())
        settings = dict(updates=3, batch_size=4, steps=4, transitions=2, save_every=1)
        flow = copy.deepcopy(first_flow(self.world))
        history = finetune(
            flow,
            clock.reward,
            method,
            FinetuneConfig(**settings, lr=1e-3, **WAYS[self.way]),
            out=out,
            prompts=None if self.world == "gaussian" else PROMPTS,
            progress=False,
        )
        return outcome(flow, history)


class Clock:
    "Counts the moments of a run, and ends the process at one of them"

    def __init__(self, end: int = 0, act=None):
        self.end = end  # 0: never
        self.act = act
        self.now = 0

    def tick(self):
        "A moment"
        self.now += 1
        if self.now == self.end:
            self.act()

    def reward(self, x, prompts=None):
        "The reward, of which every call is a moment"
        self.tick()
        return pale(x)

    def watched(self, method):
        "A method, of which every loss is a moment, and the end of it too"
        own = method.loss

        def loss(*args):
            self.tick()
            found = own(*args)
            self.tick()
            return found

        method.loss = loss
        return method


def die():
    "End this process as a kill does"
    os.kill(os.getpid(), signal.SIGKILL)


class Gone(BaseException):
    "On several processes: all leave the run at once, and nothing is saved"


def leave():
    raise Gone


def has_left(cell, out: Path, clock: Clock) -> bool:
    "Whether a run was left before its end"
    try:
        cell.train(out, clock)
    except Gone:
        return True
    return False


def same(one: dict, other: dict) -> bool:
    "To the last bit"
    states = one["state"], other["state"]
    equal = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    return equal and states[0].keys() == states[1].keys() and one["rows"] == other["rows"]


def is_resumed(cell: Cell, folder: Path, alone: bool) -> bool:
    "Whether a run that was killed at a random moment ends as one that was not"
    clock = Clock()
    whole = cell.train(folder / "whole", clock)
    moment = random.Random(cell.name).randint(2, clock.now)  # the first are a trial
    if alone:
        ended = status_of(cell.train, folder / "cut", Clock(moment, die))
        assert ended == -signal.SIGKILL, (cell, ended)
    else:
        assert has_left(cell, folder / "cut", Clock(moment, leave)), cell
    return same(whole, cell.train(folder / "cut", Clock()))


def all_cells(word: str = "") -> list:
    "Every method in every world in every way"
    cells = (Cell(*names) for names in product(WORLDS, METHODS, WAYS))
    return [cell for cell in cells if word in cell.name]


def campaign(cells: list, root: Path, alone: bool, show=print) -> list:
    "A row for each world and way: how many runs, and which did not go on to the last bit"
    count, bad = Counter(), {}
    for cell in cells:
        key = cell.world, cell.way
        count[key] += 1
        resumed = is_resumed(cell, root / cell.name, alone)
        if not resumed:
            bad.setdefault(key, []).append(cell.method)
        show("as if never killed" if resumed else "ANOTHER RUN", cell.name)
    return [
        dict(world=world, way=way, count=count[world, way], bad=bad.get((world, way), []))
        for world, way in count
    ]


def together(folder: Path, cells: list):
    "One of two processes: the campaign, written down by the first"
    torch.set_num_threads(1)
    main = os.environ["RANK"] == "0"
    rows = campaign(cells, folder, alone=False, show=print if main else lambda *said: None)
    if main:
        write_json(folder / "rows.json", rows)


def on_two(cells: list) -> list:
    "The campaign on two processes"
    for world in {cell.world for cell in cells}:
        first_flow(world)  # before they fork
    with tempfile.TemporaryDirectory() as folder:
        pids, _store = start_two(partial(together, cells=cells), Path(folder))
        if status_of_all(pids):
            raise RuntimeError("one of two processes ended")
        return read_json(Path(folder) / "rows.json", kind=list)


def on_one(cells: list) -> list:
    "The campaign on one process"
    with tempfile.TemporaryDirectory() as folder:
        return campaign(cells, Path(folder), alone=True)


def main(words=None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("resumes", description=__doc__, formatter_class=raw)
    parser.add_argument("word", nargs="?", default="", help="in the name of a cell")
    cells = all_cells(parser.parse_args(words).word)
    start, ways = time.time(), {1: on_one, 2: on_two}
    about = dict(date=str(datetime.date.today()), commit=git_commit())
    rows = [
        {**row, "processes": n, **about} for n, run in ways.items() for row in run(cells)
    ]
    count, bad = sum(row["count"] for row in rows), sum(len(row["bad"]) for row in rows)
    print(f"{count} runs killed, {count - bad} as if not, {time.time() - start:.0f} s")
    note(rows)
    return bad > 0


def note(rows: list):
    "Write rows down, those of whole worlds and ways in the place of earlier ones"
    known = read_json(FILE)["rows"] if FILE.exists() else []
    kept = {(row["world"], row["way"], row["processes"]): row for row in known}
    for row in rows:
        if row["count"] == len(METHODS):
            kept[row["world"], row["way"], row["processes"]] = row
    write_json(FILE, dict(versions=versions(), rows=list(kept.values())))


if __name__ == "__main__":
    sys.exit(main())
