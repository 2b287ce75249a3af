"Evaluations inside whole runs: sheets, rows, and what a killed run keeps of both"

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_flux import make_tiny_flux
from tiny_sd3 import make_tiny_sd3
from tiny_z_image import make_tiny_z_image
from toys import brightness

from vggflow.commands.run import run
from vggflow.common.seals import read_rows
from vggflow.judging.evaluation import draw
from vggflow.judging.image_sets import (
    draw_images,
    evaluate_sets,
    read_images,
    saved_images,
)
from vggflow.worlds.emoji_data import asset
from vggflow.worlds.emoji_networks import load_clip
from vggflow.worlds.emoji_rewards import true_utility
from vggflow.worlds.world import get_world, load_model

SMALL = dict(world="emoji", method="ReFL", lr=3e-3, batch_size=2, steps=3)
SMALL |= dict(eval_prompts=2, images_per_prompt=4, progress=False)
EVERY = dict(eval_every=1, save_every=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("VGGFLOW_CACHE", str(cache))
    torch.set_num_threads(1)


def build(name, reward, **options):
    world = get_world(name)
    return world, world.build(reward=reward, **options)


def read_sheet(file):
    return torch.tensor(np.array(Image.open(file))) / 255.0


def test_a_run_leaves_sheets_rows_and_prompts(tmp_path):
    reward = "emoji-aesthetic"
    history = run(
        updates=4, eval_every=2, save_every=2, out=tmp_path, reward=reward, **SMALL
    )
    sheets = tmp_path / "samples"
    expected = [f"{update:05d}.{end}" for update in (0, 2, 4) for end in ("png", "json")]
    names = sorted(file.name for file in sheets.iterdir())
    assert names == sorted([*expected, "prompts.json"])
    prompts = json.loads((sheets / "prompts.json").read_text())
    _, built = build("emoji", reward)
    assert prompts == [built.prompts[0], built.prompts[12]]
    for row in history.evals:
        file = sheets / f"{row['update']:05d}.json"
        means = json.loads(file.read_text())["reward"]
        assert list(means) == prompts
        assert np.mean(list(means.values())) == pytest.approx(row["reward"], abs=1e-5)

    # update 0 shows the base model, on the evaluation's noise
    first = read_sheet(sheets / "00000.png")
    assert first.shape == (2 * 64, 4 * 64, 3)
    base, _ = draw(built.flow, prompts, 4, steps=3, seed=12345, base=True)
    cells = first.unflatten(0, (2, 64)).unflatten(2, (4, 64))  # row, y, column, x, colour
    cells = cells.permute(0, 2, 4, 1, 3).flatten(0, 1)
    assert (cells - base.clamp(0, 1)).abs().max() < 1 / 250
    last = read_sheet(sheets / "00004.png")
    assert (last - first).abs().max() > 0.02


def test_sheets_of_prompts_of_ones_own_have_the_base_on_the_left(tmp_path):
    "At the cadence that is asked for, from the same noise; evaluations are of them too"
    asked = tmp_path / "mine.txt"
    asked.write_text("a fish\na cat\nan owl\n")
    out = tmp_path / "run"
    how = dict(out=out, updates=4, eval_every=4, sample_every=2, save_every=2, lr=0.01)
    run(**{**SMALL, **how, "validation_prompts": str(asked), "energy": True})
    prompts = ["a fish", "a cat", "an owl"]
    for folder in ("sheets", "samples"):
        assert json.loads((out / folder / "prompts.json").read_text()) == prompts
    sheets = [read_sheet(out / f"sheets/{update:05d}.png") for update in (0, 2, 4)]
    assert [sheet.shape for sheet in sheets] == [(3 * 64, 8 * 64, 3)] * 3
    left, right = zip(*[sheet.chunk(2, 1) for sheet in sheets])
    assert torch.equal(left[0], right[0])
    assert torch.equal(left[0], left[1]) and torch.equal(left[0], left[2])
    assert (right[2] - left[2]).abs().max() > 0.02
    # a run that goes on draws the same base, and training does not notice the prompts
    rows = read_rows(out / "metrics.jsonl")
    other = tmp_path / "other"
    run(**{**SMALL, **how, "out": other, "sample_every": 0, "updates": 2})
    how["validation_prompts"] = prompts
    run(**{**SMALL, **how, "out": other})
    for kind in ("loss", "reward"):
        again = [row[kind] for row in read_rows(other / "metrics.jsonl")]
        assert again == [row[kind] for row in rows]
    assert torch.equal(read_sheet(other / "sheets/00004.png"), sheets[2])


@pytest.mark.parametrize("make", [make_tiny_sd3, make_tiny_flux, make_tiny_z_image])
def test_they_are_encoded_before_the_text_encoders_go(tmp_path, make):
    how = dict(method="ReFL", reward="redness", batch_size=2, steps=2, updates=1)
    how |= dict(images_per_prompt=1, perceptual="none", sample_every=1, eval_every=1)
    own = dict(model=str(make(tmp_path / "model")), image_size=16, max_sequence_length=16)
    run(**how, **own, prompts=["a cat"], validation_prompts=["a dog"], out=tmp_path / "run")
    assert read_sheet(tmp_path / "run/sheets/00001.png").shape == (16, 8 * 16, 3)
    assert read_sheet(tmp_path / "run/samples/00001.png").shape == (16, 16, 3)


def test_prompts_to_be_judged_need_a_model_with_prompts():
    with pytest.raises(ValueError, match="validation_prompts need a model with prompts"):
        run(world="gaussian", validation_prompts=["a cat"], updates=1, progress=False)


def test_a_row_of_the_emoji_world():
    world, built = build("emoji", "emoji-aesthetic")
    prompts = [built.prompts[0], built.prompts[12]]
    how = dict(images_per_prompt=4, steps=3, shift=1.0, prompts=prompts)
    evaluator = world.evaluator(built, "emoji-aesthetic", **how)
    row = evaluator(built.flow)
    names = "reward reward_std perceptual_diversity clip_diversity fid fid_base fid_n fid_m"
    names += " accuracy vendors hue_spread alignment utility"
    assert set(row) >= set(names.split())
    assert row["fid_n"] == row["fid_m"] == 4
    assert all(isinstance(value, (int, float)) for value in row.values())

    images, cond = draw(built.flow, prompts, 4, steps=3, shift=1.0, seed=evaluator.seed)
    clipped = images.clamp(0, 1)
    with torch.no_grad():
        cosine = load_clip().similarity(clipped, cond).mean().item()
        utility = true_utility("emoji-aesthetic")(clipped, cond).mean().item()
    assert row["alignment"] == pytest.approx(cosine, abs=1e-4)
    assert row["utility"] == pytest.approx(utility, abs=1e-3)
    wrong = evaluator.numbers(images, cond[::-1])  # the other prompt's images
    assert wrong["alignment"] < row["alignment"] - 0.02
    assert wrong["accuracy"] < row["accuracy"]


def test_noise_and_answers_do_not_depend_on_the_batch():
    "Batches are a matter of speed"
    _, built = build("emoji", "emoji-aesthetic")
    prompts = ["a cat", "a dog", "a fox"]
    a, b = (draw(built.flow, prompts, 8, steps=2, seed=5, batch_size=n)[0] for n in (8, 24))
    assert (a - b).abs().max() < 1e-4
    assert (a - a.roll(1, 0)).abs().max() > 0.1  # teeth: images in another order


def test_a_resumed_run_keeps_its_sheets_and_writes_none_twice(tmp_path):
    def stamps(pattern="0*"):
        files = (tmp_path / "samples").glob(pattern)
        return {file.name: file.stat().st_mtime_ns for file in files}

    run(updates=2, out=tmp_path, **EVERY, **SMALL)
    before = stamps()
    run(updates=3, out=tmp_path, **EVERY, **SMALL)
    after = stamps()
    assert after.keys() - before.keys() == {"00003.png", "00003.json"}
    assert all(after[name] == stamp for name, stamp in before.items())


def test_killed_while_a_sheet_is_written(tmp_path, monkeypatch):
    "Every row has its whole sheet; the resumed run makes the missing one, the same"

    class Killed(BaseException):
        "Nothing catches it"

    replace, out = os.replace, tmp_path / "a"

    def stop(source, target):
        if str(target).endswith("00002.png"):  # written, but not in its place
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("vggflow.common.files.os.replace", stop)
        run(updates=3, out=out, **EVERY, **SMALL)
    rows = [row["update"] for row in read_rows(out / "eval.jsonl")]
    sheets = sorted(int(file.stem) for file in (out / "samples").glob("*.png"))
    assert rows == sheets == [0, 1]

    run(updates=3, out=out, **EVERY, **SMALL)
    run(updates=3, out=tmp_path / "b", **EVERY, **SMALL)
    one, two = (
        {file.name: file.read_bytes() for file in (folder / "samples").iterdir()}
        for folder in (out, tmp_path / "b")
    )
    assert len(one) == 9 and one == two  # four sheets, four rewards, the prompts
    assert read_rows(out / "eval.jsonl") == read_rows(tmp_path / "b" / "eval.jsonl")


def test_world_sd3_takes_extractors_by_name(tmp_path):
    "The emoji pipeline through the loader of the sd3 world, with a CLIP from a folder"
    prompts, model = ["a cat", "a dog"], str(asset("base"))
    world, built = build("sd3", "redness", prompts=prompts, model=model)
    how = dict(prompts=prompts, images_per_prompt=4, steps=2)
    evaluator = world.evaluator(built, clip=asset("clip"), sheets=tmp_path, **how)
    row = evaluator(built.flow, 7)
    distances = {"fid", "fid_base", "perceptual_diversity"}
    assert distances | {"clip_diversity", "alignment"} <= set(row)
    assert evaluator.batch_size == 8 and "accuracy" not in row
    assert (tmp_path / "00007.png").exists()
    with pytest.raises(ValueError, match="dreamsim"):
        world.evaluator(built, perceptual="dreamsin", **how)


@pytest.mark.parametrize(
    "settings,says",
    [
        (dict(device="cuda:7"), "is not here"),
        (dict(device="gpu"), "unknown device"),
        (dict(dtype="int"), "bfloat16, float16 or float32"),
        (dict(dtype="fp17"), "bfloat16, float16 or float32"),
    ],
)
def test_where_and_how_a_model_is_loaded(settings, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_model(**settings)
    assert "\n" not in str(caught.value)


def test_on_a_tiny_stable_diffusion(tmp_path):
    "Base and finetuned are equal before the adapter learns; alignment is that of CLIP"
    model = str(make_tiny_sd3(tmp_path / "base"))
    prompts = ["a cat", "an owl"]
    flow = load_model(model, guidance_scale=2.0, lora_rank=4)
    how = dict(n=2, steps=2, batch_size=3, progress=False, seed=1)
    draw_images(tmp_path / "f", flow, prompts, **how)
    draw_images(tmp_path / "b", flow, prompts, base=True, **how)
    finetuned, base = (saved_images(tmp_path / name) for name in "fb")
    for prompt in prompts:
        assert torch.equal(read_images(finetuned[prompt]), read_images(base[prompt]))

    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in flow.trainable_parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=noise))
    flow.save_lora(tmp_path / "lora")
    learned = load_model(model, tmp_path / "lora", guidance_scale=2.0)
    with pytest.raises(ValueError, match="another weights"):
        draw_images(tmp_path / "f", learned, prompts, **how)
    draw_images(tmp_path / "g", learned, prompts, **how)
    finetuned = saved_images(tmp_path / "g")
    moved = read_images(finetuned["a cat"]) - read_images(base["a cat"])
    assert moved.abs().max() > 0.01

    clip = load_clip()
    sets, features = dict(finetuned=finetuned, base=base), dict(perceptual=clip, clip=clip)
    out = tmp_path / "out"
    record = evaluate_sets(out, sets, dict(reward=brightness), features, progress=False)
    images = read_images([file for prompt in prompts for file in finetuned[prompt]])
    asked = [prompt for prompt in prompts for _ in range(2)]
    cosine = clip.similarity(images, asked).mean().item()
    assert record["sets"]["finetuned"]["alignment"] == pytest.approx(cosine, abs=1e-5)
