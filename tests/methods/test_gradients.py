"The gradients of each method against an independent route, and slips that must show."

import math

import pytest
import torch
from method_worlds import (
    DIRECTION,
    difference,
    draw_samples,
    gradient,
    linear,
    loss_of,
    made_for,
    mixture,
    wave,
)
from test_where_they_end import products

from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.theory.adjoint import (
    costates,
    memoryless_costates,
    memoryless_noise,
    memoryless_sample,
    sweep,
)
from vggflow.theory.flow import GaussianFlow, MixtureFlow, Trajectory, sample


class Pushed(GaussianFlow):
    "A Gaussian flow with one constant push for each Euler step"

    def __init__(self, S, N=20):
        super().__init__([0.0, 0.0], math.sqrt(S))
        self.residual.requires_grad_(False)
        self.b, self.N = torch.nn.Parameter(torch.zeros(N, 2)), N

    def velocity(self, x, t, cond=None):
        return self.base_velocity(x, t) + self.b[(t * self.N).round().long()]


def push(method, S, seed=0):
    "−d loss / d b_k along the reward's direction, (20,)"
    flow = Pushed(S).double()
    samples = draw_samples(flow, n=4, steps=20, seed=seed)
    found = gradient(flow, loss_of(flow, linear, method, samples)).view(20, 2)
    return -found @ DIRECTION.double() / DIRECTION.pow(2).sum()


@pytest.mark.parametrize("S", [0.04, 1.0])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_gradients_of_draft_are_the_last_k_of_the_optimal_direction(k, S):
    last = torch.arange(20) >= 20 - k
    want = torch.where(last, products(S).double() / 20, 0.0)
    assert (push(DRaFT(k=k), S) - want).abs().max() < 1e-6
    assert (push(DRaFT(k=k, checkpointed=True), S) - want).abs().max() < 1e-6
    # linear: the re-noised state does not matter
    assert (push(DRaFT(k=k, lv=2), S) - want).abs().max() < 1e-6


def test_gradients_of_refl_are_one_late_step_as_if_no_other_followed():
    seen = set()
    for seed in range(12):
        found = push(ReFL(), 0.04, seed)
        (k,) = found.nonzero().flatten().tolist()
        seen.add(k)
        assert abs(found[k] - (1 - k / 20)) < 1e-6
        if k < 19:  # DRaFT would give h P_k; at the last step the two agree
            assert abs(found[k] - products(0.04)[k] / 20) > 5e-3
    assert seen <= set(range(15, 20)) and len(seen) > 2


def test_draft_with_all_steps_is_full_backpropagation():
    for checkpointed in (False, True):
        flow = mixture()
        samples = draw_samples(flow)
        x = samples.x0
        for t, h in zip(samples.times, samples.times.diff()):
            x = x + h * flow.velocity(x, t.expand(len(x)))
        want = gradient(flow, -wave(x).mean())

        def found(k, flow=flow, samples=samples, checkpointed=checkpointed):
            method = DRaFT(k=k, checkpointed=checkpointed)
            return gradient(flow, loss_of(flow, wave, method, samples))

        assert (found(10) - want).abs().max() < 1e-12 * want.abs().max()
        assert (found(9) - want).abs().max() > 1e-3 * want.abs().max()


def test_refl_is_the_gradient_of_its_objective():
    "Central differences of r(x_k + (1 − t_k) v_θ(x_k, t_k)), the state held"
    flow = mixture()
    samples, method = draw_samples(flow), ReFL(last=0.3)
    k = draw_samples(flow).shared_integer(7, 10)
    with torch.no_grad():
        x = sample(flow, samples.x0, samples.times[: k + 1]).x1
    t = samples.times[k]

    def objective():
        end = x + (1 - t) * flow.velocity(x, t.expand(len(x)))
        return -wave(end).mean().item()

    found, at = gradient(flow, loss_of(flow, wave, method, samples)), 0
    for p in flow.trainable_parameters():
        i = p.numel() // 2
        old, values = p.data.flatten()[i].item(), []
        for sign in (1, -1):
            p.data.view(-1)[i] = old + sign * 1e-5
            values.append(objective())
        p.data.view(-1)[i] = old
        assert abs((values[0] - values[1]) / 2e-5 - found[at + i]) < 1e-8
        at += p.numel()


def test_low_variance_draft_starts_from_noised_final_samples():
    "Seen through the flow: states that get gradients lie at t x_1 + (1 − t) noise"
    flow, seen = mixture(), []

    class Spied(MixtureFlow):
        def velocity(self, x, t, cond=None):
            if torch.is_grad_enabled():
                seen.append((x.detach(), t[0].item()))
            return super().velocity(x, t, cond)

    flow.__class__ = Spied
    samples = draw_samples(flow, n=64)
    loss_of(flow, wave, DRaFT(k=1, lv=2), samples)
    with torch.no_grad():
        x1 = sample(flow, samples.x0, samples.times).x1
    (x, t), (y, u) = seen
    assert t == u == samples.times[-2] and not torch.equal(x, y)
    noise = torch.stack([x, y]).sub(t * x1).div(1 - t)
    assert abs(noise.std() - 1) < 0.1 and noise.mean().abs() < 0.2


# ---------------------------------------------------------------- costates


def test_pmp_costates_are_backpropagation_through_the_euler_steps():
    "On the finetuned model's own trajectories, the controls held"
    flow = mixture()
    samples = draw_samples(flow)
    times = samples.times
    with torch.no_grad():
        path = sample(flow, samples.x0, times)
        on_path = zip(path.x, times[:-1])
        base_v = torch.stack([flow.base_velocity(x, t.expand(8)) for x, t in on_path])
    controls = path.v - base_v
    xs = [samples.x0.clone().requires_grad_()]
    for t, h, u in zip(times, times.diff(), controls):
        xs.append(xs[-1] + h * (flow.base_velocity(xs[-1], t.expand(8)) + u))
    want = torch.stack(torch.autograd.grad(-wave(xs[-1]).sum(), xs))
    end = -torch.cos(path.x1)
    found, base = sweep(flow, path, end)
    assert torch.equal(found, costates(flow, path, end))
    assert (base - base_v).abs().max() < 1e-12
    assert (found - want).abs().max() < 1e-12
    one_off = Trajectory(path.x.roll(1, 0), path.v, times)
    assert (costates(flow, one_off, end) - want).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [VGGFlowPMP, AdjointMatching])
def test_losses_are_the_papers_sums(cls):
    "All steps used: the sums of the paper over the trajectory, in units of β and ∇r"
    flow, beta, noisy = mixture(), 1.7, cls is AdjointMatching
    samples = draw_samples(flow, transitions=10)
    method = made_for(flow, wave, cls(beta=beta))
    loss = loss_of(flow, wave, method, samples)
    noise = draw_samples(flow, transitions=10).normal(10, 2).transpose(0, 1)
    with torch.no_grad():
        if noisy:
            path = memoryless_sample(flow, samples.x0, samples.times, noise=noise)
        else:
            path = sample(flow, samples.x0, samples.times)
    carry_back = memoryless_costates if noisy else costates
    a = carry_back(flow, path, -beta * torch.cos(path.x1))

    def by_hand(step):
        total = 0.0
        for k, (t, h) in enumerate(zip(samples.times, samples.times.diff())):
            s, x = memoryless_noise(t, h), path.x[k]
            push = flow.velocity(x, t.expand(8)) - flow.base_velocity(x, t.expand(8))
            r = 2 / s * push + s * a[k + step] if noisy else push + a[k + step]
            total = total + r.pow(2).sum(1).mean() / 10
        return total / beta**2 / torch.cos(path.x1).pow(2).mean()

    assert abs(loss / by_hand(1) - 1) < 1e-6
    assert abs(loss / by_hand(0) - 1) > 1e-3
    found, want = gradient(flow, loss), gradient(flow, by_hand(1))
    assert difference(found, want) < 1e-6


class Guided(GaussianFlow):
    "Guidance as pipelines have it: the base velocity moves away from the unconditional one"

    guidance_scale = 5.0

    def base_velocity(self, x, t, cond=None):
        unconditional, conditional = super().base_velocity(x, t), -torch.sin(3 * x)
        return unconditional + self.guidance_scale * (conditional - unconditional)


@pytest.mark.parametrize("cls,bare", [(AdjointMatching, True), (VGGFlowPMP, False)])
def test_only_adjoint_matching_leaves_guidance_out_of_its_costate(cls, bare):
    "The path is guided; the costate goes back through the conditional velocity alone"
    torch.manual_seed(0)
    flow = Guided([0.0, 0.0], 0.6).double()
    samples = draw_samples(flow, n=4, transitions=10)
    method = made_for(flow, wave, cls())
    items = method.prepare(flow, wave, samples)
    noise = draw_samples(flow, n=4).normal(10, 2).transpose(0, 1)
    with torch.no_grad():
        if cls is AdjointMatching:
            path = memoryless_sample(flow, samples.x0, samples.times, noise=noise)
        else:
            path = sample(flow, samples.x0, samples.times)
    assert difference(items.x, path.x[:-1].transpose(0, 1).flatten(0, 1)) < 1e-12

    def targets(scale):
        flow.guidance_scale = scale
        back = memoryless_costates if cls is AdjointMatching else costates
        a = back(flow, path, -torch.cos(path.x1))[1:]
        flow.guidance_scale = 5.0
        if cls is AdjointMatching:
            s = memoryless_noise(samples.times[:-1], samples.times.diff())
            a = s[:, None, None] ** 2 / 2 * a
        return a.transpose(0, 1).flatten(0, 1)

    assert flow.guidance_scale == 5.0
    right, wrong = (1.0, 5.0) if bare else (5.0, 1.0)
    assert difference(items.target, targets(right)) < 1e-10
    assert difference(items.target, targets(wrong)) > 0.1
