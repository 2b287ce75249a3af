"What ends a run while it works: kills, full disks and errors, at every place"

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EACCES, EIO, ENOSPC, EROFS, ESTALE
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from forked import context, status_of

from faults.judge import Outcome, calling
from faults.runs import INTERVAL, UPDATES, copied, linear, made, size, train
from vggflow.common.seals import look_at_rows

WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
LOOKS = (*WRITES, "os.listdir", "os.scandir")
KILLED, ENDED, FINE = 9, 1, 0


def is_write(event: str, words: tuple, folder: Path) -> bool:
    "Whether Python is about to change a file or a folder in a folder"
    if event not in WRITES:
        return False
    if event in ("os.remove", "os.rmdir") and words[-1] != -1:
        return True  # of a tree that is removed: the name is relative
    if str(folder) not in str(words[0]):
        return False
    if event != "open":
        return True
    mode, flags = words[1:]
    return mode[0] in "wax" if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def is_new(event: str, words: tuple, folder: Path) -> bool:
    "Whether Python is about to make a file or a folder in a folder"
    if event not in ("open", "os.mkdir") or not is_write(event, words, folder):
        return False
    return not os.path.exists(words[0])


def is_look(event: str, words: tuple, folder: Path) -> bool:
    "Whether Python is about to do anything with a folder or a file in it"
    return str(folder) in str(words[0]) or is_write(event, words, folder)


def fails(code: int):
    "Raise what the system says"
    raise OSError(code, os.strerror(code))


class Act(NamedTuple):
    "What happens before a write of a number; after it too, where it lasts"

    act: Callable
    events: tuple = WRITES
    lasts: Callable | None = None  # Whether it happens to an event after that write


ACTS = {
    "killed at a write": Act(lambda: os._exit(KILLED)),
    "disk full at a write": Act(partial(fails, ENOSPC)),
    "error of a drive at a write": Act(partial(fails, EIO)),
    "renaming refused": Act(partial(fails, EACCES), ("os.rename",)),
    "read-only from a write on": Act(partial(fails, EROFS), lasts=is_write),
    "no new files from a write on": Act(partial(fails, ENOSPC), lasts=is_new),
    "drive gone from a write on": Act(partial(fails, ESTALE), LOOKS, lasts=is_look),
}


def at_write(number: int, folder: Path, what: Act):
    "Act before this process's write of that number in a folder; 0 counts them"
    seen = [0]

    def hook(event, words):
        if event not in what.events:
            return
        writes = is_write(event, words, folder)
        seen[0] += writes
        begins = writes and seen[0] == number
        goes_on = what.lasts and 0 < number <= seen[0]
        if goes_on and what.lasts(event, words, folder) or begins and not what.lasts:
            what.act()

    sys.addaudithook(hook)
    return seen


def broken_train(kind: str, number: int, folder: Path):
    "Train in this process until its write of that number"
    at_write(number, folder, ACTS[kind])
    train(folder)


def counted_writes(folder: Path, events: tuple, file: Path):
    "Write down how often a run writes"
    seen = at_write(0, folder, Act(None, events))
    train(folder)
    file.write_text(str(seen[0]))


@cache
def writes(events: tuple) -> int:
    "How often a run from its start to its end writes"
    folder = made()
    assert status_of(counted_writes, folder / "run", events, folder / "count") == FINE
    return int((folder / "count").read_text())


def reported(fn: Callable, folder: Path, file: Path):
    "Call in a process of its own, and write down the line with which it ends"
    try:
        fn()
    except Exception as error:
        file.write_text(f"{type(error).__name__}: {error}")
        os._exit(ENDED)


@dataclass
class Break:
    "One end of a run, in one place"

    kind: str
    place: str
    work: Callable  # (folder): what is ended
    run: str = "none"
    lines: tuple = ()  # Errors with which the process may end
    ends: int | None = None  # Its status; None: any

    def outcome(self, folder: Path) -> Outcome:
        "Let a process work until it is ended, then call again"
        copied(self.run, folder)
        file = folder.with_name("error")
        file.unlink(missing_ok=True)
        status = status_of(reported, partial(self.work, folder), folder, file)
        assert status == self.ends or self.ends is None, f"{self.place}: was not reached"
        said = file.read_text() if file.exists() else ""
        if said and not said.startswith(self.lines):
            return Outcome("traceback", said[:400])
        done = look_at_rows(folder / "metrics.jsonl").rows
        return calling(folder, done)


def breaks_of(kind: str, every: int = 1) -> Iterator[Break]:
    "A run from its start, ended at each of its writes, or at some"
    for number in range(1, writes(ACTS[kind].events) + 1, every):
        work = partial(broken_train, kind, number)
        ends = KILLED if kind.startswith("killed") else None
        lines = ("OSError", "PermissionError")
        yield Break(kind, f"write {number}", work, lines=lines, ends=ends)


def kills() -> Iterator[Break]:
    "A run from its start is gone before each of its writes, as by SIGKILL"
    yield from breaks_of("killed at a write")


def full_disks() -> Iterator[Break]:
    "Each write of a run fails for want of space"
    yield from breaks_of("disk full at a write")


def failing_drives() -> Iterator[Break]:
    "Every fourth write of a run fails with an input/output error"
    yield from breaks_of("error of a drive at a write", every=4)


def refused_renames() -> Iterator[Break]:
    "Each rename of a run is refused"
    yield from breaks_of("renaming refused")


def read_only_drives() -> Iterator[Break]:
    "From every fourth write on, nothing can be written any more"
    yield from breaks_of("read-only from a write on", every=4)


def no_inodes() -> Iterator[Break]:
    "From every fourth write on, no file or folder can be made, those there are written"
    yield from breaks_of("no new files from a write on", every=4)


def drives_gone() -> Iterator[Break]:
    "From every fourth write on, the folder can neither be read nor written"
    yield from breaks_of("drive gone from a write on", every=4)


class Failure(Exception):
    "An error of code that is not ours"


def failing(fn: Callable, number: int) -> Callable:
    "The function, which fails when it is called for that time"
    left = [number]

    def fails_once(*words, **named):
        left[0] -= 1
        if not left[0]:
            raise Failure("of a user's own code")
        return fn(*words, **named)

    fails_once.__qualname__ = fn.__qualname__  # the record of the run stays the same
    return fails_once


def failing_train(part: str, number: int, folder: Path):
    "Train with a part that fails once"
    train(folder, **{part: failing(dict(reward=linear, evaluate=size)[part], number)})


def failing_parts() -> Iterator[Break]:
    "The reward, or the evaluation, raises at each of its calls"
    calls = dict(reward=2 * UPDATES, evaluate=UPDATES // INTERVAL + 1)
    for part, most in calls.items():
        for number in range(1, most + 1):
            work = partial(failing_train, part, number)
            lines = ("Failure", "ValueError: reward 'linear' failed")
            place = f"{part}, call {number}"
            yield Break("error in a user's part", place, work, lines=lines)


def killed_after(seconds: float, folder: Path):
    "Train in another process, and kill it after a while"
    child = context().Process(target=train, args=(folder,))
    child.start()
    time.sleep(seconds)
    child.kill()
    child.join()


def timed_kills(number: int = 20) -> Iterator[Break]:
    "SIGKILL from outside, after 5, 10, … milliseconds"
    for k in range(1, number + 1):
        work = partial(killed_after, 0.005 * k)
        yield Break("killed from outside", f"after {5 * k} ms", work)


def two_at_once(run: str, folder: Path):
    "Call in two processes on one folder"
    children = [context().Process(target=train, args=(folder,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise Failure("one of two calls ended with an error")


def two_calls(number: int = 4) -> Iterator[Break]:
    "Two calls at once on one folder, of a new, an unfinished and a finished run"
    for run in ("none", "unfinished", "finished"):
        for k in range(number):
            work = partial(two_at_once, run)
            yield Break("two calls at once", f"{run}, {k + 1}", work, run)


BREAKS = (
    kills,
    full_disks,
    failing_drives,
    refused_renames,
    read_only_drives,
    no_inodes,
    drives_gone,
    failing_parts,
    timed_kills,
    two_calls,
)
