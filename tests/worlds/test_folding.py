"Samples are drawn with the adapter inside the weights, and nothing else notices"

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_flows import TWO, T, X, adapter_gradient, close, reload, shaken_emoji
from torch import nn

from vggflow import sample
from vggflow.worlds.folding import is_foldable, multiplies_fully

COND = ["a cat", "an owl"]


@pytest.fixture
def flow(tiny):
    return reload(tiny["t5"], guidance_scale=2.0)


@pytest.fixture
def adapted_calls(monkeypatch):
    "How often a layer was computed with its adapter beside it"
    calls, forward = [], LoraLinear.forward

    def counted(layer, *args, **kwargs):
        calls.append(None if layer.disable_adapters else layer.active_adapters[0])
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "forward", counted)
    return calls


@torch.no_grad()
def drawn(flow, x0=X, cond=TWO, base=False):
    return sample(flow, x0, flow.times(4), cond, base=base).x1


def test_samples_are_those_of_the_adapter_beside_the_weights(adapted_calls):
    flow = shaken_emoji()
    x0 = flow.prior(2, COND, torch.Generator().manual_seed(0))
    flow.fold = False
    beside = drawn(flow, x0, COND)
    assert adapted_calls and set(adapted_calls) == {"default"}
    adapted_calls.clear()
    flow.fold = True
    assert close(drawn(flow, x0, COND), beside, 5e-6)
    assert not adapted_calls  # no layer was
    for weight in flow.trainable_parameters():
        weight.data.mul_(1 + 1e-3)
    assert not close(drawn(flow, x0, COND), beside, 5e-6)  # a small difference is seen


def test_it_follows_the_weights(flow):
    with flow.drawing(), torch.no_grad():
        before = drawn(flow)
        for weight in flow.trainable_parameters():
            weight.mul_(1.1)
        inside = drawn(flow)
    assert close(inside, drawn(flow), 5e-6)
    assert not close(inside, before)


def test_the_base_and_the_weights_are_untouched(flow):
    weights = {name: w.clone() for name, w in flow.transformer.state_dict().items()}
    base, without = drawn(flow, base=True), flow.base_velocity(X, T, TWO)
    drawn(flow)
    with flow.drawing(), torch.no_grad():
        flow.velocity(X, T, TWO)
        assert torch.equal(flow.base_velocity(X, T, TWO), without)
    assert torch.equal(drawn(flow, base=True), base)
    after = flow.transformer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert not any("forward" in vars(layer) for layer in flow._layers)


def test_before_the_first_update_finetuned_and_base_samples_are_one(tiny):
    flow = reload(tiny["t5"], shake=0)
    assert torch.equal(drawn(flow), drawn(flow, base=True))


def test_gradients_do_not_see_it(flow):
    outside = adapter_gradient(flow)
    with flow.drawing():
        with torch.no_grad():
            flow.velocity(X, T, TWO)
        inside = adapter_gradient(flow)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert any(weight.abs().max() > 0 for weight in outside)


def test_samples_can_enter_a_graph(flow):
    x1, scale = drawn(flow), torch.ones(1, requires_grad=True)
    (x1 * scale).sum().backward()
    assert torch.allclose(scale.grad, x1.sum())


def test_a_second_adapter_stays_beside_the_weights(tiny, adapted_calls):
    flow = reload(tiny["t5"], correction="adapter")
    nu = flow.make_correction()
    adapted_calls.clear()
    with flow.drawing(), torch.no_grad():
        flow.velocity(X, T, TWO)
        assert not adapted_calls
        nu(X, T, TWO, (X, X))
    assert set(adapted_calls) == {"correction"}


def test_an_error_leaves_the_layers_as_they_were(flow):
    with pytest.raises(RuntimeError), flow.drawing(), torch.no_grad():
        flow.velocity(X[:, :1], T, TWO)
    assert not any("forward" in vars(layer) for layer in flow._layers)
    assert flow._block is None


def plain_layer(**config):
    config = LoraConfig(r=2, target_modules=["0"], **config)
    (layer,) = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)))
    return layer


class OwnLinear(nn.Linear):
    "Might be quantised"


def of_another_class():
    layer = plain_layer()
    layer.base_layer = OwnLinear(4, 4)
    return layer


ODD_LAYERS = dict(
    dora=lambda: plain_layer(use_dora=True),
    biased=lambda: plain_layer(lora_bias=True),
    bfloat16=lambda: plain_layer().bfloat16(),
    meta=lambda: plain_layer().to("meta"),
    of_another_class=of_another_class,
)


@pytest.mark.parametrize("odd", ODD_LAYERS)
def test_layers_that_are_not_plain_are_left_alone(odd):
    assert is_foldable(plain_layer())
    assert not is_foldable(ODD_LAYERS[odd]())


def hooked(flow):
    flow.transformer.proj_out.register_forward_pre_hook(lambda part, args: None)


def switched_off(flow):
    flow.configure(fold=False)


def in_bfloat16(flow):
    flow.transformer.bfloat16()


@pytest.mark.parametrize("change", [hooked, switched_off, in_bfloat16])
def test_flows_that_cannot_fold_draw_as_before(flow, change, adapted_calls):
    change(flow)
    assert drawn(flow).isfinite().all()
    assert set(adapted_calls) == {"default"}


def test_reduced_precision_is_noticed():
    assert multiplies_fully("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not multiplies_fully("cpu")
    torch.set_float32_matmul_precision("medium")
    assert not multiplies_fully("cpu")
