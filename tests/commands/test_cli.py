"The command line: every verb on a tiny Stable Diffusion 3 from disk, and one line for what is wrong"
import inspect, json, re, shutil, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from vggflow import cli

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    pytest.importorskip('vggflow.commands.export'); rc, out, err = call('export', run, 'given'); assert rc == 0, err
    assert {'README.md','pytorch_lora_weights.safetensors'} <= {p.name for p in Path('given').iterdir()}
    from vggflow.commands.export import read_run; shutil.copytree(run, 'r'); Path('r/command.json').unlink(); assert read_run('r')['record']['reward'] == 'mine.py:bright'   # config.json knows it too
    card = Path('given/README.md').read_text(); assert "dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)" in card and "dtype='float32'" in card and 'reward `mine.py:bright`' in card and 'height=16, width=16' in card and 'guidance_scale=2,' in card; [compile(c, 'card', 'exec') for c in re.findall('```python\n(.*?)```', card, re.S)]
    rc, _, err = call('export', run, 'given'); assert rc == 2 and 'given' in err and '--force' in err; assert call('export', run, 'given', '--force')[0] == 0

def test_the_card_tells_of_the_run_not_of_the_export(run, call, here, model):
    "Settings from the run's record; the snippets run"
    shutil.copytree(run, 'r'); f = Path('r/config.json'); record = json.loads(f.read_text()); record['config']['updates'] = 400; record['flow'].update(dtype='float16', vae_tiling=True, taesd=True, max_sequence_length=64, guidance_scale=3.)
    record['prompts'] = ['a|b','two\nlines']; f.write_text(json.dumps(record)); rc, _, err = call('export', 'r', 'given'); assert rc == 0, err
    card = Path('given/README.md').read_text(); rows = dict(re.findall(r'^\| (\w+) \| (.*) \|$', card, re.M)); assert (rows['dtype'], rows['vae_tiling'], rows['taesd'], rows['guidance_scale'], rows['updates'], rows['max_sequence_length']) == ('float16', 'True', 'True', '3', '2', '64')
    assert r'a\|b; two lines' in rows['prompts'] and ', 2 updates.' in card and str(run.parent) not in card and 'guidance_scale=3,' in card and 'enable_tiling()' in card and 'max_sequence_length=64' in card and 'torch.float16' in card
    for code in re.findall('```python\n(.*?)```', card, re.S):
        code = re.sub("folder = '.*'", "folder = 'given'", code).replace('float16', 'float32').replace(repr(Path(model).name), repr(str(model))); assert str(model) in code; said = {}; exec(code, said)
        assert 'image' not in said or said['image'].size == (16,16)
    assert said['flow'].max_sequence_length == 64 and said['flow'].vae.use_tiling and said['flow'].guidance_scale == 3

def test_doctor_verb(model, call):
    rc, out, _ = call('doctor', '--model', model, '--reward', 'redness', '--prompts', 'animals', '--image-size', '16', '--batch-size', '2', '--json')
    checks = {c['name']: c for c in json.loads(out)}; assert rc == 0 and checks['model']['status'] == checks['memory']['status'] == 'ok' and '2 text encoders' in checks['model']['found'] and '45' in checks['prompts']['found']
    for argv,name in ((['--steps', '3'], 'settings'), (['--image-size', '17'], 'sizes'), (['--device', 'cuda:9', '--reward', 'redness'], 'device')):
        rc, out, _ = call('doctor', '--model', model, *argv); assert rc == 1 and out.splitlines()[-1] == f'1 failed ({name})'
    rc, out, _ = call('doctor', '--model', model/'vae', '--reward', 'rednes'); assert rc == 1 and "did you mean 'redness'" in out and 'failed' in out.splitlines()[-1]

def test_prompts_verb(call, here):
    Path('a.csv').write_text('prompt\nx\ny\n'); assert call('prompts', 'a.csv', 'animals', '--limit', '2')[1].split() == ['x', 'butterfly']
    assert call('prompts', 'a.csv')[1] == 'x\ny\n'

@pytest.mark.parametrize('argv,says', [
    (['finetune', '--out', 'r', '--model', '/no/such/folder', '--reward', 'redness', '--prompts', 'a'], '/no/such/folder'), (['finetune', '--out', 'r', '--model', '{}', '--reward', 'rednes', '--prompts', 'a'], "did you mean 'redness'"),
    (['finetune', '--out', 'r', '--model', '{}', '--reward', 'redness'], 'prompts'), (['finetune', '--out', 'r', '--model', '{}', '--reward', 'redness', '--prompts', 'no.csv'], "'no.csv'"), (['finetune', '--out', 'r', '--method', 'VGG-Flaw'], "did you mean 'VGG-Flow'"),
    (['finetune', '--option', 'clip'], 'name=value'), (['finetune', '--out', 'r', '--world', 'gaussian', '--reward', 'linear', '--option', 'clop=1', '--eval-every', '0'], 'clop'), (['finetune', '--updates', 'x'], "--updates: invalid int value: 'x'"),
    (['finetune', '--out', 'r', '--updates', '0'], 'updates must be at least 1'), (['train', '--out', 'r', '--stop-on', 'colapse'], 'colapse'), (['sample', '--lora', 'nowhere', '--model', '{}', 'a cat'], 'nowhere'), (['sample', '--model', '{}', '--dtype', 'int', 'a'], 'int'),
    (['evaluate'], 'what is to be evaluated'), (['evaluate', '--images', 'x', '--run', 'y'], 'leave --model'), (['evaluate', '--run', 'nowhere', '--out', 'x'], "no run directory 'nowhere'"),
    (['finetune', '--updates', '3'], 'Give --out'), (['finetune', '--out', 'r', '--option', 'beta=abc'], "'abc'"), (['finetune', '--out', 'r', '--images-per-prompt', '0'], '--images-per-prompt: must be at least 1, got 0'),
    (['finetune', '--out', 'r', '--device', 'cuda:9'], "'cuda:9' is not here"), (['sample', 'a', '--device', 'cuda:9'], "'cuda:9' is not here"), (['evaluate', '--lora', 'l', '--out', 'x', '--device', 'cuda:9', '--reward', 'redness'], "'cuda:9' is not here"), (['sample', 'a', '--device', 'gpu'], 'unknown device'),
    (['sample', 'a', '--compare'], '--run DIR'), (['sample', 'a', '--out', 'a.xyz'], '.xyz'), (['sample', 'a', '--out', 'a'], 'without a suffix'), (['sample', 'a', '--n', '0'], '--n: must be at least 1'), (['sample', 'a', '--steps', '0'], '--steps: must be'), (['evaluate', '--batch-size', '0'], '--batch-size: must be'),
    (['evaluate', '--lora', 'l', '--out', 'x', '--images-per-prompt', '1'], '--perceptual none'), (['prompts', 'animals', '--limit', '-1'], '--limit: must be at least 0'),
    (['evaluate', '--images', 'x', '--out', 'y'], 'which reward'), (['export', 'nowhere', 'x'], 'nowhere'), (['doctor', '--micro-batch', 'many'], 'invalid int')])
def test_one_line_and_exit_2(model, call, here, argv, says, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    rc, _, err = call(*[a.format(model) for a in argv]); assert rc == 2 and says in err and err.strip().count('\n') == 0, err

def test_a_reward_without_gradient_ends_before_the_model_is_drawn_from(model, call, here):
    Path('flat.py').write_text('import torch\ndef f(images, prompts): return images.detach().mean((1,2,3))\n')
    rc, _, err = call('finetune', '--model', model, '--reward', 'flat.py:f', '--prompts', 'a', '--out', 'r', '--transitions', '2', *FAST); assert rc == 2 and 'no gradient' in err and not Path('r/config.json').exists()

def test_an_unfinished_run_says_so(call, here):
    Path('half').mkdir(); rc, _, err = call('evaluate', '--run', 'half', '--out', 'x', '--reward', 'redness'); assert rc == 2 and 'no finished run' in err and 'the same command goes on' in err
    Path('half/command.json').write_text('{"world": "emoji"}'); rc, _, err = call('sample', 'a cat', '--run', 'half'); assert rc == 2 and 'python -m vggflow.train half/command.json goes on' in err

def test_a_run_that_has_not_ended_has_its_last_checkpoint(run, model, call, here):
    shutil.copytree(run, 'r'); shutil.rmtree('r/lora'); rc, _, err = call('sample', 'a cat', '--run', 'r', '--out', 'deep/er/a.png'); assert rc == 0 and 'no lora/' in err and 'update 2' in err
    assert call('sample', 'a cat', '--run', run, '--out', 'b.png')[0] == 0; assert np.abs(np.array(Image.open('deep/er/a.png')).astype(int)-np.array(Image.open('b.png'))).max() <= 1   # the same weights
    rc, _, err = call('sample', 'a cat', '--run', 'r', '--lora', run/'lora', '--out', 'c.png'); assert rc == 0 and not err and Path('c.png').read_bytes() == Path('b.png').read_bytes()   # --lora wins

def test_dtype_and_tiling_are_those_of_the_run(run, model, here):
    shutil.copytree(run, 'r'); f = Path('r/config.json'); record = json.loads(f.read_text()); record['flow'].update(dtype='bfloat16', vae_tiling=True); f.write_text(json.dumps(record))
    get = lambda *argv: cli._model_of(parsed('evaluate', '--run', 'r', *argv))[0]; dtype = lambda flow: flow.transformer.pos_embed.proj.weight.dtype
    flow = get(); assert dtype(flow) == torch.bfloat16 and flow.vae.use_tiling; assert dtype(get('--dtype', 'fp32')) == torch.float32
    flow = cli._model_of(parsed('sample', '--model', model, 'a', '--vae-tiling'))[0]; assert dtype(flow) == torch.float32 and flow.vae.use_tiling
    c = Path('r/command.json'); c.write_text(json.dumps({**json.loads(c.read_text()), 'dtype':'fp16'})); assert dtype(get()) == torch.float16 and parsed('sample', 'a', '--dtype', 'BF16').dtype == 'bfloat16'

def test_limit_counts_for_the_prompts_of_a_run():
    from vggflow.judging.prompts import load_prompts
    said = dict(prompts='some.csv', drawn_prompts=['a','b','a','c','d']); go = lambda n, **kw: cli._own_prompts(parsed('evaluate', '--limit', n), {**said, **kw})
    assert go(0) == ['a','b','c','d'] and go(2) == ['a','c'] and go(3, drawn_prompts=None, prompts='animals') == load_prompts('animals')[::15] and len(go(5, drawn_prompts=None, prompts=None)) == 5

@pytest.mark.parametrize('file', ['command.json','config.json'])
@pytest.mark.parametrize('text', ['{"a"', '[1]', ''])
def test_a_damaged_record_is_named(run, call, here, file, text):
    shutil.copytree(run, 'r'); Path('r', file).write_text(text)
    for argv in (['sample', 'a cat', '--run', 'r'], ['evaluate', '--run', 'r', '--out', 'x', '--reward', 'redness'], ['export', 'r', 'x']):
        rc, _, err = call(*argv); assert rc == 2 and f'r/{file} is damaged' in err and '--model' in err and err.count('\n') == 1

def test_options_of_a_method_by_their_words():
    from vggflow.cli import _option
    assert [_option(f'x={v}')[1] for v in ('False','TRUE','no','Yes','None','null','0.8','t^2','"no"')] == [False, True, False, True, None, None, .8, 't^2', 'no']

def test_clip_none_and_quiet(model, call, here):
    "No features of CLIP, and no bar of diffusers"
    import diffusers; diffusers.utils.logging.enable_progress_bar()
    go = ['finetune', '--method', 'ReFL', '--reward', 'redness', '--prompts', 'a cat', '--updates', '1', '--batch-size', '2', '--steps', '2', '--eval-every', '1', '--images-per-prompt', '2', '--perceptual', 'none', '--clip', 'none', '--quiet']
    rc, out, err = call(*go, '--model', model, '--out', 'r'); assert rc == 0 and '%|' not in err and 'it/s' not in err, err
    row = json.loads(Path('r/eval.jsonl').read_text().splitlines()[-1]); assert 'reward' in row and 'alignment' not in row
    assert call(*[x for x in go if x != 'redness' and x != '--reward'], '--out', 'e')[0] == 0; assert 'alignment' not in json.loads(Path('e/eval.jsonl').read_text().splitlines()[-1])   # nor the emoji world's own

def test_rewards_are_tried_before_anything_is_drawn(run, call, here):
    Path('r.py').write_text('def bad(x, p): return x.mean()\ndef counted(x, p): return (x > .5).float().mean((1,2,3))\n')
    go = lambda f: call('evaluate', '--run', run, '--images-per-prompt', '2', '--reward', f'r.py:{f}', '--perceptual', 'none', '--clip', 'none', '--no-floor', '--limit', '1', '--out', f, '--quiet')
    rc, _, err = go('bad'); assert rc == 2 and 'one number per image' in err and not Path('bad').exists()
    read = lambda: json.loads(Path('counted/evaluation.json').read_text()); assert go('counted')[0] == 0 and read()['images'] == {'finetuned':2, 'base':2}; was = read()['sets']['base']['reward']   # no gradient is needed
    Path('r.py').write_text('LIMIT = -1\ndef counted(x, p): return (x > LIMIT).float().mean((1,2,3))\n'); stamp = [f.stat().st_mtime_ns for f in sorted(Path('counted').rglob('*.png')) if f.stem != 'sheet']
    assert go('counted')[0] == 0 and read()['sets']['base']['reward'] == 1 != was and stamp == [f.stat().st_mtime_ns for f in sorted(Path('counted').rglob('*.png')) if f.stem != 'sheet']   # the edited file is seen, nothing is drawn anew

def parsed(*argv): return cli.parser().parse_args([str(a) for a in argv])

def test_a_run_that_does_not_say_its_settings(run, model, call, here, monkeypatch):
    shutil.copytree(run, 'bare'); Path('bare/command.json').unlink()
    for argv in (['sample', 'a cat', '--run', 'bare'], ['evaluate', '--run', 'bare', '--out', 'x', '--reward', 'redness'], ['export', 'bare', 'x']):
        rc, _, err = call(*argv); assert rc == 2 and 'does not say its settings' in err and '--model' in err and err.count('\n') == 1
    f = Path('bare/config.json'); record = json.loads(f.read_text()); record['flow'].update(latent_size=4, correction='adapter'); f.write_text(json.dumps(record))
    flow,said = cli._model_of(parsed('sample', 'a cat', '--run', 'bare', '--model', model)); assert (flow.guidance_scale, flow.latent_size, said['steps'], said['prompts']) == (2, 4, 2, ['a cat','an owl'])
    got = {}; monkeypatch.setattr('vggflow.commands.export.export_lora', lambda flow, out, **kw: got.update(flow=flow, **kw)); assert call('export', 'bare', 'x', '--model', model)[0] == 0
    assert (got['flow'].guidance_scale, got['flow'].latent_size, got['flow'].correction_kind) == (2, 4, 'adapter')
    rc, _, err = call('evaluate', '--run', 'bare', '--model', model, '--out', 'x', '--prompts', 'a cat'); assert rc == 2 and 'which reward' in err

def test_settings_of_a_run_are_those_of_what_is_made_of_it(run, here, monkeypatch):
    "Sampling, evaluation and export build the model as the run did"
    shutil.copytree(run, 'r'); f = Path('r/command.json'); said = {**json.loads(f.read_text()), 'image_size':8, 'max_sequence_length':64, 'correction':'adapter'}; del said['reward']; f.write_text(json.dumps(said))
    for more,size in (([], 8), (['--image-size', '16'], 16)):
        flow,_ = cli._model_of(parsed('evaluate', '--run', 'r', *more)); assert (flow.latent_size*flow.pipe.vae_scale_factor, flow.max_sequence_length, flow.guidance_scale) == (size, 64, 2)
    got = {}; monkeypatch.setattr('vggflow.commands.export.export_lora', lambda flow, out, **kw: got.update(flow=flow, **kw)); assert cli.main(['export', 'r', 'x']) == 0; flow = got['flow']
    assert flow.correction_kind == 'adapter' and flow.latent_size*flow.pipe.vae_scale_factor == 8 and flow.vae.dtype == torch.bfloat16 and {p.dtype for p in flow.trainable_parameters()} == {torch.float32}

def test_a_run_without_a_reward_by_name_had_the_first_of_its_world(monkeypatch):
    monkeypatch.setattr('vggflow.commands.doctor.load_any_reward', lambda name, device: name); monkeypatch.setattr('vggflow.judging.rewards.check_reward', lambda r, **kw: None); go = lambda said, *argv: cli._rewards_of(parsed('evaluate', *argv), said, 'cpu')[1]
    assert go(dict(world='sd3', model='m'), '--run', 'r', '--model', 'm') == ['aesthetic'] and go(dict(updates=2), '--run', 'r') == ['emoji-aesthetic'] == go({}, '--lora', 'l')
    assert go(dict(world='sd3', reward='redness'), '--run', 'r') == ['redness'] and go(dict(world='sd3'), '--run', 'r', '--reward', 'a', 'b') == ['a','b']

def test_help_is_complete_and_light():
    "Every parameter of a run and of the model has a flag, and --help needs no torch"
    from vggflow.worlds.sd3 import SD3Flow
    from vggflow.train import build, run
    flags = {a.dest for p in cli.parser()._subparsers._group_actions[0].choices['finetune']._action_groups for a in p._group_actions}
    names = {n for f in (run, build, SD3Flow.__init__, SD3Flow.from_pretrained, SD3Flow.configure) for n in inspect.signature(f).parameters}
    assert not (names-flags-{'self','cls','pipe','path','options','kwargs','kw','built','token'})
    import subprocess
    p = subprocess.run([sys.executable, '-c', "import sys; from vggflow.cli import main\ntry: main(['finetune','--help'])\nfinally: print('torch' in sys.modules)"], capture_output=True, text=True)
    assert p.stdout.strip().endswith('False') and 'examples:' in p.stdout and '--micro-batch' in p.stdout and 'None)' not in p.stdout

def test_out_of_memory_names_what_helps(monkeypatch, call):
    def boom(**kw): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr('vggflow.train.run', boom); rc, _, err = call('finetune', '--out', 'r'); assert rc == 2 and '--micro-batch 1' in err and err.count('\n') == 1

def test_interrupted_says_that_it_goes_on(monkeypatch, call):
    def boom(**kw): raise KeyboardInterrupt
    monkeypatch.setattr('vggflow.train.run', boom); rc, _, err = call('finetune', '--out', 'r'); assert rc == 130 and 'goes on' in err
