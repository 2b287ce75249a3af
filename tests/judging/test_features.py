"Feature extractors against the packages that they are from"

import inspect
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vggflow.judging.features import (
    ClipFeatures,
    DreamSimFeatures,
    EfficientNetFeatures,
    extractors,
    load_efficientnet,
    match_device,
)
from vggflow.judging.metrics import diversity, frechet_distance
from vggflow.judging.pixels import fit_square


def test_efficientnet_features_notice_noise():
    pytest.importorskip("efficientnet_lite_pytorch")
    from vggflow.worlds.emoji_data import draw_factors, render

    x, y = (render(draw_factors(48, torch.Generator().manual_seed(k))) for k in (0, 1))
    noise = torch.Generator().manual_seed(2)
    extract = EfficientNetFeatures()
    features = extract(x)
    assert features.shape == (48, 1280) and not features.requires_grad
    same = frechet_distance(features, extract(y))
    noisy = (y + 0.08 * torch.randn(y.shape, generator=noise)).clamp(0, 1)
    assert frechet_distance(features, extract(noisy)) > 1.2 * same
    shape = (16, 3, 64, 64)
    repeated = y[:1].expand(shape) + 0.005 * torch.randn(shape, generator=noise)
    assert diversity(extract(repeated)) < 0.3 * diversity(extract(y))


def test_clip_features_are_those_of_transformers(tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    from vggflow.worlds.emoji_data import asset
    from vggflow.worlds.emoji_networks import load_clip

    folder, ours, x = asset("clip"), load_clip(), torch.rand(4, 3, 64, 64)
    net = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    prompts = ["a cat", "a dog", "a cat", "a red fox"]
    length = dict(padding="max_length", truncation=True)
    tokens = tokenizer(
        prompts, max_length=tokenizer.model_max_length, return_tensors="pt", **length
    )
    with torch.no_grad():  # transformers alone
        features = net.get_image_features(2 * x - 1).pooler_output
        texts = net.get_text_features(tokens.input_ids).pooler_output
        image, text = F.normalize(features, dim=-1), F.normalize(texts, dim=-1)
        assert torch.allclose(ours(x), image, atol=1e-5)
        cosines = (image * text).sum(1)
        assert torch.allclose(ours.similarity(x, prompts), cosines, atol=1e-5)
        without = ClipFeatures(folder)(x)  # CLIP's own mean and deviation
        assert (without - image).abs().max() > 1e-2

        copied = tmp_path / "clip"
        shutil.copytree(folder, copied)
        said = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
        (copied / "preprocessor_config.json").write_text(json.dumps(said))
        assert torch.allclose(ClipFeatures(copied)(x), image, atol=1e-5)
        CLIPModel.from_pretrained(copied).bfloat16().save_pretrained(copied)
        half = ClipFeatures(copied)(x)
        assert half.dtype == torch.float32 and (half - image).abs().max() < 0.05


def test_clip_features_have_gradients_and_frozen_weights(clip_folder):
    clip = ClipFeatures(clip_folder)
    images = torch.rand(2, 3, 50, 64, requires_grad=True)
    clip.similarity(images, ["a cat", "a dog"]).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in clip.parameters())


def test_a_clip_that_is_not_there_is_named():
    with pytest.raises(OSError, match="no CLIP in '/nowhere'.*--clip none"):
        ClipFeatures("/nowhere")


def test_extractors_by_name(clip_folder):
    assert extractors("none") == {} and list(extractors("none", clip_folder)) == ["clip"]
    assert extractors("none", "none") == {}
    with pytest.raises(ValueError, match="did you mean 'dreamsim'"):
        extractors("dreamsin")


def test_images_go_where_the_network_is():
    "One that is seen says where it is; a plain function may hold one that no one sees"
    x = torch.zeros(2, 3, 8, 8)
    assert match_device(x, diversity) is x
    assert match_device(x, diversity, "meta").device.type == "meta"
    assert match_device(x, nn.Linear(1, 1), "meta").device.type == "cpu"


def test_folding_does_not_change_efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pixels = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        folded, plain = (
            load_efficientnet(fold=fold).extract_features(pixels).mean((2, 3))
            for fold in (True, False)
        )
    assert (folded - plain).abs().max() < 1e-4 * plain.abs().max()
    left = [m for m in load_efficientnet().modules() if isinstance(m, nn.BatchNorm2d)]
    assert not left


HUB = """from dreamsim.feature_extraction.vision_transformer import VisionTransformer
def dino_vitb16(**k):
    size = dict(patch_size=16, embed_dim=24, depth=12, num_heads=2, mlp_ratio=2)
    return VisionTransformer(qkv_bias=True, **size)
"""


def save_dino(folder):
    "The code of torch's hub, and a head"
    (folder / "facebookresearch_dino_main").mkdir()
    (folder / "facebookresearch_dino_main" / "hubconf.py").write_text(HUB)
    head = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    names = [f"module.head.{name}" for name in [*head, "last_layer.weight"]]
    student = {name: torch.zeros(1) for name in names}
    torch.save(dict(student=student), folder / "dino_vitb16_pretrain.pth")


@pytest.fixture(scope="module")
def small_ensemble(tmp_path_factory):
    "The files of DreamSim's ensemble, from its own classes with small towers"
    import dreamsim.feature_extraction.load_clip_as_dino as clip
    import dreamsim.feature_extraction.load_open_clip_as_dino as open_clip
    import dreamsim.model
    import peft
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    folder, patch = tmp_path_factory.mktemp("dreamsim"), pytest.MonkeyPatch()
    torch.manual_seed(0)

    def small(patch_size=16):
        size = dict(embed_dim=24, depth=12, num_heads=2, mlp_ratio=2)
        return VisionTransformer(patch_size=patch_size, qkv_bias=True, **size)

    for module in (clip, open_clip):
        patch.setattr(module, "vit_base", small)
    save_dino(folder)
    for name in ("clip", "open_clip"):
        tower = small()
        tower.pos_drop = nn.LayerNorm(24)
        state = {**tower.state_dict(), "proj": torch.randn(24, 16)}
        torch.save(dict(state_dict=state), folder / f"{name}_vitb16_pretrain.pth.tar")
    settings = dreamsim.model.dreamsim_args["model_config"]["ensemble"]
    net = dreamsim.model.PerceptualModel(
        **settings, device="cpu", load_dir=str(folder), normalize_embeds=True
    )
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["qkv"])
    net = peft.get_peft_model(net, lora)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    net.save_pretrained(folder / "ensemble_lora")
    yield folder
    patch.undo()


def test_dreamsim_on_a_small_ensemble(small_ensemble):
    "The package's own loader, networks and distance"
    hub = torch.hub.get_dir()
    torch.manual_seed(1)
    extract = DreamSimFeatures(folder=small_ensemble, batch_size=2)
    images = torch.rand(5, 3, 32, 32)
    assert torch.hub.get_dir() == hub
    assert not any(weight.requires_grad for weight in extract.parameters())
    features = extract(images)
    assert features.shape == (5, 24 + 16 + 16)
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-5)

    big = fit_square(images, 224).clamp(0, 1)
    theirs = torch.cat([extract.net(big[i : i + 1], big[i + 1 : i + 2]) for i in range(4)])
    ours = 1 - (features[:-1] * features[1:]).sum(1)
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.min() > 0
    assert diversity(features[:2]) == pytest.approx(theirs[0].item(), abs=1e-5)
    assert torch.allclose(extract(images[:1]), features[:1], atol=1e-5)  # one image
    with extract.net.disable_adapter():
        assert (extract(images) - features).abs().max() > 1e-3  # the adapters were loaded


def test_weights_of_dreamsim_that_cannot_be_fetched_are_named(tmp_path, monkeypatch):
    import dreamsim

    def fetch(**_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(dreamsim, "dreamsim", fetch)
    with pytest.raises(OSError, match="not known.*--perceptual efficientnet") as raised:
        DreamSimFeatures(folder=tmp_path / "weights")
    assert str(tmp_path / "weights") in str(raised.value)


def test_dreamsim_has_gradients(small_ensemble):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    DreamSimFeatures(folder=small_ensemble)(images)[:, :3].sum().backward()
    assert images.grad.abs().sum() > 0


def test_our_call_is_the_packages_own():
    "Every option that we pass exists in the installed package"
    from dreamsim import model

    ours = {"pretrained", "device", "cache_dir", "normalize_embeds", "dreamsim_type"}
    assert ours <= set(inspect.signature(model.dreamsim).parameters)
