"One run on one process or on two: the same numbers, the same files, the same errors."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from vggflow.training.checkpoint import checkpoints, load_checkpoint
from vggflow.training.loop import read_rows

CARD = dict(world='gaussian', method='VGG-Flow', updates=4, eval_every=2, batch_size=8, save_every=2, progress=False)
CONFIGS = Path(__file__).parents[2]/'configs'/'accelerate'


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What one process found alone, and each of two together"
    d = tmp_path_factory.mktemp('processes'); (d/'card.json').write_text(json.dumps(CARD))
    env = {k:v for k,v in os.environ.items() if k not in ('WORLD_SIZE','RANK','LOCAL_RANK')}
    got = subprocess.run([sys.executable, str(Path(__file__).parents[1]/'two_processes.py'), str(d)], capture_output=True, text=True, timeout=600, env=env)
    assert got.returncode==0, got.stderr[-4000:]
    return d, *(torch.load(d/f'{n}.pt', weights_only=False) for n in ('one','0','1'))


def apart(a, b)->float:
    "Largest difference of two results: numbers of rows by their size (a twentieth for gradient norms), weights by that of the largest"
    rows = [(.05 if k=='grad_norm' else 1.)*abs(r[k]-q[k])/max(1., abs(r[k])) for x in ('rows','evals') for r,q in zip(a[x], b[x], strict=True) for k in r]
    largest = max(v.abs().max() for v in a['state'].values())
    return max(rows+[((v-b['state'][k]).abs().max()/largest).item() for k,v in a['state'].items()])


def same(a, b)->bool: return a['rows']==b['rows'] and a['evals']==b['evals'] and all(torch.equal(v, b['state'][k]) for k,v in a['state'].items())


def test_two_processes_do_what_one_does(found):
    "Five methods on the Gaussian and on tiny Stable Diffusions 3 with and without T5, with and without guidance; quantiles and units are those of all samples"
    _, one, a, b = found
    assert one['n'] == 1 and a['n'] == b['n'] == 2
    off = {k: apart(one['both'][k], a['both'][k]) for k in one['both']}
    assert len(off) == 32 and max(off.values()) < 1e-5, off
    assert max(v for k, v in off.items() if k.split()[0] not in ('tiny','whole')) < 1e-12                    # in double precision
    assert all(same(a['both'][k], b['both'][k]) for k in off)                          # to the last bit between the two
    assert {len(r['evals']) for k, r in b['both'].items()} == {0, 3} and b['both']['ema']['evals'][-1]['w'] != 0


def test_micro_batches_on_two_processes(found):
    _, one, a, _ = found
    assert max(apart(one['both'][f'gaussian {n}'], r) for n, r in a['micro'].items()) < 1e-6


def test_sharding_the_frozen_transformer_changes_nothing(found):
    "FSDP2 by fully_shard, with guidance; with gradient checkpointing and with the correction as a second adapter too"
    _, one, a, b = found
    for n in a['sharded']:
        same_run = one['both'].get(f'tiny {n} 3.0') or one['both'].get(f'tiny {n}')
        assert (same_run is None) == (n == 'carried') and (n == 'carried' or apart(same_run, a['sharded'][n]) < 1e-5), n
    assert len(a['sharded']) == 9
    assert all(same(a['sharded'][n], b['sharded'][n]) for n in a['sharded'])


def test_killed_and_resumed_on_two_processes_to_the_last_bit(found):
    "Five methods, with dropout: every process has its own random numbers back"
    d, _, a, b = found
    for n in ('vgg','pmp','am','draft','refl'):
        for r in (a, b): assert same(r['interrupted'][n]['whole'], r['interrupted'][n]['again']), n
        assert same(a['interrupted'][n]['whole'], b['interrupted'][n]['whole'])
        assert [r['update'] for r in read_rows(d/f'cut-{n}/metrics.jsonl')] == [1, 2, 3, 4, 5]
    parts = load_checkpoint(checkpoints(d/'cut-vgg/checkpoints')[-1])[1]
    assert set(parts) == {'flow', 'method', 'optimizer', 'rng', 'ema'} and not torch.equal(parts['rng']['torch'], parts['rng']['torch.1'])


def test_a_signal_to_one_of_two_ends_both_after_the_same_update(found):
    "With a checkpoint, from which they go on to the last bit"
    _, _, a, b = found
    for r in (a['told'], b['told']): assert (r['code'], r['kept']) == (143, [3]) and same(r['whole'], r['again'])


def test_two_processes_draw_together_what_one_draws(found):
    "Bit for bit; of a sharded model too"
    _, _, a, b = found
    assert a['drawing'] == {5: 0., 7: 0.} and b['drawing'] == {5: True, 7: True}
    assert max(a['sharded drawing'].values()) < 1e-6 and b['sharded drawing'] == {5: True, 7: True}


def test_the_first_process_judges_for_both(found):
    _, _, a, b = found
    a, b = a['judged'], b['judged']
    assert a['evals'] == b['evals'] and [e['update'] for e in a['evals']] == [0, 1] and {'reward','perceptual_diversity','fid','fid_base'} <= set(a['evals'][0])
    assert a['said'] == [12, 12, 'the judge is ill'] and b['said'] == ['the judge is ill']


def test_two_processes_evaluate_what_one_evaluates(found):
    "Every image drawn by one of them, bit for bit; one table"
    d, one, a, b = found; assert one['evaluated'] == a['evaluated'] == b['evaluated'] == 0
    alone, shared = ({f.relative_to(d/k): f.read_bytes() for f in (d/k).rglob('*.png')} for k in ('judged-1','judged-2')); assert len(alone) == 3*7+1 and alone == shared
    first, second = (json.loads((d/k/'evaluation.json').read_text()) for k in ('judged-1','judged-2')); assert first == second and first['sets']['base']['reward'] > 0


def test_no_two_processes_share_noise(found):
    _, _, a, b = found
    for k in ('x0', 'am', 'torch'):
        x = a['noise'][k].flatten(1) if a['noise'][k].dim() > 1 else a['noise'][k][:,None]
        assert len(x) == 8 and (torch.cdist(x, x)+torch.eye(8)).min() > 1e-4
    assert len(a['noise']['cond']) == len(b['noise']['cond']) == 4


def test_what_goes_wrong_on_one_goes_wrong_on_both(found):
    _, _, a, b = found
    assert a['faults']['stops'] == b['faults']['stops'] and 'update 2: the loss is nan' in a['faults']['stops']
    assert same(a['faults']['skips'], b['faults']['skips']) and [r.get('skipped') for r in a['faults']['skips']['rows']] == [None, True, None]
    assert 'batch_size=7 cannot be shared by 2 processes' in b['faults']['odd'] and b['faults']['shared'] == 'the evaluation is broken'


def test_a_card_is_run_once_by_both(found, tmp_path):
    from vggflow import train
    d, _, a, b = found
    assert a['card'] == b['card'] == 0
    alone = train.run(**CARD, out=tmp_path)
    rows = read_rows(d/'card2/metrics.jsonl')
    assert [r['update'] for r in rows] == [1, 2, 3, 4] and max(abs(r['loss']-q['loss']) for r, q in zip(rows, alone.rows)) < 1e-6
    assert sorted(p.name for p in (d/'card2').iterdir() if p.name != 'command.json') == sorted(p.name for p in tmp_path.iterdir())
    assert json.loads((d/'card2/command.json').read_text()) == {**{k: v for k,v in CARD.items() if k != 'progress'}, 'out': str(d/'card2')}


@pytest.mark.parametrize('name,kind,n', [('one_gpu','NO',1), ('ddp','MULTI_GPU',8), ('fsdp2','FSDP',8), ('cpu2','MULTI_GPU',2)])
def test_accelerate_reads_the_configurations(name, kind, n):
    from accelerate.commands.config.config_args import load_config_from_file
    c = load_config_from_file(str(CONFIGS/f'{name}.yaml'))
    assert str(c.distributed_type).endswith(kind) and c.num_processes == n and (name != 'fsdp2' or c.fsdp_config['fsdp_version'] == 2)


def test_accelerate_launch_runs_a_card(tmp_path):
    "The guide's command, started by accelerate itself, on a pipeline from disk with all its text encoders and with guidance"
    from tiny_sd3 import make_tiny_sd3
    from vggflow import train
    card = dict(world='sd3', model=str(make_tiny_sd3(tmp_path/'model')), reward='redness', prompts=['a cat','an owl'], updates=2, batch_size=4, steps=3, transitions=2, guidance_scale=3.,
                lora_rank=2, eval_every=2, images_per_prompt=2, progress=False)
    (tmp_path/'card.json').write_text(json.dumps(card))
    env = {k:v for k,v in os.environ.items() if k not in ('WORLD_SIZE','RANK','LOCAL_RANK')}
    go = ['-m', 'accelerate.commands.launch', '--config_file', CONFIGS/'cpu2.yaml', '-m', 'vggflow.train', tmp_path/'card.json', '--out', tmp_path/'two']
    got = subprocess.run([sys.executable, *go], capture_output=True, text=True, timeout=600, env=env)
    assert got.returncode == 0, got.stderr[-4000:]
    alone = train.run(**card, out=tmp_path/'one'); rows,evals = (read_rows(tmp_path/f'two/{n}.jsonl') for n in ('metrics','eval'))
    assert [r['update'] for r in rows] == [1, 2] and [r['loss'] for r in rows] == pytest.approx([r['loss'] for r in alone.rows], rel=1e-3)
    assert [e['update'] for e in evals] == [0, 2] and evals[-1]['reward'] == pytest.approx(alone.evals[-1]['reward'], abs=1e-3)
    assert (tmp_path/'two/lora/pytorch_lora_weights.safetensors').exists()
