"""Stable Diffusion 3 with random weights: its sizes, and small ones of the same shape.

Costs do not depend on the weights, nor on prompts' embeddings, which are random too:
nothing is downloaded.
"""

import diffusers
import torch
import transformers
from torch.nn.functional import interpolate

from vggflow.common.torchvision_cpu import cure
from vggflow.worlds.sd3 import SD3Flow

cure()

# `medium` is stable-diffusion-3-medium and the ViT-H/14 of PickScore and HPSv2;
# the parts of `small` have like shares of the operations as those of `medium` at 512

SMALL = dict(
    transformer=dict(
        num_layers=12,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=96,
    ),
    vae=dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=8),
    tokens=77,
    vision=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
    text=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    projection_dim=32,
)
MEDIUM = dict(
    transformer=dict(
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    ),
    vae=dict(block_out_channels=(128, 256, 512, 512), norm_num_groups=32),
    tokens=333,
    vision=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    text=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
    projection_dim=1024,
)
TINY = dict(SMALL, transformer=dict(SMALL["transformer"], num_layers=2))  # To count passes
SIZES = dict(tiny=TINY, small=SMALL, medium=MEDIUM)


class RandomPrompts(SD3Flow):
    "An `SD3Flow` whose prompts have random embeddings: no text encoder is needed"

    def set_tokens(self, tokens):
        self.__dict__["tokens"] = tokens
        return self

    def encode(self, prompts):
        config = self.transformer.config
        generator = torch.Generator().manual_seed(0)

        def make(*shape):
            numbers = torch.randn(*shape, generator=generator)
            return numbers.to(self.device, self.transformer.dtype)

        embeddings = make(1, self.tokens, config.joint_attention_dim)
        pooled = make(1, config.pooled_projection_dim)
        n = len(prompts)
        return embeddings.expand(n, -1, -1), pooled.expand(n, -1)


def shape_of(size):
    "Sizes by name, or as they are given"
    return size if isinstance(size, dict) else SIZES[size]


def make_transformer(size, resolution):
    "A transformer with random weights"
    latents = dict(sample_size=resolution // 8, in_channels=16, out_channels=16)
    shape = shape_of(size)["transformer"]
    return diffusers.SD3Transformer2DModel(patch_size=2, **latents, **shape)


def make_decoder(size, resolution):
    "An autoencoder with random weights"
    shape = shape_of(size)["vae"]
    n = len(shape["block_out_channels"])
    return diffusers.AutoencoderKL(
        latent_channels=16,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=resolution,
        **shape,
    )


def make_pipeline(size, resolution, device, dtype):
    "A pipeline without text encoders, made on `device`"
    with torch.device(device):
        transformer = make_transformer(size, resolution)
        vae = make_decoder(size, resolution)
    if dtype != torch.float32:
        transformer, vae = transformer.to(dtype), vae.to(dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kinds = [
        f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")
    ]
    none = dict.fromkeys(kinds)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, **none)


class RandomClipScore(torch.nn.Module):
    "Cosine of image features with a fixed direction: a CLIP reward as far as cost goes"

    def __init__(self, size, device, dtype):
        super().__init__()
        shape = shape_of(size)
        config = transformers.CLIPConfig(
            text_config=shape["text"],
            vision_config=shape["vision"],
            projection_dim=shape["projection_dim"],
        )
        with torch.device(device):
            self.clip = transformers.CLIPModel(config).to(dtype)
        self.clip.requires_grad_(False).eval()

    def forward(self, images, prompts=None):
        side = self.clip.config.vision_config.image_size
        pixels = interpolate(images, size=side, mode="bicubic", antialias=True)
        return self.clip.get_image_features(pixel_values=pixels).pooler_output.mean(1)


def build(size, resolution, guidance=5.0, device="cpu", dtype=torch.float32, rank=8):
    "(flow, reward) with random weights"
    torch.manual_seed(0)
    pipeline = make_pipeline(size, resolution, device, dtype)
    flow = RandomPrompts(pipeline, lora_rank=rank, guidance_scale=guidance)
    flow.set_tokens(shape_of(size)["tokens"])
    return flow, RandomClipScore(size, device, torch.float32)
