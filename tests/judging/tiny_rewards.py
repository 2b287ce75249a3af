"Small models with random weights, saved as a hub would give them"

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

SIZE, WIDTH = 28, 24  # side of an image, numbers in a CLIP feature
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a cat", "an owl", "a cat on a blue background"]


def numbered(tokens):
    return {token: number for number, token in enumerate(tokens)}


def tiny_tokenizer():
    "It spells"
    letters = [letter + end for letter in LETTERS for end in ("", "</w>")]
    vocabulary = numbered(["<|startoftext|>", *letters, "<|endoftext|>"])
    end = dict(model_max_length=20, pad_token="<|endoftext|>")
    return CLIPTokenizer(vocab=vocabulary, merges=[], **end)


def tiny_config(tokenizer):
    both = dict(hidden_size=32, intermediate_size=64, hidden_act="gelu")
    both |= dict(num_hidden_layers=2, num_attention_heads=2)
    ends = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=20, **both, **ends)
    vision = dict(image_size=SIZE, patch_size=7, **both)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


def save_tiny_clip(folder):
    "A CLIP, and an aesthetic head of the LAION shape in both formats"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    CLIPModel(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {}
    widths = (WIDTH, 64, 32, 16, 8, 1)
    for number, takes, gives in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        layer = nn.Linear(takes, gives)
        state[f"layers.{number}.weight"] = layer.weight.data
        state[f"layers.{number}.bias"] = layer.bias.data
    torch.save(state, folder / "aesthetic-model.pth")
    save_file(state, folder / "head.safetensors")


class BlipWeights(dict):
    "A state dict as THUDM/ImageReward publishes it, small; heads are 64 numbers wide"

    vision_width, text_width, patch, layers = 128, 64, 7, 2

    def __init__(self, seed=3):
        self.noise = torch.Generator().manual_seed(seed)
        self.add_vision("blip.visual_encoder.")
        self.add_text("blip.text_encoder.")
        widths = (self.text_width, 1024, 128, 64, 16, 1)
        for number, takes, gives in zip((0, 2, 4, 6, 7), widths, widths[1:]):
            self.linear(f"mlp.layers.{number}", gives, takes)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.noise)

    def linear(self, name, gives, takes):
        self[name + ".weight"] = self.normal(gives, takes) / takes**0.5
        self[name + ".bias"] = 0.1 * self.normal(gives)

    def norm(self, name, width):
        self[name + ".weight"] = 1 + 0.1 * self.normal(width)
        self[name + ".bias"] = 0.1 * self.normal(width)

    def add_vision(self, start):
        width, patch = self.vision_width, self.patch
        self[start + "cls_token"] = self.normal(1, 1, width)
        self[start + "pos_embed"] = self.normal(1, (SIZE // patch) ** 2 + 1, width)
        self[start + "patch_embed.proj.weight"] = self.normal(width, 3, patch, patch) / 12
        self[start + "patch_embed.proj.bias"] = 0.1 * self.normal(width)
        self.norm(start + "norm", width)
        for number in range(self.layers):
            block = f"{start}blocks.{number}."
            self.linear(block + "attn.qkv", 3 * width, width)
            self.linear(block + "attn.proj", width, width)
            self.linear(block + "mlp.fc1", 4 * width, width)
            self.linear(block + "mlp.fc2", width, 4 * width)
            self.norm(block + "norm1", width)
            self.norm(block + "norm2", width)

    def add_text(self, start):
        width = self.text_width
        embeddings = start + "embeddings."
        self[embeddings + "position_ids"] = torch.arange(40)[None]
        self[embeddings + "word_embeddings.weight"] = self.normal(60, width)
        self[embeddings + "position_embeddings.weight"] = self.normal(40, width)
        self.norm(embeddings + "LayerNorm", width)
        for number in range(self.layers):
            layer = f"{start}encoder.layer.{number}."
            self.add_attention(layer + "attention", width)
            self.add_attention(layer + "crossattention", self.vision_width)
            self.linear(layer + "intermediate.dense", 4 * width, width)
            self.linear(layer + "output.dense", width, 4 * width)
            self.norm(layer + "output.LayerNorm", width)

    def add_attention(self, name, seen_width):
        width = self.text_width
        self.linear(name + ".self.query", width, width)
        self.linear(name + ".self.key", width, seen_width)
        self.linear(name + ".self.value", width, seen_width)
        self.linear(name + ".output.dense", width, width)
        self.norm(name + ".output.LayerNorm", width)


def save_tiny_blip(folder):
    "ImageReward with random weights, and a tokenizer that spells"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *LETTERS, *["##" + letter for letter in LETTERS]]
    torch.save(dict(BlipWeights()), folder / "ImageReward.pt")
    BertTokenizer(vocab=numbered(tokens)).save_pretrained(folder)
