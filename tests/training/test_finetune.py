"The run directory: resume, refusal, faults."
import json, signal, subprocess, sys, warnings
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from vggflow.training.checkpoint import checkpoints
from vggflow.training.loop import FinetuneConfig, finetune, read_rows
from vggflow.theory.flow import GaussianFlow
from vggflow.methods.methods import Method, ReFL, VGGFlow


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


def test_a_cosine_is_not_extended(tmp_path):
    "Its learning rate has come down to zero; another end would be another curve, and going on a jump"
    whole, _ = run(tmp_path, schedule='cosine')
    with pytest.raises(ValueError, match='updates: 6 ≠ 9 .where the cosine schedule ends.'): run(tmp_path, schedule='cosine', updates=9)
    again, h = run(tmp_path, schedule='cosine', save_every=3); assert same(whole, again) and len(h.rows)==6


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
            from vggflow.theory.flow import sample
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
    from vggflow.training.checkpoint import load_checkpoint
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
from vggflow.training.checkpoint import checkpoints, load_checkpoint
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


# ---------------------------------------------------------------- told to end, folders of others, settings of another type

class Told(VGGFlow):
    "VGG-Flow that gets a signal, or an error, in the middle of an update"
    at, how = 5, None
    def prepare(self, *args):
        got = super().prepare(*args); Told.at -= 1
        if Told.at == 0: Told.how()
        return got


Told.__name__ = 'VGGFlow'


def interrupt(): raise KeyboardInterrupt


@pytest.mark.parametrize('how,error', [(interrupt, KeyboardInterrupt), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt), (lambda: signal.raise_signal(signal.SIGTERM), SystemExit)], ids=['raised', 'SIGINT', 'SIGTERM'])
@pytest.mark.parametrize('at', [1, 4])
def test_told_to_end_keeps_every_update(tmp_path, at, how, error):
    "No checkpoint is due before the end; what is kept goes on to the last bit, and handlers are as before"
    kw = dict(save_every=100, ema=.5); whole, h = run(tmp_path/'a', **kw); Told.at, Told.how = at, how
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(error) as e: run(tmp_path/'b', Told(), **kw)
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] and (error is KeyboardInterrupt or e.value.code == 143)
    assert [int(p.name) for p in checkpoints(tmp_path/'b/checkpoints')] == ([at-1] if at > 1 else [])
    again, h2 = run(tmp_path/'b', **kw)
    assert same(whole, again) and [r['loss'] for r in h.rows] == [r['loss'] for r in h2.rows]


def test_a_signal_while_a_step_is_taken_waits_for_its_end(tmp_path, monkeypatch):
    whole, _ = run(tmp_path/'a', save_every=100); F = sys.modules['vggflow.training.loop']
    def told(self):   # between the step and its row
        if self.update == 2: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(F._Run, 'follow_average', told)
    with pytest.warns(RuntimeWarning, match='ended after update 3'), pytest.raises(SystemExit): run(tmp_path/'b', save_every=100)
    monkeypatch.undo(); assert [r['update'] for r in read_rows(tmp_path/'b/metrics.jsonl')] == [1, 2, 3]
    assert same(whole, run(tmp_path/'b', save_every=100)[0])


def test_a_non_finite_update_keeps_the_state_before_it(tmp_path):
    whole, _ = run(tmp_path/'a', save_every=100)
    class Blows(VGGFlow):
        n = 0
        def loss_on(self, *args):
            Blows.n += 1; loss, logs = super().loss_on(*args)
            return (loss*float('inf') if Blows.n == 4 else loss), logs
    Blows.__name__ = 'VGGFlow'
    with pytest.raises(FloatingPointError, match='update 4: the loss is inf.*a lower lr.*name a new out'): run(tmp_path/'b', Blows(), save_every=100)
    assert [p.name for p in checkpoints(tmp_path/'b/checkpoints')] == ['000003']
    with pytest.warns(RuntimeWarning, match='goes on'): again, _ = run(tmp_path/'b', save_every=100)
    assert same(whole, again)
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match="see what the reward 'test_a_non_finite.*broken' does"):
        def broken(x, p=None): return x.sum(-1)*float('nan')
        finetune(GaussianFlow([0.], .6), broken, ReFL(), FinetuneConfig(updates=1, batch_size=2), progress=False)


def test_a_first_attempt_that_came_to_nothing_frees_its_folder(tmp_path):
    Dies.at = 1
    with pytest.raises(Killed): run(tmp_path, Dies(), lr=1.)
    (tmp_path/'eval.jsonl').write_text('{"update": 0, "x": 1}\n')
    _, h = run(tmp_path, lr=1e-3); assert len(h.rows) == 6 and not h.evals and json.loads((tmp_path/'config.json').read_text())['config']['lr'] == 1e-3


@pytest.mark.parametrize('name', ['metrics.jsonl', 'lora', 'config.json'])
def test_files_of_something_else_are_let_be(tmp_path, name):
    if name == 'lora': (tmp_path/name).mkdir()
    else: (tmp_path/name).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=f'{name}.*choose another folder') as e: run(tmp_path)
    assert '\n' not in str(e.value) and [p.name for p in tmp_path.iterdir()] == [name]


def test_what_a_record_says_about_a_run_counts_where_both_say_it(tmp_path):
    go = lambda about, out=tmp_path/'a', **kw: finetune(GaussianFlow([0.], .6), linear, ReFL(), FinetuneConfig(updates=1, batch_size=2), out=out, progress=False, about=about, **kw)
    go(None); go(dict(reward='r')); go(dict(sources={'m.py':'1'})); record = json.loads((tmp_path/'a/config.json').read_text())
    assert record['about'] == dict(reward='r', sources={'m.py':'1'})
    with pytest.raises(ValueError, match="about.sources.m.py: '1' ≠ '2'"): go(dict(sources={'m.py':'2'}))
    other = lambda x, prompts=None: -x.sum(-1)
    with pytest.raises(ValueError, match='reward: .linear. ≠'): finetune(GaussianFlow([0.], .6), other, ReFL(), FinetuneConfig(updates=1, batch_size=2), out=tmp_path/'a', progress=False, about=dict(reward='r'))
    def called(text): r = lambda x, prompts=None: x.sum(-1); r.__qualname__ = text; return r   # as weighted sums are
    for text in ('mine.py:f=2', '/there/mine.py:f=2'): finetune(GaussianFlow([0.], .6), called(text), ReFL(), FinetuneConfig(updates=1, batch_size=2), out=tmp_path/'b', progress=False, about=dict(reward='mine.py:f=2.0'))


@pytest.mark.parametrize('kw,says', [(dict(updates='2'), "updates must be a whole number, got '2'"), (dict(batch_size=2.), 'batch_size must be a whole number, got 2.0'), (dict(steps=True), 'steps must be a whole number'),
    (dict(lr='x'), 'lr must be a number'), (dict(lr=float('nan')), 'lr must be finite'), (dict(grad_clip=-1.), 'grad_clip must be at least 0'), (dict(grad_clip=float('inf')), 'grad_clip must be finite'),
    (dict(weight_decay=-.1), 'weight_decay must be at least 0'), (dict(shift=0.), 'shift must be positive'), (dict(log_to=3), 'log_to must be a name'), (dict(optimizer=1), 'optimizer must be text')], ids=str)
def test_settings_of_another_type_are_named(kw, says):
    with pytest.raises(ValueError, match=says): FinetuneConfig(**kw)
    FinetuneConfig(lr=1, grad_clip=0, log_to=['a'])


def test_no_clipping_is_clipping_at_a_norm_out_of_reach():
    off, far, near = (run(None, grad_clip=c)[0] for c in (0, 1e9, 1e-9)); assert same(off, far) and not same(off, near)


# ---------------------------------------------------------------- a run from names: cards, commands, what is known before the model

TINY = dict(reward='mine.py:bright', prompts='a.txt', method='ReFL', updates=1, batch_size=2, steps=2, eval_every=0, lora_rank=2, progress=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with a tiny model, a reward and prompts"
    from tiny_sd3 import make_tiny_sd3
    monkeypatch.chdir(tmp_path); make_tiny_sd3(tmp_path/'tiny', t5=False); (tmp_path/'a.txt').write_text('a cat\nan owl\n')
    (tmp_path/'mine.py').write_text('def bright(images, prompts): return images.mean((1,2,3))\n'); return tmp_path


def test_a_card_with_a_model_is_of_stable_diffusion_3(here, monkeypatch, capsys):
    "And its command means the same elsewhere, follows what may change, and tells another run before the model is loaded"
    from vggflow import train
    from vggflow.worlds.sd3 import SD3Flow
    (here/'card.json').write_text(json.dumps({**TINY, 'model':'tiny', 'out':'run'})); assert train.main(['card.json']) == 0
    said = lambda: json.loads((here/'run/command.json').read_text()); first = said(); record = json.loads((here/'run/config.json').read_text())
    assert first['world'] == 'sd3' and first['reward'] == f'{here}/mine.py:bright' and [first[k] for k in ('model','out','prompts')] == [str(here/n) for n in ('tiny','run','a.txt')]
    assert record['flow']['model'] == 'tiny' and set(record['about']) == {'reward','sources','weights'} and record['prompts'] == ['a cat','an owl'] and (here/'run/lora').is_dir()
    (here/'else').mkdir(); monkeypatch.chdir(here/'else'); assert train.main(['../run/command.json']) == 0   # the same run
    kw = {**first, 'updates':2, 'micro_batch':1, 'progress':False}; train.run(**kw); assert said() == {**first, 'updates':2, 'micro_batch':1}
    def loads(*args, **kw): raise AssertionError('the model was loaded')
    monkeypatch.setattr(SD3Flow, 'from_pretrained', loads)
    for more,says in ((dict(lr=.5), 'config.lr'), (dict(method='VGG-Flow', transitions=2), 'method.name'), (dict(lora_rank=4), 'flow.lora_rank'), (dict(reward='redness'), 'about.reward'), (dict(model=str(here/'other')), 'flow.model')):
        with pytest.raises(ValueError, match=f'holds another run .*{says}'): train.run(**{**kw, **more})
    (here/'mine.py').write_text('def bright(images, prompts): return -images.mean((1,2,3))\n')
    with pytest.raises(ValueError, match='about.sources.mine.py'): train.run(**kw)
    with pytest.raises(ValueError, match='holds a run already'): train.run(**kw, resume=False)
    assert said() == {**first, 'updates':2, 'micro_batch':1}


def test_a_model_goes_with_its_world(monkeypatch):
    from vggflow import train
    seen = []; monkeypatch.setitem(train.WORLDS, 'sd3', lambda reward, **kw: seen.append((reward, kw['model'])) or train.WORLDS['gaussian']('linear'))
    train.build(model='m'); assert seen == [('aesthetic','m')] and train.world_of('') == 'emoji' and train.world_of('', 'm') == 'sd3' and train.world_of('gaussian') == 'gaussian'
    with pytest.raises(ValueError, match="model='m' goes with the world 'sd3', not with 'emoji'"): train.run('emoji', model='m')


def test_no_command_is_written_over_something_else(tmp_path):
    from vggflow.train import note_command
    kw = dict(world='gaussian', out=str(tmp_path/'a'), updates=3, progress=False); path = tmp_path/'a/command.json'
    note_command(kw); note_command({**kw, 'updates':4}); assert json.loads(path.read_text())['updates'] == 4   # an attempt before any work
    for text in ('{"build": "make all"}', 'ls'):
        path.write_text(text)
        with pytest.raises(ValueError, match='is not the command of a run'): note_command(kw)
        assert path.read_text() == text
    (tmp_path/'b').mkdir(); (tmp_path/'b/metrics.jsonl').write_text('{}\n')
    with pytest.raises(ValueError, match='holds metrics.jsonl and no config.json'): note_command({**kw, 'out':str(tmp_path/'b')})
    assert [p.name for p in (tmp_path/'b').iterdir()] == ['metrics.jsonl']


def test_what_is_missing_is_said_before_a_world_is_built(tmp_path, monkeypatch):
    from vggflow import train
    def builds(*args, **kw): raise AssertionError('the world was built')
    monkeypatch.setitem(train.WORLDS, 'gaussian', builds)
    if not find_spec('bitsandbytes'):
        with pytest.raises(ImportError, match='needs bitsandbytes'): train.run('gaussian', optimizer='adamw-8bit')
    if not torch.cuda.is_available():
        for world in ('emoji', 'sd3'):
            with pytest.raises(ValueError, match="device 'cuda' is not here"): train.build(world, device='cuda', prompts=['a'], **(dict(model='m', reward='redness') if world == 'sd3' else {}))
