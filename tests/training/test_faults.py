"A short form of the campaign of faults: some places of every kind. `make faults`: all"

import pytest
from faults.__main__ import KINDS, campaign
from faults.damage import changed, files
from faults.judge import calling, reading
from faults.runs import copied, good, undamaged


def some(kind, most: int = 3):
    "A few places of a kind, spread over all of them"

    def chosen():
        faults = list(kind())
        step = max(1, len(faults) // most)
        return faults[step // 2 :: step][:most]

    chosen.__doc__ = kind.__doc__
    return chosen


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_fault_is_silent_loses_work_or_ends_in_a_traceback(kind):
    (row,) = campaign([some(kind)])
    assert row["count"] >= 3 and not row["bad"], row["bad"]


def other_numbers(data: bytes) -> bytes:
    "All rows with other digits, and no seal that could tell"
    return data.replace(b"1", b"2")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_judge_sees_what_nothing_tells(tmp_path):
    "The tooth: a reader that were given other rows would be told silent"
    folder = copied("finished", tmp_path / "run")
    assert reading(folder, "finished").name == "healed"
    (folder / "eval.jsonl.seals").unlink()
    for state in folder.glob("checkpoints/*/state.json"):
        state.unlink()
    changed("eval.jsonl", other_numbers, folder)
    assert reading(folder, "finished").name == "silent"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_judge_sees_lost_work(tmp_path):
    "The tooth: a run that begins anew has the right weights, and lost ten updates"
    (tmp_path / "run").mkdir()
    outcome = calling(tmp_path / "run", undamaged("finished")[0])
    assert outcome.name == "lost"


def test_every_file_of_a_run_is_damaged():
    assert {str(name) for name in files("finished")} >= {"config.json", "command.json"}
    assert len(files("unfinished")) == len(files("finished")) and (good() / "none").exists()
