"Adapters as trainers and libraries write them, beside stock diffusers and peft"

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_flows import TWO, T, X, close, reload, stock_pipeline, velocity

from vggflow.worlds.adapters import ADAPTER_FILES, read_adapter
from vggflow.worlds.lora import lora_settings

LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
MADE = [
    {},
    dict(use_rslora=True),
    dict(r=2),
    dict(r=16, lora_alpha=1),
    dict(lora_alpha=0.5),
    dict(lora_alpha=-2),
    dict(lora_dropout=0.4),
    dict(alpha_pattern={"attn.to_q": 16}),
    dict(alpha_pattern={"transformer_blocks.0.attn.to_v": 1}),
    dict(alpha_pattern={r"transformer_blocks\.[0]\..*": 3, "attn.to_k": 5}),
    dict(rank_pattern={"attn.to_k": 2}),
    dict(rank_pattern={"attn.to_k": 7, "transformer_blocks.1.attn.to_q": 1}),
    dict(rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 6}),
    dict(use_rslora=True, rank_pattern={"to_v": 9}, alpha_pattern={"to_q": 6}),
    dict(target_modules=["transformer_blocks.0.attn.to_q"]),
    dict(target_modules=["attn.add_q_proj", "attn.to_add_out"]),
    dict(target_modules=["ff.net.0.proj", "ff.net.2"]),
    dict(target_modules=["norm1.linear"]),
    dict(target_modules=["proj_out", "context_embedder"]),
    dict(target_modules=r".*\.attn\.to_[qk]"),
    dict(target_modules="all-linear"),
]


def stock_adapter(model, **made):
    "A stock pipeline with an adapter of peft, its weights random"
    pipe = stock_pipeline(model)
    settings = dict(r=4, lora_alpha=8, target_modules=LAYERS) | made
    pipe.transformer.add_adapter(LoraConfig(**settings))
    noise = torch.Generator().manual_seed(5)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=noise)
    return pipe


def save_by_diffusers(pipe, folder):
    "As diffusers saves it, metadata and all"
    about = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=about,
    )
    return folder


def drawn_by(pipe, model):
    "Velocity of a stock pipeline"
    flow = reload(model, shake=0)
    with torch.no_grad():
        return flow.call_transformer(pipe.transformer, X, T, *flow.encode(TWO))


def read_by_us(model, folder, **settings):
    "Velocity of a flow that has read an adapter"
    flow = reload(model, shake=0, **{**lora_settings(folder), **settings})
    flow.load_lora(folder)
    return velocity(flow)


def stock_reads(model, folder):
    "Velocity of a stock pipeline that has read an adapter, its dropout off"
    pipe = stock_pipeline(model)
    pipe.load_lora_weights(folder)
    pipe.transformer.eval()
    return drawn_by(pipe, model)


@pytest.mark.parametrize("made", MADE, ids=str)
def test_what_diffusers_saves_is_read_as_diffusers_reads_it(tiny, tmp_path, made):
    save_by_diffusers(stock_adapter(tiny["t5"], **made), tmp_path)
    ours, stock = read_by_us(tiny["t5"], tmp_path), stock_reads(tiny["t5"], tmp_path)
    assert close(ours, stock)
    assert not close(ours, drawn_by(stock_pipeline(tiny["t5"]), tiny["t5"]), 1e-3)


def without_metadata(folder, rename=lambda name: name, dtype=torch.float32):
    "The same weights under other names, in another type, and nothing said"
    file = folder / ADAPTER_FILES[0]
    weights = {rename(k): w.to(dtype).contiguous() for k, w in load_file(file).items()}
    save_file(weights, file)
    return folder


def as_processor(name):
    "The names of diffusers' first editions"
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        for new, old in (("lora_A", "down"), ("lora_B", "up")):
            short = part.removesuffix(".0")
            name = name.replace(f".{part}.{new}", f".processor.{short}_lora.{old}")
    return name


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        as_processor,
    ],
    ids=["new", "older", "oldest"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [{}, dict(rank_pattern={"to_k": 2})], ids=str)
def test_names_and_types_of_older_files(tiny, tmp_path, rename, dtype, ranks):
    save_by_diffusers(stock_adapter(tiny["t5"], **ranks), tmp_path)
    without_metadata(tmp_path, rename, dtype)
    assert close(read_by_us(tiny["t5"], tmp_path), stock_reads(tiny["t5"], tmp_path))


@pytest.mark.parametrize("made", MADE[:14:3], ids=str)
def test_a_folder_of_peft(tiny, tmp_path, made):
    "Weights, and a configuration beside them"
    settings = dict(r=4, lora_alpha=8, target_modules=LAYERS) | made
    pipe = stock_pipeline(tiny["t5"])
    model = get_peft_model(pipe.transformer, LoraConfig(**settings)).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    pipe = stock_pipeline(tiny["t5"])
    PeftModel.from_pretrained(pipe.transformer, tmp_path)  # it sorts the patterns
    assert close(read_by_us(tiny["t5"], tmp_path), drawn_by(pipe, tiny["t5"]))


def test_a_number_alpha_beside_each_layer(tiny, tmp_path):
    "As in files that were converted from other trainers: alpha over rank"
    save_by_diffusers(stock_adapter(tiny["t5"], lora_alpha=4), tmp_path)
    without_metadata(tmp_path)
    plain = read_adapter(tmp_path).factors
    file = tmp_path / ADAPTER_FILES[0]
    alphas = {f"transformer.{layer}.alpha": torch.tensor(6.0) for layer in plain}
    save_file({**load_file(file), **alphas}, file)
    for layer, (down, up) in read_adapter(tmp_path).factors.items():
        assert torch.equal(down, plain[layer][0])
        assert torch.allclose(up, 1.5 * plain[layer][1])


@pytest.mark.parametrize("settings", [dict(lora_rank=9), dict(lora_rank=4, lora_alpha=1)])
def test_more_ranks_or_another_alpha_hold_it_too(tiny, tmp_path, settings):
    save_by_diffusers(stock_adapter(tiny["t5"], use_rslora=True), tmp_path)
    own = read_by_us(tiny["t5"], tmp_path, **settings)
    assert close(own, stock_reads(tiny["t5"], tmp_path))


@pytest.mark.parametrize("which", ["t5", "sd35"])
@pytest.mark.parametrize(
    "made",
    [dict(), dict(lora_alpha=6), dict(lora_dropout=0.3), dict(lora_rank=2, lora_alpha=5)],
    ids=str,
)
def test_ours_is_read_by_anyone(tiny, tmp_path, which, made):
    "With its metadata, without them, and by peft's own rule"
    flow = reload(tiny[which], dtype="float32", **made).eval()
    flow.save_lora(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    without_metadata(tmp_path / "b")
    mine = velocity(flow)
    for folder in (tmp_path / "a", tmp_path / "b"):
        pipe = stock_pipeline(tiny[which], dtype=torch.float32)
        pipe.load_lora_weights(folder)
        encoded = flow.encode(TWO)
        with torch.no_grad():
            stock = [flow.call_transformer(pipe.transformer, X, T, *encoded) for _ in "12"]
        assert torch.equal(*stock) and close(stock[0], mine)
    again = reload(tiny[which], shake=0, dtype="float32", **made).eval()
    again.load_lora(tmp_path / "a")
    assert close(velocity(again), mine)


def key(end="lora_A.weight", layer="transformer_blocks.0.attn.to_q"):
    return f"transformer.{layer}.{end}"


WRONG = {
    "kohya's format": {"lora_unet_joint_blocks_0_attn_qkv.lora_down.weight": (4, 16)},
    "kohya's": {"lora_te1_text_model_encoder_layers_0.lora_up.weight": (4, 16)},
    "adapts a text encoder": {"text_encoder_2.layers.0.q_proj.lora_A.weight": (4, 16)},
    "is of a U-Net": {"unet.down_blocks.0.attn.to_q.lora_A.weight": (4, 16)},
    "is a DoRA": {key("lora_magnitude_vector"): (16,)},
    "is a DoRA (transformer.*dora": {key("dora_scale"): (16,)},
    "another kind than LoRA": {key("hada_w1_a"): (4, 16)},
    "no factor of a LoRA": {"transformer.proj_out.weight": (16, 16)},
    "lacks lora_B": {key("lora_A.weight", "proj_out"): (4, 16)},
    "no LoRA of a linear layer": {
        key("lora_A.weight", "pos_embed.proj"): (4, 16, 2, 2),
        key("lora_B.weight", "pos_embed.proj"): (16, 4, 1, 1),
    },
    "its layer transformer_blocks.9.attn.to_q": {
        key("lora_A.weight", "transformer_blocks.9.attn.to_q"): (4, 16),
        key("lora_B.weight", "transformer_blocks.9.attn.to_q"): (16, 4),
    },
}


@pytest.mark.parametrize("says", WRONG, ids=lambda says: says.replace(" ", "-"))
def test_what_is_no_lora_of_this_transformer_is_named(tiny, tmp_path, says):
    "Nothing of a file is left out in silence"
    save_by_diffusers(stock_adapter(tiny["t5"]), tmp_path)
    file = tmp_path / ADAPTER_FILES[0]
    more = {name: torch.zeros(shape) for name, shape in WRONG[says].items()}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as caught:
        read_by_us(tiny["t5"], tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "said,says",
    [
        (dict(use_dora=True), "use_dora=True, more than a LoRA"),
        (dict(modules_to_save=["proj_out"]), "modules_to_save"),
        (dict(bias="all"), "bias='all'"),
        (dict(peft_type="LOHA"), "is a LOHA"),
        (dict(lora_alpha="much"), "lora_alpha='much'"),
        (dict(lora_alpha=float("inf")), "lora_alpha=inf"),
        (dict(alpha_pattern={"to_q": None}), "alpha_pattern.to_q=None"),
        (dict(alpha_pattern={"to_(q": 4}), "has a pattern that is none"),
        (dict(alpha_pattern=[1]), r"alpha_pattern=\[1\]"),
        (dict(r=8), "says rank 8 of .*, whose weights have 4"),
        (dict(r=0), "r=0"),
        ("nonsense", "metadata of .* are damaged"),
        ([1], "metadata of .* are damaged"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_meant(tiny, tmp_path, said, says):
    save_by_diffusers(stock_adapter(tiny["t5"]), tmp_path)
    file = tmp_path / ADAPTER_FILES[0]
    about = stock_adapter(tiny["t5"]).transformer.peft_config["default"].to_dict()
    about = {name: sorted(v) if isinstance(v, set) else v for name, v in about.items()}
    whole = {f"transformer.{k}": v for k, v in about.items()}
    if isinstance(said, dict):
        said = json.dumps({**whole, **{f"transformer.{k}": v for k, v in said.items()}})
    said = said if isinstance(said, str) else json.dumps(said)
    save_file(load_file(file), file, {"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match=says) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_named(tiny, tmp_path, value):
    save_by_diffusers(stock_adapter(tiny["t5"]), tmp_path)
    file = tmp_path / ADAPTER_FILES[0]
    weights = load_file(file)
    weights[key("lora_B.weight")][0, 0] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match="is not finite at transformer_blocks.0.attn.to_q"):
        read_adapter(tmp_path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      and more")
    (tmp_path / "b").mkdir()
    for place in (tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c"):
        with pytest.raises(ValueError, match="no adapter can be read") as caught:
            read_adapter(place)
        assert "\n" not in str(caught.value)


def plain_factors(model, **made):
    "Weights of an adapter as diffusers writes them, by name"
    own = stock_adapter(model, **made).transformer
    return {
        f"transformer.{name}": weight.detach().clone().contiguous()
        for name, weight in get_peft_model_state_dict(own).items()
    }


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e38])
def test_a_scale_that_is_not_finite_is_refused(tiny, tmp_path, alpha):
    weights = plain_factors(tiny["t5"])
    name = next(name for name in weights if ".lora_B." in name)
    layer = name.partition(".lora_B.")[0]
    weights[f"{layer}.alpha"] = torch.tensor(alpha)
    weights[name] = weights[name] * 1e3
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="not finite at"):
        reload(tiny["t5"]).load_lora(tmp_path)


def test_the_configuration_of_peft_counts_whatever_the_weights_are_called(tiny, tmp_path):
    own = stock_adapter(tiny["t5"], r=4, lora_alpha=8).transformer
    weights = get_peft_model_state_dict(own)
    weights = {f"base_model.model.{k}": v.contiguous() for k, v in weights.items()}
    config = own.peft_config["default"].to_dict()
    config = {k: list(v) if isinstance(v, set) else v for k, v in config.items()}
    for name in ("adapter_model", "mine"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / f"{name}.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps(config, default=str)
        )
    assert close(*(read_by_us(tiny["t5"], tmp_path / n) for n in ("adapter_model", "mine")))
    (tmp_path / "adapter_model" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        reload(tiny["t5"]).load_lora(tmp_path / "adapter_model")


def test_a_weight_that_is_given_twice_is_refused(tiny, tmp_path):
    weights = plain_factors(tiny["t5"])
    name = next(iter(weights))
    weights[name.replace("transformer.", "base_model.model.", 1)] = weights[name] + 1
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="gives . of .* twice"):
        reload(tiny["t5"]).load_lora(tmp_path)


def test_numbers_and_other_keys_in_a_pickle_of_weights(tiny, tmp_path):
    weights = plain_factors(tiny["t5"])
    layer = next(iter(weights)).partition(".lora_")[0]
    torch.save({**weights, f"{layer}.alpha": 2.0}, tmp_path / "pytorch_lora_weights.bin")
    reload(tiny["t5"], lora_rank=8).load_lora(tmp_path)
    torch.save({1: torch.zeros(2)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="no adapter can be read"):
        reload(tiny["t5"]).load_lora(tmp_path)


def test_the_format_of_comfyui_is_named(tiny, tmp_path):
    weights = plain_factors(tiny["t5"])
    renamed = {
        k.replace("transformer.", "diffusion_model.", 1): v for k, v in weights.items()
    }
    save_file(renamed, tmp_path / "pytorch_lora_weights.safetensors")
    for read in (reload(tiny["t5"]).load_lora, lora_settings):
        with pytest.raises(ValueError, match="is in the format of ComfyUI"):
            read(tmp_path)
