"The command line: every verb on a tiny Stable Diffusion 3 from disk, and one line for what is wrong"
import inspect, json, os, re, shutil, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from vggflow import cli

sys.path.insert(0, str(Path(__file__).parent))

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    from tiny_sd3 import make_tiny_sd3
    return make_tiny_sd3(tmp_path_factory.mktemp('sd3')/'base', t5=False)

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path); monkeypatch.setenv('VGGFLOW_CACHE', str(tmp_path/'cache')); torch.set_num_threads(1); return tmp_path

@pytest.fixture
def call(capsys):
    def go(*argv):
        try: rc = cli.main([str(a) for a in argv])
        except SystemExit as e: rc = e.code
        return rc, *capsys.readouterr()
    return go

FAST = ['--quiet', '--steps', '2', '--updates', '2', '--batch-size', '2', '--eval-every', '0', '--lr', '1e-2', '--lora-rank', '2', '--guidance-scale', '2']

@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
    "A run of the tiny pipeline, by the command line"
    out = tmp_path_factory.mktemp('run')/'r'; reward = out.parent/'mine.py'; reward.write_text('def bright(images, prompts): return images.mean((1,2,3))\n')
    assert cli.main(['finetune', '--model', str(model), '--reward', f'{reward}:bright', '--prompts', 'a cat', 'an owl', '--method', 'VGG-Flow', '--beta', '30', '--option', 'clip=0.8', '--transitions', '2', '--out', str(out), *FAST]) == 0
    return out

def test_finetune_writes_a_run(run):
    rows = [json.loads(l) for l in (run/'metrics.jsonl').read_text().splitlines()]; said = json.loads((run/'command.json').read_text()); config = json.loads((run/'config.json').read_text())
    assert len(rows) == 2 and (run/'lora'/'pytorch_lora_weights.safetensors').exists() and said['world'] == 'sd3' and said['prompts'] == config['prompts'] == ['a cat','an owl']
    assert config['method']['clip'] == .8 and config['method']['beta'] == 30 and config['method']['reuse'] is True and config['flow']['lora_rank'] == 2 and config['flow']['guidance_scale'] == 2
    from vggflow.train import read_parameters
    assert read_parameters(run/'command.json')['model'] == said['model']   # a card for python -m vggflow.train

def test_sample_compares_on_equal_noise(run, model, call, here):
    rc, out, _ = call('sample', '--run', run, '--prompts', 'a cat', 'an owl', '--n', '2', '--compare', '--scale', '1', '--seed', '3'); assert rc == 0 and 'left: base' in out
    both = np.array(Image.open('sample.png')).astype(int); assert both.shape == (2*16, 4*16, 3) and np.abs(both[:,:32]-both[:,32:]).max() > 0
    assert call('sample', '--model', model, '--guidance-scale', '2', '--steps', '2', '--prompts', 'a cat', '--limit', '1', '--n', '2', '--scale', '1', '--seed', '3', '--out', 'base.png')[0] == 0
    assert np.abs(np.array(Image.open('base.png')).astype(int)-both[:16,:32]).max() <= 1   # the left half is the base model, to rounding
    rc, _, err = call('sample', 'a cat'); assert rc == 2 and 'sample.png exists' in err and '--force' in err

def test_evaluate_a_run_twice(run, call, here):
    go = ['evaluate', '--run', run, '--images-per-prompt', '2', '--reward', 'redness', json.loads((run/'command.json').read_text())['reward'], '--perceptual', 'efficientnet', '--clip', 'none', '--out', 'e', '--quiet']
    rc, out, err = call(*go); assert rc == 0, err
    r = json.loads(Path('e/evaluation.json').read_text()); f = r['sets']['finetuned']
    assert {'redness','perceptual_diversity','fid','fid_base','fid_n'} <= set(f) and any(k.endswith(':bright') for k in f) and len(r['prompts']) == 2 and r['images'] == {'finetuned':4, 'base':4, 'base-again':4}
    stamp = {p: p.stat().st_mtime_ns for p in Path('e').rglob('0*')}; assert call(*go)[1] == out and {p: p.stat().st_mtime_ns for p in Path('e').rglob('0*')} == stamp
    rc, out, _ = call('evaluate', '--images', 'e/finetuned', '--reference', 'e/base', '--floor', 'e/base-again', '--reward', 'redness', '--perceptual', 'efficientnet', '--clip', 'none', '--out', 'again', '--quiet')
    g = json.loads(Path('again/evaluation.json').read_text())['sets']['finetuned']; assert rc == 0 and g['reward'] == f['redness'] and g['fid'] == f['fid'] and g['perceptual_diversity'] == f['perceptual_diversity']
    rc, _, err = call(*go, '--seed', '7'); assert rc == 2 and 'another seed' in err and err.count('\n') == 1

def test_export(run, call, model):
    pytest.importorskip('vggflow.export'); rc, out, err = call('export', run, 'given'); assert rc == 0, err
    assert {'README.md','pytorch_lora_weights.safetensors'} <= {p.name for p in Path('given').iterdir()}
    card = Path('given/README.md').read_text(); assert 'dtype=torch.bfloat16' in card and 'height=16, width=16' in card and 'guidance_scale=2,' in card; [compile(c, 'card', 'exec') for c in re.findall('```python\n(.*?)```', card, re.S)]
    rc, _, err = call('export', run, 'given'); assert rc == 2 and 'given' in err; assert call('export', run, 'given', '--force')[0] == 0

def test_doctor_verb(model, call):
    rc, out, _ = call('doctor', '--model', model, '--reward', 'redness', '--prompts', 'animals', '--image-size', '16', '--batch-size', '2', '--json')
    checks = {c['name']: c for c in json.loads(out)}; assert rc == 0 and checks['model']['status'] == checks['memory']['status'] == 'ok' and '2 text encoders' in checks['model']['found'] and '45' in checks['prompts']['found']
    rc, out, _ = call('doctor', '--model', model/'vae', '--reward', 'rednes'); assert rc == 1 and "did you mean 'redness'" in out and 'failed' in out.splitlines()[-1]

def test_prompts_verb(call, here):
    Path('a.csv').write_text('prompt\nx\ny\n'); assert call('prompts', 'a.csv', 'animals', '--limit', '2')[1].split() == ['x', 'butterfly']
    assert call('prompts', 'a.csv')[1] == 'x\ny\n'

@pytest.mark.parametrize('argv,says', [
    (['finetune', '--model', '/no/such/folder', '--reward', 'redness', '--prompts', 'a'], '/no/such/folder'), (['finetune', '--model', '{}', '--reward', 'rednes', '--prompts', 'a'], "did you mean 'redness'"),
    (['finetune', '--model', '{}', '--reward', 'redness'], 'prompts'), (['finetune', '--model', '{}', '--reward', 'redness', '--prompts', 'no.csv'], "'no.csv'"), (['finetune', '--method', 'VGG-Flaw'], "did you mean 'VGG-Flow'"),
    (['finetune', '--option', 'clip'], 'name=value'), (['finetune', '--world', 'gaussian', '--reward', 'linear', '--option', 'clop=1', '--eval-every', '0'], 'clop'), (['finetune', '--updates', 'x'], "--updates: invalid int value: 'x'"),
    (['finetune', '--updates', '0'], 'updates must be at least 1'), (['train', '--stop-on', 'colapse'], 'colapse'), (['sample', '--lora', 'nowhere', '--model', '{}', 'a cat'], 'nowhere'), (['sample', '--model', '{}', '--dtype', 'int', 'a'], 'int'),
    (['evaluate'], 'what is to be evaluated'), (['evaluate', '--images', 'x', '--run', 'y'], 'leave --model'), (['evaluate', '--run', 'nowhere', '--out', 'x'], "no run directory 'nowhere'"),
    (['evaluate', '--images', 'x', '--out', 'y'], 'which reward'), (['export', 'nowhere', 'x'], 'nowhere'), (['doctor', '--micro-batch', 'many'], 'invalid int')])
def test_one_line_and_exit_2(model, call, argv, says):
    rc, _, err = call(*[a.format(model) for a in argv]); assert rc == 2 and says in err and err.strip().count('\n') == 0, err

def test_a_reward_without_gradient_ends_before_the_model_is_drawn_from(model, call, here):
    Path('flat.py').write_text('import torch\ndef f(images, prompts): return images.detach().mean((1,2,3))\n')
    rc, _, err = call('finetune', '--model', model, '--reward', 'flat.py:f', '--prompts', 'a', '--out', 'r', '--transitions', '2', *FAST); assert rc == 2 and 'no gradient' in err and not Path('r/config.json').exists()

def test_an_unfinished_run_says_so(call, here):
    Path('half').mkdir(); rc, _, err = call('evaluate', '--run', 'half', '--out', 'x', '--reward', 'redness'); assert rc == 2 and 'no finished run' in err and 'resumes' in err

def parsed(*argv): return cli.parser().parse_args([str(a) for a in argv])

def test_a_run_that_does_not_say_its_settings(run, model, call, here, monkeypatch):
    shutil.copytree(run, 'bare'); Path('bare/command.json').unlink()
    for argv in (['sample', 'a cat', '--run', 'bare'], ['evaluate', '--run', 'bare', '--out', 'x', '--reward', 'redness'], ['export', 'bare', 'x']):
        rc, _, err = call(*argv); assert rc == 2 and 'does not say its settings' in err and '--model' in err and err.count('\n') == 1
    f = Path('bare/config.json'); record = json.loads(f.read_text()); record['flow'].update(latent_size=4, correction='adapter'); f.write_text(json.dumps(record))
    flow,said = cli._model_of(parsed('sample', 'a cat', '--run', 'bare', '--model', model)); assert (flow.guidance_scale, flow.latent_size, said['steps'], said['prompts']) == (2, 4, 2, ['a cat','an owl'])
    got = {}; monkeypatch.setattr('vggflow.export.export_lora', lambda flow, out, **kw: got.update(flow=flow, **kw)); assert call('export', 'bare', 'x', '--model', model)[0] == 0
    assert (got['flow'].guidance_scale, got['flow'].latent_size, got['flow'].correction_kind) == (2, 4, 'adapter')
    rc, _, err = call('evaluate', '--run', 'bare', '--model', model, '--out', 'x', '--prompts', 'a cat'); assert rc == 2 and 'which reward' in err

def test_settings_of_a_run_are_those_of_what_is_made_of_it(run, here, monkeypatch):
    "Sampling, evaluation and export build the model as the run did"
    shutil.copytree(run, 'r'); f = Path('r/command.json'); said = {**json.loads(f.read_text()), 'image_size':8, 'max_sequence_length':64, 'correction':'adapter'}; del said['reward']; f.write_text(json.dumps(said))
    for more,size in (([], 8), (['--image-size', '16'], 16)):
        flow,_ = cli._model_of(parsed('evaluate', '--run', 'r', *more)); assert (flow.latent_size*flow.pipe.vae_scale_factor, flow.max_sequence_length, flow.guidance_scale) == (size, 64, 2)
    got = {}; monkeypatch.setattr('vggflow.export.export_lora', lambda flow, out, **kw: got.update(flow=flow, **kw)); assert cli.main(['export', 'r', 'x']) == 0; flow = got['flow']
    assert flow.correction_kind == 'adapter' and flow.latent_size*flow.pipe.vae_scale_factor == 8 and flow.vae.dtype == torch.bfloat16 and {p.dtype for p in flow.trainable_parameters()} == {torch.float32}

def test_a_run_without_a_reward_by_name_had_the_first_of_its_world(monkeypatch):
    monkeypatch.setattr('vggflow.doctor.load_any_reward', lambda name, device: name); go = lambda said, *argv: cli._rewards_of(parsed('evaluate', *argv), said, 'cpu')[1]
    assert go(dict(world='sd3', model='m'), '--run', 'r', '--model', 'm') == ['aesthetic'] and go(dict(updates=2), '--run', 'r') == ['emoji-aesthetic'] == go({}, '--lora', 'l')
    assert go(dict(world='sd3', reward='redness'), '--run', 'r') == ['redness'] and go(dict(world='sd3'), '--run', 'r', '--reward', 'a', 'b') == ['a','b']

def test_help_is_complete_and_light():
    "Every parameter of a run and of the model has a flag, and --help needs no torch"
    from vggflow.sd3 import SD3Flow
    from vggflow.train import build, run
    flags = {a.dest for p in cli.parser()._subparsers._group_actions[0].choices['finetune']._action_groups for a in p._group_actions}
    names = {n for f in (run, build, SD3Flow.__init__, SD3Flow.from_pretrained, SD3Flow.configure) for n in inspect.signature(f).parameters}
    assert not (names-flags-{'self','cls','pipe','path','options','kwargs','kw','built','token'})
    import subprocess
    p = subprocess.run([sys.executable, '-c', "import sys; from vggflow.cli import main\ntry: main(['finetune','--help'])\nfinally: print('torch' in sys.modules)"], capture_output=True, text=True)
    assert p.stdout.strip().endswith('False') and 'examples:' in p.stdout and '--micro-batch' in p.stdout and 'None)' not in p.stdout

def test_out_of_memory_names_what_helps(monkeypatch, call):
    def boom(**kw): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr('vggflow.train.run', boom); rc, _, err = call('finetune'); assert rc == 2 and '--micro-batch 1' in err and err.count('\n') == 1

def test_interrupted_says_that_it_goes_on(monkeypatch, call):
    def boom(**kw): raise KeyboardInterrupt
    monkeypatch.setattr('vggflow.train.run', boom); rc, _, err = call('finetune'); assert rc == 130 and 'goes on' in err
