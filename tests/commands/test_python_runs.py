"A run made in Python is sampled, evaluated, exported and continued from the shell"

import inspect
import json
import shutil
from pathlib import Path

import pytest

from vggflow import FinetuneConfig, ReFL, finetune, get_reward, load_flow
from vggflow.commands.run import run
from vggflow.common.seals import read_rows

ROOT = Path(__file__).parents[2]
SMALL = dict(batch_size=2, steps=3, lr=1e-2, save_every=1)
PROMPTS = ["a cat", "an owl"]


def finetune_in_python(out, updates=2, **settings):
    "What a user writes"
    flow = load_flow("emoji", lora_rank=2, guidance_scale=2.0, **settings)
    config = FinetuneConfig(updates=updates, **SMALL)
    how = dict(out=out, prompts=PROMPTS, progress=False)
    return finetune(flow, get_reward("redness"), ReFL(), config, **how)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run directory that Python wrote"
    out = tmp_path_factory.mktemp("python") / "run"
    finetune_in_python(out)
    return out


@pytest.fixture
def moved(made, here):
    "The same run in another place"
    return shutil.copytree(made, here / "kept" / "run")


def test_it_is_sampled(moved, call):
    status, out, err = call(f"sample 'a cat' --run {moved} --compare --out c.png")
    assert status == 0 and "left: base" in out, err


def test_it_is_evaluated_with_its_own_prompts(moved, call):
    few = "--images-per-prompt 2 --perceptual none --clip none --quiet"
    status, _, err = call(f"evaluate --run {moved} --reward redness --out e {few}")
    assert status == 0, err
    rows = json.loads(Path("e/evaluation.json").read_text())["prompts"]
    assert [row["prompt"] for row in rows] == PROMPTS


def test_it_is_exported(moved, call):
    status, _, err = call(f"export {moved} given")
    assert status == 0, err
    assert "guidance_scale=2," in Path("given/README.md").read_text()
    assert Path("given/pytorch_lora_weights.safetensors").exists()


def test_the_shell_goes_on_with_it(moved, call):
    "The same settings and more updates; other settings are refused"
    line = (
        "finetune --method ReFL --reward redness --prompts 'a cat' 'an owl' --lora-rank 2"
    )
    line += " --guidance-scale 2 --batch-size 2 --steps 3 --lr 1e-2 --save-every 1"
    line += f" --eval-every 0 --quiet --out {moved}"
    status, _, err = call(f"{line} --updates 3")
    assert status == 0, err
    assert [r["update"] for r in read_rows(moved / "metrics.jsonl")] == [1, 2, 3]
    status, _, err = call(f"{line} --updates 4 --seed 5")
    assert status == 2 and "another run" in err and "seed" in err


def test_python_goes_on_with_a_run_of_the_shell(here, call):
    line = (
        "finetune --method ReFL --reward redness --prompts 'a cat' 'an owl' --lora-rank 2"
    )
    line += " --guidance-scale 2 --batch-size 2 --steps 3 --lr 1e-2 --save-every 1"
    status, _, err = call(f"{line} --eval-every 0 --quiet --updates 1 --out run")
    assert status == 0, err
    history = finetune_in_python("run", updates=2)
    assert [r["update"] for r in history.rows] == [1, 2]


def test_a_moved_run_names_no_former_place(here, call):
    line = "finetune --world gaussian --batch-size 4 --steps 4 --transitions 2"
    line += " --eval-every 0 --save-every 1 --quiet"
    assert call(f"{line} --updates 2 --out first/run")[0] == 0
    Path("first/run").rename("kept")
    assert call(f"{line} --updates 3 --out kept")[0] == 0
    assert len(read_rows(Path("kept/metrics.jsonl"))) == 3
    assert not Path("first/run").exists()
    stored = "".join(p.read_text() for p in Path("kept").glob("*.json"))
    assert str(here / "first") not in stored


@pytest.mark.parametrize("own_noise", [False, True])
def test_evaluations_have_the_seed_s_own_noise_where_that_is_asked_for(own_noise):
    "So that a spread over seeds holds the noise of an evaluation too"
    how = dict(world="gaussian", updates=1, batch_size=2, eval_every=1, progress=False)
    runs = [run(**how, seed=seed, own_noise=own_noise) for seed in (0, 1, 0)]
    start = [history.evals[0]["reward"] for history in runs]
    assert runs[0].evals[0]["update"] == 0  # when nothing is learned yet
    assert start[0] == start[2]
    assert (start[0] != start[1]) == own_noise


def test_evaluations_before_the_first_are_at_its_half_and_quarter():
    "Methods rise fastest at the start"
    how = dict(world="gaussian", updates=8, batch_size=2, eval_every=8, progress=False)
    assert [row["update"] for row in run(**how, eval_early=2).evals] == [0, 2, 4, 8]
    assert [row["update"] for row in run(**how).evals] == [0, 8]


def test_the_end_is_judged_with_as_many_noises_as_asked_for():
    "The mean over noises, and the deviation of one, stand in the last row alone"
    how = dict(world="emoji", updates=1, batch_size=2, steps=4, transitions=2, eval_every=1)
    how |= dict(eval_prompts=2, images_per_prompt=2, progress=False)
    start, end = run(**how, end_noises=3).evals
    one = run(**how).evals[-1]
    assert "noises" not in start and "noises" not in one
    assert end["noises"] == 3 and end["noise_sd"]["reward"] > 0
    assert end["reward"] != one["reward"]
    assert abs(end["reward"] - one["reward"]) < 1.2 * end["noise_sd"]["reward"]


def test_the_default_method_is_the_one_that_the_study_chose():
    "In a run, in the doctor, and on the command line"
    from vggflow.commands.doctor import doctor
    from vggflow.commands.options import declared

    record = json.loads((ROOT / "figures/estimates.json").read_text())
    default = record["default"]
    assert inspect.signature(run).parameters["method"].default == default
    assert inspect.signature(doctor).parameters["method"].default == default
    assert declared("commands.run:run")["method"].default == default
