"The status report tells states apart"

import json
import shutil

import pytest
from toy_checkout import finish

from vggflow.common.files import lock, write_text
from vggflow.experiments.cards import read_cards
from vggflow.experiments.makers import note_maker
from vggflow.experiments.status import experiment_runs, status_data, status_report
from vggflow.experiments.tables import collect


def test_status_tells_the_states_apart(checkout):
    done, cut = read_cards("toy", "paper")
    finish(done)
    rows = [dict(update=i + 1, seconds=0.5) for i in range(10)]
    write_text(cut.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    text = status_report("paper")
    assert f"cut off: [toy] {cut.id}, update 10/30, will resume" in text
    assert "1 of 2 runs are there, time left with 2 at once: about 0:06" in text
    with lock(cut.folder / ".lock", "the run"):
        assert f"running: [toy] {cut.id}, update 10/30" in status_report("paper")
    finish(cut)
    collect("toy", "paper")
    text = status_report("paper")
    assert "all 2 runs are there" in text and "up to date" in text
    assert "figtoy    toy    missing" in text
    shutil.rmtree(checkout / "data/runs")
    states = [run.state for _, run in experiment_runs("toy", "paper").values()]
    assert states == ["kept", "kept"]
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        status_report("papr")


def change_template(checkout, old, new):
    "Rewrite the toy's template"
    file = checkout / "nbs/experiments/toy.ipynb"
    text = file.read_text(encoding="utf8")
    assert old in text
    write_text(file, text.replace(old, new))


def test_runs_of_other_code_are_out_of_date_until_they_are_kept(checkout, call):
    for card in read_cards("toy", "paper"):
        note_maker(card, card.folder)
        finish(card)
    collect("toy", "paper")
    ask = "status --profile paper --experiment toy"
    assert "up to date" in call(ask)[1]
    change_template(checkout, "import json, time", "import json, time  # as before")
    assert "up to date" in call(ask)[1]  # prose
    change_template(checkout, "lr*(i+1)+seed", "lr*(i+2)+seed")
    changed = "out of date: code of 2 of 2 runs changed: toy.ipynb"
    assert changed in call(ask)[1]
    status, out, _ = call(f"{ask} --keep")
    assert status == 0 and "kept: " in out and changed not in out
    collect("toy", "paper")  # keeps what was accepted
    shutil.rmtree(checkout / "data/runs")
    collect("toy", "paper")
    assert changed not in call(ask)[1]
    change_template(checkout, "lr*(i+2)+seed", "lr*(i+3)+seed")
    assert changed in call(ask)[1]


def test_what_is_kept_is_named(checkout, call):
    status, _, err = call("status --profile paper --keep")
    assert status == 2 and "--experiment: name at least one" in err
    status, _, err = call("status --profile paper --experiment toy --keep")
    assert status == 2 and "vggflow collect toy --profile paper makes it" in err


def test_status_is_data_too(checkout):
    done, _ = read_cards("toy", "paper")
    finish(done)
    data = json.loads(json.dumps(status_data("paper")))
    runs = data["experiments"]["toy"]["runs"]
    assert [run["state"] for run in runs] == ["done", "missing"]
    assert (data["there"], data["runs"]) == (1, 2)
    assert [figure["file"] for figure in data["figures"]][0] == "figures/fig07.png"
