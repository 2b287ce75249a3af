"ImageReward on random weights under the published names, against its recipe written out"

import pytest
import torch
import torch.nn.functional as F
from tiny_rewards import PROMPTS, SIZE, BlipWeights
from transformers import BertTokenizer

from vggflow.common.trial import check_reward
from vggflow.judging.image_reward import ImageReward
from vggflow.judging.pixels import CLIP_MEAN, CLIP_STD


def split_heads(x):
    return x.unflatten(-1, (-1, 64)).transpose(1, 2)


def attend(query, key, value, hidden=0):
    "Attention of heads that are 64 numbers wide"
    q, k, v = map(split_heads, (query, key, value))
    attended = (q @ k.mT / 8 + hidden).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2)


class PublishedRecipe:
    "BLIP's image encoder, its text encoder with cross-attention, and the linear layers"

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return F.linear(x, self.state[name + ".weight"], self.state[name + ".bias"])

    def norm(self, x, name, eps):
        weight, bias = self.state[name + ".weight"], self.state[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def see(self, pixels, start="blip.visual_encoder."):
        patch = [self.state[f"{start}patch_embed.proj.{k}"] for k in ("weight", "bias")]
        patches = F.conv2d(pixels, *patch, stride=BlipWeights.patch).flatten(2).mT
        first = self.state[start + "cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([first, patches], 1) + self.state[start + "pos_embed"]
        for number in range(BlipWeights.layers):
            block = f"{start}blocks.{number}."
            h = self.norm(x, block + "norm1", 1e-6)
            attended = attend(*self.linear(h, block + "attn.qkv").chunk(3, -1))
            x = x + self.linear(attended, block + "attn.proj")
            h = self.linear(self.norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
            x = x + self.linear(F.gelu(h), block + "mlp.fc2")
        return self.norm(x, start + "norm", 1e-6)

    def attention(self, x, over, hidden, name):
        query = self.linear(x, name + ".self.query")
        key, value = (self.linear(over, f"{name}.self.{k}") for k in ("key", "value"))
        attended = attend(query, key, value, hidden)
        y = self.linear(attended, name + ".output.dense") + x
        return self.norm(y, name + ".output.LayerNorm", 1e-12)

    def read(self, ids, mask, seen, start="blip.text_encoder."):
        words = self.state[start + "embeddings.word_embeddings.weight"][ids]
        places = self.state[start + "embeddings.position_embeddings.weight"]
        x = self.norm(words + places[: ids.shape[1]], start + "embeddings.LayerNorm", 1e-12)
        hidden = (1 - mask[:, None, None].float()) * -1e4
        for number in range(BlipWeights.layers):
            layer = f"{start}encoder.layer.{number}."
            x = self.attention(x, x, hidden, layer + "attention")
            x = self.attention(x, seen, 0, layer + "crossattention")
            h = F.gelu(self.linear(x, layer + "intermediate.dense"))
            y = self.linear(h, layer + "output.dense") + x
            x = self.norm(y, layer + "output.LayerNorm", 1e-12)
        return x[:, 0]

    def score(self, pixels, ids, mask):
        h = self.read(ids, mask, self.see(pixels))
        for number in (0, 2, 4, 6, 7):
            h = self.linear(h, f"mlp.layers.{number}")
        return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_the_published_recipe(blip_folder, pictures):
    prompts = ["a cat", "an owl", "z" * 60]
    length = dict(padding="max_length", truncation=True, max_length=35)
    tokenizer = BertTokenizer.from_pretrained(blip_folder)
    tokens = tokenizer(prompts, **length, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 35) and tokens.input_ids[0, 0] == 2
    assert tokens.attention_mask.sum(1).tolist() == [6, 7, 35]

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    given = (pictures[1] - mean) / std, tokens.input_ids, tokens.attention_mask
    weights = dict(BlipWeights())
    want = PublishedRecipe(weights).score(*given)
    got = ImageReward.from_pretrained(blip_folder)(pictures[1], prompts)
    assert (got - want).abs().max() < 1e-4 * want.abs().max() and want.std() > 0.01
    for name in (  # teeth: every part matters
        "blip.text_encoder.encoder.layer.1.crossattention.self.value.weight",
        "blip.visual_encoder.blocks.0.attn.proj.bias",
        "mlp.layers.6.bias",
    ):
        off = PublishedRecipe({**weights, name: 1.1 * weights[name]}).score(*given)
        assert (off - want).abs().max() > 5e-4, name


@pytest.mark.parametrize("sides", [(SIZE, SIZE), (40, 52)])
def test_imagereward_gradient_against_finite_differences(blip_folder, sides):
    reward = ImageReward.from_pretrained(blip_folder).double()
    noise, h = torch.Generator().manual_seed(1), 1e-5
    x = torch.rand(2, 3, *sides, generator=noise, dtype=torch.double).requires_grad_(True)

    def total(x):
        return reward(x, PROMPTS[:2]).sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    for _ in range(3):
        step = torch.randn(x.shape, generator=noise, dtype=torch.double)
        with torch.no_grad():
            slope = (total(x + h * step) - total(x - h * step)) / (2 * h)
        allowed = 1e-6 * slope.abs().clamp(min=1e-3)
        assert abs((gradient * step).sum() - slope) < allowed
    assert not any(weight.requires_grad for weight in reward.parameters())
    assert check_reward(reward.float()) == []


def test_imagereward_says_what_is_wrong(blip_folder, clip_folder, tmp_path):
    weights = dict(BlipWeights())
    (tmp_path / "whole").mkdir()
    torch.save(weights, tmp_path / "whole" / "ImageReward.pt")
    weights.pop("blip.visual_encoder.blocks.1.attn.qkv.bias")
    torch.save(weights, tmp_path / "ImageReward.pt")
    head = dict(path=clip_folder, file="aesthetic-model.pth", tokenizer=blip_folder)
    for settings, says in [
        (
            dict(path=tmp_path, tokenizer=blip_folder),
            "no weights encoder.layers.1.self_attn.qkv.bias",
        ),
        (head, "not a checkpoint of ImageReward"),
        (dict(path=tmp_path / "whole"), "no BERT tokenizer"),
        (dict(path="/nowhere"), "no ImageReward.pt in '/nowhere'"),
    ]:
        with pytest.raises((ValueError, OSError), match=says) as caught:
            ImageReward.from_pretrained(**settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="give prompts"):
        ImageReward.from_pretrained(blip_folder)(torch.rand(1, 3, SIZE, SIZE))
