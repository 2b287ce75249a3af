"""Figures: their records, their bytes, and what is said about a bad name."""
import json, subprocess, sys
from pathlib import Path
import pytest
from vggflow.experiments.cards import cards as E, paper_data as paper

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT/'figures').glob('**/fig*.json'))

def vggflow(*a, **kw): return subprocess.run([sys.executable, '-m', 'vggflow.cli', *a], capture_output=True, text=True, **kw)

@pytest.mark.parametrize('f', COMMITTED, ids=lambda p: str(p.relative_to(ROOT/'figures')))
def test_record_names_its_data(f):
    rec = json.loads(f.read_text())
    assert {'profile','data','versions','commit','numbers','seeds','runs'}<=set(rec)
    for end in ('png','pdf'): assert f.with_suffix(f'.{end}').read_bytes()[:4] in (b'\x89PNG', b'%PDF')
    for d in rec['data'].values():
        if (ROOT/d['file']).exists(): assert E.sha256(ROOT/d['file'])==d['sha256'], f"{f.name} was drawn from another {d['file']}: call vggflow figure {rec['figure']} --profile {rec['profile']}"

def test_paper_figure_is_kept():
    tables = list((ROOT/'data'/'results').glob('*-paper.csv'))
    if not tables: pytest.skip('the paper profile has not been run yet')
    assert (ROOT/'figures'/'paper'/'fig05.json').exists()

def test_same_data_same_bytes(tmp_path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from vggflow.experiments.plots import use_style, band, figure_record, save_figure
    with plt.style.context('default'):
        use_style(); out = []
        for i in range(2):
            fig,ax = plt.subplots(); band(ax, paper.curve(5, 'reward', 'VGG-Flow'), 'VGG-Flow', ls='--')
            out.append([p.read_bytes() for p in save_figure(fig, 'x', figure_record('smoke', dict(paper=paper.paper_file('figures.csv'))), tmp_path/str(i))])
    assert out[0]==out[1]

@pytest.mark.parametrize('args,says', [(['figure','fig55'], 'fig05'), (['figure','fig05','--profile','papr'], "did you mean 'paper'?"),
    (['figures','--profile','quik'], "did you mean 'quick'?"), (['cards','aesthetics'], "did you mean 'aesthetic'?"),
    (['figures','--experiment','lrgrid'], "did you mean 'lr-grid'?"), (['train','--world','emojis'], "did you mean 'emoji'?"),
    (['train','--world','gaussian','--method','VGG-Flw'], "did you mean 'VGG-Flow'"), (['train','--world','gaussian','--reward','linar'], "did you mean 'linear'?"),
    (['train','--updates','many'], 'invalid int value'), (['train','--betta','1'], 'unrecognized arguments'), (['collect','aesthetic','--profile','nope'], 'no profile'), (['status','--profile','papr'], "did you mean 'paper'?"),
    (['figures','fig99'], "no figure 'fig99'"), (['figures','--redraw','--executor','slurm'], 'takes no --executor'), (['collect','modes','--profile','sd3'], "has no profile 'sd3'")])
def test_bad_input_is_one_line(args, says, tmp_path):
    p = vggflow(*args, *(['--out', str(tmp_path/'run')] if args[0]=='train' else []))
    assert p.returncode==2 and says in p.stderr and p.stderr.strip().count('\n')==0 and 'Traceback' not in p.stderr, p.stderr

def test_another_run_in_the_folder(tmp_path):
    a = ['train','--world','gaussian','--updates','2','--batch-size','4','--out',str(tmp_path/'run')]
    assert vggflow(*a).returncode==0
    p = vggflow(*a, '--method', 'ReFL')
    assert p.returncode==2 and 'another run' in p.stderr and 'Traceback' not in p.stderr
    assert vggflow(*a).returncode==0  # the same run: nothing left to do

def test_train_on_the_emoji_world_leaves_a_run_directory(tmp_path):
    out = tmp_path/'run'
    p = vggflow('train', '--method', 'ReFL', '--updates', '1', '--batch-size', '2', '--steps', '4', '--eval-prompts', '1', '--images-per-prompt', '2', '--out', str(out))
    assert p.returncode==0, p.stderr
    evals = E.read_rows(out/'eval.jsonl')
    assert [e['update'] for e in evals]==[0,1]
    assert {'reward','perceptual_diversity','clip_diversity','fid','fid_base','accuracy','vendors','hue_spread'}<=set(evals[0])
    assert evals[0]['reward']!=evals[1]['reward'] and evals[0]['fid_base']==evals[1]['fid_base']
