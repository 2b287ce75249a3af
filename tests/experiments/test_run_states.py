"The status report tells states apart"

import json
import shutil

import pytest
from toy_checkout import finish

from vggflow.common.files import lock, write_text
from vggflow.experiments.cards import read_cards
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


def test_status_is_data_too(checkout):
    done, _ = read_cards("toy", "paper")
    finish(done)
    data = json.loads(json.dumps(status_data("paper")))
    runs = data["experiments"]["toy"]["runs"]
    assert [run["state"] for run in runs] == ["done", "missing"]
    assert (data["there"], data["runs"]) == (1, 2)
    assert [figure["file"] for figure in data["figures"]][0] == "figures/fig07.png"
