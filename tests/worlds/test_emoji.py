"The emoji world: its files, its data, its judges"

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from vggflow.common.data import data_folder
from vggflow.judging.prompts import ANIMALS, COLOURS, STYLES, all_captions, heldout
from vggflow.judging.rewards import WeightedSum, get_reward, register_reward
from vggflow.theory.flow import sample, time_grid
from vggflow.worlds.emoji import load_emoji, prompts
from vggflow.worlds.emoji_data import (
    asset,
    captions_of,
    draw_factors,
    pastel,
    render,
)
from vggflow.worlds.emoji_networks import load_clip, load_probe
from vggflow.worlds.emoji_rewards import load_reward, named_in, shown_in, utility


@pytest.fixture(scope="module")
def drawn():
    "One sample of each animal in each of three seeds, without guidance"
    flow, generator = load_emoji(), torch.Generator().manual_seed(11)
    images = []
    for _ in range(3):
        x0 = flow.prior(24, generator=generator)
        with torch.no_grad():
            x1 = sample(flow, x0, time_grid(20), prompts, base=True).x1
            images.append(flow.decode(x1).clamp(0, 1))
    return torch.cat(images), prompts * 3


def factors_of(n, seed):
    "Factors of some pictures"
    return draw_factors(n, torch.Generator().manual_seed(seed))


def copy_of(folder, *names):
    "A data folder with some of the artifacts"
    root = folder / "emoji"
    root.mkdir(parents=True)
    for name in (*names, "manifest.json"):
        source = data_folder() / "emoji" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, root / name)
    return root


def test_manifest_covers_every_file():
    root = data_folder() / "emoji"
    listed = json.loads((root / "manifest.json").read_text())["files"]
    files = [path for path in root.rglob("*") if path.is_file()]
    there = {path.relative_to(root).as_posix() for path in files}
    assert there - {"manifest.json", "samples.jpg"} == set(listed)
    assert sum(path.stat().st_size for path in files) < 25 * 2**20


ARTIFACTS = "master.npz base aesthetic hps pick probe clip dreamsim".split()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_are_whole(name):
    assert asset(name).exists()


def cut(path):
    "Change the last byte of a file"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    "harm,says", [(lambda path: path.unlink(), "is missing"), (cut, "is damaged")]
)
def test_a_harmed_file_is_named(tmp_path, monkeypatch, harm, says):
    root = copy_of(tmp_path, "aesthetic")
    harm(root / "aesthetic/config.json")
    monkeypatch.setenv("VGGFLOW_DATA", str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError)) as e:
        load_reward()
    text = str(e.value)
    assert says in text and "aesthetic/config.json" in text and "git checkout" in text
    assert "\n" not in text


def test_no_data_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("VGGFLOW_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        load_emoji()


def test_rewards_by_name():
    with pytest.raises(ValueError, match="did you mean 'emoji-aesthetic'") as e:
        load_reward("emoji-asthetic")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="registered already"):
        register_reward("redness")(lambda: None)
    x = torch.rand(3, 3, 64, 64)
    red, own = get_reward("redness"), load_reward()
    both = WeightedSum((red, 2.0), (own, 0.5, 1.0, 2.0))
    assert torch.allclose(both(x, None), 2 * red(x) + 0.25 * (own(x) - 1), atol=1e-5)


def test_render_is_reproducible_and_true():
    factors = factors_of(64, 5)
    x = render(factors)
    assert torch.equal(x, render(factors)) and x.shape == (64, 3, 64, 64)
    assert 0 <= x.min() and x.max() <= 1
    assert not torch.equal(x, render(factors_of(64, 6)))
    ground = pastel(factors.hue, factors.sat, factors.val)
    assert (x[:, :, 0, 0] - ground).abs().amax(1).median() < 0.02


def test_captions_say_nothing_false_and_leak_no_held_out_pair():
    factors = factors_of(2000, 7)
    captions = captions_of(factors, torch.Generator().manual_seed(0))
    shown, named, known = shown_in(factors), named_in(captions), set(all_captions())
    assert set(captions) <= known and (named[:, 0] == shown[:, 0]).all()
    assert ((named < 0) | (named == shown)).all()
    pairs = {
        (ANIMALS[animal], word)
        for animal, _, colour, style in named.tolist()
        for word in (COLOURS[colour] * (colour >= 0), STYLES[style] * (style >= 0))
        if word
    }
    assert len(pairs) > 200 and not any(heldout(*pair) for pair in pairs)
    told = (named >= 0).float().mean(0)
    assert (told[1:] > 0.12).all() and (told[1:] < 0.35).all() and told[0] == 1


def test_probe_reads_new_pictures():
    factors = factors_of(256, 8)
    read = load_probe().read(render(factors))
    assert (read.animal == factors.animal).float().mean() > 0.99
    assert (read.vendor == factors.vendor).float().mean() > 0.98
    turned = ((read.hue - factors.hue + 0.5) % 1 - 0.5).abs() * 360
    assert turned.mean() < 6  # degrees
    for name, error in dict(sat=0.03, scale=0.03).items():
        assert (getattr(read, name) - getattr(factors, name)).abs().mean() < error


def test_reward_learned_the_taste():
    factors = factors_of(512, 9)
    true = utility(factors.vendor, factors.hue, factors.sat)
    pair = torch.stack([load_reward()(render(factors)), true])
    ranks = pair.argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_clip_knows_animals():
    factors, clip = factors_of(96, 10), load_clip()
    x = render(factors)
    right = clip.similarity(x, [prompts[animal] for animal in factors.animal])
    wrong = clip.similarity(x, [prompts[(animal + 1) % 24] for animal in factors.animal])
    assert (right > wrong).float().mean() > 0.95


def test_samples_show_the_animal(drawn):
    animals = load_probe().read(drawn[0]).animal
    assert (animals == torch.arange(24).repeat(3)).float().mean() > 0.9


def test_reward_is_standardised_on_the_base(drawn):
    reward = load_reward()(*drawn)
    assert abs(reward.mean()) < 0.5 and 0.6 < reward.std() < 1.5


def test_reward_gradient_climbs(drawn):
    x, reward = drawn[0][:8].clone().requires_grad_(True), load_reward()
    before = reward(x, None)
    gradient = torch.autograd.grad(before.sum(), x)[0]
    size = gradient.flatten(1).std(1)[:, None, None, None]
    assert (reward(x + 0.02 * gradient / size, None) > before).all()


def in_a_fresh_process(code, folder):
    "Run code from another folder"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


def test_stock_pipeline_draws_after_import_vggflow_alone(tmp_path):
    code = (
        "import vggflow; from diffusers import StableDiffusion3Pipeline as P\n"
        f"p = P.from_pretrained(r'{asset('base')}')\n"
        "im = p('a cat', num_inference_steps=4, guidance_scale=2.).images[0]\n"
        "print('size', im.size)"
    )
    done = in_a_fresh_process(code, tmp_path)
    assert "size (64, 64)" in done.stdout, done.stderr[-500:]


def test_import_vggflow_is_light(tmp_path):
    code = (
        "import sys, vggflow; print(*('torch' in sys.modules, 'diffusers' in sys.modules))"
    )
    assert in_a_fresh_process(code, tmp_path).stdout.strip() == "False False"
