"Runs that are damaged: short, and the same whenever they are made"

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from forked import status_of
from short_runs import linear

from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.diagnostics import Thresholds
from vggflow.training.loop import finetune
from vggflow.training.run_directory import RunDirectory

UPDATES = 10
DONE = 7  # by the unfinished run; its last checkpoint is that of update 6
INTERVAL = 2  # updates between checkpoints
COMMAND = dict(world="gaussian", method="VGG-Flow", reward="linear", updates=UPDATES)


class DiesAt(VGGFlow):
    "VGG-Flow whose process is gone in the middle of an update; 0: it lives"

    def __init__(self, update=0):
        super().__init__()
        self.left = update

    def loss(self, *args):
        self.left -= 1
        if not self.left:
            os._exit(9)
        return super().loss(*args)


DiesAt.__name__ = "VGGFlow"  # its record is that of the others


def size(flow, update) -> dict:
    "An evaluation that sees every weight"
    return dict(size=sum(float(p.abs().sum()) for p in flow.parameters()))


def train(out, method=None, reward=linear, evaluate=size, **settings):
    "Ten updates with averaged weights, evaluations and signs: the flow and the history"
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)
    usual = dict(updates=UPDATES, batch_size=4, steps=4, transitions=2, ema=0.5)
    usual.update(save_every=INTERVAL, eval_every=INTERVAL)
    config = FinetuneConfig(**{**usual, **settings})
    RunDirectory(out).note_command(COMMAND)
    history = finetune(
        flow,
        reward,
        method or DiesAt(),  # the same code, whether it dies or not
        config,
        out=out,
        evaluate=evaluate,
        progress=False,
        thresholds=Thresholds(first=2, window=2, collapse_share=10.0),
    )
    return flow, history


def made() -> Path:
    "A folder for the length of this process"
    folder = Path(tempfile.mkdtemp(prefix="vggflow-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def good() -> Path:
    "A folder of runs that nothing has damaged: 'finished', 'unfinished' and 'none'"
    folder = made()
    train(folder / "finished")
    assert status_of(train, folder / "unfinished", DiesAt(DONE + 1)) == 9
    (folder / "none").mkdir()
    return folder


@cache
def undamaged(name: str) -> tuple:
    "Rows of a run, its evaluations and its signs, as they were written"
    history = RunDirectory(good() / name).history
    return history.rows, history.evals, history.flags


@cache
def right_weights() -> tuple:
    "The weights at the end of a run that nothing has damaged"
    flow, _ = train(made() / "again")
    return tuple(p.detach().clone() for p in flow.parameters())


def copied(name: str, out: Path) -> Path:
    "A copy of a good run"
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(good() / name, out))
