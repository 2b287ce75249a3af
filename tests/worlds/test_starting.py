"Runs that begin with an adapter, beside what stock diffusers draws from what they save"

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_pipelines import KINDS, TWO, brightness, drawn_by, open_flow, ours, stock
from tiny_flows import close

from vggflow.commands.export import export_lora
from vggflow.commands.saved import load_saved
from vggflow.methods.costate import VGGFlowPMP
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.worlds.checks import quietly

BASES = dict(inside=True, beside=False)


NAMES = ("sd3", "dev", "z_image")


def make_style(name, folder, out):
    "An adapter of rank 3 on two kinds of layers, as stock diffusers saves it"
    with quietly():
        pipe = KINDS[name].pipeline.from_pretrained(folder)
    ends = dict(sd3="ff.net.2", dev="ff.net.2", z_image="feed_forward.w1")
    targets = ["to_q", ends[name]]
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    noise = torch.Generator().manual_seed(7)
    for key, weight in pipe.transformer.named_parameters():
        if "lora_" in key:
            weight.data = 0.2 * torch.randn(weight.shape, generator=noise)
    pipe.save_lora_weights(
        out,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    return out


@pytest.fixture(scope="module")
def style(pipelines, tmp_path_factory):
    "An adapter for each"
    root = tmp_path_factory.mktemp("styles")
    return {name: make_style(name, pipelines[name], root / name) for name in NAMES}


def latents(name, pipe, x):
    "What a stock pipeline draws"
    return drawn_by(name, pipe, x, **KINDS[name].plain)


def flow_of(name, pipelines, style, shake=0.2, **settings):
    "A flow that begins with the adapter"
    settings = dict(lora=style[name], lora_alpha=3) | KINDS[name].plain | settings
    return open_flow(pipelines[name], shake, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_what_stock_diffusers_draws_with_the_lora(pipelines, style, name):
    "Whichever base is kept; the base is another"
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with_style = latents(name, stock(name, pipelines[name], style[name]), x)
    without = latents(name, stock(name, pipelines[name]), x)
    assert not close(with_style, without, 1e-2)
    for inside in BASES.values():
        flow = flow_of(name, pipelines, style, shake=0, lora_in_base=inside)
        assert close(KINDS[name].latents(ours(flow, x)[0]), with_style, 1e-4)
        with flow.adapter_off():
            base = KINDS[name].latents(ours(flow, x)[0])
        assert close(base, with_style if inside else without, 1e-4)
        assert flow.is_base() == inside


@pytest.mark.parametrize("inside", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_draws_the_same_in_stock_diffusers(
    pipelines, style, tmp_path, name, inside
):
    flow = flow_of(name, pipelines, style, lora_in_base=inside)
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    end = KINDS[name].latents(ours(flow, x)[0])
    flow.save_lora(tmp_path)
    pipe = stock(name, pipelines[name], tmp_path)
    assert close(latents(name, pipe, x), end, 1e-4)
    if inside:  # by names, ranks and values alone too
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(load_file(file), file)
        assert close(latents(name, stock(name, pipelines[name], tmp_path), x), end, 1e-4)
    again = flow_of(name, pipelines, style, shake=0, lora_in_base=inside)
    again.load_lora(tmp_path)
    assert close(KINDS[name].latents(ours(again, x)[0]), end, 1e-4)
    mine = flow.trainable_parameters()
    assert all(close(a, b) for a, b in zip(again.trainable_parameters(), mine))


@pytest.mark.parametrize("rank", [2, 5])
def test_the_rank_is_the_larger_of_two_and_all_layers_are_trained(pipelines, style, rank):
    beside = flow_of("sd3", pipelines, style, lora_rank=rank, lora_in_base=False)
    about = beside.describe()
    assert about["lora_rank"] == max(rank, 3) and about["lora"] == "sd3"
    layers = {name.partition(".lora_")[0] for name in beside.trainable_state()}
    assert any(layer.endswith("ff.net.2") for layer in layers)
    assert any(layer.endswith("attn.to_v") for layer in layers)
    inside = flow_of("sd3", pipelines, style, lora_rank=rank)
    assert inside.describe()["lora_rank"] == rank
    assert not any("ff.net.2" in name for name in inside.trainable_state())
    assert inside.fingerprint() == beside.fingerprint()
    assert inside.fingerprint() != open_flow(pipelines["sd3"]).fingerprint()


def trained(name, pipelines, style, out, updates=3, **settings):
    "A run from the adapter"
    flow = flow_of(name, pipelines, style, shake=0, **settings)
    config = FinetuneConfig(
        updates=updates, batch_size=2, steps=3, transitions=2, lr=1e-2, save_every=2
    )
    how = dict(out=out, prompts=TWO, progress=False)
    return flow, finetune(flow, brightness, VGGFlowPMP(), config, **how)


@pytest.mark.parametrize("inside", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_is_sampled_and_exported(pipelines, style, tmp_path, name, inside):
    whole, _ = trained(name, pipelines, style, tmp_path / "whole", lora_in_base=inside)
    trained(name, pipelines, style, tmp_path / "cut", updates=2, lora_in_base=inside)
    again, _ = trained(name, pipelines, style, tmp_path / "cut", lora_in_base=inside)
    state = again.trainable_state()
    assert all(torch.equal(w, state[k]) for k, w in whole.trainable_state().items())
    x = whole.prior(2, generator=torch.Generator().manual_seed(0))
    end = KINDS[name].latents(ours(whole, x)[0])
    with quietly():
        saved = load_saved(run=str(tmp_path / "cut"), dtype="float32").flow
    assert close(KINDS[name].latents(ours(saved, x)[0]), end, 1e-4)
    export_lora(saved, tmp_path / "given", run=tmp_path / "cut")
    pipe = stock(name, pipelines[name], tmp_path / "given")
    assert close(latents(name, pipe, x), end, 1e-4)
    card = (tmp_path / "given/README.md").read_text()
    assert f"Training started from the LoRA `{name}`" in card


def test_the_command_keeps_it(pipelines, style, tmp_path, call):
    line = "finetune --updates 2 --method ReFL --batch-size 2 --steps 3 --eval-every 0"
    line += " --image-size 16 --max-sequence-length 16 --reward redness --quiet"
    line += f" --model {pipelines['sd3']} --lora {style['sd3']} --base-without-lora"
    run = tmp_path / "run"
    status, _, err = call(line, "--prompts", "a cat", "--out", run)
    assert status == 0, err
    command = json.loads((run / "command.json").read_text())
    assert command["lora"] == str(style["sd3"]) and command["lora_in_base"] is False
    assert json.loads((run / "config.json").read_text())["flow"]["lora"] == "sd3"
    status, _, err = call(
        line.replace("--updates 2", "--updates 3"), "--prompts", "a cat", "--out", run
    )
    assert status == 0, err
    status, out, err = call(f"export {run} {tmp_path / 'given'}")
    assert status == 0, err
    status, _, err = call(
        line.replace(" --base-without-lora", ""), "--prompts", "a cat", "--out", run
    )
    assert status == 2 and "lora_in_base" in err


def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(pipelines, style):
    with pytest.raises(ValueError, match="cannot start from the LoRA .* another architect"):
        open_flow(pipelines["sd3"], lora=style["dev"])
    with pytest.raises(ValueError, match="no adapter can be read from"):
        open_flow(pipelines["sd3"], lora=pipelines["sd3"] / "nothing")
    flow = flow_of("sd3", pipelines, style)
    with pytest.raises(ValueError, match="does not hold the LoRA"):
        flow.load_lora(style["sd3"])
