"A flow on tiny pipelines from disk, beside the stock pipeline"

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny_flows import (
    TWO,
    T,
    X,
    adapter_gradient,
    all_close,
    base_velocity,
    close,
    pull,
    pull_by_autograd,
    reload,
    stock_pipeline,
    velocity,
)
from tiny_sd3 import make_tiny_sd3

from vggflow.theory.flow import sample, time_grid
from vggflow.worlds.sd3 import SD3Flow


def drawn_by(pipe, kind="latent", guidance=4.0, **more):
    "What a pipeline draws in five steps"
    how = dict(num_inference_steps=5, guidance_scale=guidance, output_type=kind, **more)
    return pipe(TWO, latents=X, **how).images


@pytest.mark.parametrize("kind", ["t5", "no_t5"])
def test_stock_pipeline_draws_the_same(tiny, kind, tmp_path):
    "Own sampler, times and LoRA file against the pipeline's, with guidance"
    settings = dict(guidance_scale=4.0, max_sequence_length=256, lora_rank=4)
    flow = reload(tiny[kind], **settings, lora_alpha=6)
    flow.save_lora(tmp_path)
    none = dict(text_encoder_3=None, tokenizer_3=None) if kind == "no_t5" else {}
    pipe = stock_pipeline(tiny[kind], **none)
    plain = drawn_by(pipe)
    pipe.load_lora_weights(tmp_path)
    stock, images = drawn_by(pipe), drawn_by(pipe, "pt")
    with torch.no_grad():
        own = sample(flow, X, flow.times(5), TWO).x1
        shown = flow.decode(own).clamp(0, 1)
    assert close(own, stock) and close(shown, images)
    assert close(drawn_by(flow.pipe, "pt"), images)
    # teeth: without the adapter, with another guidance, or on another grid it differs
    assert not close(plain, stock, 1e-2)
    assert not close(drawn_by(pipe, guidance=4.01), stock)
    with torch.no_grad():
        assert not close(sample(flow, X, flow.times(5, 3.01), TWO).x1, stock)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("words,tokens", [("a blurry cat", 256), ("dog", 16), ("", 16)])
def test_negative_prompt_and_length_are_those_of_diffusers(
    tiny, tmp_path, words, tokens, batched
):
    settings = dict(max_sequence_length=tokens, negative_prompt=words)
    flow = reload(tiny["t5"], guidance_scale=4.0, cfg_batched=batched, **settings)
    flow.save_lora(tmp_path)
    pipe = stock_pipeline(tiny["t5"])
    pipe.load_lora_weights(tmp_path)
    stock = drawn_by(pipe, **settings)
    flow.remember(TWO)
    flow.drop_text_encoders()  # the negative prompt is known after that too
    with torch.no_grad():
        own = sample(flow, X, flow.times(5), TWO).x1
    assert close(own, stock)
    if words:  # teeth: it is not the empty prompt's
        plain = drawn_by(pipe, max_sequence_length=tokens)
        assert not close(plain, stock, 1e-3)
        assert flow.describe()["negative_prompt"] == words
    else:
        assert "negative_prompt" not in flow.describe()


@pytest.mark.parametrize("tokens", [0, -3, 513])
def test_a_length_that_diffusers_refuses_is_refused_before_loading(tiny, tokens):
    with pytest.raises(ValueError, match=f"max_sequence_length {tokens}: give 1 to 512"):
        reload(tiny["t5"], max_sequence_length=tokens)
    if tokens > 512:
        with pytest.raises(ValueError, match="512"):
            drawn_by(stock_pipeline(tiny["t5"]), max_sequence_length=tokens)


def test_times_are_the_schedulers(tiny):
    flow = reload(tiny["t5"])
    folder = tiny["t5"] / "scheduler"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    for steps in (1, 5, 20):
        scheduler.set_timesteps(steps)
        times = flow.times(steps)
        assert torch.equal((1000 * (1 - times[:-1])).float(), scheduler.timesteps)
        assert times[0] == 0 and times[-1] == 1
    assert torch.equal(flow.times(5, 2.0), time_grid(5, 2.0))
    assert torch.allclose(flow.times(5).float(), time_grid(5, 3.0), atol=1e-6)
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=True.*give a shift"):
        flow.times(5)
    flow.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        flow.times(5)


@pytest.mark.parametrize("size", [16, (8, 16), "16x8"])
def test_a_shift_that_grows_with_the_image_is_the_pipelines(tiny, tmp_path, size):
    "And images that are not square"
    flow = reload(tiny["t5"], image_size=size, lora_rank=2)
    flow.save_lora(tmp_path)
    pipe = stock_pipeline(tiny["t5"])
    pipe.load_lora_weights(tmp_path)
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    noise = flow.prior(2, generator=torch.Generator().manual_seed(0))
    height, width = (2 * side for side in noise.shape[-2:])
    how = dict(num_inference_steps=5, guidance_scale=1.0, max_sequence_length=8)
    how |= dict(height=height, width=width, latents=noise, output_type="latent")
    stock = pipe(TWO, **how).images
    with torch.no_grad():
        own = sample(flow, noise, flow.times(5), TWO).x1
    assert close(own, stock)
    sizes = {16: (16, 16), (8, 16): (8, 16), "16x8": (16, 8)}
    assert (height, width) == sizes[size] == flow.decode(own).shape[-2:]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_checkpointing_changes_no_gradient(tiny, scale):
    "The adapter's, and the base's both ways; the adapter is on again afterwards"
    flow = reload(tiny["t5"], guidance_scale=scale, lora_dropout=0.3)
    of_base, of_adapter, before = pull(flow), adapter_gradient(flow), velocity(flow)
    flow.gradient_checkpointing(True)
    assert close(pull(flow), of_base) and close(pull_by_autograd(flow), of_base)
    assert all_close(adapter_gradient(flow), of_adapter)
    assert torch.equal(velocity(flow), before)


def test_a_recomputation_with_the_adapter_on_would_be_seen(tiny):
    flow = reload(tiny["t5"])
    x = X.clone().requires_grad_()
    on = torch.autograd.grad((flow.velocity(x, T, TWO) * X).sum(), x)[0]
    assert not close(on, pull(flow), 1e-2)


def test_checkpointing_keeps_less(tiny):
    "Numbers that the VJP of the base keeps"
    flow, kept = reload(tiny["t5"]), []
    for on in (False, True):
        flow.gradient_checkpointing(on)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flow.base_velocity(X.clone().requires_grad_(), T, TWO)
        kept.append(count)
    assert kept[1] < 0.5 * kept[0]


def test_guidance_in_turn_and_detached_base(tiny):
    plain = reload(tiny["t5"])
    both = reload(tiny["t5"], guidance_scale=3.0)
    turn = reload(tiny["t5"], guidance_scale=3.0, cfg_batched=False)
    half = reload(tiny["t5"], guidance_scale=3.0, detach_base=True)
    assert close(velocity(both), velocity(turn)) and close(pull(both), pull(turn))
    assert close(pull(half), 3 * pull(plain))
    assert not close(pull(both), pull(half), 1e-2)


def test_dropout_acts_in_training_only(tiny):
    flow, other = reload(tiny["t5"], lora_dropout=0.5), reload(tiny["t5"])
    assert close(velocity(flow), velocity(other))
    assert close(base_velocity(flow), base_velocity(other))
    with_gradient = flow.base_velocity(X, T, TWO), other.base_velocity(X, T, TWO)
    assert close(*with_gradient) and close(pull(flow), pull(other))
    assert not all_close(adapter_gradient(flow), adapter_gradient(other), 1e-2)
    assert not any(drop.training for drop in flow._drops)


def decoder_pull(flow):
    "Gradient through the decoder"
    return torch.func.grad(lambda z: flow.decode(z).square().sum())(2 * X)


@pytest.mark.parametrize("saver", ["decode_checkpointing", "vae_slicing"])
def test_frugal_decoders_have_the_plain_gradient(tiny, saver):
    plain, frugal = reload(tiny["t5"]), reload(tiny["t5"], **{saver: True})
    assert close(decoder_pull(frugal), decoder_pull(plain))


def test_a_tiled_decoder_is_another_one(tiny):
    flow, plain = reload(tiny["t5"], vae_tiling=True), reload(tiny["t5"])
    flow.vae.tile_latent_min_size, flow.vae.tile_sample_min_size = 4, 8
    tiled = decoder_pull(flow)
    flow.configure(vae_tiling=True, decode_checkpointing=True)
    assert close(decoder_pull(flow), tiled)
    assert not close(tiled, decoder_pull(plain), 1e-2)


def test_the_tiny_decoder_works_where_gradients_are_wanted(tiny):
    plain, flow = reload(tiny["t5"]), reload(tiny["t5"], taesd=tiny["taesd"])
    with torch.no_grad():
        assert close(flow.decode(X), plain.decode(X))
    small = decoder_pull(flow)
    flow.configure(decode_checkpointing=True)
    assert flow.decode(X).shape == (2, 3, 16, 16) and close(decoder_pull(flow), small)
    assert not close(small, decoder_pull(plain), 1e-2)


def test_compiled_calls_are_the_same(tiny):
    "Without gradients, finetuned and base"
    flow, plain = reload(tiny["t5"], compile="eager"), reload(tiny["t5"])
    for _ in range(2):
        assert close(velocity(flow), velocity(plain))
        assert close(base_velocity(flow), base_velocity(plain))
    with torch.no_grad():
        assert close(flow.decode(X), plain.decode(X))
    assert close(pull(flow), pull(plain))


def test_prompts_on_disk(tiny, tmp_path):
    "Read back exactly; other lengths and a missing T5 are told apart"
    kept = reload(tiny["t5"], embeddings=tmp_path).encode(TWO)
    files = sorted(tmp_path.iterdir())
    other = reload(tiny["no_t5"], embeddings=tmp_path).encode(TWO)
    reload(tiny["t5"], embeddings=tmp_path, max_sequence_length=4).encode(TWO)
    assert len(files) == 2 and len(list(tmp_path.iterdir())) == 6
    assert not torch.equal(kept[0], other[0])
    again = reload(tiny["t5"], embeddings=tmp_path)
    again.drop_text_encoders()  # what is on disk is found after the encoders have gone
    assert again.pipe.text_encoder_3 is None
    assert torch.equal(again.encode(TWO)[0], kept[0])
    assert torch.equal(again.encode(TWO)[1], kept[1])
    with pytest.raises(ValueError, match="encode\\(prompts\\)"):
        again.encode(["a horse"])


def test_damaged_and_foreign_files_are_encoded_anew(tiny, tmp_path):
    kept = reload(tiny["t5"], embeddings=tmp_path).encode(TWO)
    files = sorted(tmp_path.iterdir())
    reload(tiny["no_t5"], embeddings=tmp_path).encode(TWO)
    foreign = next(file for file in tmp_path.iterdir() if file not in files)
    files[0].write_bytes(b"junk")
    files[1].write_bytes(foreign.read_bytes())
    flow, made = reload(tiny["t5"], embeddings=tmp_path), []
    real = flow.pipe.encode_prompt

    def encode(prompts, *args, **kw):
        made.extend(prompts)
        return real(prompts, *args, **kw)

    flow.pipe.encode_prompt = encode
    assert close(flow.encode(TWO)[0], kept[0]) and made == TWO


def test_an_encoding_with_a_flipped_bit_is_encoded_anew(tiny, tmp_path):
    kept = reload(tiny["t5"], embeddings=tmp_path).encode(TWO)
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-4] ^= 1  # the last digit of the last number
        file.write_bytes(data)
    again = reload(tiny["t5"], embeddings=tmp_path).encode(TWO)
    assert all(map(torch.equal, again, kept))


def test_size_and_targets(tiny):
    flow = reload(tiny["sd35"], image_size=8, lora_targets=["attn.to_q"])
    x0 = flow.prior(1)
    assert x0.shape == (1, 4, 4, 4) and flow.decode(x0).shape == (1, 3, 8, 8)
    assert flow.velocity(x0, T[:1], TWO[:1]).shape == (1, 4, 4, 4)
    about = flow.describe()
    assert about["latent_size"] == 4 and about["lora_targets"] == ["attn.to_q"]
    assert not any("attn2" in name for name in flow.trainable_state())
    assert any("attn2.to_q" in name for name in reload(tiny["sd35"]).trainable_state())
    pattern = reload(tiny["sd35"], lora_targets=r".*attn\.to_[qk]")
    assert pattern.describe()["lora_targets"] == r".*attn\.to_[qk]"


def test_dtype_is_float32_unless_named(tiny):
    half = reload(tiny["t5"], dtype="bf16")
    assert reload(tiny["sd35"]).transformer.dtype == torch.float32
    assert half.transformer.dtype == torch.bfloat16
    assert half.velocity(X, T, TWO).dtype == torch.float32


def test_from_a_pipeline_object(tiny):
    flow = reload(make_tiny_sd3(None), lora_rank=2)
    other = reload(tiny["t5"], lora_rank=2)
    assert flow.describe()["model"] == "unnamed" and flow.recipe == {}
    assert close(velocity(flow), velocity(other))
    half = SD3Flow.from_pretrained(make_tiny_sd3(None), dtype="bf16")
    assert half.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 1.001, 2.0, 7.5])
def test_guidance_means_what_it_means_in_diffusers(tiny, guidance):
    "Up to 1 there is none, and the prompts count"
    flow = reload(tiny["t5"], shake=0, guidance_scale=guidance, max_sequence_length=256)
    with torch.no_grad():
        own = sample(flow, X, flow.times(5), TWO).x1
    assert close(own, drawn_by(stock_pipeline(tiny["t5"]), guidance=guidance))
    assert flow.guides == (guidance > 1)
