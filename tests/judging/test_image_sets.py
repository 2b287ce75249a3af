"An evaluation on disk: drawn once, scored once, compared"

import os

import numpy as np
import pytest
import torch
from PIL import Image
from toys import PROMPTS, Toy, all_files, block_means, brightness

from vggflow.judging.image_sets import (
    compare_sheet,
    draw_images,
    evaluate_sets,
    image_file,
    image_noise,
    read_images,
    saved_images,
    score_images,
    set_numbers,
)

HOW = dict(n=4, steps=3, batch_size=5, progress=False)
SETS = ("finetuned", "base", "base-again")


def evaluate_toy(out, flow):
    for seed, name in enumerate(SETS):
        draw_images(out / name, flow, PROMPTS, seed=seed, base=seed > 0, **HOW)
    sets = {name: saved_images(out / name) for name in SETS}
    judges = dict(reward=brightness), dict(perceptual=block_means)
    return evaluate_sets(out, sets, *judges, progress=False)


class Killed(BaseException):
    "Nothing catches it"


def kill_before(monkeypatch, ending):
    "Stop where a file of this ending is put into its place"
    replace = os.replace

    def stop(source, target):
        if str(target).endswith(ending):
            raise Killed
        replace(source, target)

    monkeypatch.setattr("vggflow.common.files.os.replace", stop)


def test_interrupted_evaluation_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    flow = Toy()
    record = evaluate_toy(tmp_path / "one", flow)
    assert sum(flow.drawn) == 36
    endings = ("00001/00002.png", "base/00000/00000.png")
    endings += ("00002.safetensors", "evaluation.json")
    for ending in endings:  # cut at each of these, in this order
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, ending)
            evaluate_toy(tmp_path / "two", Toy())
    flow = Toy()
    assert evaluate_toy(tmp_path / "two", flow) == record
    assert not flow.drawn  # everything was drawn before the last cut
    one, two = (all_files(tmp_path / name) for name in ("one", "two"))
    assert one == two and "sheet.png" in one


def test_what_a_record_holds(tmp_path):
    record = evaluate_toy(tmp_path, Toy())
    sets = record["sets"]
    assert set(sets) == {"finetuned", "base"} and "fid" not in sets["base"]
    distances = {"fid", "fid_base", "fid_n", "fid_m"}
    own = {"reward", "reward_std", "perceptual_diversity"}
    assert set(sets["finetuned"]) == own | distances
    assert [row["prompt"] for row in record["prompts"]] == PROMPTS
    mean = np.mean([row["finetuned"]["reward"] for row in record["prompts"]])
    assert mean == pytest.approx(sets["finetuned"]["reward"], abs=1e-6)
    assert record["images"] == dict.fromkeys(SETS, 12)
    assert record["fid_features"] == "perceptual"


def test_noise_is_of_the_image_alone(tmp_path):
    flow = Toy()
    draw_images(tmp_path / "a", flow, PROMPTS, seed=3, **HOW)
    draw_images(tmp_path / "b", flow, PROMPTS, seed=3, **{**HOW, "n": 6, "batch_size": 4})
    a, b = (saved_images(tmp_path / name, n=4) for name in "ab")
    for prompt in PROMPTS:
        off = (read_images(a[prompt]) - read_images(b[prompt])).abs().max()
        assert off <= 1 / 255 + 1e-6
    assert (read_images(a["a"]) - read_images(b["b"])).abs().max() > 0.1  # teeth


def test_numbers_name_the_noise():
    flow = Toy()

    def noise(prompt, *numbers):
        return image_noise(flow, prompt, *numbers)

    assert torch.equal(noise("a", 1, 2, 3), noise("b", 1, 2, 3))
    assert not torch.equal(noise("a", 1, 0, 0), noise("a", 1, 0, 1))
    assert not torch.equal(noise("a", 1, 2, 3), noise("a", 1, 3, 2))


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(seed=4), "seed"),
        (dict(steps=4), "times"),
        (dict(prompts=["a", "b", "d"]), "prompts"),
        (dict(mean=0.2), "weights"),
        (dict(base=True), "model"),
    ],
)
def test_a_folder_of_other_images_is_refused(tmp_path, change, says):
    draw_images(tmp_path, Toy(), PROMPTS, seed=3, **HOW)
    before = all_files(tmp_path)
    settings = dict(prompts=PROMPTS, seed=3) | HOW | change
    flow = Toy(settings.pop("mean", 0.0))
    with pytest.raises(ValueError, match=f"another.*{says}") as caught:
        draw_images(tmp_path, flow, **settings)
    assert "\n" not in str(caught.value) and all_files(tmp_path) == before


def test_processes_share_the_batches(tmp_path):
    "Each draws every second batch; together they leave what one leaves"

    told = []  # by the first one, which runs first here

    class Launch:
        number = 2

        def __init__(self, rank):
            self.rank, self.main = rank, rank == 0

        def share(self, function):
            if self.main:
                told.append(function())
                return told[-1]
            return told.pop(0)

    draw_images(tmp_path / "alone", Toy(), PROMPTS, **HOW)
    flows = [Toy(), Toy()]
    for rank, flow in enumerate(flows):
        draw_images(tmp_path / "both", flow, PROMPTS, processes=Launch(rank), **HOW)
    assert [flow.drawn for flow in flows] == [[5, 2], [5]]
    alone, both = (saved_images(tmp_path / name) for name in ("alone", "both"))
    for prompt in PROMPTS:
        off = (read_images(alone[prompt]) - read_images(both[prompt])).abs().max()
        assert off <= 1 / 255 + 1e-6


def test_scores_are_kept_for_the_same_reward_and_images_only(tmp_path):
    draw_images(tmp_path / "images", Toy(), PROMPTS, **HOW)
    files, scored = saved_images(tmp_path / "images"), []

    class Net(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([weight]))

        def forward(self, images, prompts):
            scored.append(len(images))
            return self.weight * images.mean((1, 2, 3))

    def score(weight):
        rewards = dict(reward=Net(weight))
        parts = score_images(tmp_path / "scores", files, rewards, {}, progress=False)
        return torch.cat([part["reward"] for part in parts])

    first = score(1.0)
    assert sum(scored) == 12
    assert torch.equal(score(1.0), first) and sum(scored) == 12
    assert torch.allclose(score(2.0), 2 * first) and sum(scored) == 24
    assert torch.equal(score(1.0), first) and sum(scored) == 36
    Image.new("RGB", (8, 8)).save(image_file(tmp_path / "images", 1, 2))
    changed = score(1.0)
    assert sum(scored) == 40 and changed[6] == 0
    assert torch.equal(changed[:6], first[:6])


def test_a_plain_reward_gets_its_images_on_the_device(tmp_path):
    seen = []

    def reward(images, prompts):
        seen.append(images.device.type)
        return torch.zeros(len(images))

    draw_images(tmp_path / "images", Toy(), PROMPTS, **HOW)
    sets = dict(finetuned=saved_images(tmp_path / "images"))
    how = dict(progress=False, device="meta")
    evaluate_sets(tmp_path / "out", sets, dict(reward=reward), {}, **how)
    assert seen == ["meta"] * 3


def test_what_is_damaged_is_drawn_again_or_named(tmp_path):
    flow, folder = Toy(), tmp_path / "images"
    draw_images(folder, flow, PROMPTS, **HOW)
    good = all_files(folder)
    file = image_file(folder, 1, 2)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="00002.png is no whole image"):
        read_images(saved_images(folder)["b"])
    draw_images(folder, flow, PROMPTS, **HOW)
    assert all_files(folder) == good
    for text in ('{"prompts"', "[]"):
        (folder / "drawn.json").write_text(text)
        with pytest.raises(ValueError, match="drawn.json is damaged.*remove") as caught:
            draw_images(folder, flow, PROMPTS, **HOW)
        assert "\n" not in str(caught.value)


def test_a_prompt_stands_once(tmp_path):
    with pytest.raises(ValueError, match="'a' .*stands there twice"):
        draw_images(tmp_path / "images", Toy(), ["a", "b", "a"], **HOW)
    assert not (tmp_path / "images").exists()


def plain_set(folder, n=2, size=8, prompts=("a", "b")):
    "A set of images of one colour each"
    for row in range(len(prompts)):
        for number in range(n):
            file = image_file(folder, row, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, 8), (number, row, 0)).save(file)
    return saved_images(folder, prompts)


@pytest.mark.parametrize(
    "base,says",
    [
        (dict(size=9), "9 x 8 pixels"),
        (dict(n=1), "need 2 of each"),
        (dict(prompts=("a",)), "of 1 prompts"),
        (dict(prompts=("a", "c")), "prompt 'c'"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused_before_scoring(tmp_path, base, says):
    def never(images, prompts):
        raise AssertionError("scored")

    sets = dict(finetuned=plain_set(tmp_path / "f"), base=plain_set(tmp_path / "b", **base))
    judges = dict(reward=never), dict(perceptual=block_means)
    with pytest.raises(ValueError, match=says) as caught:
        evaluate_sets(tmp_path / "out", sets, *judges, progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="stands there twice"):
        plain_set(tmp_path / "twice", prompts=("a", "a"))


def test_saved_images_of_others(tmp_path):
    for row, prompt in enumerate(("an owl", "a cat")):
        (tmp_path / prompt).mkdir()
        for number in range(3 + row):
            picture = Image.new("RGB", (8, 8), (40 * row, number, 0))
            picture.save(tmp_path / prompt / f"{number}.jpg")
    found = saved_images(tmp_path)
    assert list(found) == ["a cat", "an owl"]
    assert {len(files) for files in found.values()} == {3}
    assert list(saved_images(tmp_path, ["x", "y"], 2)) == ["x", "y"]
    (tmp_path / "prompts.json").write_text('["cat","owl"]')
    assert list(saved_images(tmp_path)) == ["cat", "owl"]
    refused = {"give one prompt for each": dict(prompts=["x"]), "has 3": dict(n=4)}
    for says, settings in refused.items():
        with pytest.raises(ValueError, match=says):
            saved_images(tmp_path, **settings)
    Image.new("RGB", (9, 8)).save(tmp_path / "a cat" / "0.jpg")
    with pytest.raises(ValueError, match="different sizes"):
        read_images(saved_images(tmp_path)["cat"])
    for bad in (tmp_path / "none", tmp_path / "a cat"):
        with pytest.raises(OSError, match="no folder of images|no images in"):
            saved_images(bad)


def test_numbers_of_one_image_a_prompt():
    "Diversity and distances need two; the rest does not"
    scores = [
        dict(
            reward=torch.tensor([float(k)]),
            alignment=torch.tensor([0.1]),
            **{"feature.perceptual": torch.rand(1, 4)},
        )
        for k in range(3)
    ]
    assert set_numbers(scores, scores, scores) == dict(
        reward=1.0,
        reward_std=pytest.approx((2 / 3) ** 0.5),
        alignment=pytest.approx(0.1),
        alignment_std=pytest.approx(0, abs=1e-6),
    )


def test_a_sheet_shows_the_sets_side_by_side(tmp_path):
    one = plain_set(tmp_path / "one", n=5)
    two = plain_set(tmp_path / "two", n=5)
    sheet = compare_sheet(dict(one=one, two=two), rows=1)
    assert sheet.shape == (8, 4 * 8 + 8 + 4 * 8, 3)
    assert (sheet[:, 32:40] == 255).all()
    assert sheet[0, 24].tolist() == sheet[0, 64].tolist() == [3, 0, 0]


GREY = 180  # of 255, in every mode below


@pytest.mark.parametrize(
    "mode,value,ending",
    [
        ("L", GREY, "png"),
        ("LA", (GREY, 255), "png"),
        ("RGB", (GREY,) * 3, "bmp"),
        ("RGBA", (GREY, GREY, GREY, 255), "png"),
        ("RGBA", (105, 105, 105, 128), "webp"),  # half seen, on white: 180
        ("RGBa", None, "tif"),
        ("I;16", GREY * 257, "png"),
        ("I", GREY * 257, "tif"),
        ("I;16", GREY * 257, "tiff"),
        ("P", GREY, "png"),
        ("CMYK", (0, 0, 0, 255 - GREY), "jpg"),
    ],
)
def test_a_picture_keeps_its_brightness(tmp_path, mode, value, ending):
    "Of any mode and depth, as PIL and a viewer show it"
    if mode == "RGBa":
        picture = Image.new("RGBA", (8, 8), (GREY,) * 3 + (255,))
    elif mode == "P":
        picture = Image.new("L", (8, 8), value).convert("P")
    else:
        picture = Image.new(mode, (8, 8), value)
    file = tmp_path / f"a.{ending}"
    picture.save(file, **({"lossless": True} if ending == "webp" else {}))
    shown = read_images([file]) * 255
    assert shown.shape == (1, 3, 8, 8)
    assert (shown - GREY).abs().max() <= 1.01


def test_a_16_bit_ramp_is_a_ramp(tmp_path):
    "Not a white picture with a black edge"
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    shown = read_images([tmp_path / "a.png"])[0, 0]
    assert (shown - torch.linspace(0, 1, 64).view(8, 8)).abs().max() < 0.003


def test_a_turned_picture_stands_upright(tmp_path):
    picture = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (4, 1)) * 30)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=turned)
    shown = read_images([tmp_path / "a.png"])[0, 0] * 255
    assert shown.shape == (8, 4) and shown[:, 0].tolist() == [30.0 * k for k in range(8)]


@pytest.mark.parametrize(
    "array,says",
    [
        (np.full((4, 4), 0.5, np.float32), "its numbers have no range"),
        (np.full((4, 4), 70000, np.int32), "more than 16 bits"),
    ],
)
def test_pictures_without_a_known_white_are_refused(tmp_path, array, says):
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=says) as caught:
        read_images([tmp_path / "a.tif"])
    assert "a.tif" in str(caught.value) and "\n" not in str(caught.value)


def test_folders_and_files_stand_in_the_order_people_count(tmp_path):
    for folder in range(11):
        for image in range(11):
            file = tmp_path / f"prompt{folder}" / f"{image}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("L", (2, 2), 20 * folder + image).save(file)
    found = saved_images(tmp_path)
    assert list(found) == [f"prompt{folder}" for folder in range(11)]
    for folder, files in enumerate(found.values()):
        levels = (read_images(files)[:, 0, 0, 0] * 255).round().tolist()
        assert levels == [20.0 * folder + image for image in range(11)]


@pytest.mark.parametrize("part", ["velocity", "decode"])
def test_images_that_are_not_finite_are_named_and_not_written(tmp_path, part):
    "No black picture"

    class Broken(Toy):
        pass

    def broken(self, x, *more):
        return getattr(Toy, part)(self, x, *more) * float("nan")

    setattr(Broken, part, broken)
    says = dict(velocity="velocity is not finite", decode="decoder gives images")[part]
    with pytest.raises(ValueError, match=f"{says}.*float32") as caught:
        draw_images(tmp_path / "images", Broken(), PROMPTS, **HOW)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.png"))
