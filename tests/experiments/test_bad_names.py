"What the command line says about a bad name: one line, before anything is lost"

import subprocess
import sys

import pytest

from vggflow.common.seals import read_rows

BAD = [
    (["figure", "fig55"], "fig05"),
    (["figure", "fig05", "--profile", "papr"], "did you mean 'paper'?"),
    (["figures", "--profile", "quik"], "did you mean 'quick'?"),
    (["cards", "aesthtic"], "did you mean 'aesthetic'?"),
    (["figures", "--experiment", "lrgrid"], "did you mean 'lr-grid'?"),
    (["train", "--world", "emojis"], "did you mean 'emoji'?"),
    (["train", "--world", "gaussian", "--method", "VGG-Flw"], "did you mean 'VGG-Flow'"),
    (["train", "--world", "gaussian", "--reward", "linar"], "did you mean 'linear'?"),
    (["train", "--updates", "many"], "invalid int value"),
    (["train", "--betta", "1"], "Unknown option"),
    (["collect", "aesthetic", "--profile", "nope"], "no profile"),
    (["status", "--profile", "papr"], "did you mean 'paper'?"),
    (["figures", "fig99"], "no figure 'fig99'"),
    (["figures", "--redraw", "--executor", "slurm"], "takes no --executor"),
    (["collect", "modes", "--profile", "sd3"], "has no profile 'sd3'"),
]


def one_line(status, says, err):
    "Refused in a line that says so"
    assert status == 2 and says in err, err
    assert err.strip().count("\n") == 0 and "Traceback" not in err


@pytest.mark.parametrize("words,says", BAD)
def test_bad_input_is_one_line(words, says, call, tmp_path):
    own = ["--out", tmp_path / "run"] if words[0] == "train" else []
    status, _, err = call("", *words, *own)
    one_line(status, says, err)


def test_bad_input_ends_a_process_in_one_line():
    words, says = BAD[0]
    command = [sys.executable, "-m", "vggflow.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    one_line(done.returncode, says, done.stderr)


def test_another_run_in_the_folder(call, tmp_path):
    line = "train --world gaussian --updates 2 --batch-size 4 --out"
    assert call(line, tmp_path / "run")[0] == 0
    status, _, err = call(line, tmp_path / "run", "--method", "ReFL")
    one_line(status, "another run", err)
    assert call(line, tmp_path / "run")[0] == 0, "the same run: nothing left to do"


def test_train_on_the_emoji_world_leaves_a_run_directory(call, tmp_path):
    out = tmp_path / "run"
    line = "train --method ReFL --updates 1 --batch-size 2 --steps 4"
    line += " --eval-prompts 1 --images-per-prompt 2 --out"
    status, _, err = call(line, out)
    assert status == 0, err
    first, last = read_rows(out / "eval.jsonl")
    assert (first["update"], last["update"]) == (0, 1)
    judged = {"reward", "perceptual_diversity", "clip_diversity", "fid", "fid_base"}
    assert judged | {"accuracy", "vendors", "hue_spread"} <= set(first)
    assert first["reward"] != last["reward"] and first["fid_base"] == last["fid_base"]
