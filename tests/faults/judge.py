"What became of a damaged run, beside the run that was never damaged"

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from faults.runs import INTERVAL, good, right_weights, train, undamaged
from vggflow.common.files import Damaged
from vggflow.training.run_directory import RunDirectory

GOOD = ("healed", "refused")
BAD = ("silent", "lost", "traceback")
TOLD = ("damaged", "repeated", "edited", "not what was written")  # words of a warning


@dataclass
class Outcome:
    "What became of a fault"

    name: str  # One of `GOOD` and `BAD`
    said: str = ""  # Warnings and errors

    @property
    def rank(self) -> int:
        "The worst is the highest"
        return (*GOOD, *reversed(BAD)).index(self.name)


def refusal(error: Exception, folder: Path) -> Outcome:
    "Whether an error is one line that names a file of the run and says what to do"
    said = f"{type(error).__name__}: {error}"
    is_own = type(error) in (Damaged, ValueError, FileNotFoundError, PermissionError)
    is_line = "\n" not in str(error) and str(folder) in str(error)
    return Outcome("refused" if is_own and is_line else "traceback", said[:400])


def watched(fn, folder: Path, judge) -> Outcome:
    "Call, and have its result judged with the warnings that it gave"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = fn()
        except Exception as error:
            return refusal(error, folder)
    said = " / ".join(str(warning.message) for warning in told)
    name = judge(result, any(word in said for word in TOLD))
    return Outcome(name, said[:400])


def seen(folder: Path) -> tuple:
    "Rows, evaluations, signs, record and settings of a run"
    run = RunDirectory(folder)
    history = run.history
    return history.rows, history.evals, history.flags, run.record, run.settings


def reading(folder: Path, name: str) -> Outcome:
    "What becomes of who looks at a damaged run"
    right = seen(good() / name)

    def judge(found, told):
        if name == "unfinished" and found[0] == right[0][:-1]:
            found = (right[0], *found[1:])  # its last row may be just being written
        if not found[3]:  # that a folder has no record is plain to see
            found = (*found[:3], *right[3:])
        same = found == right or told and found[:4] == right[:4]
        return "healed" if same else "silent"

    return watched(lambda: seen(folder), folder, judge)


def without_seconds(rows: list) -> list:
    "Rows without what no two runs have in common"
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def is_right(flow, history) -> bool:
    "Whether a run has the rows and weights of one that was never damaged, to the last bit"
    rows, evals, flags = undamaged("finished")
    weights = zip(flow.parameters(), right_weights())
    return (
        without_seconds(history.rows) == without_seconds(rows)
        and history.evals == evals
        and history.flags == flags
        and all(torch.equal(p, q) for p, q in weights)
    )


def repeated(history, done: list) -> int:
    "Updates with a checkpoint that were done again: their time is another"
    kept = done[: len(done) - len(done) % INTERVAL]
    return sum(a["seconds"] != b["seconds"] for a, b in zip(kept, history.rows))


def calling(folder: Path, done: list) -> Outcome:
    "What becomes of who calls again on a damaged run that had done these rows"

    def judge(found, told):
        flow, history = found
        if not is_right(flow, history):
            return "silent"
        if RunDirectory(folder).history.rows != history.rows:
            return "silent"
        again = repeated(history, done)
        if again > INTERVAL:
            return "lost"
        return "silent" if again and not told else "healed"

    return watched(lambda: train(folder), folder, judge)


def worst(outcomes: list) -> Outcome:
    "The worst of some outcomes; that a reader is refused is healed by calling again"
    *looks, last = outcomes
    bad = [look for look in looks if look.name in BAD]
    return max([last, *bad], key=lambda outcome: outcome.rank)
