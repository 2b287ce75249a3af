"FLUX, dev and schnell, beside the stock pipeline and beside code written from scratch"

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from tiny_flows import all_close, close
from tiny_flux import make_tiny_flux

from vggflow.commands.export import export_lora, load_correction
from vggflow.methods.costate import VGGFlowPMP
from vggflow.methods.method import Samples
from vggflow.methods.registry import METHODS
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import FlowModel, sample, time_grid
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.worlds.checks import quietly
from vggflow.worlds.flux import FluxFlow
from vggflow.worlds.lora import lora_settings
from vggflow.worlds.sd3 import SD3Flow
from vggflow.worlds.world import load_flow, load_model

TWO = ["a cat", "two owl"]
KINDS = ["dev", "schnell"]
SIZES = [16, (16, 24)]  # pixels
T = torch.tensor([0.2, 0.7])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Folders of tiny pipelines"
    root = tmp_path_factory.mktemp("flux")
    return {kind: make_tiny_flux(root / kind, dev=kind == "dev") for kind in KINDS}


def open_flow(folder, shake=0.2, **settings):
    "A flow from disk, with an adapter that is not zero unless `shake` is"
    settings = dict(image_size=16, max_sequence_length=8, lora_rank=2) | settings
    torch.manual_seed(3)
    with quietly():
        flow = load_flow(str(folder), **settings)
    for weight in flow.trainable_parameters() if shake else ():
        torch.nn.init.normal_(weight, std=shake)
    flow.pipe.set_progress_bar_config(disable=True)
    return flow


def stock(folder, lora=None):
    "The pipeline as diffusers loads it"
    with quietly():
        pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def packed(x):
    "By the pipeline's own function"
    return FluxPipeline._pack_latents(x, *x.shape)


def drawn_by(pipe, x, kind="latent", **how):
    "What the pipeline draws in five steps from our noise"
    height, width = (2 * side for side in x.shape[-2:])
    how = dict(num_inference_steps=5, max_sequence_length=8) | how
    how |= dict(height=height, width=width, latents=packed(x), output_type=kind)
    return pipe(TWO, **how).images


def ours(flow, x):
    "The same by our sampler"
    with torch.no_grad():
        end = sample(flow, x, flow.times(5), TWO).x1
        return end, flow.decode(end).clamp(0, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stock_pipeline_draws_the_same_from_our_lora(tiny, tmp_path, kind, size):
    flow = open_flow(tiny[kind], image_size=size, lora_alpha=3)
    assert type(flow) is FluxFlow
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    height, width = (size, size) if isinstance(size, int) else size
    assert x.shape == (2, 4, height // 2, width // 2)
    end, images = ours(flow, x)
    assert images.shape == (2, 3, height, width)
    flow.save_lora(tmp_path)
    pipe = stock(tiny[kind], tmp_path)
    assert close(packed(end), drawn_by(pipe, x, guidance_scale=3.5))
    assert close(images, drawn_by(pipe, x, "pt", guidance_scale=3.5))
    # teeth: without the adapter; told another guidance, where it is told one
    assert not close(packed(end), drawn_by(stock(tiny[kind]), x), 1e-2)
    other = drawn_by(pipe, x, guidance_scale=5.0)
    assert close(packed(end), other) == (kind == "schnell")


@pytest.mark.parametrize("batched", [True, False])
def test_true_guidance_and_negative_prompts_are_diffusers(tiny, tmp_path, batched):
    settings = dict(true_cfg_scale=3.0, negative_prompt="a red fish")
    flow = open_flow(tiny["dev"], **settings, cfg_batched=batched)
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    flow.save_lora(tmp_path)
    pipe = stock(tiny["dev"], tmp_path)
    settings["negative_prompt"] = ["a red fish"] * 2
    end, _ = ours(flow, x)
    assert close(packed(end), drawn_by(pipe, x, **settings))
    assert not close(packed(end), drawn_by(pipe, x), 1e-3)


def test_times_are_the_pipelines(tiny):
    "Shifted by the size of the image for dev, even for schnell"
    for kind in KINDS:
        for size in SIZES:
            flow, pipe = open_flow(tiny[kind], image_size=size), stock(tiny[kind])
            x = flow.prior(2)
            drawn_by(pipe, x, num_inference_steps=7)
            assert close(1 - flow.times(7), pipe.scheduler.sigmas.double(), 1e-6)
    assert close(open_flow(tiny["schnell"]).times(7), time_grid(7), 1e-6)
    assert close(open_flow(tiny["dev"]).times(7, 2.0), time_grid(7, 2.0), 1e-6)


class FromScratch(FlowModel):
    "FLUX by the functions of its pipeline, with an adapter of peft"

    def __init__(self, pipe, told, height, width):
        super().__init__()
        self.pipe, self.told, self.shape = pipe, told, (4, height, width)
        self.transformer, self.vae = pipe.transformer, pipe.vae
        self.vae.requires_grad_(False)

    def prior(self, n, cond=None, generator=None):
        return torch.randn(n, *self.shape, generator=generator)

    def velocity(self, x, t, cond=None):
        prompts = [""] * len(x) if cond is None else list(cond)
        with torch.no_grad():
            context, pooled, places = self.pipe.encode_prompt(
                prompts, max_sequence_length=8
            )
        height, width = x.shape[-2:]
        ids = FluxPipeline._prepare_latent_image_ids(
            len(x), height // 2, width // 2, x.device, x.dtype
        )
        told = None if self.told is None else torch.full((len(x),), self.told)
        out = self.transformer(
            packed(x), context, pooled, 1 - t, ids, places, told, return_dict=False
        )[0]
        scale = self.pipe.vae_scale_factor
        return -FluxPipeline._unpack_latents(out, scale * height, scale * width, scale)

    def base_velocity(self, x, t, cond=None):
        self.transformer.disable_adapters()
        try:
            return self.velocity(x, t, cond)
        finally:
            self.transformer.enable_adapters()
            for name, weight in self.transformer.named_parameters():
                weight.requires_grad_("lora_" in name)

    def decode(self, x):
        config = self.vae.config
        z = x / config.scaling_factor + config.shift_factor
        images = self.vae.decode(z, return_dict=False)[0] / 2 + 0.5
        return images + 0.9 * (images.clamp(0, 1) - images)

    def trainable_parameters(self):
        named = self.transformer.named_parameters()
        return [weight for name, weight in named if "lora_" in name]


def brightness(images, prompts=None):
    "Brightness, more for the left half"
    half = images.shape[-1] // 2
    return images[..., :half].mean((1, 2, 3)) + images.mean((1, 2, 3)).square()


def method_gradient(flow, kind):
    "Loss and gradient of a method's first update in the adapter, the same noise for all"
    method = METHODS[kind]()
    if hasattr(method, "learn"):
        method.learn = False  # the network ν is the flow's own; see the test of it
    samples = Samples.draw(flow, TWO, time_grid(4), indices=range(2), transitions=2, seed=5)
    method.setup(flow, brightness)
    items = method.prepare(flow, brightness, samples)
    loss, _ = method.loss(flow, items)
    return loss, torch.autograd.grad(loss, flow.trainable_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_method_are_those_of_code_from_scratch(tiny, kind, method):
    flow = open_flow(tiny[kind], image_size=(16, 24))
    told = 3.5 if kind == "dev" else None
    scratch = FromScratch(copy.deepcopy(flow.pipe), told, 8, 12)
    loss, gradient = method_gradient(flow, method)
    wanted, right = method_gradient(scratch, method)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert all_close(gradient, right, 1e-4)
    assert max(part.abs().max() for part in gradient) > 0


@pytest.mark.parametrize("correction", ["transformer", "adapter"])
def test_the_correction_is_zero_at_first_learns_and_is_saved(tiny, tmp_path, correction):
    flow = open_flow(tiny["dev"], shake=0, correction=correction, image_size=(16, 24))
    x = flow.prior(2)
    nu, hints = flow.make_correction(), [x, x]
    with torch.no_grad():
        assert not nu(x, T, TWO, hints).any()
    method = VGGFlow(beta=2.0)
    config = FinetuneConfig(updates=2, batch_size=2, steps=3, transitions=2, lr=1e-2)
    out = tmp_path / "run"
    history = finetune(
        flow, brightness, method, config, out=out, prompts=TWO, progress=False
    )
    assert history.rows[-1]["consistency"] > 0
    with torch.no_grad():
        learned = method.value.nu(x, T, TWO, *hints)
    assert learned.abs().max() > 0
    export_lora(flow, tmp_path / "given", run=out)
    card = (tmp_path / "given/README.md").read_text()
    assert "FluxPipeline" in card and "StableDiffusion3Pipeline" not in card
    again = open_flow(tiny["dev"], shake=0, correction=correction, image_size=(16, 24))
    loaded = load_correction(again, tmp_path / "given").nu
    with torch.no_grad():
        assert close(loaded(x, T, TWO, *hints), learned, 1e-6)


def run(folder, out=None, updates=4, **settings):
    "A short run, and what it leaves in the adapter"
    flow = open_flow(folder, shake=0, **settings)
    config = FinetuneConfig(
        updates=updates, batch_size=2, steps=3, transitions=2, lr=1e-2, save_every=2
    )
    how = dict(out=out, prompts=TWO, progress=False)
    history = finetune(flow, brightness, VGGFlowPMP(), config, **how)
    return flow, history


def test_a_run_resumes_to_the_last_bit(tiny, tmp_path):
    whole, _ = run(tiny["dev"], tmp_path / "whole")
    run(tiny["dev"], tmp_path / "cut", updates=2)
    again, history = run(tiny["dev"], tmp_path / "cut")
    assert [row["update"] for row in history.rows] == [1, 2, 3, 4]
    state = again.trainable_state()
    assert all(torch.equal(w, state[name]) for name, w in whole.trainable_state().items())


def test_memory_savers_change_nothing(tiny):
    plain, one = run(tiny["dev"], updates=1)
    frugal, other = run(
        tiny["dev"], updates=1, gradient_checkpointing=True, decode_checkpointing=True
    )
    assert one.rows[0]["loss"] == pytest.approx(other.rows[0]["loss"], rel=1e-4)
    pairs = zip(plain.trainable_parameters(), frugal.trainable_parameters())
    assert all(close(a, b, 1e-3) for a, b in pairs)


def test_a_run_in_half_precision(tiny):
    flow, history = run(tiny["dev"], updates=1, dtype="bfloat16")
    assert np.isfinite(history.rows[0]["loss"])
    assert all(weight.dtype == torch.float32 for weight in flow.trainable_parameters())


def test_a_folder_is_opened_by_its_index_and_an_adapter_by_its_settings(tiny, tmp_path):
    flow = open_flow(tiny["dev"], lora_rank=3)
    flow.save_lora(tmp_path)
    assert lora_settings(tmp_path)["lora_rank"] == 3
    with quietly():
        again = load_model(tiny["dev"], tmp_path, image_size=16, max_sequence_length=8)
    x = flow.prior(2)
    with torch.no_grad():
        assert close(again.velocity(x, T, TWO), flow.velocity(x, T, TWO))
    assert again.guidance_scale == 3.5 and again.recipe["name"] == str(tiny["dev"])
    with pytest.raises(ValueError, match="holds a FluxPipeline, which is no SD3Flow"):
        SD3Flow.from_pretrained(tiny["dev"])
    with pytest.raises(ValueError, match=r"multiple of 4 for this model, got \(16, 30\)"):
        open_flow(tiny["dev"], image_size=(16, 30))


def test_what_is_unusual_is_in_the_record(tiny):
    about = open_flow(tiny["dev"], image_size=(16, 24), true_cfg_scale=2.0).describe()
    assert about["latent_size"] == [8, 12] and about["true_cfg_scale"] == 2.0
    json.dumps(about)


def test_the_doctor_knows_its_size_and_its_correction(tiny):
    from vggflow.commands.doctor import check_sizes_of, memory_plan
    from vggflow.commands.memory import correction_size, memory_estimate
    from vggflow.commands.parts import count_weights, look_at_model

    seen = look_at_model(tiny["dev"])
    flow = open_flow(tiny["dev"])
    config = seen["configs"]["transformer"]
    net = flow.make_correction()
    assert correction_size(seen["flow"], config, 2) == count_weights(net)
    assert "16" in check_sizes_of(dict(image_size=16), tiny["dev"])
    with pytest.raises(ValueError, match="multiple of 4"):
        check_sizes_of(dict(image_size=18), tiny["dev"])
    given = dict(image_size=[16, 24], guidance_scale=3.5, batch_size=2)
    plan = memory_plan(given, "VGG-Flow", {}, seen, 2)
    assert plan.branches == 1, "told, not guided by two calls"
    estimate = memory_estimate(plan, seen)
    assert estimate["transformer"] == 4 * count_weights(seen["nets"]["transformer"])
    double = memory_plan({**given, "true_cfg_scale": 2.0}, "VGG-Flow", {}, seen, 2)
    assert double.branches == 2


def test_full_size_has_as_many_weights_as_is_published():
    from vggflow.worlds.checks import transformer_size

    published = dict(num_layers=19, num_single_layers=38)
    published |= dict(num_attention_heads=24, attention_head_dim=128)
    assert transformer_size(published) == pytest.approx(11.9e9, rel=0.02)
