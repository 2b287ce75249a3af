"Evaluation: sheets of samples, what a row holds, and what a killed run keeps of both"
import json, os
import numpy as np, pytest, torch
from PIL import Image
from vggflow.evaluate import Evaluator, draw, evaluator, sheet_of, write_sheet
from vggflow.finetune import read_rows
from vggflow.train import build, make_evaluator, run

SMALL = dict(world='emoji', method='ReFL', lr=3e-3, batch_size=2, steps=3, eval_prompts=2, images_per_prompt=4, progress=False)

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('VGGFLOW_CACHE', str(tmp_path_factory.getbasetemp()/'cache')); torch.set_num_threads(1)

def read(f): return torch.tensor(np.array(Image.open(f)))/255.

def test_a_run_leaves_sheets_rows_and_prompts(tmp_path):
    h = run(updates=4, eval_every=2, save_every=2, out=tmp_path, reward='emoji-aesthetic', **SMALL)
    s = tmp_path/'samples'
    assert sorted(f.name for f in s.iterdir()) == sorted([f'{u:05d}.{e}' for u in (0,2,4) for e in ('png','json')]+['prompts.json'])
    ps = json.loads((s/'prompts.json').read_text()); w = build('emoji', 'emoji-aesthetic')
    assert ps == [w.prompts[0], w.prompts[12]] and Image.open(s/'00000.png').size == (4*32, 2*32)
    base,cond = draw(w.flow, ps, 4, steps=3, seed=12345, base=True)   # the sheet of update 0 shows the base model, on the evaluation's noise
    png = read(s/'00000.png')
    for i in range(8): assert (png[32*(i//4):32*(i//4)+32, 32*(i%4):32*(i%4)+32].permute(2,0,1)-base[i].clamp(0,1)).abs().max() < 1/250
    assert (read(s/'00004.png')-png).abs().max() > .02                # and the last another
    for row in h.evals:
        means = json.loads((s/f"{row['update']:05d}.json").read_text())['reward']
        assert list(means) == ps and np.mean(list(means.values())) == pytest.approx(row['reward'], abs=1e-5)

def test_a_row_of_the_emoji_world(tmp_path):
    w = build('emoji', 'emoji-aesthetic')
    ev = make_evaluator('emoji', w, 1., 2, 4, 3, 1., reward='emoji-aesthetic')
    row = ev(w.flow)
    assert set(row) >= {'reward','reward_std','perceptual_diversity','clip_diversity','fid','fid_base','fid_n','fid_m','accuracy','vendors','hue_spread','alignment','utility'}
    assert row['fid_n'] == row['fid_m'] == 4 and all(isinstance(v, (int,float)) for v in row.values())
    from vggflow.emoji import load_clip, true_utility
    images,cond = draw(w.flow, ev.prompts, 4, steps=3, seed=ev.seed); x = images.clamp(0,1)
    with torch.no_grad():
        assert row['alignment'] == pytest.approx(load_clip().similarity(x, cond).mean().item(), abs=1e-4)
        assert row['utility'] == pytest.approx(true_utility('emoji-aesthetic')(x, cond).mean().item(), abs=1e-3)
    wrong = ev.numbers(images, cond[::-1])                           # the other prompt's images
    assert wrong['alignment'] < row['alignment']-.02 and wrong['accuracy'] < row['accuracy']

def test_noise_and_answers_do_not_depend_on_the_batch():
    "Batches are a matter of speed"
    flow = build('emoji', 'emoji-aesthetic').flow
    a,b = (draw(flow, ['a cat','a dog','a fox'], 8, steps=2, seed=5, batch_size=n)[0] for n in (8,24))
    assert (a-b).abs().max() < 1e-4

def test_a_resumed_run_keeps_its_sheets_and_writes_none_twice(tmp_path):
    run(updates=2, eval_every=1, save_every=1, out=tmp_path, **SMALL)
    stamp = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'samples').glob('0*')}
    run(updates=3, eval_every=1, save_every=1, out=tmp_path, **SMALL)
    now = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'samples').glob('0*')}
    assert now.keys()-stamp.keys() == {'00003.png','00003.json'} and all(now[k] == stamp[k] for k in stamp)

def test_killed_while_a_sheet_is_written(tmp_path, monkeypatch):
    "Every row has its whole sheet; the resumed run makes the missing one, the same as in a run that was never killed"
    class Killed(BaseException): "Nothing catches it"
    replace,out = os.replace,tmp_path/'a'
    def stop(a, b):
        if str(b).endswith('00002.png'): raise Killed()   # the sheet is written, but not in its place
        replace(a, b)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr('vggflow.evaluate.os.replace', stop); run(updates=3, eval_every=1, save_every=1, out=out, **SMALL)
    rows = [r['update'] for r in read_rows(out/'eval.jsonl')]
    assert rows == [0,1] and sorted(int(f.stem) for f in (out/'samples').glob('*.png')) == rows
    run(updates=3, eval_every=1, save_every=1, out=out, **SMALL)
    run(updates=3, eval_every=1, save_every=1, out=tmp_path/'b', **SMALL)
    files = lambda d: {f.name: f.read_bytes() for f in (d/'samples').iterdir()}
    assert len(files(out)) == 9 and files(out) == files(tmp_path/'b')   # four sheets, four rewards, the prompts; nothing left over
    assert read_rows(out/'eval.jsonl') == read_rows(tmp_path/'b/eval.jsonl')

def test_large_images_are_scaled_down_and_few_are_enough(tmp_path):
    assert sheet_of(torch.rand(6,3,1024,512), 2).shape == (512, 3*128, 3)       # 3 of each, longest side 256
    flat = sheet_of(torch.full((2,3,600,600), .4), 1); assert flat.shape == (256,512,3) and (flat == 102).all()
    write_sheet(tmp_path, 12345, torch.rand(2,3,8,8), ['é'], torch.zeros(2))
    assert json.loads((tmp_path/'prompts.json').read_text(encoding='utf8')) == ['é'] and (tmp_path/'12345.png').exists()

def test_world_sd3_takes_extractors_by_name(monkeypatch, tmp_path):
    "The emoji pipeline through the loader of the sd3 world, with a CLIP from a folder"
    from vggflow.emoji import asset
    w = build('sd3', 'redness', prompts=['a cat','a dog'], model=str(asset('base')))
    ev = evaluator('sd3', w.flow, w.reward, w.prompts, images_per_prompt=4, steps=2, clip=asset('clip'), sheets=tmp_path, cache=False)
    row = ev(w.flow, 7)
    assert ev.batch_size == 8 and {'perceptual_diversity','clip_diversity','fid','fid_base','alignment'} <= set(row) and 'accuracy' not in row
    assert (tmp_path/'00007.png').exists()
    with pytest.raises(ValueError, match="dreamsim"): evaluator('sd3', w.flow, w.reward, w.prompts, perceptual='dreamsin')
