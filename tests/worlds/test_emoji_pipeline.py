"The adapter on the emoji pipeline, beside the stock pipeline and central differences"

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_flows import COND, close, shaken_emoji, stock_pipeline

from vggflow.theory.flow import sample, time_grid
from vggflow.worlds.decoding import soft_clamp
from vggflow.worlds.emoji import load_emoji
from vggflow.worlds.emoji_data import asset
from vggflow.worlds.sd3 import SD3Flow


@pytest.fixture(scope="module")
def flow():
    return load_emoji()


@pytest.fixture
def point(flow):
    generator = torch.Generator().manual_seed(0)
    return flow.prior(3, generator=generator), torch.tensor([0.1, 0.5, 0.9])


@torch.no_grad()
def velocities(flow, point, prompts=COND):
    "Finetuned and base velocity"
    return flow.velocity(*point, prompts), flow.base_velocity(*point, prompts)


def test_starts_at_the_base(flow, point):
    assert torch.equal(*velocities(flow, point))


def test_base_ignores_the_adapter(flow, point):
    tuned, base = velocities(shaken_emoji(), point)
    _, untouched = velocities(flow, point)
    assert close(base, untouched)
    assert not close(tuned, untouched, 1e-2)


def test_adapter_back_on_after_an_error(point):
    flow = shaken_emoji()
    before, _ = velocities(flow, point)
    with pytest.raises(ValueError, match="one prompt for each sample"):
        flow.base_velocity(*point, COND[:1])
    assert torch.equal(before, velocities(flow, point)[0])
    assert all(weight.requires_grad for weight in flow.trainable_parameters())


@torch.no_grad()
def latents(flow, x0, times, guidance):
    "Where our sampler ends, on the base model"
    flow.guidance_scale = guidance
    try:
        return sample(flow, x0, times, COND, base=True).x1
    finally:
        flow.guidance_scale = 1.0


def test_sampler_is_the_stock_pipeline(flow):
    times, generator = time_grid(8), torch.Generator().manual_seed(2)
    x0 = flow.prior(3, generator=generator)
    how = dict(sigmas=(1 - times[:-1]).tolist(), guidance_scale=2.0)
    pipe = stock_pipeline(asset("base"))
    stock = pipe(COND, latents=x0, output_type="latent", **how).images
    assert close(latents(flow, x0, times, 2.0), stock, 1e-4)
    assert not close(latents(flow, x0, times, 2.01), stock, 1e-4)  # guidance a little off
    assert not close(latents(flow, x0, time_grid(8, 1.01), 2.0), stock, 1e-4)


def test_images_are_the_stock_pipeline(flow):
    times, generator = time_grid(20), torch.Generator().manual_seed(3)
    x0 = flow.prior(1, generator=generator)
    how = dict(sigmas=(1 - times[:-1]).tolist(), guidance_scale=1.0, output_type="np")
    images = stock_pipeline(asset("base"))("a cat", latents=x0, **how).images
    stock = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        x1 = sample(flow, x0, times, ["a cat"], base=True).x1
        own, other = (flow.decode(s * x1).clamp(0, 1) for s in (1.0, 1.01))
    assert close(own, stock, 1e-3)
    assert not close(other, stock, 1e-3)  # latents 1 % too large


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_jvp_and_vjp_in_double(scale):
    settings = dict(guidance_scale=scale, dtype=torch.float64)
    flow = SD3Flow.from_pretrained(asset("base"), **settings)
    torch.manual_seed(0)
    x, u, w = (torch.randn(3, 8, 8, 8, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 0.9])

    def field(y):
        return flow.base_velocity(y, t, COND)

    _, Ju = torch.func.jvp(field, (x,), (u,))
    _, pull = torch.func.vjp(field, x)
    with torch.no_grad():
        difference = (field(x + 1e-4 * u) - field(x - 1e-4 * u)) / 2e-4
    assert (Ju - difference).norm() < 1e-5 * difference.norm()
    assert torch.allclose((w * Ju).sum(), (pull(w)[0] * u).sum(), rtol=1e-9)


def test_forward_ad_with_dual_numbers(flow, point):
    import torch.autograd.forward_ad as forward_ad

    x, t = point
    u = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = flow.base_velocity(forward_ad.make_dual(x, u), t, COND)
        tangent = forward_ad.unpack_dual(dual).tangent
    _, Ju = torch.func.jvp(lambda y: flow.base_velocity(y, t, COND), (x,), (u,))
    assert close(tangent, Ju)


def test_guidance_detaches_the_empty_prompt_in_training(point):
    flow, w = shaken_emoji(), torch.randn(3, 8, 8, 8)

    def gradient(scale):
        flow.guidance_scale = scale
        total = (flow.velocity(*point, COND) * w).sum()
        return torch.autograd.grad(total, flow.trainable_parameters())

    for two, one in zip(gradient(2.0), gradient(1.0)):
        assert torch.allclose(two, 2 * one, atol=1e-4 * (1 + one.abs().max()))


def test_saved_lora_is_read_by_diffusers(tmp_path, point):
    flow = shaken_emoji(lora_rank=4, lora_alpha=10)
    flow.save_lora(tmp_path)
    pipe = stock_pipeline(asset("base"))
    pipe.load_lora_weights(tmp_path)
    x, t = point
    with torch.no_grad():
        stock = flow.call_transformer(pipe.transformer, x, t, *flow.encode(COND))
    assert close(velocities(flow, point)[0], stock)
    again = load_emoji(lora_rank=4, lora_alpha=10)
    again.load_lora(tmp_path)
    assert close(velocities(again, point)[0], stock)
    other = shaken_emoji(lora_rank=4, lora_alpha=10.01)
    assert not close(velocities(other, point)[0], stock)  # alpha a thousandth off
    with pytest.raises(ValueError, match="lora_rank"):
        load_emoji(lora_rank=2).load_lora(tmp_path)


def test_state_round_trip(point):
    flow, other = shaken_emoji(), load_emoji()
    other.load_trainable_state(flow.trainable_state())
    for name, weight in flow.trainable_state().items():
        assert torch.equal(other.trainable_state()[name], weight)
    assert close(velocities(other, point)[0], velocities(flow, point)[0])
    with pytest.raises(ValueError, match="lora_rank"):
        load_emoji(lora_rank=2).load_trainable_state(flow.trainable_state())


def test_prompts_are_encoded_once(flow, monkeypatch):
    calls, real = [], flow.pipe.encode_prompt

    def encode(prompts, *args, **kw):
        calls.append(list(prompts))
        return real(prompts, *args, **kw)

    monkeypatch.setattr(flow.pipe, "encode_prompt", encode)
    flow.encode(["a big lion", "a big lion", "a small lion"])
    flow.encode(["a small lion"])
    assert calls == [["a big lion", "a small lion"]]


def test_decode_keeps_gradients(flow):
    z = (8 * torch.randn(2, 8, 8, 8)).requires_grad_(True)  # far out: pixels saturate
    x = flow.decode(z)
    gradient = torch.autograd.grad(x.sum(), z)[0]
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    y = torch.tensor([-2.0, 0.5, 3.0])
    assert torch.allclose(soft_clamp(y), torch.tensor([-0.2, 0.5, 1.2]))


def test_no_prompt_is_the_empty_prompt(flow, point):
    with torch.no_grad():
        none, empty = flow.base_velocity(*point), flow.base_velocity(*point, [""] * 3)
    assert torch.equal(none, empty)


def test_other_shapes_and_half_precision():
    "Size, channels and precision come from the configuration"
    pipe = stock_pipeline(asset("base"), dtype=torch.bfloat16)
    other = dict(sample_size=16, pos_embed_max_size=8, num_layers=2, qk_norm="rms_norm")
    config = {**dict(pipe.transformer.config), **other}
    pipe.transformer = SD3Transformer2DModel.from_config(config).to(torch.bfloat16)
    flow = SD3Flow(pipe, lora_rank=2)
    x = flow.prior(2)
    assert x.shape == (2, 8, 16, 16) and x.dtype == torch.float32
    assert flow.trainable_parameters()[0].dtype == torch.float32
    v = flow.velocity(x, torch.tensor([0.2, 0.8]), ["a cat", "a dog"])
    images = flow.decode(x)
    assert v.dtype == images.dtype == torch.float32 and images.shape == (2, 3, 128, 128)
    v.square().sum().backward()
    grads = [weight.grad for weight in flow.trainable_parameters()]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)
