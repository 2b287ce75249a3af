"`vggflow export`: files that others load, and a card that tells of the run"

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from vggflow import SD3Flow, lora_settings
from vggflow.common.seals import read_sealed, write_sealed
from vggflow.theory.flow import sample
from vggflow.worlds.adapters import read_adapter


def snippets(card):
    "The Python in a card"
    return re.findall("```python\n(.*?)```", card, re.S)


def test_export(run, call, here):
    status, _, err = call(f"export {run} given")
    assert status == 0, err
    names = {p.name for p in Path("given").iterdir()}
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= names
    card = Path("given/README.md").read_text()
    assert "dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)" in card
    assert "dtype='float32'" in card and "reward `mine.py:bright`" in card
    assert "height=16, width=16" in card and "guidance_scale=2," in card
    for code in snippets(card):
        compile(code, "card", "exec")
    status, _, err = call(f"export {run} given")
    assert status == 2 and "given" in err and "--force" in err
    assert call(f"export {run} given --force")[0] == 0


def test_the_exported_adapter_is_as_strong_as_the_trained_one(call, here, model, fast):
    "Also where alpha is not the rank"
    line = f"finetune --model {model} --reward redness --prompts 'a cat' --method ReFL"
    assert call(f"{line} --lora-alpha 16 --out r {fast}")[0] == 0
    status, _, err = call("export r given")
    assert status == 0, err
    trained, given = (read_adapter(place).factors for place in ("r/lora", "given"))
    for layer, (down, up) in trained.items():
        assert torch.equal(down, given[layer][0]) and torch.equal(up, given[layer][1])
    assert max(up.abs().max() for _, up in trained.values()) > 0


def test_the_record_alone_knows_the_reward(run, here):
    from vggflow.commands.export import read_run

    shutil.copytree(run, "r")
    Path("r/command.json").unlink()
    assert read_run("r")["record"]["reward"] == "mine.py:bright"


def test_the_card_tells_of_the_run_not_of_the_export(run, call, here, model):
    "Settings from the run's record; the snippets run"
    shutil.copytree(run, "r")
    file = Path("r/config.json")
    record = read_sealed(file, "again")
    record["config"]["updates"] = 400
    record["flow"].update(dtype="float16", vae_tiling=True, taesd=True)
    record["flow"].update(max_sequence_length=64, guidance_scale=3.0)
    record["prompts"] = ["a|b", "two\nlines"]
    write_sealed(file, record)
    status, _, err = call("export r given")
    assert status == 0, err
    card = Path("given/README.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card, re.M))
    wanted = dict(dtype="float16", vae_tiling="True", taesd="True", guidance_scale="3")
    wanted.update(updates="2", max_sequence_length="64")
    assert {k: rows[k] for k in wanted} == wanted
    assert r"a\|b; two lines" in rows["prompts"]
    for text in (", 2 updates.", "guidance_scale=3,", "enable_tiling()", "torch.float16"):
        assert text in card
    assert "max_sequence_length=64" in card and str(run.parent) not in card
    said = run_snippets(card, model)
    assert said["image"].size == (16, 16)
    flow = said["flow"]
    assert flow.max_sequence_length == 64 and flow.vae.use_tiling
    assert flow.guidance_scale == 3


@pytest.mark.parametrize("shift,negative", [(None, ""), (1, "an owl's"), (2, ""), (3, "")])
def test_the_card_draws_what_the_run_drew(
    run, call, here, model, monkeypatch, shift, negative
):
    "Its snippet for diffusers, as it stands, on the run's own times"
    shutil.copytree(run, "r")
    record = read_sealed("r/config.json", "again")
    record["config"].update(shift=shift, steps=4)
    record["flow"].update(negative_prompt=negative)
    write_sealed("r/config.json", record)
    assert call("export r given")[0] == 0
    settings = dict(guidance_scale=record["flow"]["guidance_scale"], image_size=16)
    settings["negative_prompt"] = negative
    flow = SD3Flow.from_pretrained(model, **settings, **lora_settings("given"))
    flow.load_lora("given")
    noise = flow.prior(1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        path = sample(flow, noise, flow.times(4, shift), ["a prompt"])
        own = flow.decode(path.x1).clamp(0, 1)
    drawn, stock = [], StableDiffusion3Pipeline.__call__

    def from_the_same_noise(pipe, *args, **how):
        how |= dict(latents=noise.clone(), output_type="pt")
        drawn.append(stock(pipe, *args, **how).images)
        return stock(pipe, *args, **{**how, "output_type": "pil"})

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", from_the_same_noise)
    run_snippets(Path("given/README.md").read_text(), model)
    assert (drawn[0] - own).abs().max() < 1e-4


def run_snippets(card, model):
    "Run the Python of a card, with the folders of this test: the names that it defines"
    said = {}
    for code in snippets(card):
        code = re.sub("folder = '.*'", "folder = 'given'", code)
        code = code.replace("float16", "float32")
        code = code.replace(repr(Path(model).name), repr(str(model)))
        assert str(model) in code
        exec(code, said)
    return said


def test_an_export_names_its_folder(run, call):
    status, _, err = call(f"export {run} ''")
    assert status == 2 and "where to?" in err
