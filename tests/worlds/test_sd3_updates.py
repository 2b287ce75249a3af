"Every method through the loop on a pipeline: what moves, what stays, what goes on"

import math

import pytest
import torch
from tiny_flows import (
    COND,
    TWO,
    T,
    X,
    all_close,
    base_velocity,
    close,
    reload,
    velocity,
)
from tiny_sd3 import make_tiny_taesd

from vggflow.commands.export import export_lora, load_correction
from vggflow.common.seals import read_sealed, write_sealed
from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.estimates import (
    CalibratedEta,
    CoarseAdjoint,
    EndGradient,
    LookAhead,
    TruncatedAdjoint,
)
from vggflow.methods.value_gradient import VGGFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.worlds.emoji import load_emoji
from vggflow.worlds.emoji_rewards import load_reward
from vggflow.worlds.lora import lora_settings

METHODS = dict(
    vgg=lambda: VGGFlow(beta=5.0, clip=0.8),
    pmp=lambda: VGGFlowPMP(beta=5.0),
    am=lambda: AdjointMatching(beta=5.0),
    draft=lambda: DRaFT(k=2),
    refl=lambda: ReFL(last=0.5),
    end=lambda: EndGradient(beta=5.0),
    calibrated=lambda: CalibratedEta(beta=5.0),
    ahead=lambda: LookAhead(beta=5.0),
    truncated=lambda: TruncatedAdjoint(beta=5.0),
    coarse=lambda: CoarseAdjoint(beta=5.0, every=2),
)


def brighter_cats(images, prompts):
    "Brightness, twice for a cat"
    cats = torch.tensor([1.0 + ("cat" in prompt) for prompt in prompts])
    return images.mean((1, 2, 3)) * cats


def finite(history):
    "Whether every number of a history is one"
    numbers = [v for row in history.rows for v in row.values() if isinstance(v, float)]
    return all(map(math.isfinite, numbers))


def update(folder, method, out=None, updates=1, **settings):
    "A run of a few updates on a pipeline from disk: flow, method, history"
    flow, made = reload(folder, shake=0, **settings), METHODS[method]()
    config = FinetuneConfig(
        updates=updates,
        batch_size=2,
        steps=4,
        transitions=2,
        lr=1e-2,
        seed=0,
        save_every=1,
    )
    how = dict(out=out, prompts=[*TWO, "a red fish"], progress=False)
    history = finetune(flow, brighter_cats, made, config, **how)
    assert finite(history)
    return flow, made, history


def same_weights(one, other):
    "Whether two flows or methods have the same trained numbers, bit for bit"
    return (
        all(map(torch.equal, one.values(), other.values())) and one.keys() == other.keys()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind,scale", [("t5", 3.0), ("no_t5", 1.0)])
def test_every_method_on_a_reloaded_pipeline(tiny, method, kind, scale):
    "One update moves the adapter and leaves the base alone; so with all memory savers"
    settings = dict(guidance_scale=scale, cfg_batched=False)  # batched rounds differently
    flow, _, plain = update(tiny[kind], method, **settings)
    fresh = reload(tiny[kind], shake=0, guidance_scale=scale)
    assert close(base_velocity(flow), base_velocity(fresh))
    assert not close(velocity(flow), velocity(fresh), 1e-4)
    frugal = dict(gradient_checkpointing=True, decode_checkpointing=True)
    _, _, saved = update(tiny[kind], method, **settings, **frugal)
    for name in ("loss", "grad_norm"):
        assert saved.rows[0][name] == pytest.approx(plain.rows[0][name], rel=1e-4)


MODES = ["residual", "trajectory", "exact", "exact-jittered", "finite-difference", "paper"]
VARIANTS = [dict(mode=mode) for mode in MODES]
VARIANTS += [dict(mode="trajectory", mu=0.9), dict(correction=False)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_mode_in_half_precision_with_guidance(options):
    "Two updates in bfloat16 move the adapter and ν, and leave the base alone"
    flow = load_emoji(dtype=torch.bfloat16, guidance_scale=2.0, lora_rank=2)
    method = VGGFlow(beta=10.0, clip=0.8, **options)
    x = flow.prior(2, generator=torch.Generator().manual_seed(0))
    point = x, torch.tensor([0.3, 0.7]), COND[:2]
    with torch.no_grad():
        base = flow.base_velocity(*point)
    before = {name: weight.clone() for name, weight in flow.trainable_state().items()}
    config = FinetuneConfig(
        updates=2, batch_size=2, steps=4, transitions=2, lr=1e-3, seed=0
    )
    how = dict(prompts=COND, progress=False)
    history = finetune(flow, load_reward(), method, config, **how)
    assert finite(history)
    after = flow.trainable_state()
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert not same_weights(after, before)
    with torch.no_grad():
        assert torch.equal(base, flow.base_velocity(*point))
        assert not torch.equal(base, flow.velocity(*point))
        if method.learn:
            g = method.value.nu(*point, base, torch.zeros_like(x))
            assert g.dtype == torch.float32 and g.abs().max() > 0
            assert history.rows[-1]["consistency"] > 0


def everything_on(tiny, folder):
    "Options of Stable Diffusion 3.5, all at once"
    return dict(
        dtype="bfloat16",
        guidance_scale=2.0,
        correction="adapter",
        lora_dropout=0.1,
        cfg_batched=False,
        gradient_checkpointing=True,
        decode_checkpointing=True,
        vae_slicing=True,
        taesd=tiny["taesd"],
        embeddings=folder,
        image_size=8,
    )


def test_everything_on_with_3_5_in_half_precision(tiny, tmp_path):
    "It trains, and its export gives the same adapter and correction"
    settings = everything_on(tiny, tmp_path / "prompts")
    run = tmp_path / "run"
    flow, method, _ = update(tiny["sd35"], "vgg", run, updates=2, **settings)
    assert flow.describe()["correction"] == "adapter"
    weights = [*flow.trainable_parameters(), *method.parameters()]
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert len(list((tmp_path / "prompts").iterdir())) >= 2
    nu = method.value.correction
    assert any(weight.abs().max() > 0 for weight in nu.head.parameters())

    export_lora(flow, tmp_path / "out", run=run)
    kept = ("dtype", "correction", "image_size", "guidance_scale")
    settings = {name: settings[name] for name in kept}
    again = reload(tiny["sd35"], shake=0, **settings)
    again.load_lora(tmp_path / "out")
    value = load_correction(again, tmp_path / "out", brighter_cats)
    x = X[:, :, :4, :4]
    with torch.no_grad():
        v = flow.velocity(x, T, TWO)
        g = method.value.nu(x, T, TWO, v, x)
        assert close(again.velocity(x, T, TWO), v, 1e-2)
        assert close(value.nu(x, T, TWO, v, x), g, 1e-2)
    assert value.unit == method.value.unit


def test_resumed_with_dropout_and_a_second_adapter(tiny, tmp_path):
    "An interrupted run goes on bit for bit"
    settings = dict(guidance_scale=2.0, correction="adapter", lora_dropout=0.2)
    whole = update(tiny["t5"], "vgg", tmp_path / "a", updates=2, **settings)
    update(tiny["t5"], "vgg", tmp_path / "b", updates=1, **settings)
    rest = update(tiny["t5"], "vgg", tmp_path / "b", updates=2, **settings)
    assert same_weights(whole[0].trainable_state(), rest[0].trainable_state())
    assert same_weights(whole[1].state_dict(), rest[1].state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind,scale", [("t5", 1.0), ("no_t5", 3.0)])
def test_every_method_resumes_bit_for_bit(tiny, method, kind, scale, tmp_path):
    "T5 present and absent, guidance off and on"
    settings = dict(guidance_scale=scale)
    whole, _, _ = update(tiny[kind], method, tmp_path / "a", updates=2, **settings)
    update(tiny[kind], method, tmp_path / "b", updates=1, **settings)
    rest, _, _ = update(tiny[kind], method, tmp_path / "b", updates=2, **settings)
    assert same_weights(whole.trainable_state(), rest.trainable_state())


def test_export_overwrites_nothing(tiny, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "out"
    flow, _, _ = update(tiny["t5"], "refl", run)
    out = export_lora(flow, folder, run=run)
    card = (out / "README.md").read_text()
    names = sorted(file.name for file in out.iterdir())
    assert names == ["README.md", "pytorch_lora_weights.safetensors"]
    assert card.startswith("---\nlibrary_name: diffusers")
    assert "license" not in card.split("---")[1]
    assert "Nothing was measured" in card and "ReFL" in card and str(tmp_path) not in card
    with pytest.raises(ValueError, match="README.md.* already"):
        export_lora(flow, out)
    with pytest.raises(ValueError, match="no value correction"):
        load_correction(flow, out)
    with pytest.raises(ValueError, match="no run directory"):
        export_lora(flow, tmp_path / "x", run=out)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_fingerprint_tells_weights_of_one_name_apart(tiny, tmp_path):
    "Transformer and decoder; adapter and correction are not part of it"
    flow = reload(tiny["t5"], lora_rank=2, correction="adapter")
    mark = flow.fingerprint()
    torch.nn.init.ones_(flow.trainable_parameters()[0])
    flow.make_correction()
    del flow._marks  # measured again
    assert set(mark) == {"weights"} and flow.fingerprint() == mark
    assert reload(tiny["sd35"], lora_rank=2).fingerprint() != mark
    one, other = (
        reload(tiny["t5"], taesd=make_tiny_taesd(tmp_path / str(seed), seed=seed))
        for seed in (0, 1)
    )
    assert one.fingerprint()["weights"] == mark["weights"]
    assert one.fingerprint()["taesd"] != other.fingerprint()["taesd"]


def test_other_weights_of_the_same_name_are_another_run(tiny, tmp_path):
    "The run's folder is refused to them, but not where an old record does not say"
    run = tmp_path / "run"

    def train(flow):
        config = FinetuneConfig(updates=1, batch_size=2, steps=2)
        how = dict(out=run, prompts=TWO, progress=False)
        return finetune(flow, lambda x, p: x.mean((1, 2, 3)), ReFL(), config, **how)

    train(reload(tiny["t5"], lora_rank=2))
    assert lora_settings(run / "lora")["lora_rank"] == 2  # a run made in Python
    other = reload(tiny["t5"], lora_rank=2)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.01)
    with pytest.raises(ValueError, match="holds another run .about.weights"):
        train(other)
    record = run / "config.json"
    said = read_sealed(record, "again")
    del said["about"]
    write_sealed(record, said)
    train(other)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_known_velocity_has_the_value_and_the_gradient_of_the_velocity(tiny, scale):
    flow = reload(tiny["no_t5"], guidance_scale=scale)
    with torch.no_grad():
        known = flow.velocity(X, T, TWO)
    weights = flow.trainable_parameters()
    pairs = []
    for v in (flow.velocity(X, T, TWO), flow.known_velocity(X, T, TWO, known)):
        pairs.append((v.detach(), torch.autograd.grad(v.pow(2).sum(), weights)))
    (value, gradient), (other, others) = pairs
    assert close(other, value) and all_close(others, gradient)


def test_a_known_velocity_with_dropout_is_computed_again(tiny):
    flow = reload(tiny["no_t5"], guidance_scale=5.0, lora_dropout=0.5)
    off = flow.known_velocity(X, T, TWO, torch.zeros_like(X))
    assert off.abs().max() > 0
