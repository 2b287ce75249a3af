"Flows on tiny pipelines from disk, and what several tests measure in them"

import torch
from diffusers import StableDiffusion3Pipeline

from vggflow.worlds.checks import quietly
from vggflow.worlds.emoji import load_emoji
from vggflow.worlds.sd3 import SD3Flow

COND = ["a cat", "an owl", "a fish on a blue background"]
TWO = ["a cat", "two owl"]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.7])


def reload(folder, shake=0.2, **settings):
    "A flow from disk, with an adapter that is not zero unless `shake` is"
    torch.manual_seed(3)
    settings = {"max_sequence_length": 8, "text_batch": 1, **settings}
    with quietly():
        flow = SD3Flow.from_pretrained(folder, **settings)
    flow.pipe.set_progress_bar_config(disable=True)
    for weight in flow.trainable_parameters() if shake else ():
        torch.nn.init.normal_(weight, std=shake)
    return flow


def shaken_emoji(**settings):
    "The emoji model with an adapter that is not zero"
    flow = load_emoji(**settings)
    torch.manual_seed(1)
    for weight in flow.trainable_parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return flow


def stock_pipeline(folder, **parts):
    "The pipeline as diffusers loads it"
    with quietly():
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(a, b, tolerance=1e-5):
    "Whether the largest difference is at most a share of the largest number"
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def all_close(many, others, tolerance=1e-5):
    "`close`, for gradients: relative to the largest number of all of them"
    scale = max(b.abs().max() for b in others)
    apart = max((a - b).abs().max() for a, b in zip(many, others, strict=True))
    return bool(apart <= tolerance * scale)


@torch.no_grad()
def velocity(flow, prompts=TWO):
    "Finetuned velocity at two fixed points"
    return flow.velocity(X, T, prompts)


@torch.no_grad()
def base_velocity(flow, prompts=TWO):
    "Base velocity at two fixed points"
    return flow.base_velocity(X, T, prompts)


def pull(flow):
    "VJP of the base velocity, by torch.func"
    return torch.func.vjp(lambda x: flow.base_velocity(x, T, TWO), X)[1](X)[0]


def pull_by_autograd(flow):
    "The same by autograd"
    x = X.clone().requires_grad_()
    return torch.autograd.grad((flow.base_velocity(x, T, TWO) * X).sum(), x)[0]


def adapter_gradient(flow):
    "Gradient in the adapter's weights, always with the same dropout"
    torch.manual_seed(5)
    total = (flow.velocity(X, T, TWO) * X).sum()
    return torch.autograd.grad(total, flow.trainable_parameters())
