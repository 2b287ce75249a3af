"A Z-Image pipeline small enough to be made in a test"

from pathlib import Path

import torch
from tiny_sd3 import LETTERS, WORDS, tiny_vae

CHAT = "{% for m in messages %}user {{ m.content }} {% endfor %}assistant"


def chat_tokenizer():
    "Whole words, letters of others, and a template for what a user says"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "user", "assistant", *WORDS, *LETTERS]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def chat_model(tokenizer, width):
    "A language model of three layers"
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
    )
    return Qwen3Model(config)


def make_tiny_z_image(
    folder,  # Where the pipeline is saved
    seed=0,  # Of the random weights
    width=32,  # Of the text encoder
    channels=4,  # Of the latents
):  # The folder
    "A whole pipeline with random weights"
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )

    from vggflow.worlds.checks import quietly

    with torch.random.fork_rng(), quietly():
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=channels,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=width,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 32, 32],
        )
        for weight in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(weight, std=0.1)
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(channels, scaling=0.3611, shift=0.1159),
            text_encoder=chat_model(tokenizer, width),
            tokenizer=tokenizer,
            transformer=transformer,
        )
        pipe.save_pretrained(folder)
    return Path(folder)
