"""Stable Diffusion 3 pipelines small enough to be made in a test

Every part from a configuration, random weights, tokenizers on the spot."""

from pathlib import Path

import torch

WORDS = (
    "a an the big small red blue green yellow cat dog owl fish lion horse "
    "on in of and with photo picture drawing background house two"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(length=16):
    "Most words of WORDS are one token, others fall apart; the same whenever it is made"
    from transformers import CLIPTokenizer

    merges = {}  # from left to right; a dict, for its order
    for word in WORDS:
        for k in range(1, len(word)):
            end = "</w>" if k == len(word) - 1 else ""
            merges[word[:k], word[k] + end] = None
    vocab = ["<|startoftext|>", "<|endoftext|>", "!", *LETTERS]
    vocab += [letter + "</w>" for letter in LETTERS]
    vocab += [left + right for left, right in merges]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(
        vocab=numbers, merges=list(merges), pad_token="!", model_max_length=length
    )


def t5_tokenizer(length=256):
    "The same words as pieces"
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS] + [("▁", -9.0)]
    pieces += [(letter, -10.0) for letter in LETTERS]
    pieces += [("▁" + letter, -10.0) for letter in LETTERS if letter not in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def clip_encoder(tokenizer, hidden, act):
    "A CLIP text encoder with projection"
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return CLIPTextModelWithProjection(config)


def t5_encoder(tokenizer, width):
    "A T5 encoder of one layer"
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_ff=2 * width,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def text_parts(t5=True, width=32):
    "Two CLIP encoders with projection, T5 or None, and their tokenizers"
    clip, pieces = clip_tokenizer(), t5_tokenizer()
    third = t5_encoder(pieces, width) if t5 else None
    return dict(
        text_encoder=clip_encoder(clip, width // 2 - 4, "quick_gelu"),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip, width // 2 + 4, "gelu"),
        tokenizer_2=clip,
        text_encoder_3=third,
        tokenizer_3=pieces if t5 else None,
    )


def tiny_vae(channels, scaling, shift, size=16):
    "A VAE of two levels, without layers between itself and its latents"
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=size,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def image_parts(sd35=False, width=32, size=8, channels=4, layers=2, heads=2):
    "Transformer and VAE; `sd35`: normalised queries and keys and dual attention"
    from diffusers import SD3Transformer2DModel

    new = dict(qk_norm="rms_norm", dual_attention_layers=(0,)) if sd35 else {}
    transformer = SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=width,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=width,
        pos_embed_max_size=size,
        **new,
    )
    vae = tiny_vae(channels, 1.5305, 0.0609, 2 * size)
    return dict(transformer=transformer, vae=vae)


def make_tiny_sd3(
    folder,  # Where the pipeline is saved; None saves nothing
    t5=True,  # With the third text encoder, or with None in its place
    seed=0,  # Of the random weights
    dtype=None,  # Of the saved weights, default float32
    scheduler_shift=3.0,  # Of the scheduler; Stable Diffusion 3 has 3
    sd35=False,  # Transformer of the kind of 3.5
    **sizes,  # width, size, channels, layers, heads
):  # The folder, or the pipeline where there is none
    "A whole pipeline: images of 16 x 16, latents of 4 x 8 x 8, random weights"
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from vggflow.worlds.checks import quietly

    with torch.random.fork_rng(), quietly():
        torch.manual_seed(seed)
        pipe = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=scheduler_shift),
            **text_parts(t5, sizes.get("width", 32)),
            **image_parts(sd35, **sizes),
        )
        if dtype is not None:
            pipe.to(dtype)
        if folder is None:
            return pipe
        pipe.save_pretrained(folder)
    return Path(folder)


def make_tiny_taesd(folder, channels=4, seed=0):
    "An `AutoencoderTiny` that fits the pipeline, as TAESD3 fits the real one"
    from diffusers import AutoencoderTiny

    from vggflow.worlds.checks import quietly

    with torch.random.fork_rng(), quietly():
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=channels,
        )
        vae.save_pretrained(folder)
    return Path(folder)
