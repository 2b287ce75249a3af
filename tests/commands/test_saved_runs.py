"What is made of a run: images, numbers and an export, with the run's settings"

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import parsed
from PIL import Image

from vggflow.commands.evaluate import own_prompts, reward_texts
from vggflow.commands.saved import load_saved
from vggflow.common.seals import read_sealed, write_sealed
from vggflow.worlds.world import get_world

RUN_NOTES = {"command.json", "config.json"}


def pixels(file):
    "An image as whole numbers, (H, W, 3)"
    return np.array(Image.open(file)).astype(int)


def edit(file, **changes):
    "Change entries of a record, and seal it again"
    write_sealed(file, {**read_sealed(file, "again"), **changes})


def edit_flow(file, **changes):
    "Change what a record says of the flow"
    record = read_sealed(file, "again")
    edit(file, flow={**record["flow"], **changes})


def edit_command(folder, **changes):
    "Change what was asked for, as a user may"
    file = Path(folder, "command.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def saved_by(line):
    "The model that a line of sample or evaluate names"
    _, said = parsed(line)
    names = ("model", "lora", "run", "guidance_scale", "image_size", "dtype", "device")
    names += ("negative_prompt", "max_sequence_length")
    return load_saved(**{k: v for k, v in said.items() if k in (*names, "vae_tiling")})


def test_finetune_writes_a_run(run, model):
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    said = json.loads((run / "command.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert len(rows) == 2
    assert (run / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert said["world"] == "sd3"
    assert said["prompts"] == config["prompts"] == ["a cat", "an owl"]
    method, flow = config["method"], config["flow"]
    assert (method["clip"], method["beta"], method["reuse"]) == (0.8, 30, True)
    assert (flow["lora_rank"], flow["guidance_scale"]) == (2, 2)


def test_the_command_of_a_run_is_a_card_that_goes_on_there(run):
    from vggflow.commands.run import read_parameters

    card = read_parameters(run / "command.json")
    said = json.loads((run / "command.json").read_text())
    assert card["model"] == said["model"] and "out" not in said
    assert card["out"] == str(run.resolve())


def test_a_negative_prompt_is_the_runs_or_the_callers(run, here):
    plain = f"sample --run {run} 'a cat'"
    assert saved_by(plain).flow.negative_prompt == ""
    asked = saved_by(f"{plain} --negative-prompt 'an owl' --max-sequence-length 32").flow
    assert (asked.negative_prompt, asked.max_sequence_length) == ("an owl", 32)
    shutil.copytree(run, "r")
    edit_command("r", negative_prompt="a dog")
    with pytest.warns(
        UserWarning, match="was edited .negative_prompt (''|None) → 'a dog'."
    ):
        assert saved_by("sample --run r 'a cat'").flow.negative_prompt == "a dog"


def test_sample_compares_on_equal_noise(run, model, call, here):
    both = "--n 2 --scale 1 --seed 3"
    line = f"sample --run {run} --prompts 'a cat' 'an owl' --compare {both}"
    status, out, _ = call(line)
    assert status == 0 and "left: base" in out
    sheet = pixels("sample.png")
    assert sheet.shape == (2 * 16, 4 * 16, 3)
    assert np.abs(sheet[:, :32] - sheet[:, 32:]).max() > 0
    base = f"sample --model {model} --guidance-scale 2 --steps 2 --prompts 'a cat'"
    assert call(f"{base} --limit 1 {both} --out base.png")[0] == 0
    # the left half is the base model, to rounding
    assert np.abs(pixels("base.png") - sheet[:16, :32]).max() <= 1
    status, _, err = call("sample 'a cat'")
    assert status == 2 and "sample.png exists" in err and "--force" in err


def test_an_unfinished_run_says_so(call, here):
    Path("half").mkdir()
    status, _, err = call("evaluate --run half --out x --reward redness")
    assert status == 2 and "no finished run" in err and "the same command goes on" in err
    Path("half/command.json").write_text('{"world": "emoji"}')
    status, _, err = call("sample 'a cat' --run half")
    assert status == 2 and "python -m vggflow.train half/command.json goes on" in err


def test_a_run_that_has_not_ended_has_its_last_checkpoint(run, call, here):
    shutil.copytree(run, "r")
    shutil.rmtree("r/lora")
    status, _, err = call("sample 'a cat' --run r --out deep/er/a.png")
    assert status == 0 and "has not ended" in err and "update 2" in err
    assert call(f"sample 'a cat' --run {run} --out b.png")[0] == 0
    assert np.abs(pixels("deep/er/a.png") - pixels("b.png")).max() <= 1  # the same weights
    status, _, err = call(f"sample 'a cat' --run r --lora {run}/lora --out c.png")
    assert status == 0 and not err  # --lora wins
    assert Path("c.png").read_bytes() == Path("b.png").read_bytes()


def test_dtype_and_tiling_are_those_of_the_run(run, model, here):
    shutil.copytree(run, "r")
    edit_flow("r/config.json", dtype="bfloat16", vae_tiling=True)
    edit("r/config.json", about={})  # the checksum was that of float32

    def dtype(saved):
        return saved.flow.transformer.pos_embed.proj.weight.dtype

    saved = saved_by("evaluate --run r")
    assert dtype(saved) == torch.bfloat16 and saved.flow.vae.use_tiling
    assert dtype(saved_by("evaluate --run r --dtype fp32")) == torch.float32
    saved = saved_by(f"sample --model {model} a --vae-tiling")
    assert dtype(saved) == torch.float32 and saved.flow.vae.use_tiling
    edit_command("r", dtype="fp16")
    assert dtype(saved_by("evaluate --run r")) == torch.float16


def test_limit_counts_for_the_prompts_of_a_run():
    from vggflow.judging.prompts import load_prompts

    drawn = dict(prompts="some.csv", drawn_prompts=["a", "b", "a", "c", "d"])
    assert own_prompts(drawn) == ["a", "b", "c", "d"]
    assert own_prompts(drawn, limit=2) == ["a", "c"]
    assert own_prompts(dict(prompts="animals"), limit=3) == load_prompts("animals")[::15]
    assert len(own_prompts({}, get_world("emoji"), 5)) == 5


@pytest.mark.parametrize("file", sorted(RUN_NOTES))
@pytest.mark.parametrize("text", ['{"a"', "[1]", ""])
def test_a_damaged_record_is_named(run, call, here, file, text):
    shutil.copytree(run, "r")
    Path("r", file).write_text(text)
    for line in (
        "sample 'a cat' --run r",
        "evaluate --run r --out x --reward redness",
        "export r x",
    ):
        status, _, err = call(line)
        assert status == 2 and f"r/{file} is damaged" in err
        assert "--model" in err and err.count("\n") == 1


def without_recipe(run, folder):
    "A copy of a run that says neither its command nor how its flow is made"
    shutil.copytree(run, folder)
    Path(folder, "command.json").unlink()
    edit(f"{folder}/config.json", load={})


def test_a_run_that_does_not_say_its_settings(run, model, call, here, monkeypatch):
    without_recipe(run, "bare")
    for line in (
        "sample 'a cat' --run bare",
        "evaluate --run bare --out x --reward redness",
        "export bare x",
    ):
        status, _, err = call(line)
        assert status == 2 and "does not say its settings" in err
        assert "--model" in err and err.count("\n") == 1
    edit_flow("bare/config.json", latent_size=4, correction="adapter")
    saved = saved_by(f"sample 'a cat' --run bare --model {model}")
    assert (saved.flow.guidance_scale, saved.flow.latent_size) == (2, 4)
    assert (saved.said["steps"], saved.said["prompts"]) == (2, ["a cat", "an owl"])
    flow = exported_flow(call, monkeypatch, f"export bare x --model {model}")
    assert (flow.guidance_scale, flow.latent_size) == (2, 4)
    assert flow.correction_kind == "adapter"
    line = f"evaluate --run bare --model {model} --out x --prompts 'a cat'"
    status, _, err = call(line)
    assert status == 2 and "which reward" in err


def exported_flow(call, monkeypatch, line):
    "The flow that an export would write"
    found = {}

    def keep(flow, out, **how):
        found.update(flow=flow)

    monkeypatch.setattr("vggflow.commands.export.export_lora", keep)
    assert call(line)[0] == 0
    return found["flow"]


def test_settings_of_a_run_are_those_of_what_is_made_of_it(run, call, here, monkeypatch):
    "Sampling, evaluation and export build the model as the run did"
    shutil.copytree(run, "r")
    edit_command("r", image_size=8, max_sequence_length=64, correction="adapter")
    for more, size in (("", 8), ("--image-size 16", 16)):
        flow = saved_by(f"evaluate --run r {more}").flow
        assert flow.latent_size * flow.pipe.vae_scale_factor == size
        assert (flow.max_sequence_length, flow.guidance_scale) == (64, 2)
    flow = exported_flow(call, monkeypatch, "export r x")
    assert flow.correction_kind == "adapter"
    assert flow.latent_size * flow.pipe.vae_scale_factor == 8
    assert flow.vae.dtype == torch.bfloat16
    assert {p.dtype for p in flow.trainable_parameters()} == {torch.float32}


def test_a_run_without_a_reward_by_name_had_the_first_of_its_world():
    emoji, sd3 = get_world("emoji"), get_world("sd3")
    assert reward_texts(None, dict(world="sd3", model="m"), sd3, "m") == ["aesthetic"]
    assert reward_texts(None, dict(updates=2), emoji) == ["emoji-aesthetic"]
    assert reward_texts(None, {}, emoji) == ["emoji-aesthetic"]
    assert reward_texts(None, dict(world="sd3", reward="redness"), sd3) == ["redness"]
    assert reward_texts(["a", "b"], dict(world="sd3"), sd3) == ["a", "b"]


def test_a_reward_without_gradient_ends_before_the_model_is_drawn_from(
    model, call, here, fast
):
    flat = "def f(images, prompts): return images.detach().mean((1, 2, 3))\n"
    Path("flat.py").write_text(flat)
    line = f"finetune --model {model} --reward flat.py:f --prompts a --out r {fast}"
    status, _, err = call(line)
    assert status == 2 and "no gradient" in err
    assert not Path("r/config.json").exists()


def test_a_run_of_a_model_whose_weights_have_changed_is_refused(run, model, call, here):
    "An adapter means nothing to other weights; a model named anew is the caller's choice"
    shutil.copytree(run, "r")
    record = json.loads(Path("r/config.json").read_text())
    right = record["about"]["weights"]
    edit("r/config.json", about={**record["about"], "weights": "0123456789abcdef"})
    for line in (
        "sample 'a cat' --run r --out a.png",
        "evaluate --run r --out x --reward redness --perceptual none --clip none",
    ):
        status, _, err = call(line)
        assert status == 2 and err.count("\n") == 1
        assert "0123456789abcdef" in err and right in err and "--model" in err
    assert not Path("a.png").exists() and not Path("x").exists()
    shutil.copytree(model, "m")
    assert call("sample 'a cat' --run r --model m --out a.png")[0] == 0
    edit_flow("r/config.json", dtype="bfloat16")  # rounded in another way, not compared
    assert call("sample 'a cat' --run r --dtype fp32 --out b.png")[0] == 0


@pytest.mark.parametrize("setting", ["reward", "model", "world"])
def test_a_strangers_folder_runs_no_code(run, call, here, setting):
    "Nor does a card, unless the command line says so"
    shutil.copytree(run, "r")
    Path("evil.py").write_text("open('ran', 'w').close()\n")
    edit_command("r", **{setting: f"{here}/evil.py:thing"})
    asked = "--reward redness" if setting != "reward" else ""
    lines = (
        f"evaluate --run r --out x {asked} --perceptual none --clip none --limit 1",
        "sample 'a cat' --run r --out a.png",
        "export r x",
    )
    for line in lines:
        status, _, err = call(line)
        assert "Traceback" not in err and not Path("ran").exists()
        assert status == 0 or "look at it and say --trust" in err
    from vggflow import train

    assert train.main(["r/command.json"]) == 2 and not Path("ran").exists()
    trusted = ["r/command.json", "--trust", "--out", "fresh"]
    if setting != "model":  # which goes with another world
        assert train.main(trusted) == 2 and Path("ran").exists()
