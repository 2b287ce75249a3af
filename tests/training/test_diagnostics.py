"Failure signs: each fires on its failing series and on no healthy one, and stops a run that can go on."
import csv, json, math, random
import pytest, torch
from vggflow.training.checkpoint import checkpoints, load_checkpoint
from vggflow.training.diagnostics import (Thresholds, collapse, diagnose, divergence, hacking, kept, non_finite, replay, signs, spread, stop_names)
from vggflow.experiments.cards import project_root
from vggflow.training.loop import FinetuneConfig, Watched, finetune, read_rows
from vggflow.theory.flow import GaussianFlow
from vggflow.methods.methods import Method, ReFL, VGGFlow

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')


def rows_of(**series): return [dict(update=i+1, **dict(zip(series, vs))) for i, vs in enumerate(zip(*series.values()))]


def noisy(levels, seed=0, spread=.3):
    rng = random.Random(seed)
    return [l*math.exp(rng.gauss(0, spread)) for l in levels]


def ramp(a, b, n): return [a*(b/a)**(i/(n-1)) for i in range(n)]


# --- the signs ---

@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('levels', [[1.]*200, ramp(1., 1e-4, 200), ramp(1., 4., 200), [1.]*50+[6.]*100+[.5]*50], ids=['flat', 'falls', 'creeps', 'hump'])
def test_divergence_is_silent_on_noisy_healthy_losses(levels, seed):
    assert not replay(rows_of(consistency=noisy(levels, seed)), [])


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('levels', [ramp(1., 1e3, 200), [1.]*100+[60.]*100, [1.]+[1e7]*60, [1.]*30+ramp(1., 1e30, 100)], ids=['grows', 'jumps', 'at once', 'explodes'])
def test_divergence_fires_on_rising_losses(levels, seed):
    seen = replay(rows_of(consistency=noisy(levels, seed)), [])['divergence']
    assert seen['consistency'] > 15*seen['consistency_at_start']


def test_methods_without_a_consistency_loss_never_diverge():
    assert not divergence(rows_of(loss=[1e9]*100))


def test_divergence_survives_gaps_and_nothing():
    assert not divergence([]) and not divergence([dict(update=1, consistency=None)]*60)
    assert divergence([dict(consistency=1.)]*10+[dict(consistency=None), dict(consistency=16.)]*20)


def test_collapse_by_spread_and_by_evaluations():
    assert collapse(rows_of(spread=noisy([1.]*20+[.05]*20)))
    assert not collapse(rows_of(spread=noisy([1.]*20+[.3]*20)))
    assert not collapse(rows_of(spread=[1.]*5+[.01]*2))     # not yet rows enough
    assert collapse([], [dict(diversity=.4), dict(diversity=.05)]) and not collapse([], [dict(diversity=.4), dict(diversity=.2)])
    assert not collapse([], []) and not collapse([], [dict(reward=1.)]*2)


@pytest.mark.parametrize('reward,diversity,accuracy,fires', [
    (2., .9, .9, False), (2., .7, .7, True), (2., .8, .7, False), (2., .1, 1., False), (2., 1., .4, True), (.2, .1, .1, False), (-1., .1, .1, False)])
def test_hacking_wants_reward_up_and_quality_down(reward, diversity, accuracy, fires):
    base = dict(reward=0., reward_std=1., diversity=1., accuracy=1.)
    assert bool(hacking([base, dict(reward=reward, diversity=diversity, accuracy=accuracy)])) is fires


def test_hacking_without_its_numbers_is_silent():
    assert not hacking([]) and not hacking([dict(reward=1., accuracy=1.)])
    assert not hacking([dict(reward=0.), dict(reward=9.)]) and not hacking([dict(x=1.), dict(x=2.)])
    assert not hacking([dict(reward=0., accuracy=1.), dict(reward=float('nan'), accuracy=0.)])
    assert kept([dict(accuracy=0.), dict(accuracy=1.)], 'accuracy') is None


def test_several_diversities_count_by_their_mean():
    a, b = dict(perceptual_diversity=.4, clip_diversity=.2), dict(perceptual_diversity=.2, clip_diversity=.2)
    assert kept([a, b], 'diversity') == pytest.approx(.75)


def test_recorded_runs_are_judged_right():
    "The emoji world's 400 updates: every ReFL and DRaFT is stopped by update 200, no other method ever"
    runs = {}
    for r in csv.DictReader(open(project_root()/'data'/'results'/'aesthetic-paper.csv')):
        runs.setdefault((r['method'], r['seed']), []).append({k: float(v) for k, v in r.items() if k not in ('run', 'method', 'eta') and v})
    at = {k: replay([], e).get('hacking', {}).get('update') for k, e in runs.items()}
    hacked = [u for (m, _), u in at.items() if m in ('ReFL', 'DRaFT')]
    assert hacked and all(u and u <= 200 for u in hacked)
    assert not any(replay([], e) for (m, _), e in runs.items() if m not in ('ReFL', 'DRaFT'))


def test_spread_is_the_mean_over_pairs_and_costs_little():
    x = torch.randn(5, 3, 8, 8)
    d = torch.cdist(x.flatten(1), x.flatten(1)).pow(2).sum()/(5*4)/(3*64)
    assert spread(x).item() == pytest.approx(d.sqrt().item(), rel=1e-4)
    assert spread(torch.ones(4, 7)).item() == 0
    big = torch.randn(4, 3, 256, 256)
    assert spread(big).item() == pytest.approx(2**.5, rel=.02)


def test_non_finite_looks_at_loss_reward_and_gradients_only():
    assert non_finite(dict(loss=1., reward=1., grad_norm=1., fid=float('nan'))) == {}
    assert non_finite(dict(loss=float('inf'), grad_norm_1=float('nan'))) == dict(loss='inf', grad_norm_1='nan')


@pytest.mark.parametrize('bad', ['hackin', ['collapse', 'colapse'], ('nonfinite',)])
def test_unknown_sign_is_refused_before_any_work(tmp_path, bad):
    with pytest.raises(ValueError, match='stop_on: there is no sign'): run(tmp_path/'a', stop_on=bad)
    assert not (tmp_path/'a').exists() and stop_names(signs) == signs


# --- runs ---

def peak(x, prompts=None): return -(x-1).pow(2).sum(-1)


def run(out=None, method=None, reward=peak, evaluate=None, stop_on=('non-finite',), thresholds=None, **kw):
    torch.manual_seed(0); flow = GaussianFlow([0., 0.], 1.)
    cfg = FinetuneConfig(**{**dict(updates=40, batch_size=16, steps=5, lr=2e-2, save_every=25), **kw})
    return flow, finetune(flow, reward, method or ReFL(), cfg, out=out, progress=False, evaluate=evaluate, stop_on=stop_on, thresholds=thresholds)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_default_flags_and_goes_on():
    with pytest.warns(RuntimeWarning, match='collapse') as said: _, h = run()
    assert len(h.rows) == 40 and h.stopped is None and [f['sign'] for f in h.flags] == ['collapse'] and len(said) == 1


def test_stopped_run_is_whole(tmp_path):
    flow, h = run(tmp_path, stop_on=['collapse'], evaluate=lambda f, u: dict(n=u), eval_every=10)
    at = h.stopped['update']
    assert 0 < at < 40 and h.stopped['why'] == 'collapse' and set(h.stopped['numbers']) == {'spread', 'spread_at_start'}
    assert json.loads((tmp_path/'stopped.json').read_text()) == h.stopped
    assert read_rows(tmp_path/'diagnostics.jsonl') == h.flags == [dict(update=at, sign='collapse', numbers=h.stopped['numbers'])]
    assert [r['update'] for r in read_rows(tmp_path/'metrics.jsonl')] == list(range(1, at+1))
    assert read_rows(tmp_path/'eval.jsonl')[-1]['update'] == at     # a last look
    update, parts = load_checkpoint(checkpoints(tmp_path/'checkpoints')[-1])
    assert update == at and all(torch.equal(parts['flow'][k], v) for k, v in flow.trainable_state().items())
    assert not list(tmp_path.rglob('*.tmp'))


def test_stopped_run_stays_stopped_and_goes_on_when_told(tmp_path):
    whole, _ = run(tmp_path/'a')
    _, h = run(tmp_path/'b', stop_on='collapse'); at = h.stopped['update']
    with pytest.warns(RuntimeWarning, match=f'stopped at update {at} by collapse.*without .collapse. goes on') as said:
        _, again = run(tmp_path/'b', stop_on='collapse')
    assert again.stopped == h.stopped and len(again.rows) == at and len(said) == 1
    with pytest.warns(RuntimeWarning, match=f'goes on from update {at}; it had been stopped at update {at} by collapse'):
        more, h2 = run(tmp_path/'b')
    assert same(whole, more) and h2.stopped is None and len(h2.rows) == 40 and not (tmp_path/'b/stopped.json').exists()
    assert [f['update'] for f in h2.flags] == [at]     # not said twice


def test_killed_after_the_verdict_is_stopped_again(tmp_path):
    "Checkpoint written, the reason not yet: the rows tell it again"
    _, h = run(tmp_path, stop_on='collapse')
    (tmp_path/'stopped.json').unlink(); (tmp_path/'diagnostics.jsonl').unlink()
    _, again = run(tmp_path, stop_on='collapse')
    assert again.stopped == h.stopped and again.flags == h.flags and (tmp_path/'stopped.json').exists()


def test_lost_checkpoint_repeats_the_end(tmp_path):
    import shutil
    flow, h = run(tmp_path, stop_on='collapse', save_every=5)
    shutil.rmtree(checkpoints(tmp_path/'checkpoints')[-1])
    again, h2 = run(tmp_path, stop_on='collapse', save_every=5)
    assert same(flow, again) and h2.stopped == h.stopped and h2.flags == h.flags


def test_thresholds_move_the_line():
    _, early = run(stop_on='collapse', thresholds=Thresholds(collapse_share=.5))
    _, late = run(stop_on='collapse')
    assert early.stopped['update'] < late.stopped['update']


def test_hacking_is_judged_on_evaluations_only(tmp_path):
    said = lambda f, u: dict(reward=u, accuracy=1/(1+u))
    _, h = run(tmp_path, VGGFlow(), evaluate=said, eval_every=6, stop_on='hacking', updates=20)
    assert h.stopped['update'] == 6 and h.stopped['why'] == 'hacking'


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_healthy_run_raises_no_flag(seed):
    torch.manual_seed(seed); flow = GaussianFlow([0., 0.], .6)
    quad = lambda x, p=None: (.8*x-.25*x**2).sum(-1)
    look = lambda f, u: dict(reward=u, diversity=1-u/100, accuracy=1.)
    h = finetune(flow, quad, VGGFlow(beta=1/.7), FinetuneConfig(updates=60, seed=seed, lr=1e-2, steps=10, eval_every=20), evaluate=look, progress=False, stop_on=signs)
    assert h.flags == [] and h.stopped is None and len(h.rows) == 60 and all('spread' in r for r in h.rows)


# --- numbers that are none ---

class Blows(ReFL):
    "ReFL whose loss, reward or gradient is not finite at chosen updates"
    def __init__(self, how='loss', at=(4,)): super().__init__(); self.how, self.at, self.n = how, at, 0
    def loss(self, *args):
        self.n += 1; loss, logs = super().loss(*args)
        if self.n not in self.at: return loss, logs
        if self.how == 'loss': return loss*float('nan'), logs
        if self.how == 'reward': return loss, dict(logs, reward=float('nan'))
        return loss*0+(loss*0).abs().sqrt(), logs     # finite loss, infinite gradient


@pytest.mark.parametrize('how', ['loss', 'reward', 'gradient'])
def test_non_finite_raises_and_leaves_whole_weights(tmp_path, how):
    with pytest.raises(FloatingPointError, match='update 4: .*'+('the reward is nan' if how == 'reward' else 'lower lr')): run(tmp_path, Blows(how), save_every=2)
    assert [r['update'] for r in read_rows(tmp_path/'metrics.jsonl')] == [1, 2, 3]
    stopped = json.loads((tmp_path/'stopped.json').read_text())
    assert (stopped['update'], stopped['why']) == (4, 'non-finite') and read_rows(tmp_path/'diagnostics.jsonl')[0]['sign'] == 'non-finite'
    with pytest.warns(RuntimeWarning, match='goes on from update 3; it had been stopped at update 4 by non-finite'):
        flow, h = run(tmp_path, Blows(how, at=()), save_every=2)     # the fault was passing
    assert same(flow, run(method=ReFL())[0]) and len(h.rows) == 40


@pytest.mark.parametrize('how', ['loss', 'reward', 'gradient'])
def test_non_finite_is_skipped_where_stop_on_lets_it(tmp_path, how):
    flow, h = run(tmp_path, Blows(how, at=(4, 9)), stop_on=())
    assert [r['update'] for r in h.rows if r.get('skipped')] == [4, 9] and all(torch.isfinite(p).all() for p in flow.parameters())
    assert len(h.rows) == 40 and [f['sign'] for f in h.flags][0] == 'non-finite'
    strict = lambda c: pytest.fail(f'{c} is no JSON')
    for l in (tmp_path/'metrics.jsonl').read_text().splitlines(): json.loads(l, parse_constant=strict)
    assert [r for r in read_rows(tmp_path/'metrics.jsonl')] == h.rows


def test_many_in_a_row_end_the_run_whatever_stop_on_says():
    with pytest.raises(FloatingPointError, match='10 updates in a row'): run(method=Blows(at=range(5, 40)), stop_on=())


def test_every_way_of_progress_survives_a_skipped_update(capsys):
    for show in (True, 'plain'):
        torch.manual_seed(0); flow = GaussianFlow([0.], 1.)
        finetune(flow, peak, Blows('reward', at=(2,)), FinetuneConfig(updates=2, batch_size=4, steps=5), progress=show, stop_on=())


def test_an_error_of_the_reward_itself_passes_through():
    def breaks(x, prompts=None): raise FloatingPointError('mine')
    with pytest.raises(FloatingPointError, match='^mine$'): run(reward=breaks, stop_on=())


# --- the watched reward ---

def test_watched_reward_stands_in_for_the_reward():
    class R:
        name = 'r'
        def __call__(self, x, prompts=None, scale=1.): return scale*x.sum(1)
    w, x = Watched(R()), torch.randn(4, 3)
    assert torch.equal(w(x, None, scale=2.), 2*x.sum(1)) and w.name == 'r'
    w(10*x); assert w.logs() == dict(spread=pytest.approx(spread(x).item()))     # the first call counts
    one = Watched(R()); one(x[:1]); assert one.logs() == {}
    inside = Watched(R()); torch.func.vmap(inside)(x[None]); assert isinstance(inside.logs(), dict)
    grad = Watched(R()); torch.func.vjp(grad, x); assert grad.logs() == w.logs()


def test_a_methods_own_spread_wins():
    class Says(Method):
        def loss(self, flow, reward, batch): return sum(p.pow(2).sum() for p in flow.trainable_parameters()), dict(reward=0., spread=7.)
    assert run(method=Says(), updates=2)[1].rows[0]['spread'] == 7.


def test_command_line_stops_and_refuses(tmp_path, capsys):
    from vggflow.cli import main
    argv = ['train', '--world', 'gaussian', '--reward', 'quadratic', '--method', 'ReFL', '--lr', '.02', '--updates', '150', '--eval-every', '0']
    assert main([*argv, '--stop-on', 'hackin', '--out', str(tmp_path/'q')]) == 2 and "no sign 'hackin'" in capsys.readouterr().err
    assert main([*argv, '--stop-on', 'hacking', 'collapse', '--out', str(tmp_path/'r')]) == 0
    assert 'by collapse' in capsys.readouterr().out and (tmp_path/'r/stopped.json').exists()


def test_diagnose_names_only_known_signs():
    assert set(diagnose(rows_of(consistency=ramp(1., 1e9, 60), spread=ramp(1., 1e-9, 60)), [])) == {'divergence', 'collapse'} < set(signs)
