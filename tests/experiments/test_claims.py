"""The register of claims: rules that decide, numbers that follow from the committed tables, a file and a page in step with them."""
import json
from pathlib import Path
import numpy as np, pytest
from vggflow.experiments.cards import claims as C
from vggflow.experiments.plots import Results

ROOT = Path(__file__).parents[2]

def table(**finals):
    "A table of straight runs: reward to `finals[method][0]`, diversity from .4 to `finals[method][1]`, three seeds"
    rows,runs = [],[]
    for m,(r,d) in finals.items():
        for s in range(3):
            runs.append(dict(id=f'{m}-{s}', parameters=dict(method=m, seed=s)))
            rows += [dict(run=f'{m}-{s}', method=m, seed=s, update=u, reward=(r+.01*s)*u/100, perceptual_diversity=.4+(d-.4+.001*s)*u/100) for u in range(0, 101, 10)]
    return Results('aesthetic', 'none', rows, dict(runs=runs))

def find(name): return next(c for c in C.CLAIMS if c.id==name)

def test_effects_have_the_sign_of_the_table():
    res = table(**{'VGG-Flow':(2., .38), 'AM':(1., .38), 'ReFL':(4., .1)})
    assert C.judge(find('aesthetic-faster-than-am').effect(res))['verdict']==C.REPRODUCED
    assert C.judge(C.faster('AM', 'VGG-Flow')(res))['verdict']==C.CONTRARY
    c = find('aesthetic-refl-collapses'); assert C.judge(c.effect(res), c.low, c.high)['verdict']==C.REPRODUCED
    assert np.mean(C.better('VGG-Flow', ('ReFL',), 'perceptual_diversity')(res))>.05 and np.mean(C.better('AM', ('VGG-Flow',), 'perceptual_diversity')(res))<0

def test_a_series_that_was_not_run_is_said():
    row = C.test_claim(find('aesthetic-faster-than-am'), dict(aesthetic=table(**{'VGG-Flow':(2., .3)})))
    assert row['verdict']==C.NOT_RUN and 'AM' in row['reason']

def test_at_least_fifteen_claims_and_every_rule_can_fail():
    assert len(C.CLAIMS)>=15 and all(np.isfinite(c.low) or np.isfinite(c.high) for c in C.CLAIMS if c.effect)

def test_file_and_page_follow_from_the_tables():
    rows = C.register(); kept = json.loads((ROOT/'data'/'results'/'claims.json').read_text())['claims']
    assert [r['id'] for r in kept]==[r['id'] for r in rows]
    for k,r in zip(kept, rows):
        assert k['verdict']==r['verdict'], f"{r['id']}: call make claims"
        if r.get('n'): assert k['mean']==pytest.approx(r['mean'], rel=1e-4, abs=1e-9) and k['table_sha256']==r['table_sha256']
    page = json.loads((ROOT/'nbs'/'pages'/'claims.ipynb').read_text()); shown = ''.join(next(c for c in page['cells'] if 'as_markdown(register())' in ''.join(c['source']))['outputs'][0]['data']['text/markdown'])
    assert shown==C.as_markdown(rows), 'call make claims'

def test_results_page_follows_from_the_tables():
    "Every table of the page, computed again"
    scope,n = {},0
    for c in json.loads((ROOT/'nbs'/'pages'/'results.ipynb').read_text())['cells']:
        if c['cell_type']!='code': continue
        *before,last = [''.join(l) for l in c['source']]; exec(''.join(before), scope)
        if not c['outputs']: exec(last, scope); continue
        assert eval(last, scope).data==''.join(c['outputs'][0]['data']['text/markdown']), 'call make claims'; n += 1
    assert n>=10

def test_runs_are_compared_at_rewards_that_they_reached():
    lines = C.crossings({m:('aesthetic','paper','method',m) for m in ('VGG-Flow','VGG-Flow-PMP')}, (1., 3.)).splitlines()
    assert [l.split('|')[1:3] for l in lines[2:]]==[[' 1 ',' VGG-Flow '], [' 1 ',' VGG-Flow-PMP '], [' 3 ',' VGG-Flow-PMP ']]   # VGG-Flow does not get to 3
