"""Fronts against brute force, and every figure template on a small table: what it writes, what it refuses."""
import json
from pathlib import Path
import numpy as np, pytest
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from vggflow.experiments.cards import cards as E, plots as P

ROOT = Path(__file__).parents[2]
COMMITTED = [p for p in sorted((ROOT/'figures').glob('**/*.json')) if p.stem[:3]=='fig' or p.stem=='table1']

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('up', [True, False])
def test_front_is_the_set_that_nothing_beats(seed, up):
    pts = np.random.default_rng(seed).normal(size=(40,2)).round(1); s = [1, 1 if up else -1]
    beaten = lambda a: any((b*s>=a*s).all() and (b!=a).any() for b in pts)
    f = P.front(pts, up)
    assert (f==np.unique([a for a in pts if not beaten(a)], axis=0)).all()
    ref = (pts[:,0].min(), (pts*s)[:,1].min()*s[1])
    g = np.stack(np.meshgrid(np.linspace(ref[0], pts[:,0].max(), 501)[1:], s[1]*np.linspace(ref[1]*s[1], (pts*s)[:,1].max(), 501)[1:]), -1)
    area = (g[...,None,:]*s<=pts*s+1e-9).all(-1).any(-1).mean()*np.ptp(pts[:,0])*np.ptp(pts[:,1])
    assert P.hypervolume(pts, ref, up)==pytest.approx(area, rel=.02)
    at = P.at_equal_reward(pts, [pts[:,0].min()-1, *f[:,0], pts[:,0].max()+1], up)
    assert at[0]==f[0,1] and (at[1:-1]==f[:,1]).all() and np.isnan(at[-1])

def test_interval_is_students():
    from scipy import stats
    v = np.random.default_rng(0).normal(size=5); i = P.t_interval(v)
    assert (i['low'],i['high'])==pytest.approx(stats.t.interval(.95, 4, v.mean(), stats.sem(v)))
    assert P.t_interval([1.])==dict(n=1, mean=1., sd=None, low=None, high=None) and P.t_interval([np.nan])['mean'] is None

def test_a_missing_setting_is_in_the_cards():
    rows = [dict(run=r, method='VGG-Flow', seed=0, update=0, reward=0., eta=e) for r,e in (('a',None),('b','t'))]
    res = P.Results('eta', 'paper', rows, dict(runs=[dict(id='a', parameters=dict(options={})), dict(id='b', parameters=dict(options=dict(eta='t')))]))
    assert list(P.by_series(res, 'eta'))==['t^2','t']
    res.rows = [{k:v for k,v in r.items() if k!='eta'} for r in rows]
    assert list(P.by_series(res, 'eta'))==['t^2','t']

@pytest.mark.parametrize('f', COMMITTED, ids=lambda p: str(p.relative_to(ROOT/'figures')))
def test_numbers_are_those_of_the_tables(f):
    rec = json.loads(f.read_text()); tables = {Path(d['file']).stem:ROOT/d['file'] for d in rec['data'].values() if d['file'].startswith('data/results/') and d['file'].endswith('.csv')}
    if not all(t.exists() for t in tables.values()): pytest.skip('its table is not committed')
    res = {s:P.read_results(*s.rsplit('-', 1)) for s in tables} if all(t.parent==ROOT/'data'/'results' for t in tables.values()) else {}
    for n in [n for n in rec['numbers'] if 'reward' in n and 'update' in n]:
        r = res[f"{n.get('experiment', rec['experiment'])}-{rec['profile']}"]; vary = rec.get('vary', 'method')
        rows = r.rows if n['method']=='Base' else [q for q in r.rows if q['run']==n['run']] if 'run' in n else P.by_series(r, vary)[n[vary]]
        ends = list({q['seed']:q['reward'] for q in rows if q['update']==n['update']}.values())
        assert n['reward']==pytest.approx(np.mean(ends), rel=1e-5, abs=1e-9)

SWEEPS = dict(beta=('beta',[10.,30.,100.]), eta=('eta',['t^2','t','0']), subsampling=('transitions',[5,10]))

def invented(experiment, seeds=2, updates=40, every=10):
    "Rows and runs in the shape of a table: numbers for trying the templates, of this test alone"
    k,values = SWEEPS.get(experiment, ('method', [m for m in P.COLORS if m!='Base'])); rows,runs = [],[]
    for i,v in enumerate(values):
        for seed in range(seeds):
            p = {**dict(method='VGG-Flow', seed=seed, world='emoji', reward=f'emoji-{experiment}', updates=updates, steps=20, transitions=5, images_per_prompt=4, eval_prompts=6), k:v}
            runs.append(dict(id=f'{v}-s{seed}', parameters=p))
            for u in range(0, updates+1, every):
                s = (1+.5*i+.05*seed)*u/updates; fall = np.exp(-.4*s**2)
                rows.append({**{q:p[q] for q in ('method','seed')}, 'run':f'{v}-s{seed}', k:v, 'update':u, 'reward':2*s, 'perceptual_diversity':.4*fall,
                             'clip_diversity':.25*fall, 'fid':2000-1250*fall, 'fid_base':760., 'accuracy':fall})
    return rows,runs

@pytest.fixture
def root(tmp_path, monkeypatch):
    "A checkout with small invented tables, written as real ones"
    (tmp_path/'experiments.toml').write_text('[profiles]\nsmoke = ""\n'); monkeypatch.setenv('VGGFLOW_ROOT', str(tmp_path))
    for e in ('aesthetic','hpsv2','pickscore','beta','eta','subsampling'):
        rows,runs = invented(e); t = tmp_path/'data'/'results'/f'{e}-smoke.csv'
        E.write_csv(t, rows)
        E.write_text(t.with_suffix('.json'), json.dumps(dict(runs=runs, versions={}, commit='none')))
        folder = t.with_name(f'{t.stem}-samples'); folder.mkdir(); first = [q['id'] for q in runs if q['parameters']['seed']==0]
        for run in first:
            for u in range(0, 41, 10): plt.imsave(folder/f'{run}-{u:05}.png', np.random.default_rng(u).random((6*8,4*8,3)))
        E.write_text(Path(f'{folder}.json'), json.dumps(dict(seed=0, prompts=[f'prompt {i}' for i in range(1,7)], sheets={q:dict.fromkeys(range(0, 41, 10)) for q in first})))
    yield tmp_path
    plt.close('all')

def draw(template, **parameters):
    "Run the cells of a template here, with other parameters"
    nb = json.loads((ROOT/'nbs'/'experiments'/f'{template}.ipynb').read_text()); scope = {}
    with plt.rc_context():
        for c in nb['cells']:
            if c['cell_type']!='code': continue
            exec(''.join(c['source']), scope)
            if 'parameters' in c['metadata'].get('tags', []): assert set(parameters)<=set(scope); scope.update(parameters)
        w,_ = scope['fig'].get_size_inches(); sizes = {t.get_fontsize() for t in scope['fig'].findobj(matplotlib.text.Text) if t.get_text().strip()}
    assert w==P.PAGE and min(sizes)>=7, 'too small at the width of a page'

@pytest.mark.parametrize('template,figure,more', [('convergence','fig05',{}), ('convergence','fig11',dict(experiment='beta', vary='beta')),
    ('pareto','fig08',dict(experiment='hpsv2')), ('pareto','fig14',dict(experiment='eta', vary='eta')), ('pareto','fig16',dict(experiment='subsampling', vary='transitions')),
    ('samples','fig02',{}), ('samples','fig17',dict(kind='degradation')), ('samples','fig18',dict(page=1)), ('table1','table1',{}), ('teaser','fig01',{})])
def test_template_draws_from_the_table_alone(root, template, figure, more):
    out = root/'figures'
    draw(template, figure=figure, profile='smoke', out=str(out), **more)
    rec = json.loads((out/f'{figure}.json').read_text())
    assert {'profile','data','versions','commit','numbers','seeds','runs','experiment'}<=set(rec) and rec['numbers']
    assert (out/f'{figure}.png').stat().st_size>1e4 and (out/f'{figure}.pdf').read_bytes()[:4]==b'%PDF'
    e = more.get('experiment', 'aesthetic'); t = root/'data'/'results'/f'{e}-smoke.csv'
    assert rec['data']['results']==dict(file=f'data/results/{t.name}', sha256=E.sha256(t))

def early(root, updates=20, reward=lambda r: r['reward'], leave=()):
    "A table of the beginnings of the runs of `aesthetic` with an evaluation every five updates"
    rows,runs = invented('aesthetic'); begun = [dict(q, id='early-'+q['id'], parameters={**q['parameters'], 'updates':updates, 'eval_every':5}) for q in runs if q['id'] not in leave]
    new = [{**r, 'run':'early-'+r['run'], 'update':u, 'updates':updates, 'reward':reward({**r, 'update':u})} for r in rows if r['run'] not in leave for u in ([r['update']]+[r['update']+5]*(r['update']<updates)) if u<=updates]
    t = root/'data'/'results'/'early-smoke.csv'; E.write_csv(t, new); E.write_text(t.with_suffix('.json'), json.dumps(dict(runs=begun, versions={}, commit='none')))
    return runs

def test_evaluations_of_repeated_beginnings_are_added(root):
    plain = P.read_results('aesthetic', 'smoke'); runs = early(root); res = P.read_results('aesthetic', 'smoke'); run = res.rows[0]['run']
    assert [r['update'] for r in res.rows if r['run']==run]==[0, 5, 10, 15, 20, 30, 40] and res.early.name=='early-smoke.csv' and plain.early is None
    assert set(res.rows[1])==set(plain.rows[0]) and {r['run'] for r in res.rows}=={r['run'] for r in plain.rows}
    assert P.read_results('beta', 'smoke').rows==P.read_results('beta', 'smoke').rows and P.read_results('beta', 'smoke').early is None   # not all of its runs were repeated
    early(root, leave=[runs[0]['id']]); assert P.read_results('aesthetic', 'smoke').rows==plain.rows
    early(root, reward=lambda r: r['reward']+.1)
    with pytest.raises(ValueError, match='early-smoke.csv is not of the runs of aesthetic-smoke.csv'): P.read_results('aesthetic', 'smoke')

@pytest.mark.parametrize('template', ['convergence','pareto','samples','table1','teaser'])
def test_without_a_table_nothing_is_drawn(root, template):
    with pytest.raises(FileNotFoundError, match='make figures PROFILE=paper'): draw(template, profile='paper', out=str(root/'figures'))
    assert not (root/'figures').exists()
