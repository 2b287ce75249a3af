"""Cards, the strict runner and the graph: tried on a small checkout of its own, whose runs take a second."""
import csv, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat as nbf
import pytest
from vggflow import experiments as E

ROOT = Path(__file__).parent.parent
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
from vggflow.experiments import project_root
from vggflow.plots import figure_record, save_figure
t = project_root()/'data'/'results'/f'toy-{profile}.csv'
rows = list(csv.DictReader(t.open())); fig,ax = plt.subplots(); ax.plot([float(r['reward']) for r in rows])
if out: save_figure(fig, 'figtoy', figure_record(profile, dict(results=t)), out)'''
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
    notebook(tmp_path/'nbs/experiments/toyfig.ipynb', "profile: str = 'smoke'\nout: str = ''", TOYFIG)
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

# --- runner

def test_refuses_undeclared(checkout):
    with pytest.raises(ValueError, match="no parameter of toy called 'updats'; did you mean 'updates'"):
        E.run_notebook(E.template_path('toy'), checkout/'x.ipynb', dict(updats=3))
    assert not list(checkout.glob('x*'))

def test_failure_keeps_the_notebook_and_says_where(checkout):
    with pytest.raises(RuntimeError, match='OSError: the disk is full .*x.failed.ipynb'):
        E.run_notebook(E.template_path('toy'), checkout/'x.ipynb', dict(bad=True, out=str(checkout)))
    assert [p.name for p in checkout.glob('x*')]==['x.failed.ipynb']

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
    assert f'resumes after update' in text and (checkout/'figures/figtoy.png').exists()
    assert len(E.read_rows(cut/'metrics.jsonl'))==30 and rows<30

def test_a_failing_run_does_not_stop_the_others(checkout):
    f = checkout/'experiments.toml'; f.write_text(TOML.replace('lr = 1\n', 'lr = 1\nbad = true\n'))
    p = figures('--profile', 'smoke', '--cores', '1'); text = p.communicate(timeout=120)[0]
    assert p.returncode!=0 and 'the disk is full' in text and '.failed.ipynb' in text and 'refl seed 0: update 3/3, reward 1.50; done' in text
    assert not (checkout/'figures/figtoy.png').exists()

def test_a_second_call_waits(checkout):
    code = f"from vggflow.experiments import hold\nwith hold({str(checkout/'.lock')!r}, 'x'): print('mine', flush=True)"
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
