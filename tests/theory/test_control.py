"The truths of theory.control agree with each other, with formulas, and with brute force."

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import minimize_scalar

from vggflow.theory.control import (
    characteristics,
    control_cost,
    controlled_cost,
    gaussian_reach,
    grid_value_1d,
    open_loop_optimum,
    optimal_moments,
    riccati,
    tilted_moments,
)
from vggflow.theory.flow import GaussianFlow, MixtureFlow, time_grid

DOUBLE = dict(dtype=torch.double)
LAM = 0.7


def problem(d, seed=0):
    "An anisotropic Gaussian base, a and a full C in d dimensions, with the reward"
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, **DOUBLE)

    B, a = normal(d, d), normal(d)
    flow = GaussianFlow(normal(d), 0.3 + normal(d).abs()).double()
    C = 0.3 * B @ B.T / d + 0.2 * torch.eye(d, **DOUBLE)

    def reward(x, prompts=None):
        return x @ a - ((x @ C) * x).sum(-1) / 2

    return flow, a, C, reward, normal(24, d)


def value(P, q, o, x):
    return ((x @ P) * x).sum(-1) / 2 + x @ q + o


def close(a, b, tol):
    assert ((a - b).norm() / b.norm()).item() < tol


def uniform(lo, hi, n):
    return torch.linspace(lo, hi, n, **DOUBLE)


def at(x, V, points):
    return torch.tensor(np.interp(points.numpy(), x.numpy(), V.numpy()))


# Riccati


@pytest.mark.parametrize("d", [1, 2, 5])
def test_discrete_riccati_is_the_open_loop_optimum(d):
    flow, a, C, reward, x0 = problem(d)
    for times in (time_grid(20).double(), time_grid(12, 3.0).double()):
        P, q, o = riccati(flow, a, C, LAM, times, discrete=True)
        least = open_loop_optimum(flow, reward, x0, times, LAM)[1]
        assert (value(P[0], q[0], o[0], x0) - least).abs().max() < 1e-6
        assert (value(P[-1], q[-1], o[-1], x0) + reward(x0)).abs().max() < 1e-9


def test_discrete_riccati_is_a_least_squares_problem():
    "All N controls of 20 steps in 2-D at once, by the normal equations of scipy.linalg"
    flow, a, C, _, x0 = problem(2)
    times = time_grid(20).double()
    N, h, S = 20, 0.05, (flow.std**2).numpy()
    starts = times[:-1].tolist()
    A = [1 + h * (t * S - (1 - t)) / ((1 - t) ** 2 + t * t * S) for t in starts]
    b = [flow.mean.numpy() * (h - (Ak - 1) * t) for Ak, t in zip(A, starts)]
    x, M = x0[0].numpy(), np.zeros((2, 2 * N))  # x_N = x + M u
    for k in range(N):
        M = A[k][:, None] * M
        M[:, 2 * k : 2 * k + 2] = h * np.eye(2)
        x = A[k] * x + b[k]
    a, C = a.numpy(), C.numpy()
    normal = LAM * h * np.eye(2 * N) + M.T @ C @ M
    u = scipy.linalg.solve(normal, M.T @ (a - C @ x), assume_a="pos")
    end = x + M @ u
    J = LAM * h / 2 * u @ u - a @ end + end @ C @ end / 2
    P, q, o = riccati(flow, torch.tensor(a), torch.tensor(C), LAM, times, discrete=True)
    assert abs(value(P[0], q[0], o[0], x0[:1]).item() - J) < 1e-7


def test_continuous_riccati_by_matrix_fractions():
    "P = Y X⁻¹ for the linear Hamiltonian system, by scipy.linalg.expm on 4000 pieces"
    flow, a, C, _, _ = problem(2)
    S, n = (flow.std**2).numpy(), 4000
    XY = np.concatenate([np.eye(2), C.numpy()])
    for k in reversed(range(n)):
        t = (k + 0.5) / n
        c = np.diag((t * S - (1 - t)) / ((1 - t) ** 2 + t * t * S))
        H = np.block([[c, -np.eye(2) / LAM], [np.zeros((2, 2)), -c]])
        XY = scipy.linalg.expm(-H / n) @ XY
    P = riccati(flow, a, C, LAM, time_grid(2).double())[0][0]
    assert np.abs(XY[2:] @ np.linalg.inv(XY[:2]) - P.numpy()).max() < 1e-5


@pytest.mark.parametrize("d", [1, 2, 5])
def test_riccati_characteristics_and_moments_agree(d):
    flow, a, C, reward, x1 = problem(d)
    times = time_grid(200).double()
    xs, gs = characteristics(flow, reward, x1, times, LAM)
    P, q, _ = riccati(flow, a, C, LAM, times)
    close(torch.einsum("nij,nbj->nbi", P, xs) + q[:, None], gs, 1e-6)
    affine = torch.cat([xs[0], torch.ones(24, 1, **DOUBLE)], 1)  # x_1 is affine in x_0
    W = torch.linalg.lstsq(affine, x1).solution
    mean, cov = optimal_moments(flow, a, C, LAM)
    close(W[-1], mean, 1e-6)
    close(W[:-1].T @ W[:-1], cov, 1e-6)


@pytest.mark.parametrize("steps", [200, 400])
def test_the_discrete_optimum_tends_to_the_continuous_one(steps):
    flow, a, C, _, x0 = problem(2)
    times = time_grid(steps).double()
    found = [riccati(flow, a, C, LAM, times, discrete) for discrete in (True, False)]
    discrete, continuous = (value(P[0], q[0], o[0], x0) for P, q, o in found)
    assert (discrete - continuous).abs().max() < 8 / steps


def test_the_feedback_of_riccati_is_optimal_for_control_cost():
    flow, a, C, reward, x0 = problem(2)
    times = time_grid(20).double()
    P, q, o = riccati(flow, a, C, LAM, times, discrete=True)

    class Steered(GaussianFlow):
        def velocity(self, x, t, cond=None):
            v = self.base_velocity(x, t)
            k = int((times[:-1] - t[0]).abs().argmin())
            slope = (x + 0.05 * v) @ P[k + 1] + q[k + 1]
            stiffness = LAM * torch.eye(2, **DOUBLE) + 0.05 * P[k + 1]
            return v - torch.linalg.solve(stiffness, slope.T).T

    best = Steered(flow.mean, flow.std).double()
    cost = control_cost(best, reward, x0, times, LAM)
    assert (cost - value(P[0], q[0], o[0], x0)).abs().max() < 1e-9


def test_unbounded_problems_are_refused():
    flow, times = GaussianFlow([0.0], 1.0).double(), time_grid(20).double()
    for solve, more in ((riccati, [times]), (optimal_moments, [])):
        with pytest.raises(ValueError, match="lam must exceed 1.571"):
            solve(flow, [0.0], -1.0, 1.5, *more)
        assert all(z.isfinite().all() for z in solve(flow, [0.0], -1.0, 1.6, *more))
    with pytest.raises(ValueError, match="no minimum"):
        riccati(flow, [0.0], -1.0, 1.0, times, discrete=True)
    with pytest.raises(ValueError, match="no minimum"):
        tilted_moments(flow, [0.0], -1.0, 0.9)
    with pytest.raises(ValueError, match="GaussianFlow"):
        riccati(MixtureFlow([[0.0]], 1.0), [0.0], 1.0, 1.0, times)
    with pytest.raises(ValueError, match="dimensions"):
        riccati(flow, [0.0, 1.0], 1.0, 1.0, times)
    with pytest.raises(ValueError, match="end at 1"):
        riccati(flow, [0.0], 1.0, 1.0, times[:-1])
    with pytest.raises(ValueError, match="positive"):
        riccati(flow, [0.0], 1.0, 0.0, times)


def test_a_number_for_C_and_the_dtype_of_the_flow():
    flow = GaussianFlow([0.1, 0.2], [0.5, 2.0])
    number = riccati(flow, [1.0, 2.0], 0.5, 1.0, time_grid(5))
    matrix = riccati(flow, [1.0, 2.0], 0.5 * torch.eye(2), 1.0, time_grid(5))
    for a, b in zip(number, matrix):
        assert torch.equal(a, b) and a.dtype == torch.float32
    assert [tuple(z.shape) for z in number] == [(6, 2, 2), (6, 2), (6,)]


# Moments


@pytest.mark.parametrize("S", [0.04, 1.0])
def test_mean_shifts_of_the_paper(S):
    flow = GaussianFlow([0.0], math.sqrt(S)).double()
    best = optimal_moments(flow, [1.0], 0.0, 1.0)[0].item()
    assert abs(best - {0.04: 0.3142, 1.0: 1.5708}[S]) < 1e-4
    assert abs(tilted_moments(flow, [1.0], 0.0, 1.0)[0].item() - S) < 1e-6
    times = time_grid(20).double()
    discrete = -2 * riccati(flow, [1.0], 0.0, 1.0, times, discrete=True)[2][0].item()
    assert abs(discrete - {0.04: 0.2909, 1.0: 1.4764}[S]) < 1e-4


def test_quadratic_numbers_of_the_paper():
    mean, cov = optimal_moments(GaussianFlow([0.0], 0.6).double(), [0.8], 0.5, 0.7)
    assert abs(mean.item() - 0.644) < 5e-4 and abs(cov.item() - 0.129) < 5e-4


def test_tilted_moments_by_summing_the_density():
    flow, a, C, reward, _ = problem(2)
    side = uniform(-8, 8, 801)
    x = torch.cartesian_prod(side, side)
    logp = reward(x) / LAM - ((x - flow.mean) / flow.std).pow(2).sum(-1) / 2
    w = logp.softmax(0)
    m = w @ x
    mean, cov = tilted_moments(flow, a, C, LAM)
    close(m, mean, 1e-6)
    close((w[:, None] * (x - m)).T @ (x - m), cov, 1e-6)


def test_optimal_moments_by_sampling_open_loop_controls():
    flow, a, C, reward, _ = problem(1, seed=3)
    times = time_grid(200).double()
    nodes, w = np.polynomial.hermite_e.hermegauss(8)
    w = torch.tensor(w / w.sum())
    x0 = torch.tensor(nodes)[:, None]
    u, _ = open_loop_optimum(flow, reward, x0, times, LAM)
    x1 = controlled_cost(flow, reward, x0, u, times, LAM)[0][:, 0]
    mean, cov = optimal_moments(flow, a, C, LAM)
    assert abs((w @ x1 - mean).item()) < 0.01
    assert abs((w @ (x1 - w @ x1) ** 2 / cov).item() - 1) < 0.02


# The grid


def two_peaks(x, p=None):
    low, high = (torch.exp(-((x - at) ** 2) / 0.18) for at in (-1, 1))
    return (low + 1.3 * high).sum(-1)


def towards(x, p=None):
    return -0.5 * (x - 1).pow(2).sum(-1)


def test_grid_against_riccati():
    flow = GaussianFlow([0.3], 0.6).double()
    x, times = uniform(-7, 7, 1001), time_grid(8).double()

    def reward(x, prompts=None):
        return (0.8 * x - 0.25 * x**2).sum(-1)

    V = grid_value_1d(flow, reward, LAM, x, times)
    for k, (P, q, o) in enumerate(zip(*riccati(flow, [0.8], 0.5, LAM, times))):
        inner = x.abs() < 3
        assert (V[k] - value(P, q, o, x[:, None]))[inner].abs().max() < 1e-3


def test_grid_with_a_kink_against_scipy_minimisation_over_the_end_point():
    "On a Gaussian base the least cost of reaching z is (z − y)²/2K; brute force over z"
    flow, lam = GaussianFlow([0.2], 0.8).double(), 0.5
    x = uniform(-6, 6, 1201)
    V = grid_value_1d(flow, two_peaks, lam, x, time_grid(1).double())[0]
    K = math.pi / 2 * 0.8 / lam
    assert abs(gaussian_reach(flow, lam).item() - K) < 1e-6

    def cost(z, start):
        energy = (z - (0.2 + 0.8 * start)) ** 2 / (2 * K)
        return energy - two_peaks(torch.tensor([[z]], **DOUBLE)).item()

    options = dict(method="bounded", options=dict(xatol=1e-9))
    ends = np.linspace(-3, 3, 61)
    for i in range(300, 901, 60):
        start = x[i].item()
        near = ends[np.argmin([cost(z, start) for z in ends])]
        bounds = (near - 0.1, near + 0.1)
        best = minimize_scalar(cost, bounds=bounds, args=(start,), **options).fun
        assert abs(best - V[i].item()) < 4e-3


def test_grid_against_brute_force_over_controls_on_a_mixture():
    "Three constant controls, every combination of 41 values, and a reward with a kink"
    flow = MixtureFlow([[-1.0], [1.0]], 0.4).double()

    def reward(x, prompts=None):
        return -(x - 0.5).abs().sum(-1)

    def velocity(y, t, u):
        return flow.base_velocity(y, torch.full((len(y),), t, **DOUBLE)) + u

    x, lam, U = uniform(-6, 6, 1201), 1.0, uniform(-3, 3, 41)
    V = grid_value_1d(flow, reward, lam, x, torch.tensor([0.7, 1.0]).double())[0]
    u = torch.cartesian_prod(U, U, U)
    for start in (-0.8, 0.0, 1.1):
        y = torch.full((len(u), 1), start, **DOUBLE)
        for k in range(12):  # midpoint steps of .025
            t, push = 0.7 + 0.025 * k, u[:, k // 4, None]
            middle = y + 0.0125 * velocity(y, t, push)
            y = y + 0.025 * velocity(middle, t + 0.0125, push)
        brute = (lam / 2 * 0.1 * u.pow(2).sum(1) - reward(y)).min().item()
        assert -1e-3 < brute - at(x, V, torch.tensor([start])).item() < 1e-2


def test_grid_characteristics_and_open_loop_agree_on_a_mixture():
    flow, lam = MixtureFlow([[-0.8], [0.8]], 0.5).double(), 1.0
    times, x = time_grid(200).double(), uniform(-8, 8, 1601)
    V = grid_value_1d(flow, towards, lam, x, times)
    G = torch.gradient(V, spacing=0.01, dim=1)[0]
    x1 = uniform(-1.1, 2, 15)[:, None]
    xs, gs = characteristics(flow, towards, x1, times, lam)
    assert (xs.diff(dim=1) > 0).all()  # no crossing
    paid = torch.trapezoid(gs[..., 0] ** 2 / (2 * lam), dx=1 / 200, dim=0) - towards(x1)
    u, least = open_loop_optimum(flow, towards, xs[0], times, lam)
    close(at(x, V[0], xs[0, :, 0]), paid, 0.01)
    close(least, paid, 0.01)
    close(-lam * u, gs[:-1], 0.01)
    for k in (0, 60, 120, 180):
        close(at(x, G[k], xs[k, :, 0]), gs[k, :, 0], 0.01)
    wrong = grid_value_1d(flow, towards, 1.1 * lam, x, times[[0, -1]])[0]
    with pytest.raises(AssertionError):
        close(at(x, wrong, xs[0, :, 0]), paid, 0.01)


def test_at_a_shock_the_grid_is_the_least_branch_and_one_start_is_not_enough():
    flow, lam = MixtureFlow([[-1.0], [1.0]], 0.4).double(), 2.0
    times, x = time_grid(200).double(), uniform(-8, 8, 1601)
    V = grid_value_1d(flow, towards, lam, x, times[[0, -1]])[0]
    x1 = uniform(-2.6, 2.6, 2001)[:, None]
    xs, gs = characteristics(flow, towards, x1, times, lam)
    assert (xs[0].diff(dim=0) < 0).any()  # they cross
    paid = torch.trapezoid(gs[..., 0] ** 2 / (2 * lam), dx=1 / 200, dim=0) - towards(x1)
    for p in (-1.6, -1.4, -1.1, -0.9):
        branches = paid[(xs[0, :, 0] - p).abs() < 0.005]
        assert abs(branches.min().item() / at(x, V, torch.tensor([p])).item() - 1) < 0.01
    start, coarse = torch.tensor([[-1.1]], **DOUBLE), time_grid(100).double()
    away = torch.where(x1[:, 0] > 0.12, (xs[0, :, 0] + 1.1).abs(), torch.inf)
    right = -gs[:-1:2, away.argmin()][:, None] / lam  # of paths that end on the right
    stuck = open_loop_optimum(flow, towards, start, coarse, lam)[1].item()
    best = open_loop_optimum(flow, towards, start, coarse, lam, u0=right)[1].item()
    truth = at(x, V, start[:, 0]).item()
    assert stuck > truth + 0.1 and abs(best / truth - 1) < 0.01


def test_grid_shapes_and_refusals():
    flow, x = GaussianFlow([0.0], 1.0), torch.linspace(-3, 3, 61)
    V = grid_value_1d(flow, towards, 1.0, x, time_grid(4))
    assert V.shape == (5, 61) and V.dtype == torch.float32
    assert torch.allclose(V[-1], -towards(x[:, None]))
    for bad in (x**3, x.flip(0), x[:, None]):
        with pytest.raises(ValueError, match="uniform"):
            grid_value_1d(flow, towards, 1.0, bad, time_grid(4))


def test_without_a_reward_nothing_is_paid():
    flow, x = MixtureFlow([[-1.0], [1.0]], 0.4).double(), uniform(-6, 6, 601)
    V = grid_value_1d(flow, lambda x, p=None: 0 * x.sum(-1), 1.0, x, time_grid(4).double())
    assert V[:, x.abs() < 4].abs().max() < 1e-3
