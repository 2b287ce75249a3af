"Evaluators: what is drawn, by whom, and what a row holds"

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toys import PROMPTS, Toy, block_means, brightness

from vggflow.judging.evaluation import Evaluator, draw, evaluate
from vggflow.judging.metrics import diversity, frechet_distance
from vggflow.judging.sheets import sample_sheet, write_sheet
from vggflow.theory.flow import GaussianFlow, sample


def make_evaluator(flow, prompts=PROMPTS, n=4, steps=3, **settings):
    features = dict(perceptual=block_means)
    settings = dict(features=features, cache=False) | settings
    return Evaluator(flow, brightness, prompts, n, steps, **settings)


def test_images_are_drawn_prompt_after_prompt_from_one_generator():
    "Against the sampler itself, on noise drawn batch after batch"
    flow = Toy()
    images, cond = draw(flow, PROMPTS, 2, steps=3, seed=5, batch_size=4)
    assert cond == ["a", "a", "b", "b", "c", "c"]
    generator = torch.Generator().manual_seed(5)
    x0 = torch.cat([flow.prior(n, generator=generator) for n in (4, 2)])
    with torch.no_grad():
        want = flow.decode(sample(flow, x0, flow.times(3, None)).x[-1])
        other = flow.decode(sample(flow, x0.flip(0), flow.times(3, None)).x[-1])
    assert (images - want).abs().max() < 1e-5
    assert (images - other).abs().max() > 0.05  # teeth: another order of the noise


def test_batches_are_a_matter_of_speed():
    "The toy's noise does not depend on the batch: one generator for all"
    flow = Toy()
    a, b = (draw(flow, PROMPTS, 8, 2, seed=5, batch_size=n)[0] for n in (8, 24))
    assert (a - b).abs().max() < 1e-4
    other = draw(flow, PROMPTS, 8, 2, seed=6, batch_size=8)[0]
    assert (a - other).abs().max() > 0.1  # teeth: other noise


class Launch:
    "What `Processes` of a launch answer; gathering finds what all processes drew"

    def __init__(self, number, rank, found):
        self.number, self.rank, self.main = number, rank, rank == 0
        self.found, self.rounds = found, 0

    def gather(self, images):
        own = self.found.setdefault(self.rounds, {})
        own[self.rank] = images
        self.rounds += 1
        return torch.cat([own[rank] for rank in sorted(own)])


@pytest.mark.parametrize("n", [5, 7])
def test_processes_draw_together_what_one_draws_alone(n):
    "Batches of three for two processes; the last round may have one for both"
    flow, found = Toy(), {}
    alone, _ = draw(flow, ["a"], n, steps=3, batch_size=3)
    one, _ = draw(flow, ["a"], n, 3, batch_size=3, processes=Launch(2, 1, found))
    assert one is None
    both, _ = draw(flow, ["a"], n, 3, batch_size=3, processes=Launch(2, 0, found))
    assert both.shape == alone.shape and (both - alone).abs().max() < 1e-5


def test_a_row_is_made_of_its_definitions():
    flow = Toy()
    evaluator = make_evaluator(flow)
    row = evaluator(flow)
    images, _ = draw(flow, PROMPTS, 4, 3, seed=evaluator.seed)
    scores, features = brightness(images), block_means(images)
    assert row["reward"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert row["reward_std"] == pytest.approx(scores.std().item(), rel=1e-3)
    base, again = (
        block_means(draw(flow, PROMPTS, 4, 3, seed=evaluator.seed + k, base=True)[0])
        for k in (1, 2)
    )
    rows = [slice(4 * k, 4 * k + 4) for k in range(3)]
    fid = np.mean([frechet_distance(features[r], base[r]) for r in rows])
    floor = np.mean([frechet_distance(again[r], base[r]) for r in rows])
    spread = np.mean([diversity(features[r]) for r in rows])
    assert row["fid"] == pytest.approx(fid, rel=1e-3)
    assert row["fid_base"] == pytest.approx(floor, rel=1e-3)
    assert row["perceptual_diversity"] == pytest.approx(spread, rel=1e-3)
    assert row["fid_n"] == row["fid_m"] == 4 and abs(fid / floor - 1) > 0.01  # teeth


def test_the_top_level_call_is_an_evaluator(clip_folder):
    flow = Toy()
    settings = dict(images_per_prompt=2, steps=2, perceptual="none", cache=False)
    row = evaluate(flow, "redness", PROMPTS, clip=str(clip_folder), **settings)
    assert set(row) == {"reward", "reward_std", "clip_diversity", "alignment"}
    images, _ = draw(flow, PROMPTS, 2, 2, seed=12345)
    redness = images[:, 0].mean() - images[:, 1:].mean()
    assert row["reward"] == pytest.approx(redness.item(), abs=1e-5)


def test_without_prompts_states_are_judged_as_they_are():
    "States of an analytic world are no images: they are not clipped to [0, 1]"
    flow = GaussianFlow(torch.zeros(2), torch.full((2,), 0.5))
    row = evaluate(flow, lambda x, p: x[:, 0], images_per_prompt=512, steps=20)
    assert abs(row["reward"]) < 0.1 and row["reward_std"] > 0.4


def test_large_images_are_scaled_down_and_few_are_enough(tmp_path):
    sheet = sample_sheet(torch.rand(6, 3, 1024, 512), 2)
    assert sheet.shape == (512, 3 * 128, 3)  # 3 of each, longest side 256
    flat = sample_sheet(torch.full((2, 3, 600, 600), 0.4), 1)
    assert flat.shape == (256, 512, 3) and (flat == 102).all()
    write_sheet(tmp_path, 12345, torch.rand(2, 3, 8, 8), ["é"], torch.zeros(2))
    prompts = json.loads((tmp_path / "prompts.json").read_text(encoding="utf8"))
    assert prompts == ["é"] and (tmp_path / "12345.png").exists()


def test_a_sheet_shows_the_images_that_were_judged(tmp_path):
    flow = Toy()
    evaluator = make_evaluator(flow, sheets=tmp_path)
    row = evaluator(flow, 7)
    images, _ = draw(flow, PROMPTS, 4, 3, seed=evaluator.seed)
    sheet = np.asarray(Image.open(tmp_path / "00007.png")).astype(float) / 255
    assert sheet.shape == (3 * 8, 4 * 8, 3)
    shown = torch.tensor(sheet[8:16, 16:24]).permute(2, 0, 1)
    assert (shown - images[6].clamp(0, 1)).abs().max() < 1 / 250
    means = json.loads((tmp_path / "00007.json").read_text())["reward"]
    assert list(means) == PROMPTS
    assert np.mean(list(means.values())) == pytest.approx(row["reward"], abs=1e-5)


def test_features_of_the_base_model_are_kept(tmp_path):
    flow = Toy()
    first = make_evaluator(flow, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    flow.drawn.clear()
    again = make_evaluator(flow, cache=tmp_path)
    assert flow.drawn == [3]  # the fingerprint alone
    assert torch.equal(first.base["two"], again.base["two"])
    for other in (dict(n=5), dict(steps=2), dict(seed=1), dict(prompts=["a", "b", "d"])):
        make_evaluator(flow, cache=tmp_path, **other)
    make_evaluator(Toy(0.2), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match="VGGFLOW_CACHE"):
        warned = make_evaluator(Toy(), cache=tmp_path / "file" / "cache")
    written = make_evaluator(Toy(), cache=tmp_path / "ok")
    assert torch.equal(warned.base["one"], written.base["one"])


def test_no_more_is_decoded_at_once_than_the_batch():
    flow = Toy()
    make_evaluator(flow, list("abcdefg"), 2, 2, batch_size=4)
    assert max(flow.drawn) == 4


def test_a_plain_reward_gets_its_images_on_the_device():
    "It may hold a network that no one sees"
    seen = []

    class Far(Toy):
        device = "meta"

    def reward(images, prompts):
        seen.append(images.device.type)
        return torch.zeros(len(images))

    evaluator = Evaluator(Far(), reward, PROMPTS, 2, 2, cache=False)
    evaluator.numbers(torch.rand(6, 3, 8, 8), [p for p in PROMPTS for _ in "ab"])
    assert seen == ["meta"]


def test_a_row_of_one_image_a_prompt():
    "Diversity and distances need two; the rest does not"
    flow = Toy()
    row = make_evaluator(flow, PROMPTS[:1], 1)(flow)
    assert row == dict(reward=pytest.approx(0.5, abs=0.1), reward_std=0.0)
    assert flow.drawn == [1]


def test_further_numbers_are_functions_of_images_and_prompts():
    flow = Toy()

    def first_prompts(images, cond):
        return dict(first=sum(prompt == "a" for prompt in cond), images=len(images))

    row = make_evaluator(flow, more=[first_prompts])(flow)
    assert (row["first"], row["images"]) == (4, 12)
