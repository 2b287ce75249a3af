"Damage to the files of a run: a function for each kind, which gives every place"

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults.judge import Outcome, calling, reading, worst
from faults.runs import copied, good, undamaged

LEASE = Path(".training.lease")  # waited for, where damaged: see test_run_directory
ROWS = ("metrics.jsonl", "eval.jsonl", "diagnostics.jsonl")


@dataclass
class Fault:
    "One fault, in one place"

    kind: str
    run: str  # 'finished', 'unfinished' or 'none'
    place: str
    inject: Callable  # (folder)

    def outcome(self, folder: Path) -> Outcome:
        "Damage a copy of the run, look at it, and call again"
        copied(self.run, folder)
        self.inject(folder)
        done, _, _ = undamaged(self.run)
        return worst([reading(folder, self.run), calling(folder, done)])


def files(run: str) -> list:
    "The files of a run that hold something, by their names in it"
    found = (file for file in sorted((good() / run).rglob("*")) if file.is_file())
    names = [file.relative_to(good() / run) for file in found if file.stat().st_size]
    return [name for name in names if name != LEASE]


def changed(name, change: Callable, folder: Path):
    "Change the bytes of a file"
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


def flipped(at: int, bit: int, data: bytes) -> bytes:
    "One bit is another"
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def zeroed(at: int, length: int, data: bytes) -> bytes:
    "A block of zeros"
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def flipped_bits(each: int = 8) -> Iterator[Fault]:
    "A bit flipped, at places spread over every file of a run"
    for run in ("unfinished", "finished"):
        for name in files(run):
            size = (good() / run / name).stat().st_size
            for k in range(each):
                at, bit = (2 * k + 1) * size // (2 * each), (k + len(str(name))) % 8
                change = partial(flipped, at, bit)
                inject = partial(changed, name, change)
                yield Fault("flipped bit", run, f"{name} byte {at} bit {bit}", inject)


def zeroed_blocks() -> Iterator[Fault]:
    "64 zeros in the middle of every file of a run, and a file of zeros"
    for run in ("unfinished", "finished"):
        for name in files(run):
            size = (good() / run / name).stat().st_size
            for at, length in ((size // 2, 64), (0, size)):
                inject = partial(changed, name, partial(zeroed, at, length))
                yield Fault("zeroed block", run, f"{name} at {at}", inject)


def torn_rows() -> Iterator[Fault]:
    "The file of rows, or of seals, ends at each byte of its last line"
    for run in ("finished", "unfinished"):
        for name in ("metrics.jsonl", "metrics.jsonl.seals", "eval.jsonl.seals"):
            data = (good() / run / name).read_bytes()
            start = data[:-1].rfind(b"\n") + 1
            for end in range(start, len(data)):
                inject = partial(changed, name, lambda data, end=end: data[:end])
                yield Fault("torn row", run, f"{name} at {end - len(data)}", inject)


def cut(share: int, data: bytes) -> bytes:
    "A part of the bytes; none for 0"
    return data[: len(data) // share] if share else b""


def shortened_files() -> Iterator[Fault]:
    "A file is cut to its half, or to nothing"
    for run in ("unfinished", "finished"):
        for name in files(run):
            for share in (0, 2):
                inject = partial(changed, name, partial(cut, share))
                yield Fault("shortened file", run, f"{name} to 1/{share}", inject)


def on_lines(change: Callable, data: bytes) -> bytes:
    "Change a list of lines"
    return b"".join(change(data.splitlines(keepends=True)))


LINES = {  # what may happen to rows
    "first removed": lambda rows: rows[1:],
    "middle removed": lambda rows: [*rows[:2], *rows[3:]],
    "last removed": lambda rows: rows[:-1],
    "last two removed": lambda rows: rows[:-2],
    "last doubled": lambda rows: [*rows, rows[-1]],
    "middle doubled": lambda rows: [*rows[:2], *rows[1:]],
    "two swapped": lambda rows: [*rows[1:2], rows[0], *rows[2:]],
    "all reversed": lambda rows: rows[::-1],
    "a digit changed": lambda rows: [rows[0].replace(b"1", b"7"), *rows[1:]],
    "a word for a number": lambda rows: [rows[0].replace(b": ", b': "a', 1), *rows[1:]],
    "a line of text": lambda rows: [*rows, b"hello\n"],
    "an empty line": lambda rows: [*rows, b"\n"],
    "a list for a row": lambda rows: [*rows, b"[1]\n"],
    "bytes of no text": lambda rows: [*rows, b"\xff\xfe\n"],
    "deep nesting": lambda rows: [*rows, b"[" * 9000 + b"\n"],
}


def changed_rows() -> Iterator[Fault]:
    "Rows edited, removed, doubled and swapped, in files of rows and of seals"
    for run in ("unfinished", "finished"):
        for name in (*ROWS, *(f"{name}.seals" for name in ROWS)):
            rows = (good() / run / name).read_bytes()
            for what, change in LINES.items():
                if on_lines(change, rows) != rows:
                    inject = partial(changed, name, partial(on_lines, change))
                    yield Fault("changed row", run, f"{name}: {what}", inject)


def edited(name: str, edit: Callable, folder: Path):
    "Edit the content of a JSON file"
    file = folder / name
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


STATES = {  # edits of state.json
    "update": lambda s: s.update(update=s["update"] + 2),
    "a text as update": lambda s: s.update(update="six"),
    "no update": lambda s: s.pop("update"),
    "a checksum": lambda s: s["files"].update({"flow.safetensors": "0" * 64}),
    "no checksums": lambda s: s.pop("files"),
    "a file more": lambda s: s["files"].update({"x.safetensors": "0" * 64}),
    "a loss": lambda s: s["rows"]["metrics"][0].update(loss=1.0),
    "a row less": lambda s: s["rows"]["metrics"].pop(),
    "no rows": lambda s: s.pop("rows"),
    "another seal": lambda s: s.update(seal="0" * 20),
    "a list as seal": lambda s: s.update(seal=[]),
}
RECORDS = {  # edits of config.json
    "lr": lambda s: s["config"].update(lr=9.0),
    "seed": lambda s: s["config"].update(seed=9),
    "method": lambda s: s["method"].update(beta=9.0),
    "reward": lambda s: s.update(reward="other"),
    "no config": lambda s: s.pop("config"),
    "a text as flow": lambda s: s.update(flow="x"),
    "a list as method": lambda s: s.update(method=[]),
    "edition": lambda s: s.update(edition=1),
    "versions": lambda s: s.update(versions={}),
    "prompts": lambda s: s.update(prompts=["x"]),
}


def edited_files() -> Iterator[Fault]:
    "Numbers and names edited in the state of a checkpoint and in the record"
    for run, update in (("unfinished", 6), ("finished", 10)):
        state = f"checkpoints/{update:06d}/state.json"
        for name, edits in ((state, STATES), ("config.json", RECORDS)):
            for what, edit in edits.items():
                inject = partial(edited, name, edit)
                yield Fault("edited file", run, f"{name}: {what}", inject)


def removed(name, folder: Path):
    "Remove a file or a folder"
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def deleted_files() -> Iterator[Fault]:
    "A file or a checkpoint is gone"
    for run in ("unfinished", "finished"):
        folders = sorted((good() / run / "checkpoints").iterdir())
        places = [folder.relative_to(good() / run) for folder in folders]
        for name in (*files(run), *places):
            yield Fault("deleted file", run, str(name), partial(removed, name))


def replaced(source, target, folder: Path):
    "Put one file or folder of a run in the place of another"
    source, target = folder / source, folder / target
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def mixed_checkpoints() -> Iterator[Fault]:
    "Parts of an older checkpoint, or all of it, under the name of the newest"
    for run in ("unfinished", "finished"):
        older, newer = sorted((good() / run / "checkpoints").iterdir())
        for file in (*sorted(newer.iterdir()), newer):
            target = file.relative_to(good() / run)
            source = Path(str(target).replace(newer.name, older.name))
            inject = partial(replaced, source, target)
            yield Fault("older checkpoint mixed in", run, str(target), inject)
        first, second = "checkpoints/" + older.name, "checkpoints/" + newer.name
        yield Fault("older checkpoint mixed in", run, "the other way round",
                    partial(replaced, second, first))  # fmt: skip


def of_another_run() -> Iterator[Fault]:
    "Files of the finished run in the folder of the unfinished one"
    for name in files("unfinished"):
        if (good() / "finished" / name).exists() and name.name != "command.json":

            def inject(folder, name=name):
                shutil.copyfile(good() / "finished" / name, folder / name)

            yield Fault("file of another run", "unfinished", str(name), inject)


def dated(days: int, folder: Path):
    "Give every file of a run another date"
    moment = time.time() + 86400 * days
    for file in folder.rglob("*"):
        os.utime(file, (moment, moment))


def wrong_clocks() -> Iterator[Fault]:
    "All files are of yesterday, of tomorrow, or of years away"
    for run in ("unfinished", "finished"):
        for days in (-9000, -1, 1, 9000):
            yield Fault("wrong clock", run, f"{days} days", partial(dated, days))


DAMAGE = (
    flipped_bits,
    zeroed_blocks,
    torn_rows,
    shortened_files,
    changed_rows,
    edited_files,
    deleted_files,
    mixed_checkpoints,
    of_another_run,
    wrong_clocks,
)
