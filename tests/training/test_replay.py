"An update of a run, made again from what the run keeps"

import json
import math

import pytest
import torch
from short_runs import EVERY_METHOD, linear, run

from vggflow.theory.flow import GaussianFlow
from vggflow.training.replay import replay_update, told

RUN = "finetune --world emoji --updates 3 --batch-size 2 --steps 5 --eval-every 0 --quiet"


def again(folder, update, method):
    "An update of a run of `short_runs`"
    torch.manual_seed(0)
    return replay_update(folder, update, GaussianFlow([0.0, 0.0], 0.6), linear, method)


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("update, began", [(2, 0), (6, 4)])
def test_it_is_the_update_of_the_run_to_the_last_bit(tmp_path, name, update, began):
    _, history = run(tmp_path, EVERY_METHOD[name](), ema=0.5)
    before = files_of(tmp_path)
    found = again(tmp_path, update, EVERY_METHOD[name]())
    recorded = history.rows[update - 1]
    assert found.began == began and not found.bad and not found.weights
    assert {**found.row, "seconds": recorded["seconds"]} == recorded
    assert "every number as it was recorded" in told(found)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("update", [0, 7])
def test_only_updates_of_the_run_are_repeated(tmp_path, update):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"updates 1 to 6, not {update}"):
        again(tmp_path, update, None)


def test_an_update_that_ended_the_run_names_its_sample(tmp_path, call):
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(images, prompts):\n    return images.flatten(1).mean(1)\n")
    out = tmp_path / "run"
    asked = f"--reward {reward}:mine --prompts cat dog --out {out}"
    assert call(f"{RUN} {asked}")[0] == 0
    bad = "(images * float('inf') if 'dog' in prompts else images).flatten(1).mean(1)"
    reward.write_text(f"def mine(images, prompts):\n    return {bad}\n")
    status, _, err = call(f"replay {out} 3")
    assert status == 2 and "--trust" in err
    status, text, _ = call(f"replay {out} 3 --trust --json")
    found = json.loads(text)
    assert status == 0 and found["update"] == 3 and found["began"] == 0
    values = {s["prompt"]: s["reward"] for s in found["samples"]}
    assert values.keys() <= {"cat", "dog"} and not math.isfinite(values["dog"])
    assert "reward" in found["bad"]
