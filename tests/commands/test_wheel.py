"""The wheel: built from the repository, installed into an empty environment, used from another folder."""
import os, subprocess, sys, sysconfig, venv, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[2]

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    d = tmp_path_factory.mktemp('wheel'); src = d/'src'
    files = subprocess.run(['git', '-C', str(ROOT), 'ls-files', '-co', '--exclude-standard', '-z'], capture_output=True, text=True, check=True).stdout.split('\0')
    for f in filter(None, files):
        if (ROOT/f).is_file() and not f.startswith(('nbs/','figures/')): (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((ROOT/f).read_bytes())
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(d), str(src)], check=True, capture_output=True, text=True)
    return next(d.glob('vggflow-*.whl'))

@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "An environment of its own with the wheel; the other packages are those of this one"
    d = tmp_path_factory.mktemp('venv'); venv.create(d, with_pip=False); py = d/'bin'/'python'
    site = Path(subprocess.run([py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], capture_output=True, text=True, check=True).stdout.strip())
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(py), 'install', '-q', '--no-deps', '--no-index', str(wheel)], check=True, capture_output=True)
    (site/'others.pth').write_text(sysconfig.get_path('purelib')+'\n')
    return py

def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for f in ('vggflow/flow.py','vggflow/vggflow.mplstyle','vggflow/data/paper/figures.csv'): assert f in names
    assert any(n.startswith('vggflow/data/emoji/base/') for n in names)
    assert [n for n in names if n.endswith('licenses/LICENSE')] and [n for n in names if n.endswith('licenses/NOTICE')]
    stray = [n for n in names if n.startswith('vggflow/data/') and not n.startswith(('vggflow/data/paper/','vggflow/data/emoji/'))]
    assert not stray and not [n for n in names if not n.startswith('vggflow')], stray

def run(python, code, cwd): return subprocess.run([python, '-c', code], cwd=cwd, capture_output=True, text=True,
    env={**{k:v for k,v in os.environ.items() if k not in ('VGGFLOW_DATA','VGGFLOW_ROOT','PYTHONPATH')}, 'HF_HUB_OFFLINE':'1'})

def test_is_the_wheel_and_not_the_checkout(python, tmp_path):
    p = run(python, 'import vggflow; print(vggflow.__file__)', tmp_path)
    assert str(ROOT) not in p.stdout and 'site-packages' in p.stdout, p.stdout+p.stderr

def test_paper_numbers_from_any_folder(python, tmp_path):
    p = run(python, "from vggflow.experiments.paper_data import curve, table1; print(len(table1()), round(float(curve(5,'reward','VGG-Flow')['mean'][-1]),2))", tmp_path)
    assert p.stdout.split()==['18','8.24'], p.stderr

def test_draws_a_cat_from_any_folder(python, tmp_path):
    p = run(python, "from vggflow.cli import main; raise SystemExit(main(['sample', 'a cat', '--out', 'cat.png', '--steps', '10']))", tmp_path)
    assert p.returncode==0, p.stderr
    from PIL import Image
    im = Image.open(tmp_path/'cat.png'); assert im.size==(128,128) and len(im.getcolors(1<<16) or [])>20
    p = run(python, "from vggflow.cli import main; raise SystemExit(main(['sample', 'a cat', '--out', 'cat.png']))", tmp_path)
    assert p.returncode==2 and 'exists' in p.stderr
