"A FLUX pipeline small enough to be made in a test: dev, or schnell"

from pathlib import Path

import torch
from tiny_sd3 import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_vae


def text_parts(width):
    "CLIP, whose pooled output is used, T5, and their tokenizers"
    from transformers import CLIPTextModel

    clip, pieces = clip_tokenizer(), t5_tokenizer()
    config = clip_encoder(clip, width, "quick_gelu").config
    return dict(
        text_encoder=CLIPTextModel(config),
        tokenizer=clip,
        text_encoder_2=t5_encoder(pieces, width),
        tokenizer_2=pieces,
    )


def image_parts(dev, width, channels=4):
    "Transformer of two double and two single blocks, and VAE"
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    vae = tiny_vae(channels, scaling=0.3611, shift=0.1159)
    return dict(transformer=transformer, vae=vae)


def make_tiny_flux(
    folder,  # Where the pipeline is saved
    dev=True,  # Told its guidance, a shift that grows with the image; False: schnell
    seed=0,  # Of the random weights
    width=32,  # Of the text encoders
):  # The folder
    "A whole pipeline with random weights"
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from vggflow.worlds.checks import quietly

    shift = dict(shift=3.0, use_dynamic_shifting=True) if dev else dict(shift=1.0)
    with torch.random.fork_rng(), quietly():
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
            **text_parts(width),
            **image_parts(dev, width),
        )
        pipe.save_pretrained(folder)
    return Path(folder)
