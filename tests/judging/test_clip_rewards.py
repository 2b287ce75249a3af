"The rewards that look through CLIP, by their loaders, against the published recipes"

import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import PROMPTS, SIZE, WIDTH, tiny_config, tiny_tokenizer
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from vggflow.judging.clip_rewards import (
    REVISIONS,
    AestheticReward,
    ClipReward,
    HPSv2Reward,
    PickScoreReward,
    affine_head,
    cleaned,
    clip_state,
    head_file,
    load_open_clip,
    pinned_revision,
)
from vggflow.judging.image_reward import ImageReward
from vggflow.judging.pixels import CLIP_MEAN, CLIP_STD, clip_pixels, fit_square
from vggflow.judging.rewards import REWARDS, get_reward


def published_features(path, pictures, prompts):
    "A CLIP and its unit features, by the processors of transformers"
    clip = CLIPModel.from_pretrained(path).eval()
    crop = dict(height=SIZE, width=SIZE)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    tokens = CLIPTokenizer.from_pretrained(path)(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=20,
        return_tensors="pt",
    )
    seen = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        image = clip.get_image_features(**seen).pooler_output
        text = clip.get_text_features(**tokens).pooler_output
    return clip, F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, (a, b)


def test_pickscore_is_the_published_recipe(clip_folder, pictures):
    pil, images = pictures
    clip, image, text = published_features(clip_folder, pil, PROMPTS)
    reward = PickScoreReward.from_pretrained(clip_folder)
    scale = clip.logit_scale.exp().detach()
    assert_close(reward(images, PROMPTS), scale * (text @ image.T).diagonal())
    exchanged = reward(images, PROMPTS[::-1]) - reward(images, PROMPTS)
    assert exchanged.abs().max() > 1e-3  # teeth: the prompts matter


def test_hpsv2_is_the_bare_cosine(clip_folder, pictures):
    pil, images = pictures
    _, image, text = published_features(clip_folder, pil, PROMPTS)
    reward = HPSv2Reward.from_pretrained(clip_folder)
    assert_close(reward(images, PROMPTS), (image @ text.T).diagonal())
    plain = ClipReward.from_pretrained(clip_folder)
    assert_close(plain(images, PROMPTS), reward(images, PROMPTS))
    turned = (image @ text.T).diagonal() - (image @ text.roll(1, 0).T).diagonal()
    assert turned.abs().max() > 1e-3  # teeth: other prompts are further off than allowed


@pytest.mark.parametrize("name", ["aesthetic-model.pth", "head.safetensors"])
def test_aesthetic_is_the_published_recipe(clip_folder, pictures, name):
    pil, images = pictures
    _, features, _ = published_features(clip_folder, pil, PROMPTS)
    state = torch.load(clip_folder / "aesthetic-model.pth", weights_only=True)
    for number in (0, 2, 4, 6, 7):
        layer = f"layers.{number}"
        features = features @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
    reward = AestheticReward.from_pretrained(clip_folder, file=name)
    assert_close(reward(images), features[:, 0])
    assert_close(reward(images, PROMPTS), reward(images))
    assert reward(images).std() > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "aesthetic-model.pth",
        "sac+logos+ava1-l14-linearMSE.pth",
        "sac+logos+ava1-l14-linearMSE.safetensors",
        "ava+logos-l14-linearMSE.pth",
        "sa_0_4_vit_l_14_linear.pth",
    ],
)
def test_a_published_head_is_found_under_its_name(clip_folder, pictures, name, tmp_path):
    "And gives the numbers of its file"
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    state = torch.load(folder / "aesthetic-model.pth", weights_only=True)
    for file in ("aesthetic-model.pth", "head.safetensors"):
        (folder / file).unlink()
    if name.startswith("sa_0_4"):  # one layer, without a number
        state = dict(weight=torch.randn(1, WIDTH), bias=torch.randn(1))
    save = save_file if name.endswith(".safetensors") else torch.save
    save(state, folder / name)
    features = published_features(clip_folder, pictures[0], PROMPTS)[1]
    for layer in sorted({key.removesuffix("weight") for key in state if "weight" in key}):
        features = features @ state[f"{layer}weight"].T + state[f"{layer}bias"]
    reward = get_reward(f"aesthetic@{folder}")
    assert_close(reward(pictures[1]), features[:, 0])


def test_a_head_with_activations_is_refused(clip_folder):
    "Its weights look like those of one without"
    with pytest.raises(ValueError, match="has ReLUs between its layers"):
        head_file(clip_folder, "ava+logos-l14-reluMSE.pth")


def test_a_folder_without_a_head_names_them_all(clip_folder, tmp_path):
    with pytest.raises(
        OSError, match="none of aesthetic-model.pth, sac.*put one"
    ) as caught:
        head_file(tmp_path)
    assert "\n" not in str(caught.value)


def test_float32_whatever_the_rest_computes_in(clip_folder, pictures):
    reward, images = PickScoreReward.from_pretrained(clip_folder), pictures[1]
    want = reward(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reward(images, PROMPTS)
    assert got.dtype == torch.float32
    assert_close(got, want, 1e-5)
    half = images.bfloat16()
    assert_close(reward(half, PROMPTS), reward(half.float(), PROMPTS), 1e-5)


@pytest.mark.parametrize("cls", [AestheticReward, HPSv2Reward, PickScoreReward])
@pytest.mark.parametrize("sides", [(SIZE, SIZE), (40, 52)])
def test_gradient_against_finite_differences(clip_folder, cls, sides):
    reward = cls.from_pretrained(clip_folder).double()
    reward.clip.set_attn_implementation("sdpa")  # eager takes its softmax in float32
    noise, h = torch.Generator().manual_seed(1), 1e-5
    x = torch.rand(2, 3, *sides, generator=noise, dtype=torch.double).requires_grad_(True)

    def total(x):
        return reward(x, PROMPTS[:2]).sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    for _ in range(4):
        step = torch.randn(x.shape, generator=noise, dtype=torch.double)
        with torch.no_grad():
            slope = (total(x + h * step) - total(x - h * step)) / (2 * h)
        allowed = 1e-6 * slope.abs().clamp(min=1e-3)
        assert abs((gradient * step).sum() - slope) < allowed
    assert gradient.abs().flatten(1).max(1).values.min() > 0
    assert not any(weight.requires_grad for weight in reward.parameters())


def test_second_derivatives_exist(clip_folder):
    "The exact consistency mode takes a forward derivative of the gradient"
    reward = PickScoreReward.from_pretrained(clip_folder)
    x = torch.rand(2, 3, SIZE, SIZE)
    gradient = torch.func.grad(lambda y: reward(y, PROMPTS[:2]).sum())
    _, change = torch.func.jvp(gradient, (x,), (torch.ones_like(x),))
    assert change.isfinite().all() and change.abs().max() > 0


# --- how an image becomes square


def smooth_picture(height, width):
    y, x = torch.meshgrid(
        torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    red = 0.5 + 0.4 * torch.sin(7 * x + 2 * y)
    return torch.stack([red, 0.5 + 0.4 * torch.cos(5 * y), 0.2 + 0.6 * x])


@pytest.mark.parametrize(
    "sides", [(96, 96), (64, 96), (100, 72), (20, 20), (40, 90), (86, 40), (31, 28)]
)
def test_crop_is_the_processors(sides):
    levels = (255 * smooth_picture(*sides)).round().byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    crop = dict(height=SIZE, width=SIZE)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    want = processor(picture, return_tensors="pt").pixel_values
    got = clip_pixels(levels[None] / 255, SIZE)
    # a PIL image is rounded to 1/255 before CLIP's 1/.26
    assert (got - want).abs().max() < 0.03
    assert (got.flip(1) - want).abs().max() > 0.3  # teeth: colours reversed


@pytest.mark.parametrize("sides", [(56, 56), (20, 20), (40, 90)])
def test_the_resize_adds_nothing_above_white_or_below_black(sides):
    "As in eight bits, where the processors resize"
    torch.manual_seed(0)
    levels = 255 * torch.randint(2, (3, *sides)).byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    crop = dict(height=SIZE, width=SIZE)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    want = processor(picture, return_tensors="pt").pixel_values
    assert (clip_pixels(levels[None] / 255, SIZE) - want).abs().max() < 0.03
    resized = fit_square(levels[None] / 255, SIZE)
    assert resized.min() >= -2e-4 and resized.max() <= 1 + 2e-4


def test_a_picture_that_is_out_of_range_keeps_its_gradient():
    "Decoders give values a little above white; rewards push on them too"
    images = (1.2 * torch.ones(1, 3, 40, 40)).requires_grad_()
    fit_square(images, SIZE).sum().backward()
    assert images.grad.sum() == pytest.approx(3 * SIZE * SIZE, rel=1e-4)


def test_pad_keeps_the_whole_image_on_black():
    wide = torch.ones(1, 3, 20, 40)
    padded = fit_square(wide, SIZE, "pad")
    assert padded.shape[-2:] == (SIZE, SIZE)
    assert torch.allclose(padded[:, :, 7:21], torch.ones(1, 3, 14, SIZE), atol=1e-5)
    assert padded[:, :, :7].abs().max() == 0 and padded[:, :, 21:].abs().max() == 0
    assert fit_square(wide, SIZE, "crop").min() > 0.999


def test_what_fits_is_kept_as_it_is():
    fits = torch.rand(2, 3, SIZE, SIZE)
    assert fit_square(fits, SIZE, "pad") is fits and fit_square(fits, SIZE) is fits


def test_gradients_pass_through_the_resize_and_not_through_what_is_cut_off():
    wide = torch.rand(1, 3, 30, 50, requires_grad=True)
    square = fit_square(wide, 17)
    assert square.shape == (1, 3, 17, 17)
    square.sum().backward()
    assert wide.grad[..., 20:30].abs().min() > 0
    assert (wide.grad[..., :5] == 0).all()  # the margin is cut off
    assert fit_square(torch.rand(1, 3, 7, 7), 40).shape == (1, 3, 40, 40)


# --- weights of open_clip


class Block(nn.Module):
    "As open_clip names it"

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = dict(c_fc=nn.Linear(width, 2 * width), c_proj=nn.Linear(2 * width, width))
        self.mlp = nn.ModuleDict(layers)

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        attended, _ = self.attn(h, h, h, attn_mask=mask, need_weights=False)
        x = x + attended
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, 2) for _ in range(2)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width):
        super().__init__()

        def noise(*shape):
            return nn.Parameter(0.1 * torch.randn(*shape))

        self.class_embedding = noise(width)
        self.positional_embedding = noise(17, width)
        self.proj = noise(width, WIDTH)
        self.conv1 = nn.Conv2d(3, width, 7, 7, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Tower(width)

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    "What open_clip computes, under the names of its weights"

    def __init__(self, vocabulary, width=32):
        super().__init__()
        self.visual = Visual(width)
        self.transformer = Tower(width)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.ln_final = nn.LayerNorm(width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(20, width))
        self.text_projection = nn.Parameter(torch.randn(width, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        causal = torch.full((20, 20), -torch.inf).triu(1)
        self.register_buffer("attn_mask", causal)

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "Folder of an open_clip checkpoint, and the network that it is from"
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("hps")
    net = OpenClip(len(tiny_tokenizer())).eval()
    state = dict(epoch=1, name="x", state_dict=net.state_dict())
    torch.save(state, folder / "HPS_v2.1_compressed.pt")
    return folder, net


def test_open_clip_weights_give_the_published_score(clip_folder, checkpoint, pictures):
    folder, net = checkpoint
    images = pictures[1]
    reward = HPSv2Reward.from_pretrained(folder, like=clip_folder)
    length = dict(padding="max_length", max_length=20, truncation=True)
    ids = tiny_tokenizer()(PROMPTS, **length, return_tensors="pt").input_ids
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        image, text = net.visual((images - mean) / std), net.encode_text(ids)
    assert_close(reward(images, PROMPTS), F.cosine_similarity(image, text))


def test_the_older_checkpoint_is_found_too(clip_folder, checkpoint, pictures, tmp_path):
    torch.save(checkpoint[1].state_dict(), tmp_path / "HPS_v2_compressed.pt")
    older = HPSv2Reward.from_pretrained(tmp_path, like=clip_folder)
    newer = HPSv2Reward.from_pretrained(checkpoint[0], like=clip_folder)
    assert_close(older(pictures[1], PROMPTS), newer(pictures[1], PROMPTS))


def test_open_clip_weights_that_do_not_fit(clip_folder, checkpoint, tmp_path):
    state = checkpoint[1].state_dict()
    state.pop("ln_final.weight")
    torch.save(dict(state_dict=state), tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match="does not fit the architecture") as caught:
        HPSv2Reward.from_pretrained(tmp_path, like=clip_folder)
    assert "final_layer_norm" in str(caught.value) and "\n" not in str(caught.value)


def test_open_clip_weights_of_another_shape(clip_folder, checkpoint, tmp_path):
    state = checkpoint[1].state_dict()
    state["ln_final.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no weights of these shapes"):
        load_open_clip(tmp_path, "x.pt", clip_folder)


def test_open_clip_itself_agrees():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(2)
    both = dict(layers=2, width=32)
    vision = dict(image_size=SIZE, patch_size=7, head_width=16, mlp_ratio=2.0, **both)
    text = dict(context_length=20, vocab_size=60, heads=2, mlp_ratio=2.0, **both)
    net = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text).eval()
    config = tiny_config(tiny_tokenizer())
    config.text_config.vocab_size = 60
    config.text_config.eos_token_id = 2
    clip = CLIPModel(config).eval()
    unmatched = clip.load_state_dict(clip_state(net.state_dict()), strict=False)
    assert not unmatched.unexpected_keys
    x = torch.randn(2, 3, SIZE, SIZE)
    ids = torch.randint(3, 59, (2, 20))
    ids[:, -1] = 59
    with torch.no_grad():
        assert_close(clip.get_image_features(x).pooler_output, net.encode_image(x))
        assert_close(clip.get_text_features(ids).pooler_output, net.encode_text(ids))


TEXTS = [
    "a cat",
    "A Cat's 3D-render, 1920x1080!!",
    "caf&eacute; &amp;amp; bar",
    "schÃ¶n “quoted” … text",
    "two\n lines\tand  spaces",
    "naïve Ångström ﬁ ligature",
    "日本語の猫",
    "emoji 🐱 cat",
    "don't we'll I'm they've",
    "a.b,c;d:e/f\\g",
    "100% of #1 @home & more",
    "x" * 400,
    "&lt;b&gt;bold&lt;/b&gt;",
    "ＦＵＬＬ width",
    "e\u0301 combining",
    "",
    "A\u00a0B\u200bC",
    "&quot;q&quot; it&#39;s",
]


@pytest.fixture(scope="module")
def tokenizers():
    "open_clip's, and one of transformers with the same vocabulary"
    tokenizer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(k, k): v for k, v in tokenizer.encoder.items()}
    merges = [tuple(pair) for pair in tokenizer.bpe_ranks]
    return tokenizer, CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.mark.parametrize("text", TEXTS)
def test_hpsv2_reads_a_prompt_as_open_clip_does(tokenizers, text):
    "Entities, broken characters and spaces; what fills the rest is never looked at"
    theirs, ours = tokenizers
    wanted = theirs([text])[0].tolist()
    wanted = wanted[: wanted.index(49407) + 1]
    tokens = ours(cleaned(text), truncation=True, max_length=77).input_ids
    assert tokens == wanted


def test_without_cleaning_it_would_not(tokenizers):
    "Teeth"
    theirs, ours = tokenizers
    text = "caf&eacute;"
    assert ours(text).input_ids != theirs([text])[0].tolist()[:4]


def test_hpsv2_cleans_what_it_scores(clip_folder, pictures):
    reward = HPSv2Reward.from_pretrained(clip_folder)
    images = pictures[1][:1]
    assert torch.equal(reward(images, ["a&#32;  cat\n"]), reward(images, ["a cat"]))
    plain = ClipReward.from_pretrained(clip_folder)  # as transformers has it
    assert not torch.equal(plain(images, ["a&#32;cat"]), plain(images, ["a cat"]))


# --- errors, in one line each


@pytest.mark.parametrize("name", ["aesthetic", "hpsv2", "pickscore", "clip", "imagereward"])
@pytest.mark.parametrize("path", ["/nowhere/at/all", "nobody/nothing"])
def test_missing_model_says_what_to_do(name, path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set") as caught:
        get_reward(name, path=path)
    text = str(caught.value)
    assert path in text and "\n" not in text and len(text) < 200


def test_published_ids_are_the_defaults():
    assert {"aesthetic", "hpsv2", "pickscore", "clip", "imagereward"} <= REWARDS.keys()
    assert AestheticReward.path == "openai/clip-vit-large-patch14"
    assert AestheticReward.head == "trl-lib/ddpo-aesthetic-predictor"
    assert HPSv2Reward.path == "xswu/HPSv2"
    assert PickScoreReward.path == "yuvalkirstain/PickScore_v1"


def test_published_ids_are_pinned(monkeypatch, clip_folder):
    "The known commit is asked for, another where one is named, and none for a folder"
    assert all(len(commit) == 40 and int(commit, 16) for commit in REVISIONS.values())
    ours = (ClipReward, PickScoreReward, HPSv2Reward, ImageReward)
    assert {*[cls.path for cls in ours], ImageReward.tokenizer_path} <= REVISIONS.keys()
    assert pinned_revision(clip_folder) == {}
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for path, revision in (("xswu/HPSv2", None), ("xswu/HPSv2", "main"), ("me/my", None)):
        with pytest.raises(OSError, match="no network"):
            load_open_clip(path, "x.pt", clip_folder, revision)
    assert asked == [
        ("xswu/HPSv2", "x.pt", REVISIONS["xswu/HPSv2"]),
        ("xswu/HPSv2", "x.pt", "main"),
        ("me/my", "x.pt", None),
    ]


def test_every_loader_asks_for_the_pinned_commit(monkeypatch, clip_folder):
    "Of the head of the aesthetic score, whose commit is not known, the one that is named"
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, revision))
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    head = AestheticReward.head
    for load in (
        lambda: ImageReward.from_pretrained(),
        lambda: AestheticReward.from_pretrained(clip_folder, head=head),
        lambda: AestheticReward.from_pretrained(clip_folder, head, head_revision="v2"),
    ):
        with pytest.raises(OSError, match="no network"):
            load()
    published = ImageReward.path
    assert asked == [(published, REVISIONS[published]), (head, None), (head, "v2")]


def test_a_clip_without_its_tokenizer_is_noticed(clip_folder, tmp_path):
    "transformers makes an empty tokenizer without a word: every prompt would be the same"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no tokenizer|no CLIP model") as caught:
        ClipReward.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_head_is_named(clip_folder):
    with pytest.raises(OSError, match="no other.pth"):
        AestheticReward.from_pretrained(clip_folder, file="other.pth")


@pytest.mark.parametrize("shapes", [[(1, WIDTH + 1)], [(8, WIDTH), (1, 9)], [(2, WIDTH)]])
def test_head_of_a_wrong_shape(shapes):
    state = {}
    for number, shape in enumerate(shapes):
        state[f"layers.{number}.weight"] = torch.zeros(shape)
        state[f"layers.{number}.bias"] = torch.zeros(shape[:1])
    with pytest.raises(ValueError, match=f"{WIDTH} features") as caught:
        affine_head(state, WIDTH)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_run(clip_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save(Evil(), tmp_path / "aesthetic-model.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        AestheticReward.from_pretrained(clip_folder, head=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_prompt_is_asked_for(clip_folder):
    reward = PickScoreReward.from_pretrained(clip_folder)
    with pytest.raises(ValueError, match="give prompts"):
        reward(torch.rand(1, 3, SIZE, SIZE))


def test_pixels_keep_their_order():
    "One bright pixel of a square image stays where it is"
    image = torch.zeros(1, 3, SIZE, SIZE)
    image[0, 1, 3, 5] = 1
    mean, std = np.array(CLIP_MEAN), np.array(CLIP_STD)
    got = clip_pixels(image, SIZE)[0, :, 3, 5].numpy()
    assert np.allclose(got, (np.array([0, 1, 0]) - mean) / std, atol=1e-5)
