"What the command line says about a bad name: one line, before anything is lost"

import subprocess
import sys

import pytest

from vggflow.common.files import read_rows


def vggflow(*words):
    "The command, to its end"
    call = [sys.executable, "-m", "vggflow.cli", *words]
    return subprocess.run(call, capture_output=True, text=True)


BAD = [
    (["figure", "fig55"], "fig05"),
    (["figure", "fig05", "--profile", "papr"], "did you mean 'paper'?"),
    (["figures", "--profile", "quik"], "did you mean 'quick'?"),
    (["cards", "aesthetics"], "did you mean 'aesthetic'?"),
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


@pytest.mark.parametrize("words,says", BAD)
def test_bad_input_is_one_line(words, says, tmp_path):
    own = ["--out", str(tmp_path / "run")] if words[0] == "train" else []
    done = vggflow(*words, *own)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr


def test_another_run_in_the_folder(tmp_path):
    words = ["train", "--world", "gaussian", "--updates", "2", "--batch-size", "4"]
    words += ["--out", str(tmp_path / "run")]
    assert vggflow(*words).returncode == 0
    other = vggflow(*words, "--method", "ReFL")
    assert other.returncode == 2 and "another run" in other.stderr
    assert "Traceback" not in other.stderr
    assert vggflow(*words).returncode == 0, "the same run: nothing left to do"


def test_train_on_the_emoji_world_leaves_a_run_directory(tmp_path):
    out = tmp_path / "run"
    words = ["train", "--method", "ReFL", "--updates", "1", "--batch-size", "2"]
    words += ["--steps", "4", "--eval-prompts", "1", "--images-per-prompt", "2"]
    done = vggflow(*words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    first, last = read_rows(out / "eval.jsonl")
    assert (first["update"], last["update"]) == (0, 1)
    judged = {"reward", "perceptual_diversity", "clip_diversity", "fid", "fid_base"}
    assert judged | {"accuracy", "vendors", "hue_spread"} <= set(first)
    assert first["reward"] != last["reward"] and first["fid_base"] == last["fid_base"]
