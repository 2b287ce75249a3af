"The second adapter as a correction; the small transformer is held in its chapter"

import pytest
import torch
from tiny_flows import TWO, T, X, base_velocity, reload, velocity


@pytest.fixture(params=[False, True], ids=["plain", "checkpointed"])
def flow(request, tiny):
    how = dict(guidance_scale=2.0, gradient_checkpointing=request.param)
    return reload(tiny["t5"], correction="adapter", **how)


@pytest.fixture
def nu(flow):
    "A correction that is not zero"
    nu = flow.make_correction()
    assert nu(X, T, TWO, HINTS).abs().max() == 0  # but it is at the start
    torch.manual_seed(2)
    for weight in nu.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return nu


HINTS = X, X.flip(0)


def test_every_weight_of_it_learns(nu):
    nu(X, T, TWO, HINTS).square().sum().backward()
    assert all(weight.grad is not None for weight in nu.parameters())
    ends = [*nu.inlet.parameters(), *nu.head.parameters()]
    assert all(weight.grad.abs().max() > 0 for weight in ends)
    moved = sum(bool(weight.grad.abs().max() > 0) for weight in nu.lora.values())
    assert moved > 0.8 * len(nu.lora)


def test_it_reads_prompt_time_state_and_hints(nu):
    out = nu(X, T, TWO, HINTS)
    others = dict(
        prompt=nu(X, T, TWO[::-1], HINTS),
        time=nu(X, T + 0.1, TWO, HINTS),
        state=nu(X.flip(1), T, TWO, HINTS),
        hints=nu(X, T, TWO, HINTS[::-1]),
    )
    for what, other in others.items():
        assert (out - other).abs().max() > 1e-4, what


def test_it_is_differentiable_forwards(nu):
    _, tangent = torch.func.jvp(lambda x: nu(x, T, TWO, HINTS), (X,), (X,))
    with torch.no_grad():
        further, nearer = (nu(s * X, T, TWO, HINTS) for s in (1.001, 0.999))
    difference = (further - nearer) / 2e-3
    assert (tangent - difference).norm() < 1e-2 * difference.norm()


def test_the_flow_does_not_notice_it(flow):
    before = velocity(flow), base_velocity(flow)
    nu = flow.make_correction()
    for weight in nu.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    nu(X, T, TWO, HINTS).square().sum().backward()
    assert torch.equal(velocity(flow), before[0])
    assert torch.equal(base_velocity(flow), before[1])
    own = flow.trainable_parameters()
    assert all(weight.requires_grad and weight.grad is None for weight in own)
    assert not any("correction" in name for name in flow.trainable_state())
