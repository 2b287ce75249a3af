"`vggflow evaluate`: the same images, the same numbers, and rewards tried beforehand"

import json
from pathlib import Path

FEW = "--perceptual efficientnet --clip none --quiet"


def numbers(folder, name="finetuned"):
    "What an evaluation says of a set"
    return json.loads(Path(folder, "evaluation.json").read_text())["sets"][name]


def stamps(folder):
    "When each image was written"
    files = [p for p in Path(folder).rglob("*.png") if p.stem != "sheet"]
    return {p: p.stat().st_mtime_ns for p in files}


def test_evaluate_a_run_twice(run, call, here):
    own = json.loads((run / "command.json").read_text())["reward"]
    line = f"evaluate --run {run} --images-per-prompt 2 --reward redness {own} {FEW}"
    status, out, err = call(f"{line} --out e")
    assert status == 0, err
    first = numbers("e")
    assert {"redness", "perceptual_diversity", "fid", "fid_base", "fid_n"} <= set(first)
    assert any(k.endswith(":bright") for k in first)
    result = json.loads(Path("e/evaluation.json").read_text())
    assert len(result["prompts"]) == 2
    assert result["images"] == {"finetuned": 4, "base": 4, "base-again": 4}
    drawn = stamps("e")
    assert call(f"{line} --out e")[1] == out and stamps("e") == drawn
    status, _, err = call(f"{line} --out e --seed 7")
    assert status == 2 and "another seed" in err and err.count("\n") == 1
    there = "evaluate --images e/finetuned --reference e/base --floor e/base-again"
    assert call(f"{there} --reward redness {FEW} --out again")[0] == 0
    again = numbers("again")
    assert again["reward"] == first["redness"] and again["fid"] == first["fid"]
    assert again["perceptual_diversity"] == first["perceptual_diversity"]
    status, out, _ = call(f"{line} --out e --json")
    assert status == 0 and json.loads(out)["sets"]["finetuned"]["fid"] == first["fid"]


def test_rewards_are_tried_before_anything_is_drawn(run, call, here):
    bad = "def bad(x, p): return x.mean()\n"
    counted = "def counted(x, p): return (x > LIMIT).float().mean((1, 2, 3))\n"
    Path("r.py").write_text(f"LIMIT = 0.5\n{bad}{counted}")
    line = f"evaluate --run {run} --images-per-prompt 2 --perceptual none --clip none"
    line += " --no-floor --limit 1 --quiet"
    status, _, err = call(f"{line} --reward r.py:bad --out bad")
    assert status == 2 and "one number per image" in err and not Path("bad").exists()
    assert call(f"{line} --reward r.py:counted --out counted")[0] == 0  # needs no gradient
    was = numbers("counted", "base")["reward"]
    drawn = stamps("counted")
    assert len(drawn) == 4
    Path("r.py").write_text(f"LIMIT = -1\n{bad}{counted}")
    assert call(f"{line} --reward r.py:counted --out counted")[0] == 0
    # the edited file is seen, nothing is drawn anew
    assert numbers("counted", "base")["reward"] == 1 != was
    assert stamps("counted") == drawn


def test_clip_none_and_quiet(model, call, here):
    "No features of CLIP, and no bar of diffusers"
    import diffusers

    diffusers.utils.logging.enable_progress_bar()
    line = "finetune --method ReFL --prompts 'a cat' --updates 1 --batch-size 2 --steps 2"
    line += " --eval-every 1 --images-per-prompt 2 --perceptual none --clip none --quiet"

    def last_row(folder):
        return json.loads(Path(folder, "eval.jsonl").read_text().splitlines()[-1])

    status, _, err = call(f"{line} --reward redness --model {model} --out r")
    assert status == 0 and "%|" not in err and "it/s" not in err, err
    assert "reward" in last_row("r") and "alignment" not in last_row("r")
    assert call(f"{line} --out e")[0] == 0
    assert "alignment" not in last_row("e")  # nor the emoji world's own
