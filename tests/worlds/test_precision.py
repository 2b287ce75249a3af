"What a GPU is asked to do, as far as a CPU can tell: precision, waiting, places, graphs"

import copy
import math
import shutil
import warnings

import pytest
import torch
from test_pipelines import KINDS, TWO, T, brightness, open_flow
from torch.utils._python_dispatch import TorchDispatchMode

from vggflow.commands import installation
from vggflow.commands.doctor import check_sizes_of
from vggflow.judging.rewards import get_reward
from vggflow.methods.registry import METHODS
from vggflow.theory.value import reward_gradient
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.worlds.emoji import load_emoji
from vggflow.worlds.lora import CastLinear

NAMES = ("sd3", "dev", "z_image")


class Waits(TorchDispatchMode):
    "Counts numbers that are fetched from tensors: on a GPU each is waited for"

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits_of_an_update(folder, method, micro_batch):
    "Numbers fetched by a run of one update"
    flow = open_flow(folder, shake=0)
    how = dict(updates=1, batch_size=2, steps=4, transitions=4, lr=1e-3)
    config = FinetuneConfig(**how, micro_batch=micro_batch)
    with Waits() as waits:
        finetune(flow, brightness, METHODS[method](), config, prompts=TWO, progress=False)
    return waits.count


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_are_not_waited_for(pipelines, method):
    "Eight parts fetch as many numbers as one"
    whole, parts = (waits_of_an_update(pipelines["sd3"], method, size) for size in (0, 1))
    assert parts == whole


def test_a_decoder_in_float32_mends_the_gradient_of_a_model_in_bfloat16():
    "By what share the gradient of a reward is off, with the error of the decoder alone"
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, how in dict(
        exact={},
        half=dict(dtype="bfloat16"),
        mended=dict(dtype="bfloat16", decoder_dtype="float32"),
    ).items():
        flow = load_emoji(**how)
        assert flow.transformer.dtype == (torch.float32 if not how else torch.bfloat16)
        found[name] = reward_gradient(flow, brightness, x)
    off = {
        name: ((gradient - found["exact"]).norm() / found["exact"].norm()).item()
        for name, gradient in found.items()
    }
    print(off)
    assert 1e-3 < off["half"] < 2e-2 and off["mended"] < 1e-5
    assert load_emoji(decoder_dtype="float32").describe().get("decoder_dtype") is None
    assert flow.describe()["decoder_dtype"] == "float32"


def test_bfloat16_by_autocast_is_off_where_the_code_keeps_float32():
    "By what share a reward's gradient and ν are off under autocast: why neither is there"
    flow, noise = load_emoji(), torch.Generator().manual_seed(0)
    x, *hints = torch.randn(3, 4, 8, 8, 8, generator=noise)
    prompts, judge = ["a cat", "an owl"] * 2, get_reward("emoji-aesthetic")
    torch.manual_seed(0)
    nu = flow.make_correction()
    torch.nn.init.normal_(flow.last_layer(nu.net).weight, std=0.05)

    def both(half):
        def score(images, cond):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return judge(images, cond)

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = nu(x, torch.linspace(0.1, 0.9, 4), prompts, hints)
        return reward_gradient(flow, score, x, prompts), value.float()

    pairs = zip(both(True), both(False))
    off = [((half - exact).norm() / exact.norm()).item() for half, exact in pairs]
    print(off)
    assert 5e-4 < off[0] < 2e-2 and 5e-4 < off[1] < 2e-2


def test_tf32_is_one_setting():
    assert load_emoji(tf32=True).describe()["tf32"]
    assert torch.get_float32_matmul_precision() == "high"
    assert "tf32" not in load_emoji().describe()


def kept_for_gradients(flow, x, prompts):
    "Gradient of the adapter, and the bytes that its graph keeps beside weights"
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in flow.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        v = flow.velocity(x, torch.linspace(0.1, 0.9, len(x)), prompts)
    gradient = torch.autograd.grad(v.square().sum(), flow.trainable_parameters())
    assert {part.dtype for part in gradient} == {torch.float32}
    return torch.cat([part.flatten() for part in gradient]), sum(kept.values())


def test_an_adapter_in_the_models_type_keeps_less_and_its_gradient_is_near():
    "By what share: emoji world, four random latents, guidance of the world"
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    ways = dict(
        exact={}, half=dict(dtype="bfloat16"), cast=dict(dtype="bfloat16", autocast=True)
    )
    gradient, kept = {}, {}
    for name, how in ways.items():
        flow, noise = load_emoji(**how), torch.Generator().manual_seed(1)
        for weight in flow.trainable_parameters():
            weight.data.normal_(std=0.05, generator=noise)
        found = kept_for_gradients(flow, x, ["a cat", "an owl"] * 2)
        gradient[name], kept[name] = found
    exact = gradient["exact"]
    off = {name: ((g - exact).norm() / exact.norm()).item() for name, g in gradient.items()}
    print(off, kept)
    assert 1e-3 < off["half"] < 0.05 and off["cast"] < 0.05
    assert not torch.equal(gradient["cast"], gradient["half"])
    assert kept["cast"] < 0.8 * kept["half"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_the_adapter_in_the_models_type(pipelines, name):
    "Weights move and stay in float32, ν's adapter is cast too, the record says so"
    how = dict(shake=0, dtype="bfloat16", autocast=True, correction="adapter")
    flow = open_flow(pipelines[name], **how)
    config = FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2, lr=1e-3)
    method = METHODS["VGGFlow"]()
    history = finetune(flow, brightness, method, config, prompts=TWO, progress=False)
    assert all(math.isfinite(row["loss"]) for row in history.rows)
    assert any(weight.any() for key, weight in flow._lora if "lora_B" in key)
    assert {weight.dtype for weight in flow.trainable_parameters()} == {torch.float32}
    factors = [layer.lora_A["correction"] for layer in flow._layers]
    assert {type(factor) for factor in factors} == {CastLinear}
    assert flow.describe()["autocast"] is True


def test_products_can_be_turned_back_and_a_copy_has_its_own(pipelines):
    flow = open_flow(pipelines["sd3"], dtype="bfloat16", autocast=True)
    other = copy.deepcopy(flow)
    x = flow.prior(2)
    for weight in other.trainable_parameters():
        weight.data.mul_(3)
    with torch.no_grad():
        cast, copied = flow.velocity(x, T, TWO), other.velocity(x, T, TWO)
        flow.configure(fold=False)
        plain = flow.velocity(x, T, TWO)
    assert (copied - cast).norm() > 0.1 * cast.norm()
    assert not torch.equal(plain, cast) and (plain - cast).norm() < 0.1 * cast.norm()
    assert "autocast" not in flow.describe() and other.describe()["autocast"]


def test_what_cannot_be_cast_is_refused_before_weights_are_read(pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd3"], tmp_path / "headless")
    for file in folder.glob("transformer/*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="autocast=True .* give dtype='bfloat16'"):
        open_flow(folder, autocast=True)
    found = check_sizes_of(dict(autocast=True, dtype="bfloat16"), str(folder))
    assert "rank 8" in found
    with pytest.raises(ValueError, match="give dtype='bfloat16'"):
        check_sizes_of(dict(autocast=True, dtype="float32"), str(folder))


def test_an_adapter_cannot_follow_a_model_in_float32(pipelines):
    with pytest.raises(ValueError, match="autocast=True .* give dtype='bfloat16'"):
        open_flow(pipelines["sd3"], autocast=True)
    assert "autocast" not in open_flow(pipelines["sd3"]).describe()


def test_encodings_stay_on_the_models_device(pipelines, monkeypatch):
    "Known, they are not copied again"
    flow = open_flow(pipelines["sd3"])
    flow.remember(TWO)
    place = torch.device("meta")
    monkeypatch.setattr(type(flow), "device", place)
    context, pooled = flow.encode(TWO)
    kept = [part for name in TWO for part in flow._cache[name]]
    assert {part.device for part in (context, pooled, *kept)} == {place}


def test_all_tokens_of_a_long_prompt_are_counted_in_bfloat16(pipelines):
    "A sum of 257 ones in bfloat16 is 256"
    flow = open_flow(
        pipelines["z_image"], shake=0, dtype="bfloat16", max_sequence_length=300
    )
    x, seen = flow.prior(1), []

    def note(latents, t, prompts, return_dict):
        seen.append([len(prompt) for prompt in prompts])
        return [latents]

    context = torch.zeros(1, 300, 16, dtype=torch.bfloat16)
    mask = (torch.arange(300) < 257)[None].to(torch.bfloat16)
    flow.call_transformer(note, x, T[:1], context, mask)
    assert seen == [[257]]


def test_what_a_device_map_has_placed_is_not_moved(pipelines, monkeypatch):
    from vggflow.worlds.diffusers_flow import DiffusersFlow

    moved = []
    monkeypatch.setattr(DiffusersFlow, "to", lambda self, *a: moved.append(a) or self)
    open_flow(pipelines["sd3"], device_map="cpu")
    assert not moved
    open_flow(pipelines["sd3"])
    assert moved == [("cpu",)]


@pytest.mark.parametrize("how", [{}, dict(dtype="bfloat16", autocast=True)], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_is_one_graph(pipelines, name, how):
    "As torch.compile sees it, of a model that was never called"
    how = KINDS[name].plain | how
    flow, fresh = (open_flow(pipelines[name], **how) for _ in range(2))
    given = []
    flow.transformer.register_forward_pre_hook(
        lambda net, args, options: given.append((args, options)), with_kwargs=True
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = flow.transformer.dtype
        encodings = [part.to(kind) for part in flow.encode(TWO)]
        flow.call_transformer(flow.transformer, flow.prior(2).to(kind), T, *encodings)
        args, options = given[0]
        seen = torch._dynamo.explain(fresh.transformer)(*args, **options)
    assert seen.graph_break_count == 0, seen.break_reasons


@pytest.mark.parametrize(
    "have,torch_is,status",
    [
        ("0.28.0+cu130", "2.13.0+cpu", "failed"),
        ("0.28.0+cpu", "2.13.0+cu130", "failed"),
        ("0.28.0", "2.13.0+cpu", "usable"),
        ("0.28.0+cpu", "2.13.0+cpu", "usable"),
    ],
)
def test_builds_of_torch_and_torchvision_that_differ_are_named(
    monkeypatch, have, torch_is, status
):
    monkeypatch.setattr(installation.metadata, "version", lambda name: have)
    monkeypatch.setattr(torch, "__version__", torch_is)
    check = installation.check_torchvision()
    assert (check.status == "failed") == (status == "failed")
    if status == "failed":
        assert have in check.found and torch_is in check.found
        assert "pip install -c constraints.txt torchvision" in check.remedy
