"The emoji world's three rewards: tiny real ones, with a known truth behind them"

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel

from vggflow.common.data import data_folder
from vggflow.judging.features import EMOJI as DREAMSIM_EMOJI
from vggflow.judging.features import DreamSimFeatures, EfficientNetFeatures
from vggflow.judging.prompts import ANIMALS, COLOURS, SIZES, STYLES, all_captions, caption
from vggflow.judging.rewards import get_reward
from vggflow.worlds.emoji import prompts
from vggflow.worlds.emoji_data import asset, captions_of, draw_factors, render
from vggflow.worlds.emoji_rewards import (
    UTILITIES,
    hps_utility,
    load_reward,
    named_in,
    pick_utility,
    true_utility,
)
from vggflow.worlds.responses import climbed, distances

EMOJI = {"emoji-aesthetic": "aesthetic", "emoji-hps": "hps", "emoji-pick": "pick"}
REAL = {  # the loader of the real reward, and its options
    "emoji-aesthetic": ("aesthetic", dict(file="aesthetic.safetensors")),
    "emoji-hps": ("hpsv2", {}),
    "emoji-pick": ("pickscore", {}),
}


def compared(n, seed):
    "Factors, pictures and prompts: two pictures for each of `n` prompts, true or not"
    noise, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    factors = draw_factors(2 * n, noise)
    same = torch.rand(n, generator=noise) < 0.6
    factors.animal[n:] = torch.where(same, factors.animal[:n], factors.animal[n:])
    first = SimpleNamespace(**{name: values[:n] for name, values in vars(factors).items()})
    asked = [
        true if choice.random() < 0.7 else choice.choice(all_captions())
        for true in captions_of(first, noise)
    ]
    return factors, render(factors), asked * 2


def ranks(values):
    return torch.as_tensor(values).argsort().argsort().double()


def spearman(a, b):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_knows_its_hidden_utility(name):
    factors, pictures, asked = compared(256, 20)
    reward, truth, judge = load_reward(name), UTILITIES[name], true_utility(name)
    with torch.no_grad():
        scores, utility = reward(pictures, asked), truth(factors, asked)
        judged = judge(pictures, asked)
    agreed = (scores[:256] > scores[256:]) == (utility[:256] > utility[256:])
    assert agreed.float().mean() > 0.7
    assert spearman(judged, utility) > 0.9  # the probe judges the truth on real pictures


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_ranks_pictures_of_one_prompt(name):
    "Comparisons are within a prompt, and so is this"
    factors = draw_factors(12 * 24, torch.Generator().manual_seed(25))
    factors.animal = torch.arange(24).repeat(12)
    asked = prompts * 12
    with torch.no_grad():
        scores = load_reward(name)(render(factors), asked).view(12, 24)
        utility = UTILITIES[name](factors, asked).view(12, 24)
    assert sum(spearman(*pair) for pair in zip(scores.T, utility.T)) / 24 > 0.65


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_is_a_tiny_real_one(name):
    "The loader of the real one gives the same number, up to zero and unit"
    folder = asset(EMOJI[name])
    own = json.loads((folder / "config.json").read_text())["reward"]
    CLIPModel.from_pretrained(folder)  # the folder is one of transformers
    kind, options = REAL[name]
    _, pictures, asked = compared(8, 21)
    bare = get_reward(kind, path=folder, **options)(pictures, asked)
    scores = load_reward(name)(pictures, asked)
    assert (scores - (bare - own["loc"]) / own["scale"]).abs().max() < 1e-4
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < 1.1 * 2**20 and own["pair_accuracy"] <= own["ceiling"] + 0.02


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_is_found_by_its_name(name):
    _, pictures, asked = compared(2, 26)
    assert torch.equal(
        get_reward(name)(pictures, asked), load_reward(name)(pictures, asked)
    )


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_has_an_exact_gradient(name):
    reward = copy.deepcopy(load_reward(name)).double()
    reward.parts[0].clip.set_attn_implementation("sdpa")
    _, x, asked = compared(2, 22)
    x = x.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(x, asked).sum(), x)
    noise = torch.Generator().manual_seed(0)
    step, h = torch.randn(x.shape, dtype=torch.double, generator=noise), 1e-5
    with torch.no_grad():
        ahead, behind = (reward(x + k * h * step, asked).sum() for k in (1, -1))
    slope = (ahead - behind) / (2 * h)
    assert abs((gradient * step).sum() - slope) < 1e-6 * abs(slope).clamp(min=1)


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_reward_can_be_cheated(name):
    """Gradient ascent on pixels: a reward above all real pictures', and pictures that two
    judges find further from themselves than from others of the same animal"""
    factors, pictures, _ = compared(12, 23)
    reward, real = load_reward(name), pictures[:12]
    animal = factors.animal[:12]
    asked = [prompts[number] for number in animal]
    other = draw_factors(12, torch.Generator().manual_seed(24))
    other.animal = animal
    cheated = climbed(real, reward, asked, steps=50)
    assert reward(cheated, asked).mean() > reward(real, asked).max()
    for judge in (EfficientNetFeatures(), DreamSimFeatures(DREAMSIM_EMOJI)):
        apart = distances(judge, real, render(other)).mean()
        assert distances(judge, real, cheated).mean() > apart


def test_prompts_matter_where_they_should():
    _, pictures, asked = compared(96, 24)
    pictures, asked = pictures[:96], asked[:96]
    wrong = asked[1:] + asked[:1]
    taste = load_reward("emoji-aesthetic")
    assert torch.equal(taste(pictures, asked), taste(pictures, None))
    for name in ("emoji-hps", "emoji-pick"):
        reward = load_reward(name)
        assert (reward(pictures, asked) - reward(pictures, wrong)).mean() > 0.5


def test_what_a_prompt_names():
    asked = ["a big flat cat on a blue background", "an emoji of an owl", "nothing"]
    words = zip((ANIMALS, SIZES, COLOURS, STYLES), ("cat", "big", "blue", "flat"))
    cat = [known.index(word) for known, word in words]
    owl = [ANIMALS.index("owl"), -1, -1, -1]
    assert named_in(asked).tolist() == [cat, owl, [-1] * 4]


def test_utilities_say_what_is_asked():
    numbers = dict(hue=0.6, sat=0.3, scale=1.0)
    factors = SimpleNamespace(**{name: torch.tensor([k]) for name, k in numbers.items()})
    factors.animal = factors.vendor = torch.tensor([0])
    cat, dog = ANIMALS[:2]

    def hps(*named):
        return hps_utility(factors, [caption(*named)]).item()

    def pick(*named):
        return pick_utility(factors, [caption(*named)]).item()

    assert hps(cat) - hps(dog) == pytest.approx(2)
    assert hps(cat, "big") - hps(cat, "small") == pytest.approx(1)
    assert hps(cat, "", "blue") - hps(cat, "", "red") == pytest.approx(1)
    assert pick(dog) == 0 and pick(cat, "small") == pytest.approx(pick(cat) / 2)
    assert 0 < pick(cat) == pytest.approx(pick(cat, "big", "blue"))
    with pytest.raises(ValueError, match="no utility is known for reward 'redness'"):
        true_utility("redness")


def test_manifest_lists_the_rewards():
    manifest = json.loads((data_folder() / "emoji" / "manifest.json").read_text())
    for name in EMOJI.values():
        files = ("config.json", "model.safetensors", "tokenizer.json")
        assert {f"{name}/{file}" for file in files} <= manifest["files"].keys()
        assert manifest["made"][name]["notebook"] == "nbs/emoji/scorers.ipynb"
