"The closed forms, and the mistakes that must miss them."

import math
from dataclasses import replace

import pytest
import torch
from torch.func import jvp

from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.adjoint import memoryless_costates, memoryless_sample, pullback
from vggflow.theory.control import control_cost, gap_closed, riccati
from vggflow.theory.flow import (
    GaussianFlow,
    MixtureFlow,
    Trajectory,
    portions,
    sample,
    time_grid,
)
from vggflow.theory.losses import (
    consistency_modes,
    costate_targets,
    local_terms,
    residual_exact,
    residual_fd,
    trajectory_target,
)
from vggflow.theory.value import ValueGradient
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune

A = torch.tensor([1.0, 0.5])
CONFIG = FinetuneConfig(
    updates=150, batch_size=32, lr=2e-2, schedule="cosine", weight_decay=0.0
)


def linear(x, prompts=None):
    return x @ A


def quadratic(x, prompts=None):
    return (0.8 * x - 0.25 * x**2).sum(-1)


def relative(found, truth):
    "Size of the difference in units of the size of the truth"
    return ((found - truth).norm() / truth.norm()).item()


def mean_shift(flow):
    "Mean displacement by the finetuned flow in units of a, 200 midpoint steps"
    x0 = flow.prior(500, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        finetuned = sample(flow, x0, time_grid(200), method="midpoint")
        base = sample(flow, x0, time_grid(200), base=True, method="midpoint")
    return ((finetuned.x1 - base.x1).mean(0) @ A / A.pow(2).sum()).item()


def trained_shift(S, method, seed=0):
    torch.manual_seed(seed)
    flow = GaussianFlow([0.0, 0.0], math.sqrt(S))
    finetune(flow, linear, method, CONFIG, progress=False)
    return mean_shift(flow)


def exact_shift(S):
    return math.pi / 2 * math.sqrt(S)


@pytest.mark.parametrize("S", [0.04, 1.0])
def test_no_correction_misses(S):
    found = trained_shift(S, VGGFlow(beta=1.0, correction=False))
    assert abs(found / exact_shift(S) - 1) > 0.1


def residual_with_wrong_time(value, x, t, beta, cond=None, factors=None, known=None):
    "The exact residual with the total derivative too small by a thousand"
    g, v, pulled = known or local_terms(value, x, t, cond, factors)

    def g_at(y, s):
        return value(y, s, cond, factors=factors)

    direction = ((v - beta * g) / 1000, torch.ones_like(t) / 1000)
    return jvp(g_at, (x, t), direction)[1] + pulled


def test_time_step_off_by_1000_misses(monkeypatch):
    monkeypatch.setitem(consistency_modes, "wrong-time", residual_with_wrong_time)
    try:
        found = trained_shift(0.04, VGGFlow(beta=1.0, mode="wrong-time"))
    except FloatingPointError:
        return  # or it diverges
    assert abs(found / 0.3142 - 1) > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_mode_closes_the_gap_of_the_sampler_on_gaussians(seed):
    "Against the discrete Riccati recursion: anisotropic in 5 dimensions, quadratic reward"
    torch.manual_seed(seed)
    flow = GaussianFlow(torch.zeros(5), torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]))
    config = replace(CONFIG, batch_size=64, seed=seed)
    finetune(flow, quadratic, VGGFlow(beta=1.0), config, progress=False)
    x0 = flow.prior(256)
    times = time_grid(20)
    slope = torch.full((5,), 0.8).double()
    solution = riccati(flow.double(), slope, 0.5, 1.0, times.double(), discrete=True)
    P, q, offset = (torch.as_tensor(part)[0].float() for part in solution)
    least = 0.5 * ((x0 @ P) * x0).sum(1) + x0 @ q + offset
    assert gap_closed(flow.float(), quadratic, x0, times, 1.0, least=least) > 0.97


def learned_value(flow, reward, clip=None):
    "A value gradient with a correction in the middle of its training"
    value = ValueGradient(flow, reward, flow.make_correction(), clip=clip)
    torch.nn.init.normal_(value.correction.net[-1].weight, std=0.3)
    return value


def sine(x, prompts=None):
    return torch.sin(x).sum(-1)


@pytest.mark.parametrize("seed", [0, 1])
def test_costates_are_the_gradient_through_the_base_steps(seed):
    "costate_targets(mu=1) is the gradient of the reward through the base's Euler steps"
    torch.manual_seed(seed)
    flow = MixtureFlow(torch.randn(3, 2), 0.5).double()
    value = learned_value(flow, sine).double()
    x0 = flow.prior(16).requires_grad_()
    tr = sample(flow, x0, time_grid(10).double(), base=True)
    (by_autograd,) = torch.autograd.grad(-sine(tr.x1).sum(), x0)
    tr = Trajectory(tr.x.detach(), tr.v.detach(), tr.times)
    assert (costate_targets(value, tr, mu=1.0)[0][0] - by_autograd).abs().max() < 1e-10
    early = costate_targets(value, tr, mu=0.9)[0][0]
    assert (early - by_autograd).abs().max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_without_pulling_back_a_target_leans_on_the_next_value_alone(seed):
    "costate_targets(mu=0) is trajectory_target at every step"
    torch.manual_seed(seed)
    flow = MixtureFlow(torch.randn(3, 2), 0.5).double()
    value = learned_value(flow, sine).double()
    times = time_grid(10).double()
    tr = sample(flow, flow.prior(16), times, base=True)
    t = times[:-1, None].expand(10, 16).flatten()
    t_next = times[1:, None].expand(10, 16).flatten()
    v_next = torch.cat([tr.v[1:], 0 * tr.v[:1]]).flatten(0, 1)
    x, x_next = tr.x[:-1].flatten(0, 1), tr.x[1:].flatten(0, 1)
    value.measure(tr.x1, torch.ones(16).double())
    g_next = value(x_next, t_next, v=v_next).detach()
    one_step, _ = trajectory_target(flow, x, t, t_next, g_next)
    targets = costate_targets(value, tr, mu=0.0)[0].flatten(0, 1)
    assert (targets - one_step).abs().max() < 1e-10
    blended = costate_targets(value, tr, mu=0.1)[0].flatten(0, 1)
    assert (blended - one_step).abs().max() > 1e-3


def least_cost(flow, i, c, lam, times, x0):
    "Dynamic programming by hand on coordinate i: the least cost from each start"

    def base_at(x, k):
        point = torch.full((1, 2), x).double()
        return flow.base_velocity(point, times[k : k + 1])[0, i].item()

    h = 1 / (len(times) - 1)
    p, q, offset = c, -A[i].item(), 0.0
    for k in reversed(range(len(times) - 1)):
        b = h * base_at(0.0, k)
        a = 1 + h * base_at(1.0, k) - b
        s = p * lam / (lam + h * p)
        r = q * lam / (lam + h * p)
        offset = offset - h * q * q / (2 * (lam + h * p)) + s * b * b / 2 + r * b
        q, p = (s * b + r) * a, s * a * a
    return p / 2 * x0[:, i] ** 2 + q * x0[:, i] + offset


def test_gap_closed_agrees_with_the_riccati_recursion():
    "On an anisotropic Gaussian, for a partly trained flow"
    torch.manual_seed(0)
    flow = GaussianFlow([0.3, -0.2], [0.5, 1.2]).double()
    lam, c, times = 0.7, 0.5, time_grid(20).double()

    def reward(x, prompts=None):
        return x @ A.double() - c / 2 * x.pow(2).sum(-1)

    config = FinetuneConfig(updates=60, lr=5e-3)
    finetune(flow, reward, VGGFlow(beta=1 / lam), config, progress=False)
    x0 = flow.prior(200)
    least = sum(least_cost(flow, i, c, lam, times, x0) for i in (0, 1)).mean()
    with torch.no_grad():
        base = control_cost(flow, reward, x0, times, lam, base=True).mean()
        now = control_cost(flow, reward, x0, times, lam).mean()
    by_hand = ((base - now) / (base - least)).item()
    assert 0.2 < by_hand < 1.0
    assert abs(gap_closed(flow, reward, x0, times, lam) / by_hand - 1) < 0.01


def quartic(x, prompts=None):
    return -x.pow(4).sum(-1)


def test_finite_differences_agree_with_the_exact_residual_in_float32():
    torch.manual_seed(0)
    flow = MixtureFlow(torch.randn(8, 5), 0.6)
    value = learned_value(flow, quartic)
    x = flow.prior(128)
    t = torch.rand(128) * 0.96 + 0.02
    value.measure(x, t)
    exact = residual_exact(value, x, t, 0.5).detach()
    assert relative(residual_fd(value, x, t, 0.5).detach(), exact) < 1e-3
    assert relative(residual_fd(value, x, t, 0.55).detach(), exact) > 1e-3


def cosine(x, prompts=None):
    return x.cos().sum(-1)


def test_one_set_of_clip_factors_serves_both_ends_of_a_difference():
    torch.manual_seed(0)
    flow = MixtureFlow(torch.randn(4, 2), 0.5)
    value = ValueGradient(flow, cosine, clip=0.5)
    x = flow.prior(64)
    t = torch.rand(64) * 0.9 + 0.05
    factors = value.measure(x, t)[1]
    assert (factors < 1).any()
    exact = residual_exact(value, x, t, 0.5, factors=factors)
    assert relative(residual_fd(value, x, t, 0.5, factors=factors), exact) < 1e-3
    assert relative(residual_fd(value, x, t, 0.5), exact) > 1e-3


def losses_at_scale(scale):
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)

    def reward(x, prompts=None):
        return scale * linear(x)

    method = VGGFlow(beta=1 / scale)
    history = finetune(flow, reward, method, FinetuneConfig(updates=20), progress=False)
    return torch.tensor([row["loss"] for row in history.rows])


def test_tiny_rewards_train_like_large_ones():
    "PickScore's gradients are 1e-6 of a toy's: reward down and beta up change nothing"
    assert torch.allclose(losses_at_scale(1.0), losses_at_scale(1e-6), rtol=1e-2)


@pytest.mark.parametrize(
    "mode,updates", [("exact", 150), ("finite-difference", 150), ("trajectory", 250)]
)
def test_every_mode_closes_the_gap_on_a_gaussian(mode, updates):
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)
    config = replace(CONFIG, updates=updates)
    finetune(flow, linear, VGGFlow(beta=1.0, mode=mode), config, progress=False)
    assert gap_closed(flow, linear, flow.prior(200), time_grid(20), 1.0) > 0.97


def test_residual_takes_one_time_for_the_whole_batch():
    "A time expanded over the batch shares its memory; a dual number does not allow that"
    flow = MixtureFlow([[1.0, 0.0], [-1.0, 0.0]], 0.3)
    value = learned_value(flow, lambda x, prompts=None: x.sum(1))
    x = flow.prior(4)

    def residual(t):
        return residual_exact(value, x, t, 1.0).detach()

    shared = residual(torch.tensor(0.5).expand(4))
    assert relative(shared, residual(torch.full((4,), 0.5))) < 1e-6
    assert relative(shared, residual(torch.full((4,), 0.51))) > 1e-3


class Watched(MixtureFlow):
    "Remembers how many rows each call of the network had"

    def __init__(self, *args):
        super().__init__(*args)
        self.rows = []

    def base_velocity(self, x, t, cond=None):
        assert len(x) == len(t)
        assert cond is None or len(cond) == len(x)
        self.rows.append(len(x))
        return super().base_velocity(x, t, cond)


@pytest.fixture
def watched():
    torch.manual_seed(0)
    return Watched(torch.randn(3, 2), 0.5).double()


def test_a_pullback_sees_at_most_so_many_rows_and_stays_the_same(watched):
    x = watched.prior(7)
    g = watched.prior(7)
    t = torch.tensor(0.4).double().expand(7)
    prompts = list("abcdefg")
    whole = pullback(watched, x, t, g, prompts)
    watched.rows.clear()
    with portions(with_gradients=3):
        in_parts = pullback(watched, x, t, g, prompts)
    assert watched.rows == [3, 3, 1]
    for part, truth in zip(in_parts, whole):
        assert relative(part, truth) < 1e-12
    assert relative(pullback(watched, x, t, g.flip(0))[1], whole[1]) > 0.1


def noisy_path(flow, noise=None):
    "A path of the noisy sampler from fixed noise"
    x0 = flow.prior(7, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    times = time_grid(5).double()
    with torch.no_grad():
        return memoryless_sample(flow, x0, times, generator, base=True, noise=noise)


def test_noisy_paths_in_portions_have_the_noise_of_their_rows(watched):
    whole = noisy_path(watched)
    watched.rows.clear()
    with portions(without_gradients=4):
        in_parts = noisy_path(watched)
    assert watched.rows == [4] * 5 + [3] * 5
    assert in_parts.x.shape == whole.x.shape
    assert relative(in_parts.x, whole.x) < 1e-12
    assert relative(in_parts.v, whole.v) < 1e-12
    given = torch.randn(5, 7, 2, dtype=torch.float64)
    with portions(without_gradients=4):
        from_given = noisy_path(watched, given)
    assert relative(from_given.x, noisy_path(watched, given).x) < 1e-12
    assert relative(from_given.x, whole.x) > 0.1


def test_noise_that_is_drawn_before_gives_the_same_path(watched):
    "Drawn step by step, from the generator that the sampler would use"
    generator = torch.Generator().manual_seed(2)
    shape = (7, 2)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    given = noisy_path(watched, torch.stack(drawn))
    assert relative(given.x, noisy_path(watched).x) < 1e-12


def test_a_noisy_path_with_gradients_is_not_cut(watched):
    "The graph belongs to the caller, who has said how many rows he gives"
    x0 = watched.prior(5).requires_grad_()
    with portions(without_gradients=2):
        path = memoryless_sample(watched, x0, time_grid(4).double(), base=True)
    assert watched.rows == [5] * 4
    assert path.x1.requires_grad


def test_costates_of_noisy_paths_go_in_portions(watched):
    path = noisy_path(watched)
    end = watched.prior(7)
    whole = memoryless_costates(watched, path, end)
    watched.rows.clear()
    with portions(with_gradients=2):
        in_parts = memoryless_costates(watched, path, end)
    assert set(watched.rows) == {1, 2}
    assert relative(in_parts, whole) < 1e-12
