"The closed forms, and the mistakes that must miss them."
import math
import pytest, torch
from torch.func import jvp
from vggflow.theory.control import gap_closed, control_cost, riccati
from vggflow.training.loop import FinetuneConfig, finetune
from vggflow.theory.flow import GaussianFlow, MixtureFlow, Trajectory, sample, time_grid
from vggflow.theory.losses import consistency_modes, costate_targets, local_terms, residual_exact, residual_fd, trajectory_target
from vggflow.methods.methods import VGGFlow
from vggflow.theory.value import ValueGradient

A = torch.tensor([1., .5])
CFG = FinetuneConfig(updates=300, batch_size=32, lr=1e-2, schedule='cosine', weight_decay=0.)


def linear(x, prompts=None): return x@A
def quadratic(x, prompts=None): return (.8*x-.25*x**2).sum(-1)


def shift(flow):
    "Mean displacement by the finetuned flow in units of a, 200 midpoint steps"
    with torch.no_grad():
        x0, times = flow.prior(500, generator=torch.Generator().manual_seed(1)), time_grid(200)
        d = sample(flow, x0, times, method='midpoint').x1-sample(flow, x0, times, base=True, method='midpoint').x1
    return (d.mean(0)@A/A.pow(2).sum()).item()


def trained_shift(S, method, seed=0):
    torch.manual_seed(seed); flow = GaussianFlow([0., 0.], math.sqrt(S))
    finetune(flow, linear, method, CFG, progress=False)
    return shift(flow)


@pytest.mark.parametrize('S', [.04, 1.])
def test_lands_within_one_percent_of_the_exact_shift(S):
    assert abs(trained_shift(S, VGGFlow(beta=1., mode='exact'), seed=1)/(math.pi/2*math.sqrt(S))-1) < .01


@pytest.mark.parametrize('S', [.04, 1.])
def test_no_correction_misses(S):
    assert abs(trained_shift(S, VGGFlow(beta=1., correction=False))/(math.pi/2*math.sqrt(S))-1) > .1


def test_time_step_off_by_1000_misses(monkeypatch):
    def wrong(value, x, t, beta, cond=None, factors=None, known=None):
        g, v, pulled = known or local_terms(value, x, t, cond, factors)
        dg = jvp(lambda y, s: value(y, s, cond, factors=factors), (x, t), ((v-beta*g)/1000, torch.ones_like(t)/1000))[1]
        return dg+pulled
    monkeypatch.setitem(consistency_modes, 'wrong-time', wrong)
    try: shift = trained_shift(.04, VGGFlow(beta=1., mode='wrong-time'))
    except FloatingPointError: return   # or it diverges
    assert abs(shift/.3142-1) > .5


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_default_mode_closes_the_gap_of_the_sampler_on_gaussians(seed):
    "Default mode against the discrete Riccati recursion, anisotropic in 5 dimensions, quadratic reward"
    torch.manual_seed(seed); std = torch.tensor([.2, .4, .6, .8, 1.]); flow = GaussianFlow(torch.zeros(5), std)
    reward = lambda x, p=None: .8*x.sum(-1)-.25*x.pow(2).sum(-1)
    finetune(flow, reward, VGGFlow(beta=1.), FinetuneConfig(updates=300, batch_size=64, lr=1e-2, schedule='cosine', weight_decay=0., seed=seed), progress=False)
    x0, times = flow.prior(256), time_grid(20)
    P, q, o = (torch.as_tensor(a)[0].float() for a in riccati(flow.double(), torch.full((5,), .8).double(), .5, 1., times.double(), discrete=True))
    least = .5*((x0@P)*x0).sum(1)+x0@q+o
    assert gap_closed(flow.float(), reward, x0, times, 1., least=least) > .97


@pytest.mark.parametrize('seed', [0, 1])
def test_on_grid_modes_agree_with_the_adjoint_of_the_euler_steps(seed):
    "costate_targets(mu=1) is the gradient of the reward through the base's Euler steps; mu=0 leans on the next value alone"
    torch.manual_seed(seed); flow = MixtureFlow(torch.randn(3, 2), .5).double(); times = time_grid(10).double()
    reward = lambda x, p=None: torch.sin(x).sum(-1); value = ValueGradient(flow, reward, flow.make_correction()).double()
    torch.nn.init.normal_(value.correction.net[-1].weight, std=.3)
    x0 = flow.prior(16).requires_grad_(); tr = sample(flow, x0, times, base=True)
    (by_autograd,) = torch.autograd.grad(-reward(tr.x1).sum(), x0)
    tr = Trajectory(tr.x.detach(), tr.v.detach(), times)
    assert (costate_targets(value, tr, mu=1.)[0][0]-by_autograd).abs().max() < 1e-10
    t = times[:-1, None].expand(10, 16).flatten(); nxt = times[1:, None].expand(10, 16).flatten()
    v_next = torch.cat([tr.v[1:], 0*tr.v[:1]]).flatten(0, 1)
    one_step = trajectory_target(value, tr.x[:-1].flatten(0, 1), t, tr.x[1:].flatten(0, 1), nxt, v_next=v_next)[0]
    assert (costate_targets(value, tr, mu=0.)[0].flatten(0, 1)-one_step).abs().max() < 1e-10


def test_printed_differences_miss_where_the_exact_ones_land():
    def moments(mode):
        torch.manual_seed(0); flow = GaussianFlow([0.], .6)
        finetune(flow, quadratic, VGGFlow(beta=1/.7, mode=mode), CFG, progress=False)
        x0 = torch.linspace(-4, 4, 401)[:, None]; w = torch.exp(-x0**2/2); w = w/w.sum()
        with torch.no_grad(): x = sample(flow, x0, time_grid(200), method='midpoint').x1
        m = (w*x).sum(); return m.item(), (w*(x-m)**2).sum().item()
    mean, var = moments('exact')
    assert abs(mean/.644-1) < .02 and abs(var/.129-1) < .05
    mean, var = moments('paper')
    assert abs(mean/.644-1) > .1 and abs(var/.129-1) > .1


def test_gap_closed_agrees_with_the_riccati_recursion():
    "Dynamic programming by hand, on an anisotropic Gaussian, against `gap_closed` of a partly trained flow"
    torch.manual_seed(0)
    flow = GaussianFlow([.3, -.2], [.5, 1.2]).double(); lam, c, times = .7, .5, time_grid(20).double()
    reward = lambda x, p=None: (x@A.double())-c/2*x.pow(2).sum(-1)
    finetune(flow, reward, VGGFlow(beta=1/lam), FinetuneConfig(updates=60, lr=5e-3), progress=False)
    x0 = flow.prior(200)
    least = torch.zeros(200).double()
    for i in range(2):
        p, q, o = c, -A[i].item(), 0.
        for k in reversed(range(20)):
            e = lambda z: torch.full((1, 2), z).double()
            b = .05*flow.base_velocity(e(0.), times[k:k+1])[0, i].item()
            a = 1+.05*flow.base_velocity(e(1.), times[k:k+1])[0, i].item()-b
            s, r = p*lam/(lam+.05*p), q*lam/(lam+.05*p)
            o = o-.05*q*q/(2*(lam+.05*p))+s*b*b/2+r*b
            q, p = (s*b+r)*a, s*a*a
        least += p/2*x0[:, i]**2+q*x0[:, i]+o
    with torch.no_grad(): base, now = (control_cost(flow, reward, x0, times, lam, base=b).mean() for b in (True, False))
    by_hand = ((base-now)/(base-least.mean())).item()
    assert .2 < by_hand < 1.
    assert abs(gap_closed(flow, reward, x0, times, lam)/by_hand-1) < .01


def test_finite_differences_agree_with_the_exact_residual_in_float32():
    torch.manual_seed(0)
    flow = MixtureFlow(torch.randn(8, 5), .6); value = ValueGradient(flow, lambda x, p=None: -x.pow(4).sum(-1), flow.make_correction())
    torch.nn.init.normal_(value.correction.net[-1].weight, std=.3)
    x, t = flow.prior(128), torch.rand(128)*.96+.02
    value.measure(x, t)
    exact, fd = (f(value, x, t, .5).detach() for f in (residual_exact, residual_fd))
    assert ((exact-fd).norm()/exact.norm()) < 1e-3


def test_one_set_of_clip_factors_serves_both_ends_of_a_difference():
    torch.manual_seed(0)
    flow = MixtureFlow(torch.randn(4, 2), .5); value = ValueGradient(flow, lambda x, p=None: x.cos().sum(-1), clip=.5)
    x, t = flow.prior(64), torch.rand(64)*.9+.05
    factors = value.measure(x, t)[1]
    assert (factors < 1).any()
    exact, fd = (f(value, x, t, .5, factors=factors) for f in (residual_exact, residual_fd))
    assert ((exact-fd).norm()/exact.norm()) < 1e-3


def test_tiny_rewards_train_like_large_ones():
    "PickScore's gradients are 1e-6 of a toy's: scaling the reward down and beta up changes nothing"
    def losses(s):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
        return [r['loss'] for r in finetune(flow, lambda x, p=None: s*linear(x), VGGFlow(beta=1/s), FinetuneConfig(updates=20), progress=False).rows]
    assert torch.allclose(torch.tensor(losses(1.)), torch.tensor(losses(1e-6)), rtol=1e-2)


@pytest.mark.parametrize('mode', ['exact', 'finite-difference', 'trajectory'])
def test_every_mode_closes_the_gap_on_a_gaussian(mode):
    torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
    finetune(flow, linear, VGGFlow(beta=1., mode=mode), CFG, progress=False)
    x0 = flow.prior(200)
    assert gap_closed(flow, linear, x0, time_grid(20), 1.) > .97

def test_residual_takes_one_time_for_the_whole_batch():
    "A time expanded over the batch shares its memory; a dual number does not allow that"
    flow = MixtureFlow([[1.,0.],[-1.,0.]], .3); value = ValueGradient(flow, lambda x,p=None: x.sum(1), flow.make_correction()); x = flow.prior(4)
    assert torch.equal(residual_exact(value, x, torch.tensor(.5).expand(4), 1.), residual_exact(value, x, torch.full((4,), .5), 1.))
