"Five methods: each against the place where it must end, and the slips that must miss it."
import math
import pytest, torch
from vggflow.worlds import emoji
from vggflow.theory.adjoint import costates, memoryless_costates, memoryless_sample, sweep
from vggflow.theory.control import gap_closed
from vggflow.training.loop import FinetuneConfig, finetune
from vggflow.theory.flow import GaussianFlow, MixtureFlow, Trajectory, sample, time_grid
from vggflow.methods.methods import AdjointMatching, Batch, DRaFT, Method, ReFL, VGGFlow, VGGFlowPMP, methods, unguided
from vggflow.train import make_method

A = torch.tensor([1., .5])
ALL = {'VGG-Flow': VGGFlow, 'VGG-Flow-PMP': VGGFlowPMP, 'AM': AdjointMatching, 'DRaFT': lambda: DRaFT(k=2), 'ReFL': ReFL}
TEMPERED = [VGGFlow, VGGFlowPMP, AdjointMatching]


def linear(x, prompts=None): return x@A.to(x)
def quadratic(x, prompts=None): return (.8*x-.25*x**2).sum(-1)
def wave(x, prompts=None): return torch.sin(x).sum(-1)
def seeded(n=0): return torch.Generator().manual_seed(n)


def train(flow, reward, method, **kw):
    finetune(flow, reward, method, FinetuneConfig(**{**dict(updates=250, lr=1e-2, schedule='cosine', weight_decay=0.), **kw}), progress=False)
    return flow


def mixture(seed=0, wild=True):
    "A mixture in double precision, its finetuned velocity away from the base"
    torch.manual_seed(seed); flow = MixtureFlow(torch.randn(3, 2), .5).double()
    if wild: torch.nn.init.normal_(flow.residual.net[-1].weight, std=.3)
    return flow


def batch_of(flow, n=8, steps=10, transitions=5, seed=0):
    return Batch(flow.prior(n, generator=seeded(seed)), time_grid(steps).to(next(flow.parameters())), generator=seeded(seed+1), transitions=transitions)


def gradient(flow, loss): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, flow.trainable_parameters())])


# ---------------------------------------------------------------- where they end

def c(t, S): return (t*S-(1-t))/((1-t)**2+t**2*S)


def products(S, N=20):
    "P_k = Π_{j>k}(1 + h c(t_j)): what a push at step k moves x_1 by, in units of h"
    t = torch.arange(N)/N
    return torch.stack([(1+c(t[k+1:], S)/N).prod() for k in range(N)])


def shift(flow, draw):
    "Mean displacement against the base from the same noise, in units of the reward's direction; variance of one coordinate"
    with torch.no_grad(): now, was = draw(False), draw(True)
    return ((now-was).mean(0)@A/A.pow(2).sum()).item(), now.var(0).mean().item()


@pytest.mark.parametrize('method', [VGGFlow, VGGFlowPMP])
@pytest.mark.parametrize('S', [.04, 1.])
def test_lands_on_the_control_optimum_of_the_grid(method, S):
    """PMP: 0.2909 and 1.4764, the optimum of 20 Euler steps. VGG-Flow learns g(x_k, t_k), the costate at the start of the step, where the
    discrete optimum takes the one at its end: 0.265 on the narrow Gaussian, 99 % of the gap (chapter 06)"""
    torch.manual_seed(0); flow = train(GaussianFlow([0., 0.], math.sqrt(S)), linear, method(beta=1.))
    x0 = flow.prior(400, generator=seeded(9))
    moved, _ = shift(flow, lambda base: sample(flow, x0, time_grid(20), base=base).x1)
    P = products(S); end, start = P.pow(2).sum()/20, (P*P*(1+c(torch.arange(20)/20, S)/20)).sum()/20
    assert abs(moved/(start if method is VGGFlow else end)-1) < .01
    if S == .04: assert abs(start/end-1) > .05                                          # the two can be told apart
    assert gap_closed(flow, linear, x0, time_grid(20), 1.) > (.98 if method is VGGFlow else .999)


def test_beta_scales_the_shift_and_nothing_else():
    "Twice β, twice the way; the loss starts the same"
    def run(beta):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6); cfg = FinetuneConfig(updates=150, lr=1e-2, schedule='cosine', weight_decay=0.)
        first = finetune(flow, linear, VGGFlowPMP(beta=beta), cfg, progress=False).rows[0]['loss']
        x0 = flow.prior(200, generator=seeded(9))
        return first, shift(flow, lambda base: sample(flow, x0, time_grid(20), base=base).x1)[0]
    (l1, s1), (l2, s2) = run(.5), run(1.)
    assert abs(l1/l2-1) < 1e-4 and abs(s2/s1-2) < .05


@pytest.mark.parametrize('S,shifted', [(.04, 1.), (.36, 3.)])
def test_adjoint_matching_lands_on_the_tilt(S, shifted):
    "The tilt of the sampler's own law at 20 steps, also of SD3's grid: mean moved by variance times βa, variance kept. Not the control optimum"
    beta, times = 2., time_grid(20, shifted)
    torch.manual_seed(0); flow = train(GaussianFlow([0., 0.], math.sqrt(S)), linear, AdjointMatching(beta=beta), shift=shifted)
    draw = lambda base: memoryless_sample(flow, flow.prior(4000, generator=seeded(8)), times, seeded(9), base=base).x1
    moved, var = shift(flow, draw)
    v = kept = 1.
    for t, h in zip(times.tolist(), times.diff().tolist()): a = 1+h*(2*c(t, S)-1/(t+h)); v, kept = a*a*v+2*h*(1-t)/(t+h), a*kept
    assert abs(moved/(beta*(v-kept**2))-1) < .02
    assert abs(var/v-1) < .06
    P = products(S)
    if shifted == 1: assert abs(moved/(beta*P.pow(2).sum()/20)-1) > .3


def test_adjoint_matching_narrows_as_a_quadratic_tilt():
    torch.manual_seed(0); S, beta = .36, 1.5; flow = train(GaussianFlow([0., 0.], .6), quadratic, AdjointMatching(beta=beta), updates=400, batch_size=64)
    with torch.no_grad(): x = memoryless_sample(flow, flow.prior(8000, generator=seeded(8)), time_grid(100), seeded(9)).x1
    var = 1/(1/S+.5*beta)
    assert abs(x.mean().item()/(var*.8*beta)-1) < .06 and abs(x.var(0).mean().item()/var-1) < .08
    assert abs(x.var(0).mean().item()/S-1) > .15


@pytest.mark.parametrize('method', [lambda: DRaFT(k=20), DRaFT, ReFL])
def test_without_a_prior_all_samples_climb_to_the_top(method):
    "x = 1.6 is the top of the reward, 1.28 its value: DRaFT and ReFL go there, whatever the data were; PMP does not"
    def ends(m):
        torch.manual_seed(0); flow = train(GaussianFlow([0., 0.], .6), quadratic, m, updates=120)
        with torch.no_grad(): return sample(flow, flow.prior(400, generator=seeded(9)), time_grid(20)).x1
    x = ends(method())
    assert quadratic(x).mean() > 1.2 and x.std(0).mean() < .33
    x = ends(VGGFlowPMP(beta=1.))
    assert quadratic(x).mean() < 1.1 and x.std(0).mean() > .38


# ---------------------------------------------------------------- gradients

class Pushed(GaussianFlow):
    "A Gaussian flow with one constant push for each Euler step"
    def __init__(self, S, N=20):
        super().__init__([0., 0.], math.sqrt(S)); self.residual.requires_grad_(False)
        self.b, self.N = torch.nn.Parameter(torch.zeros(N, 2)), N
    def velocity(self, x, t, cond=None): return self.base_velocity(x, t)+self.b[(t*self.N).round().long()]


def push(method, S, seed=0):
    flow = Pushed(S).double(); flow.mean, flow.std = flow.mean.double(), flow.std.double()
    loss, _ = method.loss(flow, linear, Batch(flow.prior(4, generator=seeded(seed)), time_grid(20).double(), generator=seeded(seed)))
    return (-gradient(flow, loss).view(20, 2)@A.double()/A.pow(2).sum())


@pytest.mark.parametrize('S', [.04, 1.])
@pytest.mark.parametrize('k', [1, 4, 20])
def test_gradients_of_draft_are_the_last_k_of_the_optimal_direction(k, S):
    want = torch.where(torch.arange(20) >= 20-k, products(S).double()/20, 0.)
    assert (push(DRaFT(k=k), S)-want).abs().max() < 1e-6
    assert (push(DRaFT(k=k, checkpointed=True), S)-want).abs().max() < 1e-6
    assert (push(DRaFT(k=k, lv=2), S)-want).abs().max() < 1e-6                       # linear: the re-noised state does not matter


def test_gradients_of_refl_are_one_late_step_as_if_no_other_followed():
    seen = set()
    for seed in range(12):
        g = push(ReFL(), .04, seed); (k,) = g.nonzero().flatten().tolist(); seen.add(k)
        assert abs(g[k]-(1-k/20)) < 1e-6
        if k < 19: assert abs(g[k]-products(.04)[k]/20) > 5e-3      # DRaFT would give h P_k; at the last step the two agree
    assert seen <= set(range(15, 20)) and len(seen) > 2


def test_draft_with_all_steps_is_full_backpropagation():
    for checkpointed in (False, True):
        flow = mixture(); b = batch_of(flow); x = b.x0
        for t, h in zip(b.times, b.times.diff()): x = x+h*flow.velocity(x, t.expand(len(x)))
        want = gradient(flow, -wave(x).mean())
        got = lambda k: gradient(flow, DRaFT(k=k, checkpointed=checkpointed).loss(flow, wave, b)[0])
        assert (got(10)-want).abs().max() < 1e-12*want.abs().max()
        assert (got(9)-want).abs().max() > 1e-3*want.abs().max()


def test_refl_is_the_gradient_of_its_objective():
    "Central differences of r(x_k + (1 − t_k) v_θ(x_k, t_k)) with the state held, against backpropagation"
    flow = mixture(); b = batch_of(flow); k = torch.randint(7, 10, (1,), generator=seeded(1)).item()
    with torch.no_grad(): x = sample(flow, b.x0, b.times[:k+1]).x1
    t = b.times[k].expand(len(x))
    objective = lambda: -wave(x+(1-b.times[k])*flow.velocity(x, t)).mean().item()
    got, at = gradient(flow, ReFL(last=.3).loss(flow, wave, b)[0]), 0
    for p in flow.trainable_parameters():
        i = p.numel()//2; old = p.data.flatten()[i].item(); f = []
        for s in (1, -1): p.data.view(-1)[i] = old+s*1e-5; f.append(objective())
        p.data.view(-1)[i] = old
        assert abs((f[0]-f[1])/2e-5-got[at+i]) < 1e-8; at += p.numel()


def test_low_variance_draft_starts_from_noised_final_samples():
    "Seen through the flow: the states that get gradients lie at t x_1 + (1 − t) noise"
    flow = mixture(); b = batch_of(flow, n=64); seen = []
    class Spied(MixtureFlow):
        def velocity(self, x, t, cond=None):
            if torch.is_grad_enabled(): seen.append((x.detach(), t[0].item()))
            return super().velocity(x, t, cond)
    flow.__class__ = Spied
    DRaFT(k=1, lv=2).loss(flow, wave, b)
    with torch.no_grad(): x1 = sample(flow, b.x0, b.times).x1
    (x, t), (y, u) = seen
    assert t == u == b.times[-2] and not torch.equal(x, y)
    noise = torch.stack([x, y]).sub(t*x1).div(1-t)
    assert abs(noise.std()-1) < .1 and noise.mean().abs() < .2


# ---------------------------------------------------------------- costates

def test_pmp_costates_are_backpropagation_through_the_euler_steps():
    "On the finetuned model's own trajectories, the controls held: to rounding in double precision"
    flow = mixture(); b = batch_of(flow)
    with torch.no_grad(): tr = sample(flow, b.x0, b.times)
    u = tr.v-torch.stack([flow.base_velocity(x, t.expand(8)) for x, t in zip(tr.x, b.times[:-1])])
    xs = [b.x0.clone().requires_grad_()]
    for t, h, uk in zip(b.times, b.times.diff(), u): xs.append(xs[-1]+h*(flow.base_velocity(xs[-1], t.expand(8))+uk))
    want = torch.stack(torch.autograd.grad(-wave(xs[-1]).sum(), xs))
    end = -torch.cos(tr.x1)
    a, base = sweep(flow, tr, end)
    assert torch.equal(a, costates(flow, tr, end)) and (base-tr.v+u).abs().max() < 1e-12
    assert (a-want).abs().max() < 1e-12
    assert (costates(flow, Trajectory(tr.x.roll(1, 0), tr.v, tr.times), end)-want).abs().max() > 1e-3   # states one step off


@pytest.mark.parametrize('cls', [VGGFlowPMP, AdjointMatching])
def test_losses_are_the_papers_sums(cls):
    "All steps used: the sums of PAPER.md over the trajectory, in units of β and ∇r"
    flow, beta = mixture(), 1.7; b = batch_of(flow, transitions=10); m = cls(beta=beta); m.setup(flow, wave); m.double()
    loss = m.loss(flow, wave, b)[0]; noisy = cls is AdjointMatching; g = seeded(1)
    with torch.no_grad(): tr = memoryless_sample(flow, b.x0, b.times, g) if noisy else sample(flow, b.x0, b.times)
    a = (memoryless_costates if noisy else costates)(flow, tr, -beta*torch.cos(tr.x1))

    def by_hand(step):
        total = 0.
        for k in range(10):
            t, h = b.times[k], b.times[k+1]-b.times[k]; s = (2*(1-t)/(t+h)).sqrt()
            v = flow.velocity(tr.x[k], t.expand(8))-flow.base_velocity(tr.x[k], t.expand(8))
            r = 2/s*v+s*a[k+step] if noisy else v+a[k+step]
            total = total+r.pow(2).sum(1).mean()/10
        return total/beta**2/torch.cos(tr.x1).pow(2).mean()
    assert abs(loss/by_hand(1)-1) < 1e-6 and abs(loss/by_hand(0)-1) > 1e-3
    got, want = gradient(flow, loss), gradient(flow, by_hand(1))
    assert (got-want).abs().max() < 1e-6*want.abs().max()


@pytest.mark.parametrize('cls', TEMPERED)
def test_units_of_the_reward_do_not_matter(cls):
    def losses(s):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
        return [r['loss'] for r in finetune(flow, lambda x, p=None: s*quadratic(x), cls(beta=1/s), FinetuneConfig(updates=10), progress=False).rows]
    assert torch.allclose(torch.tensor(losses(1.)), torch.tensor(losses(1e-6)), rtol=1e-2)


@pytest.mark.parametrize('cls', [VGGFlowPMP, AdjointMatching])
def test_clip_bounds_the_largest_reward_gradients(cls):
    "One sample with a reward gradient a thousand times the others' would own the loss"
    steep = lambda x, p=None: torch.where(torch.arange(len(x)) == 0, 1e3, 1.)*x.sum(-1)
    def loss(clip):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6); m = cls(clip=clip); m.setup(flow, steep); b = batch_of(flow, n=32)
        return m.loss(flow, steep, b)[0]*m.value.unit**2
    assert loss(.8) < 1e-3*loss(None)


# ---------------------------------------------------------------- as they were before `loss` was divided

OPEN = dict(eta=lambda t: t/2, alpha=.7)   # leaves the boundary open
RECORDED = {                               # loss, norm of all gradients
    'residual': (lambda: VGGFlow(1.3, clip=.8, **OPEN), .436454, 1.3936), 'no correction': (lambda: VGGFlow(1.3, clip=.8, correction=False), .259781, .966738),
    'trajectory': (lambda: VGGFlow(1.3, mode='trajectory', clip=.8), .30331, .995697), 'carried': (lambda: VGGFlow(1.3, mode='trajectory', mu=.9, clip=.8, **OPEN), 1.535114, 3.000401),
    'exact': (lambda: VGGFlow(1.3, mode='exact', clip=.8, **OPEN), 1.068542, 1.75114), 'exact-jittered': (lambda: VGGFlow(1.3, mode='exact-jittered', clip=.8, **OPEN), .97271, 1.80206),
    'finite-difference': (lambda: VGGFlow(1.3, mode='finite-difference', clip=.8), 2.588553, 2.693127), 'paper': (lambda: VGGFlow(1.3, mode='paper', clip=.8), 2.263195, 2.339339),
    'PMP': (lambda: VGGFlowPMP(clip=.8), 3.493556, 4.460174), 'AM': (lambda: AdjointMatching(clip=.8), 3.103348, 7.916025), 'ReFL': (lambda: ReFL(.5, True), -.545893, .264423),
    'DRaFT': (lambda: DRaFT(checkpointed=True), .458764, 2.738736), 'DRaFT-LV': (lambda: DRaFT(k=2, lv=2), .194099, 1.224004),
    'DRaFT-LV, checkpointed': (lambda: DRaFT(k=1, lv=3, checkpointed=True, relu=True), -.360338, .046395)}


@pytest.mark.parametrize('name', RECORDED)
def test_prepare_and_loss_on_give_the_recorded_loss(name):
    "Second batch of a seeded run in float32; recorded from the losses in one piece, which these were equal to in every bit"
    make, loss, norm = RECORDED[name]; both = lambda x, p=None: quadratic(x)+wave(x)
    torch.manual_seed(0); flow = MixtureFlow(torch.tensor([[1., 1.], [-1., .5], [0., -1.]]), .5); torch.nn.init.normal_(flow.residual.net[-1].weight, std=.3)
    m = make(); m.setup(flow, both); g = seeded(1)
    if getattr(m, 'learn', False): torch.nn.init.normal_(m.value.correction.net[-1].weight, std=.1)
    for _ in range(2): l = m.loss(flow, both, Batch(flow.prior(8, generator=g), time_grid(10), generator=g, transitions=4))[0]
    l.backward(); grads = [p.grad.flatten() for p in [*flow.parameters(), *m.parameters()] if p.grad is not None]
    assert l.item() == pytest.approx(loss, rel=1e-4) and torch.cat(grads).norm().item() == pytest.approx(norm, rel=1e-4)


# ---------------------------------------------------------------- options, randomness, resume

@pytest.mark.parametrize('make,says', [
    (lambda: DRaFT(k=0), 'at least 1'), (lambda: DRaFT(k=1.5), 'at least 1'), (lambda: DRaFT(lv=-1), 're-noised'),
    (lambda: DRaFT(k=11).loss(mixture(), wave, batch_of(mixture())), 'at most the 10 steps'),
    (lambda: VGGFlowPMP(beta=0), 'must be positive'), (lambda: AdjointMatching(beta=-1.), 'must be positive'), (lambda: VGGFlow(beta=0), 'must be positive'),
    (lambda: ReFL(last=0), 'share'), (lambda: make_method('AM', bta=1.), 'beta'), (lambda: make_method('VGG-Flow-PNP'), 'VGG-Flow-PMP'),
    (lambda: step(AdjointMatching(clip=2.)), 'quantile')])
def test_bad_options_are_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as e: make()
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('name,kw,says', [('VGG-Flow', dict(mu='abc'), "mu must be a number, got 'abc'"), ('VGG-Flow', dict(clip='abc'), 'clip must be a number'), ('VGG-Flow', dict(value_lr='abc'), 'value_lr must be a number'),
    ('VGG-Flow', dict(correction='maybe'), "correction must be true or false, got 'maybe'"), ('VGG-Flow', dict(beta=float('nan')), 'beta must be a number'), ('VGG-Flow', dict(mode=3), 'mode must be text'), ('VGG-Flow', dict(value_lr=-1.), 'value_lr must be at least 0'),
    ('VGG-Flow', dict(clip=1.5), 'clip is a quantile in (0, 1], got 1.5'), ('AM', dict(clip=0), 'clip is a quantile in (0, 1], got 0'), ('DRaFT', dict(k='abc'), 'k must be a number'), ('DRaFT', dict(k=1.5), 'k must be a whole number'),
    ('ReFL', dict(last='abc'), 'last must be a number'), ('ReFL', dict(relu=2), 'relu must be true or false'), ('ReFL', dict(last=True), 'last must be a number')], ids=str)
def test_options_of_another_type_are_refused_when_the_method_is_made(name, kw, says):
    with pytest.raises(ValueError) as e: make_method(name, **kw)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_options_as_a_command_line_says_them():
    m = make_method('VGG-Flow', correction='False', reuse='no', clip='none', beta=2); assert not m.learn and not m.reuse and m.clip is None and m.hyper == VGGFlow(beta=2, correction=False).hyper
    d = make_method('DRaFT', lv='false', checkpointed='yes', relu=1); assert (d.lv, d.checkpointed, d.relu) == (0, True, True) and make_method('DRaFT', lv=2).lv == 2 and make_method('DRaFT', lv=True).lv == 1
    assert make_method('VGG-Flow').hyper == VGGFlow().hyper and make_method('VGG-Flow', eta='t').hyper['eta'] == 't'


def step(method, flow=None, b=None):
    flow = flow or mixture(); method.setup(flow, wave)
    return method.double().loss(flow, wave, b or batch_of(flow))[0].item()


def test_all_five_are_known_by_their_printed_names():
    assert {type(make_method(n)) for n in ALL} == set(methods.values()) and len(methods) == 5
    assert all(issubclass(m, Method) for m in methods.values())
    assert make_method('VGG-Flow-PMP', beta=2., clip=.8).hyper == dict(beta=2., clip=.8)


@pytest.mark.parametrize('name', ALL)
def test_every_random_choice_comes_from_the_batch(name):
    def loss(seed, other):
        flow = mixture(); b = batch_of(flow); b.generator = seeded(seed); m = ALL[name](); torch.manual_seed(3); m.setup(flow, wave)
        torch.manual_seed(other); return m.double().loss(flow, wave, b)[0].item()
    assert loss(0, 1) == loss(0, 2)
    if name != 'DRaFT': assert len({loss(s, 1) for s in range(6)}) > 1


@pytest.mark.parametrize('name', ['VGG-Flow-PMP', 'AM', 'DRaFT'])
def test_resumes_to_the_last_bit(tmp_path, name):
    def run(out, updates):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
        m = DRaFT(k=2, lv=2) if name == 'DRaFT' else ALL[name]()
        h = finetune(flow, quadratic, m, FinetuneConfig(updates=updates, batch_size=4, save_every=2), out=out, progress=False)
        return flow, [r['loss'] for r in h.rows]
    whole, losses = run(tmp_path/'a', 6)
    run(tmp_path/'b', 3); torch.rand(5)
    again, more = run(tmp_path/'b', 6)
    assert losses == more and all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))


# ---------------------------------------------------------------- the emoji world

@pytest.fixture(scope='module', params=[1., 2.])
def world(request): return emoji.load_flow(guidance_scale=request.param), emoji.load_reward()


@pytest.mark.parametrize('name', ALL)
def test_one_update_on_the_emoji_flow(world, name):
    flow, reward = world; prompts = emoji.prompts[:3]; start = {k: v.clone() for k, v in flow.trainable_state().items()}
    x, t = flow.prior(2, generator=seeded()), torch.tensor([.3, .8])
    with torch.no_grad(): base = flow.base_velocity(x, t, prompts[:2])
    h = finetune(flow, reward, ALL[name](), FinetuneConfig(updates=1, batch_size=2, steps=5, transitions=2), prompts=prompts, progress=False)
    moved = [k for k, v in flow.trainable_state().items() if not torch.equal(v, start[k])]
    with torch.no_grad(): after, now = flow.base_velocity(x, t, prompts[:2]), flow.velocity(x, t, prompts[:2])
    flow.load_trainable_state(start)
    assert math.isfinite(h.rows[0]['loss']) and h.rows[0]['grad_norm'] > 0 and len(moved) > len(start)/3
    assert torch.equal(base, after) and not torch.equal(now, after)      # the base stays, the finetuned velocity moves


def test_emoji_costates_are_backpropagation(world):
    "float32, LoRA switched off, guidance inside: against autograd through the same Euler steps"
    flow, reward = world; cond = emoji.prompts[:2]; times = time_grid(4)
    x = [flow.prior(2, generator=seeded()).requires_grad_()]
    for t, h in zip(times, times.diff()): x.append(x[-1]+h*flow.base_velocity(x[-1], t.expand(2), cond))
    want = torch.stack(torch.autograd.grad(-reward(flow.decode(x[-1]), cond).sum(), x))
    tr = Trajectory(torch.stack(x).detach(), None, times)
    got = costates(flow, tr, want[-1], cond)
    assert (got-want).norm() < 1e-5*want.norm()
    with unguided(flow): other = costates(flow, tr, want[-1], cond)
    assert (flow.guidance_scale == 1.) == torch.equal(got, other)       # and the switch is set back


def test_unguided_is_set_back_after_an_error():
    class Flow: guidance_scale = 5.
    flow = Flow()
    with pytest.raises(KeyError):
        with unguided(flow): assert flow.guidance_scale == 1.; raise KeyError
    assert flow.guidance_scale == 5.
    with unguided(object()): pass

def test_reuse_of_the_reward_gradient_costs_little():
    "One reward gradient for a transition: the same losses for a linear reward, and nearly the optimum for a quadratic one"
    quad = lambda x, _=None: .8*x.sum(1)-.25*(x**2).sum(1)
    def made(reuse, reward, updates):
        torch.manual_seed(0); flow = GaussianFlow(torch.zeros(2), torch.full((2,), .6))
        h = finetune(flow, reward, VGGFlow(beta=1.5, reuse=reuse), FinetuneConfig(updates=updates, batch_size=128, lr=3e-3, schedule='cosine'), progress=False)
        return flow,[r['loss'] for r in h.rows]
    assert made(True, linear, 3)[1]==pytest.approx(made(False, linear, 3)[1], rel=1e-5)
    flow,losses = made(True, quad, 300); assert losses[0]!=pytest.approx(made(False, quad, 1)[1][0], rel=1e-4)   # the two differ there
    assert gap_closed(flow, quad, flow.prior(512, generator=torch.Generator().manual_seed(9)), time_grid(20), 1/1.5) > .985
    with pytest.raises(ValueError, match='reuse goes with'): VGGFlow(mode='exact', reuse=True)
