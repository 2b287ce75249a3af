"""Cards, the strict runner and the graph: tried on a small checkout of its own, whose runs take a second."""
import csv, json, os, shutil, signal, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import nbformat as nbf
import pytest
from vggflow.experiments.cards import cards as E, status

ROOT = Path(__file__).parents[2]
TOY = '''import json, time
from pathlib import Path
d = Path(out); f = d/'metrics.jsonl'
n = len(f.read_text().splitlines()) if f.exists() else 0
with f.open('a') as h:
    for i in range(n, updates):
        time.sleep(pause); h.write(json.dumps(dict(update=i+1, reward=lr*(i+1)+seed, seconds=pause))+'\\n'); h.flush()
if bad: raise OSError('the disk is full')
(d/'eval.jsonl').write_text(''.join(json.dumps(dict(update=u, reward=lr*u+seed))+'\\n' for u in (0,updates)))'''
TOYFIG = '''import csv
import matplotlib.pyplot as plt
from vggflow.experiments.cards import project_root
from vggflow.experiments.plots import figure_record, save_figure
t = project_root()/'data'/'results'/f'{experiment}-{profile}.csv'
rows = list(csv.DictReader(t.open())); fig,ax = plt.subplots(); ax.plot([float(r['reward']) for r in rows], lw=width)
if out: save_figure(fig, figure, figure_record(profile, dict(results=t)), out)'''
TOML = '''
[profiles]
smoke = "a"
paper = "b"
[toy]
template = "toy"
figures = {figtoy = "toyfig"}
parameters = {updates = 3}
grid = {seed = [0]}
[[toy.series]]
method = "VGG-Flow"
lr = 1
[[toy.series]]
method = "ReFL"
lr = 0.5
[toy.smoke]
pause = 0.01
[sweep]
study = true
like = "toy"
folder = "toy"
figures = {figsweep = {template = "toyfig", width = 3}, fig07 = {template = "both", needs = ["toy", "sweep"]}}
series = [{method = "VGG-Flow", lr = 1}, {method = "VGG-Flow", lr = 2}]
[toy.paper]
updates = 30
pause = 0.1
'''

def notebook(path, parameters, code):
    c = nbf.v4.new_code_cell(parameters); c.metadata['tags'] = ['parameters']
    nb = nbf.v4.new_notebook(cells=[c, nbf.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    path.parent.mkdir(parents=True, exist_ok=True); nbf.write(nb, path); return path

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path/'experiments.toml').write_text(TOML); shutil.copy(ROOT/'Snakefile', tmp_path)
    notebook(tmp_path/'nbs/experiments/toy.ipynb', "method: str = 'VGG-Flow'\nlr: float = 0.0\nupdates: int = 1\nseed: int = 0\npause: float = 0.0\nbad: bool = False\nout: str = ''", TOY)
    notebook(tmp_path/'nbs/experiments/toyfig.ipynb', "profile: str = 'smoke'\nexperiment: str = 'toy'\nfigure: str = 'figtoy'\nwidth: float = 1.0\nout: str = ''", TOYFIG)
    notebook(tmp_path/'nbs/experiments/both.ipynb', "profile: str = 'smoke'\nneeds: list = []\nout: str = ''", 'pass')
    monkeypatch.setenv('VGGFLOW_ROOT', str(tmp_path)); return tmp_path

def figures(*args, **kw): return subprocess.Popen([sys.executable, '-m', 'vggflow.cli', 'figures', *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kw)

# --- cards

def test_id_depends_on_what_matters_only(checkout):
    ids = [c.id for c in E.cards('toy', 'smoke')]
    f = checkout/'experiments.toml'
    f.write_text('# a comment\n'+TOML.replace('lr = 1\n', 'lr = 1.0 # the same number\n').replace('parameters = {updates = 3}', 'parameters = {bad = false, updates = 3}'))
    assert [c.id for c in E.cards('toy', 'smoke')]==ids
    f.write_text(TOML.replace('lr = 0.5', 'lr = 0.51'))
    new = [c.id for c in E.cards('toy', 'smoke')]
    assert new[0]==ids[0] and new[1]!=ids[1]

def test_profiles_share_equal_runs(checkout):
    (checkout/'experiments.toml').write_text(TOML.replace('updates = 30\npause = 0.1', 'pause = 0.01'))
    assert [c.id for c in E.cards('toy', 'smoke')]==[c.id for c in E.cards('toy', 'paper')]

@pytest.mark.parametrize('old,new,says', [('lr = 0.5', 'lrr = 0.5', "did you mean 'lr'?"), ('lr = 0.5', 'lr = "fast"', 'declared float'),
    ('[toy.smoke]', '[toy.smoek]', "no key of experiment toy called 'smoek'"), ('template = "toy"', 'template = "tooy"', "did you mean 'toy' or 'toyfig'?")])
def test_bad_experiments_file(checkout, old, new, says):
    (checkout/'experiments.toml').write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=says.replace('?', r'\?')) as e: E.cards('toy', 'smoke')
    assert '\n' not in str(e.value)

def test_a_card_is_written_once(checkout):
    c = E.cards('toy', 'smoke')[0]; f = c.save(); t = f.stat().st_mtime_ns
    assert c.save().stat().st_mtime_ns==t and E.load_card(f)==c
    f.write_text('{')
    with pytest.raises(ValueError, match='not a run card'): E.load_card(f)

# --- experiments that share runs

def test_a_sweep_is_like_another_experiment_and_shares_its_runs(checkout):
    toy,sweep = (E.cards(e, 'paper') for e in ('toy','sweep'))
    assert [c.folder for c in sweep][0]==toy[0].folder and sweep[1].folder not in [c.folder for c in toy]
    assert {c.parameters['updates'] for c in sweep}=={30} and {c.folder.parent.name for c in sweep}=={'toy'}
    f = checkout/'experiments.toml'; f.write_text(TOML+'[more]\nlike = "sweep"\n')
    with pytest.raises(ValueError, match="is like toy; write like = 'toy'"): E.read_experiments()

def test_a_profile_may_have_series_of_its_own(checkout):
    f = checkout/'experiments.toml'; f.write_text(TOML+'[sweep.paper]\nseries = [{method = "AM"}]\n')
    assert [c.parameters['method'] for c in E.cards('sweep', 'paper')]==['AM'] and len(E.cards('sweep', 'smoke'))==2

# --- figures of the file

def test_figures_are_names_or_tables(checkout):
    figs = E.figures_of(); out = str(checkout/'figures'/'smoke')
    assert E.figure_arguments(figs['figtoy'], 'smoke')==dict(profile='smoke', experiment='toy', figure='figtoy', out=out)
    assert E.figure_arguments(figs['figsweep'], 'smoke')==dict(profile='smoke', experiment='sweep', figure='figsweep', width=3., out=out)
    assert E.figure_arguments(figs['fig07'], 'smoke')==dict(profile='smoke', needs=['toy','sweep'], out=out)

@pytest.mark.parametrize('old,new,says', [('width = 3', 'widht = 3', "did you mean 'width'?"), ('width = 3', 'width = "wide"', 'declared float'),
    ('"sweep"]', '"swep"]', "did you mean 'sweep'?"), ('template = "toyfig", ', '', 'has no template'), ('figsweep = ', 'figtoy = ', 'listed by toy and by sweep')])
def test_a_bad_figure_is_refused_before_anything_runs(checkout, old, new, says):
    (checkout/'experiments.toml').write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=says.replace('?', r'\?')) as e: E.make_plan('smoke', experiments=['sweep'])
    assert '\n' not in str(e.value)

def test_a_plan_holds_only_what_a_figure_needs(checkout):
    assert list(E.make_plan('smoke').cards)==['toy'] and list(E.make_plan('smoke').figures)==['figtoy']   # studies only when named
    assert list(E.make_plan('smoke', ['figsweep']).cards)==['sweep']
    assert list(E.make_plan('smoke', ['7']).cards)==['toy','sweep']
    with pytest.raises(ValueError, match="did you mean 'figtoy'"): E.make_plan('smoke', ['figto'])

# --- tables

def finish(card, reward=1., sheets=()):
    "What a finished run leaves"
    n = card.parameters['updates']; card.save()
    (card.folder/'eval.jsonl').write_text(''.join(json.dumps(dict(update=u, reward=reward*u/3))+'\n' for u in (0,n)))
    (card.folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(update=i+1, seconds=.5))+'\n' for i in range(n)))
    for u in sheets: E.write_text(card.folder/'samples'/f'{u:05}.png', f'{card.id} {u}')
    if sheets: E.write_text(card.folder/'samples'/'prompts.json', '["a cat"]')
    (card.folder/'run.ipynb').write_text('{}')

def test_rows_are_kept_where_runs_are_gone(checkout):
    for c in E.cards('toy', 'smoke')+E.cards('sweep', 'smoke'): finish(c)
    before = E.collect('toy', 'smoke').read_bytes(); E.collect('sweep', 'smoke')
    shutil.rmtree(checkout/'data/runs')
    assert E.collect('toy', 'smoke').read_bytes()==before and E.table_state('toy', 'smoke')==''
    plan = E.make_plan('smoke'); assert not plan.todo('toy') and len(plan.kept['toy'])==2
    assert len(E.make_plan('smoke', fresh=True).todo('toy'))==2
    with pytest.raises(FileNotFoundError, match='2 of 2 runs'): E.collect('toy', 'smoke', fresh=True)
    E.table_path('toy', 'smoke').unlink()   # the run that both ask for is kept by the other's table
    assert [c.parameters['method'] for c in E.make_plan('smoke').todo('toy')]==['ReFL']

def test_changed_settings_keep_only_the_runs_that_are_still_asked_for(checkout):
    for c in E.cards('toy', 'smoke'): finish(c)
    E.collect('toy', 'smoke'); shutil.rmtree(checkout/'data/runs')
    f = checkout/'experiments.toml'; f.write_text(TOML.replace('lr = 0.5', 'lr = 0.25'))
    assert E.table_state('toy', 'smoke')=='other settings: 1 runs missing, 1 not asked for'
    new, = E.make_plan('smoke').todo('toy'); finish(new, 2.); E.collect('toy', 'smoke')
    rows = list(csv.DictReader(E.table_path('toy', 'smoke').open()))
    assert [(r['method'],r['lr'],r['reward']) for r in rows if r['update']=='3']==[('VGG-Flow','1.0','1.0'),('ReFL','0.25','2.0')]
    f.write_text(TOML.replace('lr = 1\n', 'lr = 7\n').replace('lr = 0.5', 'lr = 9')); assert E.table_state('toy', 'smoke')=='made by other settings'

def test_a_partial_table_says_what_is_missing(checkout):
    a,b = E.cards('toy', 'smoke')
    with pytest.raises(FileNotFoundError, match='nothing to collect'): E.collect('toy', 'smoke', partial=True)
    finish(a)
    with pytest.raises(FileNotFoundError, match='1 of 2 runs .* first '+b.id): E.collect('toy', 'smoke')
    assert E.table_record(E.collect('toy', 'smoke', partial=True))['missing']==[b.id]
    assert E.table_state('toy', 'smoke')=='partial: 1 runs missing' and E.make_plan('smoke').todo('toy')==[a,b]

def test_a_table_knows_when_it_is_out_of_date(checkout):
    a,_ = cs = E.cards('toy', 'smoke'); [finish(c) for c in cs]; t = E.collect('toy', 'smoke'); assert E.table_state('toy', 'smoke')==''
    finish(a, 5.); assert E.table_state('toy', 'smoke')==f'older than run {a.id}'
    t.write_text(t.read_text()+'x\n'); assert E.table_state('toy', 'smoke')=='does not match its record' and not E.tabled('toy', 'smoke')

def test_sample_sheets_are_bundled(checkout):
    a,b = cs = E.cards('toy', 'smoke'); [finish(c, sheets=(0,1,2,3)) for c in cs]; E.collect('toy', 'smoke')
    d = checkout/'data/results/toy-smoke-samples'; names = {f'{c.id}-{u:05}.png' for c in cs for u in (0,1,2,3)}
    assert {f.name for f in d.iterdir()}==names and (d/f'{a.id}-00002.png').read_text()==f'{a.id} 2'
    shutil.rmtree(a.folder); E.collect('toy', 'smoke'); assert {f.name for f in d.iterdir()}==names   # kept, as its rows are
    rec = json.loads((checkout/'data/results/toy-smoke-samples.json').read_text()); assert rec['prompts']==['a cat'] and set(rec['sheets'])=={a.id,b.id}
    assert rec['sheets'][a.id]['2']['sha256']==E.sha256(d/f'{a.id}-00002.png')
    f = checkout/'experiments.toml'; f.write_text(TOML.replace('lr = 0.5', 'lr = 1\nseed = 9')); finish(E.cards('toy', 'smoke')[1]); E.collect('toy', 'smoke')
    assert {f.name for f in d.iterdir()}=={f'{a.id}-{u:05}.png' for u in (0,1,2,3)}   # no experiment asks for b

def test_a_figure_knows_when_it_is_out_of_date(checkout):
    for c in E.cards('toy', 'smoke'): finish(c)
    E.collect('toy', 'smoke'); fig = E.figures_of()['figtoy']; assert E.figure_state(fig, 'smoke')=='missing'
    E.draw_figure('figtoy', 'smoke'); assert E.figure_state(fig, 'smoke')==''
    assert E.figure_state(replace(fig, parameters=dict(width=2.)), 'smoke')=='parameters changed'
    t = E.template_path('toyfig'); old = t.read_text(); t.write_text(old.replace('plt.subplots()', 'plt.subplots( )'))
    assert E.figure_state(fig, 'smoke')=='template changed'
    t.write_text(old.replace('"metadata": {', '"metadata": {"x": 1,', 1)); assert E.figure_state(fig, 'smoke')==''
    finish(E.cards('toy', 'smoke')[0], 2.); E.collect('toy', 'smoke', partial=True); assert E.figure_state(fig, 'smoke')=='toy-smoke.csv has changed'

# --- status

def test_status_tells_the_states_apart(checkout):
    a,b = E.cards('toy', 'paper'); finish(a)
    E.write_text(b.folder/'metrics.jsonl', ''.join(json.dumps(dict(update=i+1, seconds=.5))+'\n' for i in range(10)))
    text = status.report('paper')
    assert f'cut off: [toy] {b.id}, update 10/30, will resume' in text and '1 of 2 runs are there, time left with 2 at once: about 0:06' in text
    with E.hold(b.folder/'.lock'): assert f'running: [toy] {b.id}, update 10/30' in status.report('paper')
    finish(b); E.collect('toy', 'paper'); text = status.report('paper')
    assert 'all 2 runs are there' in text and 'up to date' in text and 'figtoy    toy    missing' in text
    shutil.rmtree(checkout/'data/runs'); assert [r.state for _,r in status.experiment_status('toy', 'paper').values()]==['kept','kept']
    with pytest.raises(ValueError, match="did you mean 'paper'"): status.report('papr')

# --- runner

def test_refuses_undeclared(checkout):
    with pytest.raises(ValueError, match="no parameter of toy called 'updats'; did you mean 'updates'"):
        E.run_notebook(E.template_path('toy'), checkout/'x.ipynb', dict(updats=3))
    assert not list(checkout.glob('x*'))

def test_failure_keeps_the_notebook_and_says_where(checkout):
    with pytest.raises(RuntimeError, match='OSError: the disk is full .*x.failed.ipynb'):
        E.run_notebook(E.template_path('toy'), checkout/'x.ipynb', dict(bad=True, out=str(checkout)))
    assert [p.name for p in checkout.glob('x*')]==['x.failed.ipynb']

@pytest.mark.parametrize('long,transport', [(False,'ipc'), (True,'tcp')])
def test_kernels_share_no_port(tmp_path, monkeypatch, long, transport):
    "Ports are picked before they are bound: two kernels that start at once may pick the same. A socket's path may be too long, though"
    if long: (tmp_path/('x'*90)).mkdir(); monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/('x'*90)))
    notebook(tmp_path/'a.ipynb', 'seed: int = 0  # Seed', "from ipykernel.connect import get_connection_info\nprint('by', get_connection_info(unpack=True)['transport'])")
    assert f'by {transport}' in E.run_notebook(tmp_path/'a.ipynb', tmp_path/'b.ipynb', {}).read_text()

def test_templates_of_this_project_declare_their_parameters():
    for p in (ROOT/'nbs'/'experiments').glob('*.ipynb'):
        for k,v in E.template_parameters(p).items(): assert v['help'], f'{p.name}: {k} has no comment'

# --- graph

def test_figures_from_nothing_then_nothing_to_do(checkout):
    p = figures('--profile', 'smoke'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0, text
    for end in ('png','pdf','json'): assert (checkout/'figures'/f'figtoy.{end}').stat().st_size
    assert '[toy] vgg-flow seed 0: update 3/3, reward 3.00; done in' in text and 'figures/figtoy.png' in text
    rows = list(csv.DictReader((checkout/'data/results/toy-smoke.csv').open()))
    assert [(r['method'],r['reward']) for r in rows]==[('VGG-Flow','0.0'),('VGG-Flow','3.0'),('ReFL','0.0'),('ReFL','1.5')]
    rec = json.loads((checkout/'figures/figtoy.json').read_text())
    assert rec['profile']=='smoke' and rec['data']['results']['sha256']==E.sha256(checkout/'data/results/toy-smoke.csv')
    before = {f:f.stat().st_mtime_ns for f in checkout.glob('data/runs/toy/*/run.ipynb')}
    p = figures('--profile', 'smoke'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0 and 'starts' not in text and before=={f:f.stat().st_mtime_ns for f in before}

def test_sigkill_and_again(checkout):
    p = figures('--profile', 'paper', '--cores', '1')
    runs = checkout/'data/runs/toy'; t = time.time()
    def half(): return [d for d in runs.glob('*') if not (d/'run.ipynb').exists() and 3<len(E.read_rows(d/'metrics.jsonl'))<25]
    while not (list(runs.glob('*/run.ipynb')) and half()):
        assert time.time()-t<90 and p.poll() is None, p.communicate()[0]
        time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    done = {f:f.stat().st_mtime_ns for f in runs.glob('*/run.ipynb')}; cut = half()[0]; rows = len(E.read_rows(cut/'metrics.jsonl'))
    assert len(done)==1 and not (checkout/'figures/figtoy.png').exists()
    p = figures('--profile', 'paper', '--cores', '1'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0, text
    assert done=={f:f.stat().st_mtime_ns for f in done}, 'a finished run was repeated'
    assert 'resumes after update' in text and (checkout/'figures/figtoy.png').exists()
    assert len(E.read_rows(cut/'metrics.jsonl'))==30 and rows<30

def test_sigkill_of_the_driver_alone(checkout):
    (checkout/'experiments.toml').write_text(TOML.replace('updates = 30\npause = 0.1', 'updates = 12\npause = 0.1'))
    runs = checkout/'data/runs/toy'; log = (checkout/'log').open('a'); call = [sys.executable, '-m', 'vggflow.cli', 'figures', '--profile', 'paper']
    p = subprocess.Popen(call, stdout=log, stderr=log); t = time.time()
    while not any(E.read_rows(f) for f in runs.glob('*/metrics.jsonl')):
        assert time.time()-t<90 and p.poll() is None; time.sleep(.05)
    p.kill(); p.wait()
    assert subprocess.run(call, stdout=log, stderr=log, timeout=120).returncode==0, (checkout/'log').read_text()
    text = (checkout/'log').read_text()
    assert text.count('starts (')==2 and 'resumes' not in text, text   # the scheduler lived on, and the second call waited for its runs
    assert all([r['update'] for r in E.read_rows(f)]==list(range(1,13)) for f in runs.glob('*/metrics.jsonl')) and (checkout/'figures/figtoy.png').exists()

def test_only_a_named_figure_and_redraw(checkout):
    p = figures('figsweep', '--profile', 'smoke'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0 and not (checkout/'data/results/toy-smoke.csv').exists() and (checkout/'figures/figsweep.png').exists(), text
    shutil.rmtree(checkout/'data/runs'); shutil.rmtree(checkout/'figures')
    p = figures('--redraw'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0 and 'starts' not in text and 'no table yet for figtoy, fig07' in text and (checkout/'figures/figsweep.png').exists(), text
    p = figures('figsweep', '--profile', 'smoke', '--', '--dry-run'); text = p.communicate(timeout=120)[0]
    assert p.returncode==0 and '2 kept from the committed table' in text and 'rule run' not in text, text

def test_a_failing_run_does_not_stop_the_others(checkout):
    f = checkout/'experiments.toml'; f.write_text(TOML.replace('lr = 1\n', 'lr = 1\nbad = true\n'))
    p = figures('--profile', 'smoke', '--cores', '1'); text = p.communicate(timeout=120)[0]
    assert p.returncode!=0 and 'the disk is full' in text and '.failed.ipynb' in text and 'refl seed 0: update 3/3, reward 1.50; done' in text
    assert not (checkout/'figures/figtoy.png').exists()

def test_a_second_call_waits(checkout):
    code = f"from vggflow.experiments.cards import hold\nwith hold({str(checkout/'.lock')!r}, 'x'): print('mine', flush=True)"
    with E.hold(checkout/'.lock'):
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        assert 'waiting' in p.stdout.readline() and p.poll() is None
    assert p.communicate(timeout=20)[0]=='mine\n'

def test_publishing_another_profile_says_so(checkout, capsys):
    for prof in ('paper','smoke'):
        d = checkout/'figures'/prof; d.mkdir(parents=True)
        for end in ('png','pdf'): (d/f'figtoy.{end}').write_text(prof)
        (d/'figtoy.json').write_text(json.dumps(dict(profile=prof)))
    E.publish('paper', ['figtoy']); E.publish('smoke', ['figtoy'])
    assert 'it showed profile paper; that version is kept as figures/paper/figtoy.*' in capsys.readouterr().out
    assert (checkout/'figures/figtoy.png').read_text()=='smoke' and (checkout/'figures/paper/figtoy.png').read_text()=='paper'
