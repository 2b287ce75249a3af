"From names to a flow, a reward and prompts, and what a world does with them"

from types import SimpleNamespace

import pytest
import torch
from tiny_flows import close

from vggflow.theory.flow import FlowModel, sample
from vggflow.worlds.analytic import AnalyticEvaluator
from vggflow.worlds.emoji import ProbeReport, utility_report
from vggflow.worlds.sd3 import SD3Flow
from vggflow.worlds.world import (
    WORLDS,
    World,
    flow_recipe,
    get_world,
    load_flow,
    load_model,
)

MINE = """
import torch
from vggflow.theory.flow import GaussianFlow
from vggflow.worlds.world import Built, World

class Mine(GaussianFlow):
    def __init__(self, std=0.3):
        super().__init__([0., 1.], std)

def make_flow(std=0.3):
    return GaussianFlow([0., 1.], std)

def right(x, prompts=None):
    return x[:, 0]

class Plane(World):
    name, default_reward = 'plane', 'right'
    def make(self, reward, prompts, **options):
        return Built(Mine(**options), right, None)
"""


@pytest.fixture
def mine(tmp_path):
    "A user's file"
    (tmp_path / "my.py").write_text(MINE)
    return tmp_path / "my.py"


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_knows_its_name(name):
    world = get_world(name, "a/model" if name == "sd3" else "")
    assert world.name == name and world.default_reward and isinstance(world, World)


def test_the_world_that_is_meant():
    assert get_world().name == get_world(None).name == "emoji"
    assert get_world("", "a/model").name == "sd3"
    with pytest.raises(ValueError, match="no world 'gausian'; did you mean 'gaussian'"):
        get_world("gausian")
    says = "model='m' goes with the world 'sd3', not with 'emoji': leave one of the two"
    with pytest.raises(ValueError, match=says):
        get_world("emoji", "m")


def test_options_are_refused_where_they_mean_nothing():
    world = get_world("gaussian")
    with pytest.raises(ValueError, match="option of the world 'gaussian' called 'lora"):
        world.check_options(dict(lora_rank=4))
    with pytest.raises(ValueError, match="did you mean 'updates'"):
        world.check_options(dict(updatess=4), known=("updates",))
    assert get_world().check_options(dict(lora_rnak=4)) == dict(lora_rnak=4)
    assert {"lora_rank", "device", "taesd", "prompts", "model"} <= get_world().options()


def test_analytic_worlds_build_the_same_from_one_seed():
    one, other = (get_world("mixture").build("quadratic", seed=3) for _ in range(2))
    x0 = one.flow.prior(8, generator=torch.Generator().manual_seed(0))
    ends = [sample(built.flow, x0, built.flow.times(5)).x1 for built in (one, other)]
    assert torch.equal(*ends) and torch.equal(one.reward(ends[0]), other.reward(ends[1]))
    with pytest.raises(ValueError, match="reward of an analytic world 'quadratik'"):
        get_world("mixture").build("quadratik")


def test_an_analytic_evaluation_knows_the_optimum():
    world = get_world("gaussian")
    built = world.build("quadratic")
    how = dict(beta=2.0, steps=8, shift=3.0, images_per_prompt=4, prompts=None)
    evaluator = world.evaluator(built, **how)
    assert isinstance(evaluator, AnalyticEvaluator) and evaluator.lam == 0.5
    numbers = evaluator(built.flow)
    assert numbers["gap_closed"] == 0 and numbers["cost"] == pytest.approx(
        -numbers["reward"], abs=1e-5
    )


def test_where_a_process_puts_its_model():
    one = SimpleNamespace(number=1, device="cuda:0")
    two = SimpleNamespace(number=2, device="cuda:1", main=False)
    exact = SimpleNamespace(weights_dtype="float32")
    plain = SimpleNamespace(weights_dtype=None)
    sd3, emoji, gaussian = get_world("sd3"), get_world(), get_world("gaussian")
    there = dict(device="cuda:1", dtype="float32", text_encoders=False)
    assert sd3.place(two, exact) == there
    assert sd3.place(one, plain) == gaussian.place(two, exact) == {}
    assert emoji.place(two, exact) == dict(device="cuda:1")


def test_sd3_names_what_it_needs(tiny):
    world = get_world("sd3")
    with pytest.raises(ValueError, match="needs model=, a folder or a hub id"):
        world.build("redness", prompts=["a cat"])
    with pytest.raises(ValueError, match="needs prompts=: a list of strings"):
        world.build("redness", model=str(tiny["t5"]))


def test_sd3_is_built_and_its_encoders_leave(tiny):
    world = get_world("", str(tiny["t5"]))
    how = dict(model=str(tiny["t5"]), max_sequence_length=8)
    built = world.build("redness", prompts=["a cat", "two owl"], **how)
    assert isinstance(built.flow, SD3Flow) and built.flow.text_batch == 1
    world.prepare(built)
    assert built.flow.pipe.text_encoder is None
    assert len(built.flow.encode([*built.prompts, ""])[0]) == 3


# ---- load_flow and its recipe


@pytest.mark.parametrize(
    "name,settings",
    [
        ("gaussian", dict(mean=[0.5, -0.3], std=0.2)),
        ("mixture", {}),
        ("emoji", dict(lora_rank=4, guidance_scale=2.0)),
    ],
)
def test_a_flow_is_made_again_from_its_recipe(name, settings):
    flow = load_flow(name, **settings)
    again = load_flow(**flow.recipe)
    assert flow.recipe == again.recipe == dict(name=name, **settings)
    x0 = flow.prior(2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        assert close(again.base_velocity(x0, t), flow.base_velocity(x0, t))


def test_a_recipe_of_a_folder(tiny, monkeypatch):
    "Its whole path; no token, no device, no place of encodings; guidance as it is now"
    monkeypatch.chdir(tiny["root"])
    place = dict(token="secret", device="cpu", embeddings="e")
    flow = load_flow("./t5", lora_rank=4, dtype=torch.float32, **place)
    known = dict(name=str(tiny["root"] / "t5"), lora_rank=4, dtype="float32")
    assert flow.recipe == known
    flow.guidance_scale = 3.0
    assert flow.recipe == dict(known, guidance_scale=3.0)
    direct = SD3Flow.from_pretrained("t5", lora_targets=("attn.to_q",))
    assert direct.recipe == dict(name=known["name"], lora_targets=["attn.to_q"])
    assert flow_recipe("emoji", dict(quantization_config=object())) == dict(name="emoji")


def test_an_unknown_flow_is_named():
    with pytest.raises(ValueError, match="no flow 'emojy'; did you mean 'emoji'"):
        load_flow("emojy")
    with pytest.raises(ValueError, match="no such folder"):
        load_flow("no/such/folder")
    with pytest.raises(ValueError, match="setting of the flow 'gaussian' called 'stdd'"):
        load_flow("gaussian", stdd=0.3)


# ---- models and worlds of one's own


@pytest.mark.parametrize("what", ["Mine", "make_flow"])
def test_a_model_by_its_import_path(mine, what):
    "A class or a function, called with the settings that are left"
    path = f"{mine}:{what}"
    world = get_world("", path)
    built = world.build(f"{mine}:right", model=path, std=0.5)
    assert isinstance(built.flow, FlowModel) and built.flow.std[0] == 0.5
    assert built.flow.recipe == dict(name=path, std=0.5) and world.name == "model"
    assert load_flow(**built.flow.recipe).std[0] == 0.5
    numbers = world.evaluator(built, beta=2.0, steps=4, clip="")(built.flow, 3)
    assert numbers["cost"] == pytest.approx(-numbers["reward"], abs=1e-5)
    with pytest.raises(ValueError, match="needs reward="):
        world.build(model=path)


def test_a_world_by_its_import_path(mine):
    world = get_world(f"{mine}:Plane")
    assert world.name == "plane" and world.build(std=0.4).flow.std[0] == 0.4


def test_a_wrong_import_path_names_file_and_name(mine):
    with pytest.raises(ValueError, match="my.py has no 'make_flwo'.*make_flow"):
        load_flow(f"{mine}:make_flwo")
    with pytest.raises(ValueError, match="there is no file .*your.py"):
        load_flow(f"{mine.parent / 'your.py'}:make_flow")


# ---- models with adapters, for images


def test_a_model_with_its_adapter(tiny, tmp_path):
    flow = load_model(str(tiny["t5"]), guidance_scale=2.0, lora_rank=4)
    torch.nn.init.normal_(flow.trainable_parameters()[1], std=0.1)
    flow.save_lora(tmp_path)
    again = load_model(str(tiny["t5"]), tmp_path, guidance_scale=2.0)
    for weight, kept in zip(again.trainable_parameters(), flow.trainable_parameters()):
        assert torch.equal(weight, kept)
    with pytest.raises(ValueError, match="dtype is bfloat16, float16 or float32"):
        load_model(dtype="float64")


def test_only_worlds_of_images_load_one():
    with pytest.raises(ValueError, match="the world 'gaussian' has no images"):
        get_world("gaussian").load()


# ---- what the emoji world reports


def test_the_probe_reports_accuracy_diversity_and_following():
    read = SimpleNamespace(
        animal=torch.tensor([0, 1, 2, 0]),
        vendor=torch.tensor([0, 1, 3, 3]),
        hue=torch.tensor([0.2, 0.7, 0.1, 0.1]),
        scale=torch.tensor([0.7, 0.85, 0.85, 1.0]),
    )
    report = ProbeReport(lambda images: read, 2)
    said = report(None, ["a cat", "a dog", "a fox", "a horse"])
    assert said["accuracy"] == 0.75 and "following" not in said
    assert said["vendors"] == pytest.approx(1.5)  # two, then one
    assert said["hue_spread"] == pytest.approx(0.5)  # opposite, then equal
    asked = ["a small cat", "a small round dog", "a fox on a red background", "a cat"]
    assert report(None, asked)["following"] == 0.5  # small and round, of four words


def test_no_truth_no_report():
    assert utility_report("redness") is None
