"The run directory: resume, refusal, faults."
import json, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from vggflow.checkpoint import checkpoints
from vggflow.finetune import FinetuneConfig, finetune, read_rows
from vggflow.flow import GaussianFlow
from vggflow.methods import Method, ReFL, VGGFlow


def linear(x, prompts=None): return x.sum(-1)


def run(out, method=None, flow_seed=0, **kw):
    torch.manual_seed(flow_seed); flow = GaussianFlow([0., 0.], .6)
    cfg = FinetuneConfig(**{**dict(updates=6, batch_size=4, save_every=2), **kw})
    return flow, finetune(flow, linear, method or VGGFlow(), cfg, out=out, progress=False)


class Killed(Exception): pass


class Dies(VGGFlow):
    "VGG-Flow that is killed in the middle of its run"
    at = 5
    def loss(self, *args):
        Dies.at -= 1
        if Dies.at == 0: raise Killed
        return super().loss(*args)


Dies.__name__ = 'VGGFlow'


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('at', [1, 2, 4, 6])
def test_killed_anywhere_resumes_to_the_last_bit(tmp_path, at):
    whole, h = run(tmp_path/'a')
    Dies.at = at
    with pytest.raises(Killed): run(tmp_path/'b', Dies())
    with open(tmp_path/'b/metrics.jsonl', 'a') as f: f.write('{"update": 3, "lo')   # the last line torn
    again, h2 = run(tmp_path/'b')
    assert same(whole, again)
    rows = read_rows(tmp_path/'b/metrics.jsonl')
    assert [r['update'] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r['loss'] for r in rows] == [r['loss'] for r in h.rows]


def test_finished_run_is_not_repeated(tmp_path):
    _, h = run(tmp_path)
    seconds = [r['seconds'] for r in h.rows]
    _, h2 = run(tmp_path)
    assert [r['seconds'] for r in h2.rows] == seconds


def test_a_run_can_be_extended(tmp_path):
    long, _ = run(tmp_path/'a', updates=9)
    run(tmp_path/'b'); more, h = run(tmp_path/'b', updates=9)
    assert same(long, more) and len(h.rows) == 9


@pytest.mark.parametrize('kw,name', [(dict(lr=1e-2), 'lr'), (dict(seed=1), 'seed'), (dict(method=ReFL()), 'method.name'),
                                     (dict(method=VGGFlow(beta=2.)), 'method.beta')])
def test_another_runs_folder_is_refused_untouched(tmp_path, kw, name):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match=f'holds another run.*{name}'): run(tmp_path, **kw)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}


def test_another_reward_is_another_run(tmp_path):
    run(tmp_path)
    def other(x, prompts=None): return -x.sum(-1)
    torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
    with pytest.raises(ValueError, match="holds another run.*reward: 'linear' ≠"):
        finetune(flow, other, VGGFlow(), FinetuneConfig(updates=6, batch_size=4, save_every=2), out=tmp_path, progress=False)


def test_no_resume_never_overwrites(tmp_path):
    torch.manual_seed(0); flow = GaussianFlow([0.], .6)
    finetune(flow, linear, ReFL(), FinetuneConfig(updates=1), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match='another folder'):
        finetune(flow, linear, ReFL(), FinetuneConfig(updates=1), out=tmp_path, resume=False, progress=False)


def test_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path)
    last = checkpoints(tmp_path/'checkpoints')[-1]
    (last/'flow.safetensors').write_bytes(b'x'*10)
    with pytest.raises(ValueError, match=f'{last.name} is damaged'): run(tmp_path, updates=8)


def test_non_finite_loss_stops_and_says_where(tmp_path):
    class Blows(ReFL):
        n = 0
        def loss(self, *args):
            Blows.n += 1; loss, logs = super().loss(*args)
            return (loss*float('inf') if Blows.n == 4 else loss), logs
    with pytest.raises(FloatingPointError, match='update 4'): run(tmp_path, Blows())
    assert [r['update'] for r in read_rows(tmp_path/'metrics.jsonl')] == [1, 2, 3]


def test_seeds_differ_and_repeat(tmp_path):
    losses = lambda **kw: [r['loss'] for r in run(None, **kw)[1].rows]
    assert losses(seed=0) == losses(seed=0) != losses(seed=1)


def test_evaluation_does_not_disturb_the_run():
    def go(evaluate):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6)
        cfg = FinetuneConfig(updates=6, batch_size=4, eval_every=2)
        return finetune(flow, linear, VGGFlow(), cfg, progress=False, evaluate=evaluate)
    noisy = go(lambda f, u: dict(x=torch.randn(3).sum().item()))
    assert [r['loss'] for r in noisy.rows] == [r['loss'] for r in go(None).rows]
    assert [r['update'] for r in noisy.evals] == [0, 2, 4, 6]


def test_a_new_method_is_one_class_with_one_loss():
    class Climb(Method):
        "Climb the reward of full samples"
        def loss(self, flow, reward, batch):
            from vggflow.flow import sample
            r = reward(flow.decode(sample(flow, batch.x0, batch.times).x1), batch.cond).mean()
            return -r, dict(reward=r.item())
    torch.manual_seed(0); flow = GaussianFlow([0.], .6)
    rows = finetune(flow, lambda x, p: -(x[:, 0]-1)**2, Climb(), FinetuneConfig(updates=40, lr=1e-2, steps=5), progress=False).rows
    assert rows[-1]['reward'] > rows[0]['reward']+.3


def test_config_names_the_bad_value():
    with pytest.raises(ValueError, match='lr must be positive, got -1'): FinetuneConfig(lr=-1)
    with pytest.raises(ValueError, match='transitions must lie between 1 and the 3 steps of the sampler, got 5'): run(None, steps=3)


# ---------------------------------------------------------------- micro-batches, average, optimisers, trackers

def test_a_method_with_only_a_loss_has_no_micro_batches():
    class Climb(Method):
        def loss(self, flow, reward, batch): return -flow.velocity(batch.x0, batch.times[:1].expand(len(batch.x0))).mean(), dict(reward=0.)
    assert len(run(None, Climb())[1].rows) == 6
    with pytest.raises(ValueError, match='micro_batch=2: Climb has only a loss'): run(None, Climb(), micro_batch=2)
    with pytest.raises(NotImplementedError, match='must have prepare and loss_on'): run(None, Method())


def test_micro_batches_may_change_on_resume(tmp_path):
    whole, h = run(tmp_path/'a'); run(tmp_path/'b', updates=4); other, h2 = run(tmp_path/'b', micro_batch=3, forward_batch=1)
    assert len(h2.rows) == 6 and max((p-q).abs().max() for p, q in zip(whole.parameters(), other.parameters())) < 1e-5
    assert [r['spread'] for r in h.rows] == pytest.approx([r['spread'] for r in h2.rows])


def test_a_run_from_before_an_option_resumes_with_its_default(tmp_path):
    whole, _ = run(tmp_path/'a'); run(tmp_path/'b', updates=4)
    path = tmp_path/'b/config.json'; old = json.loads(path.read_text())
    for k in ('micro_batch', 'forward_batch', 'ema', 'optimizer', 'log_to', 'sample_every'): del old['config'][k]
    assert old['config']['shift'] == 1.
    path.write_text(json.dumps(old)); again, _ = run(tmp_path/'b')
    assert same(whole, again)
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match='config.ema: 0.0 ≠ 0.5'): run(tmp_path/'b', ema=.5)


def test_the_average_is_evaluated_kept_and_left_behind(tmp_path):
    def go(out, updates):
        torch.manual_seed(0); flow = GaussianFlow([0., 0.], .6); seen = []
        cfg = FinetuneConfig(updates=updates, batch_size=4, save_every=2, eval_every=1, ema=.5, lr=.1)
        look = lambda f, u: seen.append({k: v.clone() for k, v in f.trainable_state().items()}) or {}
        finetune(flow, linear, VGGFlow(), cfg, out=out, progress=False, evaluate=look)
        return flow, seen
    flow, seen = go(tmp_path/'a', 3); go(tmp_path/'b', 2); again, _ = go(tmp_path/'b', 3)
    assert same(flow, again) and all(torch.equal(v, flow.trainable_state()[k]) for k, v in seen[-1].items())
    from vggflow.checkpoint import load_checkpoint
    parts = [load_checkpoint(tmp_path/'a/checkpoints'/u)[1] for u in ('000002', '000003')]
    for k, v in parts[1]['ema'].items(): assert torch.allclose(v, .5*parts[0]['ema'][k]+.5*parts[1]['flow'][k], atol=1e-6) and torch.equal(v, seen[3][k])
    assert any((parts[1]['flow'][k]-v).abs().max() > 1e-3 for k, v in parts[1]['ema'].items())


def test_optimisers_by_name():
    plain, fused = (run(None, optimizer=o)[0] for o in ('adamw', 'adamw-fused'))
    assert max((p-q).abs().max() for p, q in zip(plain.parameters(), fused.parameters())) < 1e-4
    with pytest.raises(ValueError, match="unknown optimizer 'adam': use one of adamw, adamw-fused"): FinetuneConfig(optimizer='adam')
    if not find_spec('bitsandbytes'):
        with pytest.raises(ImportError, match='needs bitsandbytes'): run(None, optimizer='adamw-8bit')


EIGHT_BIT = """
import sys; sys.path.insert(0, sys.argv[1]); sys.path.append(sys.argv[2])
from test_finetune import run, same
whole, h = run(sys.argv[3]+'/a', optimizer='adamw-8bit', lr=1e-2); run(sys.argv[3]+'/b', updates=4, optimizer='adamw-8bit', lr=1e-2)
again, k = run(sys.argv[3]+'/b', optimizer='adamw-8bit', lr=1e-2); plain, _ = run(None, lr=1e-2)
import torch
from vggflow.checkpoint import checkpoints, load_checkpoint
kinds = {v.dtype for v in load_checkpoint(checkpoints(sys.argv[3]+'/b/checkpoints')[-1])[1]['optimizer'].values()}
apart = max((p-q).abs().max().item() for p, q in zip(whole.parameters(), plain.parameters()))
print(same(whole, again), len(k.rows), torch.uint8 in kinds, 0 < apart < .02)
"""

def test_eight_bit_optimiser_resumes_bit_for_bit(tmp_path):
    "With bitsandbytes itself, in a process of its own: where it is installed, or where `make test` put it, beside the environment"
    beside = Path(sys.prefix)/'beside'
    if not find_spec('bitsandbytes') and not (beside/'bitsandbytes').exists(): pytest.skip('bitsandbytes is not there: make test fetches it')
    p = subprocess.run([sys.executable, '-c', EIGHT_BIT, str(Path(__file__).parent), str(beside), str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.split() == ['True', '6', 'True', 'True']


def test_rows_go_to_trackers_of_accelerate(tmp_path, monkeypatch):
    from accelerate import tracking
    told = []
    class Notes(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only, tracker = 'notes', True, True, None
        def __init__(self, run_name, logging_dir): super().__init__(); told.append(('start', run_name, logging_dir))
        def start(self): pass
        def store_init_configuration(self, values): told.append(('config', values))
        def log(self, values, step=None, **kw): told.append((step, values))
        def finish(self): told.append('end')
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, 'notes', Notes)
    _, h = run(tmp_path, log_to='notes')
    assert told[0] == ('start', 'vggflow', str(tmp_path)) and told[1][1]['config.lr'] == 5e-4 and told[-1] == 'end'
    assert [(s, v['train/loss']) for s, v in told[2:-1]] == [(r['update'], r['loss']) for r in h.rows]
    with pytest.raises(ValueError, match="no tracker 'note', only"): run(None, log_to='note')
    def no_key(self): raise KeyError('no API key configured')
    monkeypatch.setattr(Notes, 'start', no_key)
    with pytest.raises(RuntimeError, match="log_to='notes' does not start .KeyError: .no API key"): run(None, log_to='notes')


def test_tensorboard_reads_the_rows(tmp_path, monkeypatch):
    from accelerate import PartialState, tracking
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    PartialState._reset_state()   # as in a process that has started nothing of accelerate
    _, h = run(tmp_path, log_to='tensorboard', updates=4); _, h = run(tmp_path, log_to='tensorboard')   # goes on
    seen = {}
    for f in tmp_path.rglob('events.out.tfevents*'):
        e = EventAccumulator(str(f.parent)); e.Reload()
        for k in e.Tags()['scalars']: seen.setdefault(k, {}).update({s.step: s.value for s in e.Scalars(k)})
    assert list(sorted(seen['train/loss'].items())) == [(r['update'], pytest.approx(r['loss'], rel=1e-6)) for r in h.rows]
    monkeypatch.setattr(tracking, 'get_available_trackers', lambda: [])
    with pytest.raises(ImportError, match='pip install tensorboard'): run(None, log_to=('tensorboard',))


def test_samples_along_the_way():
    torch.manual_seed(0); flow = GaussianFlow([0.], .6); seen = []
    finetune(flow, linear, ReFL(), FinetuneConfig(updates=5, batch_size=2, sample_every=2), progress=False, samples=lambda f, u: seen.append(u))
    assert seen == [0, 2, 4, 5]
