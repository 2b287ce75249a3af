"""The repository itself: notebooks, exports, imports and settings agree with each other."""
import ast, configparser, json, os, re, shutil, subprocess, sys, tomllib
from importlib.metadata import version, PackageNotFoundError
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p.stem for p in (ROOT/'vggflow').glob('*.py') if p.stem[0]!='_')
theory = ['flow','control','value','losses','methods','checkpoint']
worlds = ['flow','sd3','rewards','prompts','metrics','emoji','torchvision_cpu']
IMPORTS = dict(flow=[], rewards=[], prompts=[], metrics=[], paper=[], experiments=[], equations=[], checkpoint=[], torchvision_cpu=[],
    adjoint=['flow'], density=['flow'], diagnostics=[], control=['flow'], value=['flow'], losses=['flow','value','adjoint'], methods=['flow','value','losses','adjoint'],
    finetune=['flow','value','losses','methods','checkpoint','diagnostics'], sd3=['flow','torchvision_cpu'],
    emoji=['flow','sd3','rewards','prompts','metrics','torchvision_cpu'], plots=['paper','experiments','finetune'], claims=['plots','paper','experiments'], status=['experiments'],
    evaluate=[*theory,*worlds,'experiments'], train=[*theory,*worlds,'finetune','evaluate','experiments','diagnostics'],
    cost=['flow','methods'], export=['sd3','value','checkpoint'], doctor=['train','emoji','sd3','rewards','prompts','torchvision_cpu'],
    cli=['train','evaluate','plots','experiments','equations','status','claims','doctor','export','emoji','prompts','flow','finetune','sd3','rewards','checkpoint'], files=[])

def bin_env(): return {**os.environ, 'PATH':f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

def imports_of(source):
    "Modules of ours that a source imports, anywhere in it"
    res = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.ImportFrom):
            m = n.module or ''
            if n.level==1: res |= {m.split('.')[0]} if m else {a.name for a in n.names}
            elif m.startswith('vggflow.'): res.add(m.split('.')[1])
            elif m=='vggflow': res |= {a.name for a in n.names}
        elif isinstance(n, ast.Import): res |= {a.name.split('.')[1] for a in n.names if a.name.startswith('vggflow.')}
    return {m for m in res if m in MODULES}

@pytest.mark.parametrize('module', MODULES)
def test_imports_run_down_only(module):
    assert module in IMPORTS, f'{module} is new: say in tests/test_repo.py what it may import (DESIGN: who may import whom)'
    over = imports_of((ROOT/'vggflow'/f'{module}.py').read_text())-set(IMPORTS[module])-{module,'files'}   # a leaf for everybody
    assert not over, f'{module} may not import {sorted(over)}'

def test_import_check_sees_all_forms():
    src = 'from .flow import x\ndef f():\n    from vggflow.emoji import y\n    import vggflow.train\n    from vggflow import plots'
    assert imports_of(src)=={'flow','emoji','train','plots'}&set(MODULES)

def test_import_vggflow_is_light():
    code = "import sys, vggflow, vggflow.cli, vggflow.experiments, vggflow.paper; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split()==['False','False']

@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.stem)
def test_notebook_is_clean(nb):
    d = json.loads(nb.read_text()); code = [c for c in d['cells'] if c['cell_type']=='code']
    assert not [c for c in code if c.get('execution_count')], 'execution counts: run make clean-notebooks'
    assert all(set(c['metadata'])<={'tags'} for c in d['cells']), 'stray cell metadata: run make clean-notebooks'
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    if nb.parent.name!='nbs': assert len(tagged)==1, f"{nb.name} needs exactly one cell tagged 'parameters'"
    if nb.parent.name=='experiments': assert not any(c['outputs'] for c in code), 'templates keep no outputs'
    assert nb.stat().st_size<250_000, 'over 250 KB'
    long = [len(''.join(c['source']).splitlines()) for c in code]
    assert max(long, default=0)<=30, f'a code cell of {max(long)} lines'

def test_export_leaves_no_difference(tmp_path):
    for f in ('nbs','vggflow'): shutil.copytree(ROOT/f, tmp_path/f, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    for f in ('pyproject.toml','settings.ini'): shutil.copy(ROOT/f, tmp_path)
    env = {k:v for k,v in bin_env().items() if k!='IN_TEST'}
    p = subprocess.run(['nbdev-export'], cwd=tmp_path, env=env, capture_output=True, text=True); assert p.returncode==0, p.stderr
    read = lambda d: {f.name:f.read_text() for f in (d/'vggflow').glob('*.py')}
    a,b = read(ROOT),read(tmp_path)
    assert not [f for f in a.keys()|b.keys() if a.get(f)!=b.get(f)], 'vggflow/ differs from the notebooks: run make export'
    assert (ROOT/'pyproject.toml').read_text()==(tmp_path/'pyproject.toml').read_text()

def test_every_module_comes_from_a_notebook():
    for m in MODULES: assert 'AUTOGENERATED! DO NOT EDIT!' in (ROOT/'vggflow'/f'{m}.py').read_text(), f'{m}.py has no notebook'

def test_readme_is_in_step():
    from vggflow.experiments import readme
    assert (ROOT/'README.md').read_text()==readme(), 'README.md differs from nbs/index.ipynb: run make readme'

def test_settings_ini_equals_pyproject():
    t = tomllib.loads((ROOT/'pyproject.toml').read_text()); p,n = t['project'],t['tool']['nbdev']
    c = configparser.ConfigParser(); c.read(ROOT/'settings.ini'); s = c['DEFAULT']
    import vggflow
    assert s['version']==vggflow.__version__ and s['lib_name']==p['name'] and s['description']==p['description']
    assert s['min_python']==p['requires-python'].lstrip('>=') and s['author']==p['authors'][0]['name']
    assert (s['license'],p['license'])==('apache2','Apache-2.0')
    assert s['keywords'].split()==[k.replace(' ','_') for k in p['keywords']]
    assert s['requirements'].split()==p['dependencies'] and s['dev_requirements'].split()==p['optional-dependencies']['dev']
    assert s['console_scripts']==f"vggflow={p['scripts']['vggflow']}"
    for k,v in n.items(): assert s[k]==(' '.join(v) if isinstance(v, list) else str(v)), k

def test_constraints_are_what_is_installed():
    pins = dict(l.split('==') for l in (ROOT/'constraints.txt').read_text().splitlines() if l and l[0]!='#')
    assert pins['torch']=='2.13.0' and pins['torchvision']=='0.28.0'
    for k,v in pins.items():
        try: have = version(k)
        except PackageNotFoundError: continue
        assert have.split('+')[0]==v, f'{k} {have} is installed, constraints.txt says {v}'
    deps = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['dependencies']
    assert not {re.match('[A-Za-z0-9_-]+', d)[0].lower() for d in deps}-set(pins), 'a dependency without a pin'

def test_emoji_world_is_small():
    assert sum(f.stat().st_size for f in (ROOT/'data'/'emoji').rglob('*') if f.is_file())<25e6

def test_experiments_file_is_whole():
    from vggflow.experiments import cards, experiment_names, has_profile, read_experiments
    exps = read_experiments()
    for e in experiment_names(exps):
        for p in exps['profiles']:
            if not has_profile(exps[e], p): continue
            ids = [c.id for c in cards(e, p, exps)]
            assert ids and len(set(ids))==len(ids)
    paper = cards('aesthetic', 'paper', exps)
    assert {c.parameters['seed'] for c in paper}=={0,1,2} and {c.parameters['updates'] for c in paper}=={400}
