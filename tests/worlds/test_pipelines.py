"Every kind of pipeline beside diffusers' own, and beside code written from scratch"

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline
from tiny_flows import all_close, close
from tiny_flux import make_tiny_flux
from tiny_sd3 import make_tiny_sd3
from tiny_z_image import make_tiny_z_image

from vggflow.commands.export import export_lora, load_correction
from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.method import Samples
from vggflow.methods.registry import METHODS
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import FlowModel, sample, time_grid
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.worlds.checks import flow_of_class, quietly
from vggflow.worlds.flux import FluxFlow
from vggflow.worlds.lora import lora_settings
from vggflow.worlds.sd3 import SD3Flow
from vggflow.worlds.world import load_flow, load_model
from vggflow.worlds.z_image import ZImageFlow

TWO = ["a cat", "two owl"]
T = torch.tensor([0.2, 0.7])
SIZES = [16, (16, 8)]  # pixels


def as_it_is(x):
    "The latents of a pipeline that packs none"
    return x


def packed(x):
    "By FLUX's own function"
    return FluxPipeline._pack_latents(x, *x.shape)


@dataclass
class Kind:
    "A kind of pipeline, and what a test has to know of it"

    flow: type
    pipeline: type
    make: object  # folder -> a tiny one in it
    plain: dict  # Settings of one call for a velocity; the same for flow and pipeline
    guided: dict  # Of two calls
    latents: object = as_it_is  # Ours, as the pipeline takes and gives them


KINDS = dict(
    sd3=Kind(
        SD3Flow,
        StableDiffusion3Pipeline,
        make_tiny_sd3,
        plain=dict(guidance_scale=1.0),
        guided=dict(guidance_scale=3.0),
    ),
    dev=Kind(
        FluxFlow,
        FluxPipeline,
        make_tiny_flux,
        plain=dict(guidance_scale=3.5),
        guided=dict(guidance_scale=2.0, true_cfg_scale=3.0, negative_prompt=""),
        latents=packed,
    ),
    schnell=Kind(
        FluxFlow,
        FluxPipeline,
        lambda folder: make_tiny_flux(folder, dev=False),
        plain=dict(guidance_scale=0.0),
        guided=dict(guidance_scale=0.0, true_cfg_scale=2.0, negative_prompt=""),
        latents=packed,
    ),
    z_image=Kind(
        ZImageFlow,
        ZImagePipeline,
        make_tiny_z_image,
        plain=dict(guidance_scale=0.0),
        guided=dict(guidance_scale=2.0),
    ),
)


def open_flow(folder, shake=0.2, **settings):
    "A flow from disk, with an adapter that is not zero unless `shake` is"
    settings = dict(image_size=16, max_sequence_length=16, lora_rank=2) | settings
    torch.manual_seed(3)
    with quietly():
        flow = load_flow(str(folder), **settings)
    for weight in flow.trainable_parameters() if shake else ():
        torch.nn.init.normal_(weight, std=shake)
    flow.pipe.set_progress_bar_config(disable=True)
    return flow


def stock(name, folder, lora=None):
    "The pipeline as diffusers loads it"
    with quietly():
        pipe = KINDS[name].pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def drawn_by(name, pipe, x, kind="latent", **how):
    "What the pipeline draws in five steps from our noise"
    height, width = (2 * side for side in x.shape[-2:])
    how = dict(num_inference_steps=5, max_sequence_length=16) | copy.deepcopy(how)
    how |= dict(height=height, width=width, latents=KINDS[name].latents(x.clone()))
    return pipe(list(TWO), output_type=kind, **how).images


def ours(flow, x):
    "The same by our sampler"
    with torch.no_grad():
        end = sample(flow, x, flow.times(5), TWO).x1
        return end, flow.decode(end).clamp(0, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("guidance", ["plain", "guided"])
@pytest.mark.parametrize("name", KINDS)
def test_stock_pipeline_draws_the_same_from_our_lora(
    pipelines, tmp_path, name, guidance, size
):
    kind = KINDS[name]
    settings = getattr(kind, guidance)
    if guidance == "guided":
        settings = {**settings, "negative_prompt": "a red fish"}
    flow = open_flow(pipelines[name], image_size=size, lora_alpha=3, **settings)
    assert type(flow) is kind.flow
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    height, width = (size, size) if isinstance(size, int) else size
    assert x.shape == (2, 4, height // 2, width // 2)
    end, images = ours(flow, x)
    assert images.shape == (2, 3, height, width)
    flow.save_lora(tmp_path)
    pipe = stock(name, pipelines[name], tmp_path)
    if guidance == "guided":
        settings["negative_prompt"] = ["a red fish"] * 2
    assert close(kind.latents(end), drawn_by(name, pipe, x, **settings))
    assert close(images, drawn_by(name, pipe, x, "pt", **settings))
    # teeth: without the adapter, or with another negative prompt, it differs
    bare = stock(name, pipelines[name])
    assert not close(kind.latents(end), drawn_by(name, bare, x, **settings), 1e-2)
    if guidance == "guided":
        settings["negative_prompt"] = ["two blue horse on a house"] * 2
        assert not close(kind.latents(end), drawn_by(name, pipe, x, **settings), 1e-4)


def test_a_distilled_model_is_told_its_guidance(pipelines):
    x = open_flow(pipelines["dev"]).prior(2)
    for name, differs in dict(dev=True, schnell=False).items():
        ends = [
            ours(open_flow(pipelines[name], guidance_scale=g), x)[0] for g in (1.0, 5.0)
        ]
        assert close(*ends, 1e-4) != differs


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_two_calls_need_a_negative_prompt_as_in_diffusers(pipelines, name):
    "Which there leaves them out without a word"
    with pytest.raises(ValueError, match="true_cfg_scale=3 .* give negative_prompt"):
        open_flow(pipelines[name], true_cfg_scale=3.0)
    pipe, x = stock(name, pipelines[name]), torch.randn(2, 4, 8, 8)
    one, two = (drawn_by(name, pipe, x, true_cfg_scale=w) for w in (1.0, 3.0))
    assert torch.equal(one, two)
    assert open_flow(pipelines[name], true_cfg_scale=None).weight == 1.0


@pytest.mark.parametrize("name", KINDS)
def test_times_are_the_pipelines(pipelines, name):
    "Those of dev are shifted by the size of the image"
    seen = []
    for size in SIZES:
        flow, pipe = (
            open_flow(pipelines[name], image_size=size),
            stock(name, pipelines[name]),
        )
        drawn_by(name, pipe, flow.prior(2), num_inference_steps=7)
        assert close(1 - flow.times(7), pipe.scheduler.sigmas.double(), 1e-6)
        seen.append(flow.times(7))
    assert torch.equal(*seen) == (name != "dev")
    assert close(flow.times(7, 2.0), time_grid(7, 2.0), 1e-6)


class FromScratch(FlowModel):
    "A pipeline by its own functions, with an adapter of peft"

    def __init__(self, pipe, told=None):
        super().__init__()
        self.pipe, self.told = pipe, told
        self.transformer, self.vae = pipe.transformer, pipe.vae
        self.vae.requires_grad_(False)

    def prior(self, n, cond=None, generator=None):
        return torch.randn(n, 4, 8, 4, generator=generator)

    def velocity(self, x, t, cond=None):
        prompts = [""] * len(x) if cond is None else list(cond)
        how = dict(prompts=prompts, max_sequence_length=16)
        calls = dict(
            StableDiffusion3Pipeline=self.of_sd3,
            FluxPipeline=self.of_flux,
            ZImagePipeline=self.of_z_image,
        )
        return calls[type(self.pipe).__name__](x, t, **how)

    def of_sd3(self, x, t, prompts, **how):
        with torch.no_grad():
            context, _, pooled, _ = self.pipe.encode_prompt(
                prompts, prompts, prompts, do_classifier_free_guidance=False, **how
            )
        return -self.transformer(x, context, pooled, 1000 * (1 - t), return_dict=False)[0]

    def of_flux(self, x, t, prompts, **how):
        with torch.no_grad():
            context, pooled, places = self.pipe.encode_prompt(prompts, **how)
        height, width = x.shape[-2:]
        ids = FluxPipeline._prepare_latent_image_ids(
            len(x), height // 2, width // 2, x.device, x.dtype
        )
        told = None if self.told is None else torch.full((len(x),), self.told)
        out = self.transformer(
            packed(x), context, pooled, 1 - t, ids, places, told, return_dict=False
        )[0]
        return -FluxPipeline._unpack_latents(out, 2 * height, 2 * width, 2)

    def of_z_image(self, x, t, prompts, **how):
        with torch.no_grad():
            context, _ = self.pipe.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, **how
            )
        images = [image[:, None] for image in x]
        out = self.transformer(images, t, context, return_dict=False)[0]
        return torch.cat([image[:, 0][None] for image in out])

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


def method_gradient(flow, method, reward=brightness):
    "Loss and gradient of a method's first update in the adapter, the same noise for all"
    made = METHODS[method]()
    if hasattr(made, "learn"):
        made.learn = False  # the network ν is the flow's own; see the test of it
    samples = Samples.draw(flow, TWO, time_grid(4), indices=range(2), transitions=2, seed=5)
    made.setup(flow, reward)
    items = made.prepare(flow, reward, samples)
    loss, _ = made.loss(flow, items)
    return loss, torch.autograd.grad(loss, flow.trainable_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_method_are_those_of_code_from_scratch(pipelines, name, method):
    flow = open_flow(pipelines[name], image_size=(16, 8), **KINDS[name].plain)
    told = 3.5 if name == "dev" else None
    scratch = FromScratch(copy.deepcopy(flow.pipe), told)
    loss, gradient = method_gradient(flow, method)
    wanted, right = method_gradient(scratch, method)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert all_close(gradient, right, 1e-4)
    assert max(part.abs().max() for part in gradient) > 0


@pytest.mark.parametrize("name", KINDS)
def test_guidance_is_in_the_costate_but_for_adjoint_matching(pipelines, name):
    "Whatever the number is called that means none"
    found = {}
    for method in (VGGFlowPMP, AdjointMatching):
        for guidance in ("plain", "guided"):
            settings = getattr(KINDS[name], guidance)
            if name == "dev":
                settings = {**settings, "guidance_scale": 2.0}
            flow = open_flow(pipelines[name], shake=0, **settings)
            before = dict(guidance_scale=flow.guidance_scale, weight=flow.weight)
            path = sample(flow, torch.ones(2, 4, 8, 8), time_grid(3), TWO)
            made = method()
            costate = made.carry_back(flow, path, torch.ones_like(path.x1), TWO)
            found[method, guidance] = costate[0] / costate[0].norm()
            after = dict(guidance_scale=flow.guidance_scale, weight=flow.weight)
            assert before == after
    assert not close(found[VGGFlowPMP, "plain"], found[VGGFlowPMP, "guided"], 1e-3)


@pytest.mark.parametrize("correction", ["transformer", "adapter"])
@pytest.mark.parametrize("name", KINDS)
def test_the_correction_is_zero_at_first_learns_and_is_saved(
    pipelines, tmp_path, name, correction
):
    settings = dict(shake=0, correction=correction, image_size=(16, 8))
    flow = open_flow(pipelines[name], **settings)
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
    assert KINDS[name].pipeline.__name__ in card and "height=16, width=8" in card
    again = open_flow(pipelines[name], **settings)
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


@pytest.mark.parametrize("name", KINDS)
def test_a_run_resumes_to_the_last_bit(pipelines, tmp_path, name):
    whole, _ = run(pipelines[name], tmp_path / "whole")
    run(pipelines[name], tmp_path / "cut", updates=2)
    again, history = run(pipelines[name], tmp_path / "cut")
    assert [row["update"] for row in history.rows] == [1, 2, 3, 4]
    state = again.trainable_state()
    assert all(torch.equal(w, state[k]) for k, w in whole.trainable_state().items())


@pytest.mark.parametrize("name", KINDS)
def test_memory_savers_change_nothing(pipelines, name):
    plain, one = run(pipelines[name], updates=1)
    frugal = dict(gradient_checkpointing=True, decode_checkpointing=True)
    saved, other = run(pipelines[name], updates=1, **frugal)
    assert one.rows[0]["loss"] == pytest.approx(other.rows[0]["loss"], rel=1e-4)
    pairs = zip(plain.trainable_parameters(), saved.trainable_parameters())
    assert all(close(a, b, 1e-3) for a, b in pairs)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_in_half_precision(pipelines, name):
    flow, history = run(pipelines[name], updates=1, dtype="bfloat16")
    assert np.isfinite(history.rows[0]["loss"])
    assert all(weight.dtype == torch.float32 for weight in flow.trainable_parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_opened_by_its_index_and_an_adapter_by_its_settings(
    pipelines, tmp_path, name
):
    flow = open_flow(pipelines[name], lora_rank=3)
    flow.save_lora(tmp_path)
    assert lora_settings(tmp_path)["lora_rank"] == 3
    with quietly():
        again = load_model(pipelines[name], tmp_path, image_size=16, max_sequence_length=16)
    x = flow.prior(2)
    with torch.no_grad():
        assert close(again.velocity(x, T, TWO), flow.velocity(x, T, TWO))
    assert again.guidance_scale == flow.usual_guidance
    assert again.recipe["name"] == str(pipelines[name])
    other = ZImageFlow if name == "sd3" else SD3Flow
    says = f"holds a .*Pipeline, which is no {other.__name__}: open it by"
    with pytest.raises(ValueError, match=says):
        other.from_pretrained(pipelines[name])
    with pytest.raises(ValueError, match=r"multiple of 4.* got \(16, 30\)"):
        open_flow(pipelines[name], image_size=(16, 30))


@pytest.mark.parametrize("name", KINDS)
def test_encodings_are_found_on_disk_again(pipelines, tmp_path, name):
    settings = dict(shake=0, embeddings=tmp_path / "texts")
    flow = open_flow(pipelines[name], **settings)
    flow.remember(TWO)
    again = open_flow(pipelines[name], **settings)
    again.encode([""])
    files = list((tmp_path / "texts").iterdir())
    assert len(files) == 3, "two prompts and the empty one"
    again.drop_text_encoders()
    x = flow.prior(2)
    with torch.no_grad():
        assert torch.equal(again.velocity(x, T, TWO), flow.velocity(x, T, TWO))


def test_what_is_unusual_is_in_the_record(pipelines):
    settings = dict(image_size=(16, 8), true_cfg_scale=2.0, negative_prompt="")
    about = open_flow(pipelines["dev"], **settings).describe()
    assert about["latent_size"] == [8, 4] and about["true_cfg_scale"] == 2.0
    assert about["negative_prompt"] == "", "without it the scale would be refused"
    assert "negative_prompt" not in open_flow(pipelines["dev"]).describe()
    json.dumps(about)


@pytest.mark.parametrize("name", KINDS)
def test_the_doctor_knows_its_size_and_its_correction(pipelines, name):
    from vggflow.commands.doctor import check_sizes_of, memory_plan
    from vggflow.commands.memory import correction_size, memory_estimate
    from vggflow.commands.parts import count_numbers, count_weights, look_at_model

    seen, flow = look_at_model(pipelines[name]), open_flow(pipelines[name])
    config, net = seen["configs"]["transformer"], flow.make_correction()
    assert seen["flow"] is KINDS[name].flow
    assert correction_size(seen["flow"], config, 2) == count_weights(net)
    assert "16" in check_sizes_of(dict(image_size=16), pipelines[name])
    with pytest.raises(ValueError, match="multiple of 4"):
        check_sizes_of(dict(image_size=18), pipelines[name])
    for guidance, branches in dict(plain=1, guided=2).items():
        given = dict(image_size=[16, 8], batch_size=2, **getattr(KINDS[name], guidance))
        plan = memory_plan(given, "VGG-Flow", {}, seen, 2)
        assert plan.branches == branches
        estimate = memory_estimate(plan, seen)
        assert estimate["transformer"] == 4 * count_numbers(seen["nets"]["transformer"])


def test_full_sizes_have_as_many_weights_as_is_published():
    dev = dict(num_layers=19, num_single_layers=38)
    dev |= dict(num_attention_heads=24, attention_head_dim=128)
    assert FluxFlow.network(dev).weights == pytest.approx(11.9e9, rel=0.02)
    turbo = dict(n_layers=30, n_refiner_layers=2, dim=3840, n_heads=30)
    assert ZImageFlow.network(turbo).weights == pytest.approx(6e9, rel=0.04)


def test_every_flow_of_the_table_is_one_of_these():
    for kind in KINDS.values():
        assert flow_of_class(kind.pipeline.__name__).endswith(f":{kind.flow.__name__}")
