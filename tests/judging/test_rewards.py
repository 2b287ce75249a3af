"Rewards as text, plug-ins, and the trial of a reward"

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from tiny_rewards import PROMPTS

from vggflow.common.trial import check_reward
from vggflow.judging.clip_rewards import AestheticReward, ClipReward, PickScoreReward
from vggflow.judging.rewards import (
    MAKERS,
    REWARDS,
    WeightedSum,
    get_reward,
    parse_reward,
    register_reward,
    reward_identity,
    with_paths,
)


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


def assert_close(a, b, tolerance=1e-6):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, (a, b)


def test_weighted_sums_from_text(clip_folder, pictures):
    x = pictures[1]
    reward = get_reward(f"clip@{clip_folder}=0.5, aesthetic@{clip_folder},redness=-2")
    cosine = ClipReward.from_pretrained(clip_folder)(x, PROMPTS)
    score = AestheticReward.from_pretrained(clip_folder)(x)
    redness = get_reward("redness")(x)
    assert_close(reward(x, PROMPTS), 0.5 * cosine + score - 2 * redness)
    assert reward.__qualname__.startswith("clip@") and len(list(reward.parameters())) > 50
    assert_close(get_reward("redness=2")(x), 2 * redness)


def test_text_is_read_part_by_part(clip_folder):
    terms = [tuple(term) for term in parse_reward("a@/x y/z#abc=2,m:f")]
    assert terms == [("a", 2.0, "/x y/z", "abc"), ("m:f", 1.0, None, None)]
    for bad in ("", "a,,b", "clip=x", "clip=nan", "=2", "@/x"):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            get_reward(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="takes no path"):
        get_reward("redness@/somewhere")
    with pytest.raises(ValueError, match="at once"):
        get_reward("redness,clip", path=clip_folder)


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.delitem(REWARDS, "mine", raising=False)
    register_reward("mine")(brightness)
    register_reward("mine")(brightness)  # the same again, as by a module that is reloaded
    with pytest.raises(ValueError, match="registered already"):
        register_reward("mine")(lambda: None)
    monkeypatch.delitem(REWARDS, "mine")


def test_shipped_names_import_their_module_when_asked_for(monkeypatch, clip_folder):
    "As in a process that has imported no reward yet"
    module = "vggflow.judging.clip_rewards"
    assert MAKERS["pickscore"] == module
    monkeypatch.setattr("vggflow.judging.rewards.REWARDS", {})
    kept = sys.modules.pop(module)
    try:
        reward = get_reward("pickscore", path=clip_folder)
        assert type(reward).__name__ == "PickScoreReward"
    finally:
        sys.modules[module] = kept


MINE = """
import torch

def dark(images, prompts=None):
    return -images.mean((1, 2, 3))

class Net(torch.nn.Module):
    def __init__(self, path="none"):
        super().__init__()
        self.path = path

    def forward(self, images, prompts):
        return images.amax((1, 2, 3))

net = Net()

def make(path="default"):
    return Net(path)
"""


def test_plugins(tmp_path, monkeypatch, pictures):
    x = pictures[1]
    (tmp_path / "mine.py").write_text(MINE)
    at = f"{tmp_path}/mine.py"
    assert_close(get_reward(f"{at}:dark")(x), -brightness(x))
    assert get_reward(f"{at}:Net").path == "none"
    assert get_reward(f"{at}:make@/there").path == "/there"
    assert get_reward(f"{at}:net")(x, PROMPTS).shape == (3,)
    monkeypatch.syspath_prepend(tmp_path)
    assert_close(get_reward("mine:dark=3")(x), -3 * brightness(x))


def test_plugins_of_a_package_and_what_cannot_be_imported(tmp_path, monkeypatch, pictures):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1/0")
    monkeypatch.syspath_prepend(tmp_path)
    asked = []

    def entry_points(group):
        asked.append(group)
        return [EntryPoint("night", "mine:dark", group)]

    monkeypatch.setattr("vggflow.judging.rewards.entry_points", entry_points)
    assert_close(get_reward("night")(pictures[1]), -brightness(pictures[1]))
    assert asked == ["vggflow.rewards"]
    for bad, says in [
        (f"{tmp_path}/mine.py:light", "light"),
        (f"{tmp_path}/broken.py:f", "division by zero"),
        (f"{tmp_path}/none.py:f", "no file"),
        ("nomodule:f", "nomodule"),
        ("nigh", "did you mean 'night'"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            get_reward(bad)
        assert "\n" not in str(caught.value)


def test_a_module_in_the_working_directory(tmp_path, monkeypatch, pictures):
    text = "def dark(images, prompts=None): return -images.mean((1, 2, 3))\n"
    (tmp_path / "beside_me.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr("sys.path", elsewhere)
    dark = get_reward("beside_me:dark")
    assert_close(dark(pictures[1]), -brightness(pictures[1]))
    with pytest.raises(ValueError, match="'no_such_module'"):
        get_reward("no_such_module:dark")


WRONG_TERMS = """
def scalar(images, prompts=None): return images.mean()
def number(images, prompts=None): return 1.0
def column(images, prompts=None): return images.mean((1, 2, 3))[:, None]
"""


@pytest.mark.parametrize(
    "name,says",
    [("scalar", r"shape \(\)"), ("number", "a float"), ("column", r"shape \(3, 1\)")],
)
def test_every_term_of_a_sum_gives_one_number_per_image(tmp_path, pictures, name, says):
    (tmp_path / "mine.py").write_text(WRONG_TERMS)
    reward = get_reward(f"redness=1,{tmp_path}/mine.py:{name}=.5")
    says = f"'{name}' of a sum returned {says} for 3 images"
    with pytest.raises(ValueError, match=says):
        reward(pictures[1], PROMPTS)


def test_a_sum_needs_a_term():
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum()


def test_a_sum_shifts_and_scales_its_terms(pictures):
    x = pictures[1]
    total = WeightedSum((brightness, 2.0, 0.5, 0.1), (brightness, -1.0))(x)
    assert_close(total, 2 * (brightness(x) - 0.5) / 0.1 - brightness(x), 1e-5)


def test_identity_of_a_reward_is_its_text_and_its_source(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("def a(images, prompts=None): return images.mean((1, 2, 3))\n")
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    whole = f"{file}:a=0.5, clip@{tmp_path}/clip#v1=2"
    identity = reward_identity(whole)
    assert identity == reward_identity("mine.py:a=.5,clip@clip#v1=2.0")
    assert identity["reward"] == "mine.py:a=0.5,clip@clip#v1=2.0"
    assert reward_identity("redness") == dict(reward="redness=1.0")
    file.write_text(file.read_text() + "#\n")
    assert reward_identity(whole)["sources"] != identity["sources"]


def test_files_and_folders_of_a_text_are_changed_and_nothing_else():
    text = "mine.py:a=0.5, clip@clip#v1=2,m:f,p@openai/x"
    changed = with_paths(text, lambda path: f"/x/{path}")
    assert changed == "/x/mine.py:a=0.5,clip@/x/clip#v1=2,m:f,p@/x/openai/x"


@pytest.mark.parametrize(
    "reward,says",
    [
        (lambda x, p: x.mean(), "shape"),
        (lambda x, p: x.mean((1, 2)), "shape"),
        (lambda x, p: x.mean((1, 2, 3)).tolist(), "list"),
        (lambda x, p: x.mean((1, 2, 3)) * float("nan"), "finite"),
        (lambda x, p: (255 * x).round().mean((1, 2, 3)), "no gradient"),
        (lambda x, p: x.detach().mean((1, 2, 3)), "no gradient"),
        (torch.no_grad()(lambda x, p: x.mean((1, 2, 3))), "no gradient"),
        (lambda x, p: x.mean((1, 2, 3)).long(), "floats"),
        (lambda x, p: x.numpy(), "failed"),
        (lambda x: x, "failed"),
        (lambda x, p: (x - x.detach()).square().sum((1, 2, 3)).sqrt(), "not finite"),
    ],
)
def test_check_reward_finds(reward, says):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad(), pytest.raises(ValueError, match=says) as caught:
        check_reward(reward, name="mine")
    assert "'mine'" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(torch.rand(3), expected)  # no global noise is drawn


def test_check_reward_notes(clip_folder):
    plain = ["the prompts do not matter"]
    assert check_reward(PickScoreReward.from_pretrained(clip_folder)) == []
    assert check_reward(AestheticReward.from_pretrained(clip_folder)) == plain
    assert check_reward(brightness, torch.rand(3, 3, 8, 8), ["a", "b", "c"]) == plain
    crowded = check_reward(lambda x, p: brightness(x) / len(x))
    assert "depends on the others" in crowded[-1]
    assert check_reward(lambda x, p: brightness(x.double()))[0] == "computed in float64"
    one_dark = torch.tensor([1.0, 0.0])
    faint = check_reward(lambda x, p: brightness(x) * one_dark[: len(x)])
    assert "one of the images has a zero gradient" in faint
