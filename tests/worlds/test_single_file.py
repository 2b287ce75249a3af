"Single files of weights, beside the folders that they were made from"

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipelines import KINDS, TWO, T, drawn_by, open_flow, ours, stock
from tiny_flows import close

from vggflow.common.hub import HubError
from vggflow.worlds.single_file import pipeline_home

NAMES = ("sd3", "dev", "z_image")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

BLOCK = r"transformer_blocks\.(\d+)\."
OF_SD3 = {  # Names of diffusers -> those of the first authors
    r"pos_embed\.proj": "x_embedder.proj",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
    BLOCK + r"attn\.to_out\.0": r"joint_blocks.\1.x_block.attn.proj",
    BLOCK + r"attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    BLOCK + r"norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
    BLOCK + r"norm1_(context)\.linear": r"joint_blocks.\1.\2_block.adaLN_modulation.1",
    BLOCK + r"ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
    BLOCK + r"ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
    BLOCK + r"ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
    BLOCK + r"ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
}
OF_Z_IMAGE = {
    r"all_final_layer\.2-1\.(.*)": r"final_layer.\1",
    r"all_x_embedder\.2-1": "x_embedder",
    r"(.*)\.attention\.to_out\.0": r"\1.attention.out",
    r"(.*)\.attention\.norm_([qk])": r"\1.attention.\2_norm",
}
FUSED = {  # Three layers of diffusers -> one of the first authors
    BLOCK + r"attn\.to_([qkv])": r"joint_blocks.\1.x_block.attn.qkv",
    BLOCK + r"attn\.add_([qkv])_proj": r"joint_blocks.\1.context_block.attn.qkv",
    r"(.*)\.attention\.to_([qkv])": r"\1.attention.qkv",
}


def first_name(layer, table):
    "A layer's name among the first authors"
    for own, other in table.items():
        if re.fullmatch(own, layer):
            return re.sub(own, other, layer)
    return layer


def halves_exchanged(weight):
    "Scale and shift, in the other order"
    return torch.cat(weight.chunk(2)[::-1])


def as_first_authors(name, weights):
    "A transformer as its first authors wrote it, with ComfyUI's prefix"
    table, written, fused = dict(sd3=OF_SD3, z_image=OF_Z_IMAGE)[name], {}, {}
    for key, weight in weights.items():
        layer, dot, end = key.rpartition(".")
        if key == "pos_embed.pos_embed":
            written["pos_embed"] = weight
            continue
        three = first_name(layer, FUSED)
        if three != layer:
            fused.setdefault(f"{three}.{end}", {})[layer] = weight
            continue
        last = layer in ("norm_out.linear", "transformer_blocks.1.norm1_context.linear")
        weight = halves_exchanged(weight) if last else weight
        written[first_name(layer, table) + dot + end] = weight
    order = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    for key, parts in fused.items():
        ranked = sorted(parts, key=lambda layer: order.index(layer.rpartition(".")[2]))
        written[key] = torch.cat([parts[layer] for layer in ranked])
    return {f"model.diffusion_model.{k}": w.contiguous() for k, w in written.items()}


@pytest.fixture(scope="module")
def changed(pipelines, tmp_path_factory):
    "Single files: the transformers with other weights, in diffusers' names"
    root, files = tmp_path_factory.mktemp("files"), {}
    for name in NAMES:
        noise = torch.Generator().manual_seed(4)
        weights = {
            key: weight
            if "pos_embed.pos" in key
            else weight + 0.02 * torch.randn(weight.shape, generator=noise)
            for key, weight in load_file(pipelines[name] / WEIGHTS).items()
        }
        files[name] = root / f"{name}.safetensors"
        save_file(weights, files[name])
    return files


def images_by_diffusers(name, folder, file, x, lora=None):
    "What stock diffusers draws with the file's weights"
    pipe = stock(name, folder, lora)
    pipe.transformer.load_state_dict(load_file(file), strict=False)
    return drawn_by(name, pipe, x, **KINDS[name].plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_diffusers_names(pipelines, changed, tmp_path, name):
    settings = dict(config=str(pipelines[name])) | KINDS[name].plain
    flow = open_flow(changed[name], shake=0, **settings)
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    end = KINDS[name].latents(ours(flow, x)[0])
    wanted = images_by_diffusers(name, pipelines[name], changed[name], x)
    assert close(end, wanted, 1e-4)
    other = drawn_by(name, stock(name, pipelines[name]), x, **KINDS[name].plain)
    assert not close(end, other, 1e-3)
    assert flow.describe()["model"] == f"{name}.safetensors"
    again = open_flow(flow.recipe["name"], shake=0, config=flow.recipe["config"])
    assert again.fingerprint() == flow.fingerprint()


@pytest.mark.parametrize("name", ["sd3", "z_image"])
def test_a_file_of_the_first_authors(pipelines, changed, tmp_path, name):
    file = tmp_path / "model.safetensors"
    save_file(as_first_authors(name, load_file(changed[name])), file)
    flow = open_flow(file, shake=0, config=pipelines[name])
    plain = open_flow(changed[name], shake=0, config=pipelines[name])
    x = flow.prior(2)
    with torch.no_grad():
        assert torch.equal(flow.velocity(x, T, TWO), plain.velocity(x, T, TWO))


def test_a_run_from_a_file_by_the_commands(pipelines, changed, tmp_path, call):
    line = "finetune --updates 2 --method ReFL --batch-size 2 --steps 3 --eval-every 0"
    line += " --image-size 16 --max-sequence-length 16 --reward redness --quiet"
    line += (
        f" --model {changed['sd3']} --config {pipelines['sd3']} --out {tmp_path / 'run'}"
    )
    status, _, err = call(line, "--prompts", "a cat")
    assert status == 0, err
    command = json.loads((tmp_path / "run/command.json").read_text())
    assert command["config"] == str(pipelines["sd3"])
    draw = f"sample --run {tmp_path / 'run'} --out {tmp_path / 'a.png'} --steps 2"
    status, _, err = call(draw, "a cat")
    assert status == 0, err
    status, _, err = call(f"export {tmp_path / 'run'} {tmp_path / 'given'}")
    assert status == 0, err
    card = (tmp_path / "given/README.md").read_text()
    code = re.findall("```python\n(.*?)```", card, re.S)
    assert "from_single_file('sd3.safetensors'" in code[0]
    for part in code:
        part = part.replace("'sd3.safetensors'", repr(str(changed["sd3"])))
        part = re.sub("(config=|pretrained.)'sd3'", rf"\1{str(pipelines['sd3'])!r}", part)
        part = re.sub("folder = '.*'", f"folder = {str(tmp_path / 'given')!r}", part)
        exec(part, {})
    line = line.replace("finetune", "doctor").replace("--quiet", "")
    status, out, err = call(line, "--prompts", "a cat")
    assert status == 0 and "StableDiffusion3Pipeline" in out, out + err


def test_what_a_file_cannot_be(pipelines, changed, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not hold the transformer of"):
        open_flow(changed["dev"], config=pipelines["sd3"])
    with pytest.raises(ValueError, match="does not tell which model it is: give config="):
        open_flow(changed["sd3"])
    with pytest.raises(ValueError, match="goes with a single file"):
        open_flow(pipelines["sd3"], config=pipelines["sd3"])
    with pytest.raises(OSError, match="no file .*nothing.safetensors"):
        open_flow(tmp_path / "nothing.safetensors", config=pipelines["sd3"])
    # the file tells that it is Stable Diffusion 3 medium, and the hub is out of reach
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    block = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
    large = {block: torch.zeros(9216), "pos_embed": torch.zeros(1, 36864, 2)}
    large = {f"model.diffusion_model.{name}": weight for name, weight in large.items()}
    file = tmp_path / "sd3_medium.safetensors"
    save_file(large, file)
    with pytest.raises(HubError, match="stable-diffusion-3-medium-diffusers.*config=") as e:
        pipeline_home(file, local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(e.value)
