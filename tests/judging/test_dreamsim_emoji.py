"The small DreamSim: its files, its loader, and what the shipped one sees"

import shutil
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vggflow.common.data import data_folder
from vggflow.judging.damage import DAMAGES, damaged
from vggflow.judging.features import (
    ADAPTER,
    EMOJI,
    TOWER,
    DreamSimFeatures,
    extractor_name,
    small_network,
)
from vggflow.judging.pixels import fit_square
from vggflow.worlds.emoji_data import asset, draw_factors, render
from vggflow.worlds.responses import CHANGES, redrawn

SHIPPED = data_folder() / "emoji" / "dreamsim"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{TOWER} is missing: run `git checkout"):
        DreamSimFeatures(EMOJI, tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    "A tower of two narrow blocks and its adapter, in the published layout"
    import peft
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = dict(img_size=[224], patch_size=56, embed_dim=24, depth=2, num_heads=2)
    tower = VisionTransformer(qkv_bias=True, **sizes)
    tower.pos_drop = nn.LayerNorm(24)
    state = {name: value.half() for name, value in tower.state_dict().items()}
    state["proj"] = torch.randn(24, 16)
    kwargs = dict(qkv_bias=True, **sizes)
    torch.save(dict(kwargs=kwargs, state_dict=state), folder / TOWER)
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["qkv"])
    net = peft.get_peft_model(small_network(folder), lora)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    net.save_pretrained(folder / ADAPTER)
    return folder


def test_a_small_tower_is_opened_by_the_packages_class(small_folder, no_network):
    from dreamsim import PerceptualModel

    extract = DreamSimFeatures(EMOJI, small_folder)
    assert isinstance(extract.net.base_model.model, PerceptualModel)
    assert extractor_name(extract) == "DreamSim-emoji"
    images = torch.rand(3, 3, 64, 64)
    features = extract(images)
    assert features.shape == (3, 16)
    big = fit_square(images, 224).clamp(0, 1)
    theirs = extract.net(big[:1], big[1:2])  # the package's own distance
    assert torch.allclose(1 - (features[:1] * features[1:2]).sum(1), theirs, atol=1e-5)
    with extract.net.disable_adapter():
        assert (extract(images) - features).abs().max() > 1e-3  # the adapter was loaded


@pytest.mark.parametrize("name", [TOWER, f"{ADAPTER}/adapter_model.safetensors"])
def test_a_damaged_file_is_one_line(small_folder, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)
    (folder / name).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="a file is damaged: run `git checkout") as error:
        DreamSimFeatures(EMOJI, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_tower_that_would_run_code_is_refused(small_folder, tmp_path):
    "A pickle that calls a function when it is read"
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)

    class Calls:
        def __reduce__(self):
            return print, ("executed",)

    torch.save(dict(kwargs=Calls()), folder / TOWER)
    with pytest.raises(ValueError, match="UnpicklingError"):
        DreamSimFeatures(EMOJI, folder)


@pytest.fixture(scope="module")
def judge():
    if not SHIPPED.exists():
        pytest.skip("data/emoji/dreamsim is not made yet: nbs/emoji/perceptual.ipynb")
    return DreamSimFeatures(EMOJI, asset("dreamsim"))


def apart(judge, x, y):
    return 1 - F.cosine_similarity(judge(x), judge(y))


def test_the_shipped_judge_needs_no_network(judge, no_network):
    images = torch.rand(2, 3, 64, 64)
    again = DreamSimFeatures(EMOJI)
    assert torch.equal(again(images), judge(images))
    assert apart(judge, images, images).abs().max() < 1e-5


def test_distances_rise_with_every_damage(judge):
    generator = torch.Generator().manual_seed(17)
    x = render(draw_factors(64, generator), size=64)
    for kind in DAMAGES:
        hurt = [damaged(x, kind, s, generator) for s in (0.1, 0.3, 0.6, 1.0)]
        means = [apart(judge, x, y).mean().item() for y in hurt]
        if kind == "shift":  # moved by whole patches, a picture has the same ones again
            means = [means[0], means[-1]]
        assert means == sorted(means), (kind, means)


def triplets(generator):
    "Pictures, a nearer one and a farther one, by kinds of pairs whose order is plain"
    f = draw_factors(48, generator)
    x = render(f, size=64)

    def drawn(*groups):
        names = tuple(name for group in groups for name in CHANGES[group])
        return render(redrawn(f, names, generator), size=64)

    yield "animal", x, drawn("place"), drawn("place", "animal")
    yield "vendor", x, drawn("place"), drawn("place", "vendor", "ground")
    for kind in DAMAGES:
        pair = [damaged(x, kind, strength, generator) for strength in (0.2, 0.8)]
        yield kind, x, *pair
        yield f"animal or {kind}", x, pair[0], drawn("animal")


def test_agreement_on_plain_triplets(judge):
    right = []
    for _, x, near, far in triplets(torch.Generator().manual_seed(18)):
        right.append((apart(judge, x, near) < apart(judge, x, far)).float())
    assert torch.cat(right).mean() >= 0.85
