"Evaluation: sheets of samples, what a row holds, and what a killed run keeps of both"
import json, os
import numpy as np, pytest, torch
from PIL import Image
from vggflow.judging.evaluation import Evaluator, draw, evaluator, sheet_of, write_sheet
from vggflow.training.loop import read_rows
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
    from vggflow.worlds.emoji import load_clip, true_utility
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
        m.setattr('vggflow.judging.evaluation.os.replace', stop); run(updates=3, eval_every=1, save_every=1, out=out, **SMALL)
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
    from vggflow.worlds.emoji import asset
    w = build('sd3', 'redness', prompts=['a cat','a dog'], model=str(asset('base')))
    ev = evaluator('sd3', w.flow, w.reward, w.prompts, images_per_prompt=4, steps=2, clip=asset('clip'), sheets=tmp_path, cache=False)
    row = ev(w.flow, 7)
    assert ev.batch_size == 8 and {'perceptual_diversity','clip_diversity','fid','fid_base','alignment'} <= set(row) and 'accuracy' not in row
    assert (tmp_path/'00007.png').exists()
    with pytest.raises(ValueError, match="dreamsim"): evaluator('sd3', w.flow, w.reward, w.prompts, perceptual='dreamsin')

# --- an evaluation on disk

import sys
from pathlib import Path
from vggflow.judging.evaluation import checksum, draw_images, evaluate_sets, image_file, image_noise, load_model, read_images, saved_images, score_images, set_numbers
from vggflow.theory.flow import GaussianFlow
sys.path.insert(0, str(Path(__file__).parents[1]))

class Toy(GaussianFlow):
    "Images of 8 x 8 from a Gaussian; counts what it draws"
    def __init__(self, mean=0.): torch.manual_seed(0); super().__init__(torch.full((192,), mean), torch.full((192,), .5)); self.drawn = []
    def prior(self, n, cond=None, generator=None): return torch.randn(n, 192, generator=generator)
    def decode(self, x): self.drawn.append(len(x)); return (.5+.1*x).view(-1,3,8,8)
    def describe(self): return dict(model='toy', guidance_scale=1.)

PS, KW = ['a','b','c'], dict(n=4, steps=3, batch_size=5, progress=False)
def bright(x, p): return x.mean((1,2,3))
def blocks(x): return torch.nn.functional.avg_pool2d(x, 4).flatten(1)
def everything(d): return {str(f.relative_to(d)): f.read_bytes() for f in sorted(Path(d).rglob('*')) if f.is_file()}

def whole(out, flow):
    for k,name in enumerate(('finetuned','base','base-again')): draw_images(out/name, flow, PS, seed=k, base=k > 0, **KW)
    return evaluate_sets(out, {k: saved_images(out/k) for k in ('finetuned','base','base-again')}, dict(reward=bright), dict(perceptual=blocks), progress=False)

def test_interrupted_evaluation_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    flow = Toy(); one = whole(tmp_path/'one', flow); assert sum(flow.drawn) == 36
    class Killed(BaseException): "Nothing catches it"
    replace = os.replace
    for at in ('00001/00002.png', 'base/00000/00000.png', '00002.safetensors', 'evaluation.json'):   # cut at each of these, in this order
        def stop(a, b):
            if str(b).endswith(at): raise Killed()
            replace(a, b)
        with monkeypatch.context() as m, pytest.raises(Killed): m.setattr('vggflow.judging.evaluation.os.replace', stop); whole(tmp_path/'two', Toy())
    flow = Toy(); assert whole(tmp_path/'two', flow) == one and not flow.drawn   # everything was drawn before the last cut
    a,b = everything(tmp_path/'one'),{k:v for k,v in everything(tmp_path/'two').items() if not k.endswith('.tmp')}; assert a == b and 'sheet.png' in a
    r = one['sets']; assert set(r) == {'finetuned','base'} and {'reward','reward_std','perceptual_diversity','fid','fid_base','fid_n','fid_m'} == set(r['finetuned']) and 'fid' not in r['base']
    assert [p['prompt'] for p in one['prompts']] == PS and np.mean([p['finetuned']['reward'] for p in one['prompts']]) == pytest.approx(r['finetuned']['reward'], abs=1e-6)

def test_noise_is_of_the_image_alone(tmp_path):
    flow = Toy(); draw_images(tmp_path/'a', flow, PS, seed=3, **KW); draw_images(tmp_path/'b', flow, PS, seed=3, **{**KW, 'n':6, 'batch_size':4})
    a,b = (saved_images(tmp_path/k, n=4) for k in 'ab')
    assert all((read_images(a[p])-read_images(b[p])).abs().max() <= 1/255+1e-6 for p in PS) and not torch.equal(image_noise(flow, 'a', 1, 0, 0), image_noise(flow, 'a', 1, 0, 1))
    assert torch.equal(image_noise(flow, 'a', 1, 2, 3), image_noise(flow, 'b', 1, 2, 3)) and not torch.equal(image_noise(flow, 'a', 1, 2, 3), image_noise(flow, 'a', 1, 3, 2))

@pytest.mark.parametrize('change,says', [(dict(seed=4), 'seed'), (dict(steps=4), 'times'), (dict(prompts=['a','b','d']), 'prompts'), (dict(flow=.2), 'weights'), (dict(base=True), 'model')])
def test_a_folder_of_other_images_is_refused(tmp_path, change, says):
    flow = Toy(); draw_images(tmp_path, flow, PS, seed=3, **KW); before = everything(tmp_path)
    kw = {**KW, 'seed':3, **{k:v for k,v in change.items() if k not in ('flow','prompts')}}
    with pytest.raises(ValueError, match=f'another.*{says}') as e: draw_images(tmp_path, Toy(change.get('flow', 0.)), change.get('prompts', PS), **kw)
    assert '\n' not in str(e.value) and everything(tmp_path) == before

def test_scores_are_kept_for_the_same_reward_and_images_only(tmp_path):
    flow = Toy(); draw_images(tmp_path/'i', flow, PS, **KW); files = saved_images(tmp_path/'i'); calls = []
    class Net(torch.nn.Module):
        def __init__(self, w): super().__init__(); self.w = torch.nn.Parameter(torch.tensor([w]))
        def forward(self, x, p): calls.append(len(x)); return self.w*x.mean((1,2,3))
    score = lambda w: torch.cat([s['reward'] for s in score_images(tmp_path/'s', files, dict(reward=Net(w)), {}, progress=False)])
    a = score(1.); assert sum(calls) == 12 and torch.equal(score(1.), a) and sum(calls) == 12
    assert torch.allclose(score(2.), 2*a) and sum(calls) == 24 and torch.equal(score(1.), a) and sum(calls) == 36
    Image.new('RGB', (8,8)).save(image_file(tmp_path/'i', 1, 2)); b = score(1.); assert sum(calls) == 40 and b[6] == 0 and torch.equal(b[:6], a[:6])
    assert checksum(bright) != checksum(lambda x, p: x.mean((1,2,3))*2) and checksum(dict(a=1)) != checksum(dict(a=2)) and checksum(bright) == checksum(bright)

def test_a_score_knows_what_made_it(tmp_path, monkeypatch):
    "Helpers beside a reward in its file, attributes and any weight of a network, values that a function holds"
    import importlib.util
    def reward(text):
        (tmp_path/'r.py').write_text(text); spec = importlib.util.spec_from_file_location('r', tmp_path/'r.py'); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m); return m.f
    a,b = (reward(f'def helper(x): return {k}*x\ndef f(x, p): return helper(x.mean((1,2,3)))\n') for k in (1,2)); one = checksum(reward('def f(x, p): return 1\n')); assert checksum(a) == checksum(b) != one   # the file as it is now
    class Net(torch.nn.Module):
        def __init__(self, n=100, scale=1.): super().__init__(); self.big = torch.nn.Linear(n, n); self.scale = scale; torch.nn.init.ones_(self.big.weight)
    x,y = Net(),Net(); y.load_state_dict(x.state_dict()); assert checksum(x) == checksum(y) != checksum(Net(scale=2.)); y.scale = 2.; assert checksum(x) != checksum(y) and checksum(x, whole=False) == checksum(y, whole=False)
    y.scale = 1.; y.eval(); assert checksum(x) == checksum(y)
    with torch.no_grad(): y.big.weight[37,41] += 1e-6
    assert checksum(x) != checksum(y) and checksum(x.bfloat16()) != checksum(y)
    from vggflow.judging.rewards import WeightedSum
    held = lambda k: (lambda x, p: k*x.mean((1,2,3))); assert checksum(held(1)) == checksum(held(1)) != checksum(held(2)) and checksum(WeightedSum((bright, 1.))) != checksum(WeightedSum((held(1), 1.)))

def test_what_is_damaged_is_drawn_again_or_named(tmp_path):
    flow = Toy(); draw_images(tmp_path/'i', flow, PS, **KW); good = everything(tmp_path/'i'); f = image_file(tmp_path/'i', 1, 2); f.write_bytes(f.read_bytes()[:60]); files = saved_images(tmp_path/'i')
    with pytest.raises(ValueError, match='00002.png is no whole image'): read_images(files['b'])
    draw_images(tmp_path/'i', flow, PS, **KW); assert everything(tmp_path/'i') == good
    for text in ('{"prompts"', '[]'):
        (tmp_path/'i'/'drawn.json').write_text(text)
        with pytest.raises(ValueError, match='drawn.json is damaged.*remove') as e: draw_images(tmp_path/'i', flow, PS, **KW)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match="'a' .*stands there twice"): draw_images(tmp_path/'j', flow, ['a','b','a'], **KW)
    assert not (tmp_path/'j').exists()

def test_sets_that_cannot_be_compared_are_refused_before_scoring(tmp_path):
    def make(name, n=2, size=8, prompts=('a','b')):
        for i,_ in enumerate(prompts):
            for k in range(n): f = image_file(tmp_path/name, i, k); f.parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (size,8), (k,i,0)).save(f)
        return saved_images(tmp_path/name, prompts)
    def never(x, p): raise AssertionError('scored')
    go = lambda base, **kw: evaluate_sets(tmp_path/'o', dict(finetuned=make('f'), base=base), dict(reward=never), dict(perceptual=blocks), progress=False, **kw)
    for base,says in ((make('g', size=9), '9 x 8 pixels'), (make('h', n=1), 'need 2 of each'), (make('k', prompts=('a',)), 'of 1 prompts'), (make('l', prompts=('a','c')), "prompt 'c'")):
        with pytest.raises(ValueError, match=says) as e: go(base)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='stands there twice'): make('m', prompts=('a','a'))

def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path/'file').touch(); go = lambda cache: Evaluator(Toy(), bright, PS, 4, 3, features=dict(perceptual=blocks), cache=cache)
    with pytest.warns(RuntimeWarning, match='VGGFLOW_CACHE'): ev = go(tmp_path/'file'/'cache')
    assert torch.equal(ev.base['one'], go(tmp_path/'ok').base['one'])

@pytest.mark.parametrize('kw,says', [(dict(device='cuda:7'), 'is not here'), (dict(device='gpu'), 'unknown device'), (dict(dtype='int'), 'bfloat16, float16 or float32'), (dict(dtype='fp17'), 'bfloat16, float16 or float32')])
def test_where_and_how_a_model_is_loaded(kw, says):
    with pytest.raises(ValueError, match=says) as e: load_model(**kw)
    assert '\n' not in str(e.value)

def test_saved_images_of_others(tmp_path):
    for k,p in enumerate(('an owl','a cat')):
        for i in range(3+k): (tmp_path/p).mkdir(exist_ok=True); Image.new('RGB', (8,8), (40*k,i,0)).save(tmp_path/p/f'{i}.jpg')
    assert list(saved_images(tmp_path)) == ['a cat','an owl'] and {len(v) for v in saved_images(tmp_path).values()} == {3} and list(saved_images(tmp_path, ['x','y'], 2)) == ['x','y']
    (tmp_path/'prompts.json').write_text('["cat","owl"]'); assert list(saved_images(tmp_path)) == ['cat','owl']
    for kw,says in [(dict(prompts=['x']), 'give one prompt for each'), (dict(n=4), 'has 3')]:
        with pytest.raises(ValueError, match=says): saved_images(tmp_path, **kw)
    Image.new('RGB', (9,8)).save(tmp_path/'a cat/0.jpg')
    with pytest.raises(ValueError, match='different sizes'): read_images(saved_images(tmp_path)['cat'])
    for bad in (tmp_path/'none', tmp_path/'a cat'):
        with pytest.raises(OSError, match='no folder of images|no images in'): saved_images(bad)

def test_prompts_are_fingerprinted_in_chunks():
    "No more at once than the batch; what is one chunk has the name that it had"
    import hashlib
    from vggflow.judging.evaluation import fingerprint
    ps = list('abcdefg'); flow = Toy(); key = fingerprint(flow, ps, 1); assert flow.drawn == [7]
    x = flow.prior(7, ps, generator=torch.Generator().manual_seed(7)); y = flow.decode(flow.base_velocity(x, torch.full((7,), .5), ps))
    assert key == hashlib.sha256(y.detach().numpy().tobytes()+repr((ps, 1)).encode()).hexdigest()[:20]
    flow.drawn.clear(); fingerprint(flow, ps, 1, 3); assert flow.drawn == [3,3,1]
    flow.drawn.clear(); Evaluator(flow, bright, ps, 2, 2, batch_size=4, features=dict(perceptual=blocks), cache=False); assert max(flow.drawn) == 4

def test_a_plain_reward_gets_its_images_on_the_device(tmp_path):
    "It may hold a network that no one sees; one that is seen says where it is"
    from vggflow.judging.evaluation import near
    x = torch.zeros(2,3,8,8); assert near(x, bright, 'meta').device.type == 'meta' and near(x, bright) is x and near(x, torch.nn.Linear(1, 1), 'meta').device.type == 'cpu'
    seen = []
    def reward(x, p): seen.append(x.device.type); return torch.zeros(len(x))
    class Far(Toy): device = 'meta'
    ev = Evaluator(Far(), reward, PS, 2, 2, cache=False); ev.numbers(torch.rand(6,3,8,8), [p for p in PS for _ in 'ab']); assert seen == ['meta']
    draw_images(tmp_path/'i', Toy(), PS, **KW); evaluate_sets(tmp_path/'o', dict(finetuned=saved_images(tmp_path/'i')), dict(reward=reward), {}, progress=False, device='meta'); assert seen == ['meta']*4

def test_numbers_of_one_image_a_prompt():
    "Diversity and distances need two; the rest does not"
    s = [dict(reward=torch.tensor([float(i)]), alignment=torch.tensor([.1]), **{'feature.perceptual': torch.rand(1,4)}) for i in range(3)]
    assert set_numbers(s, s, s) == dict(reward=1., reward_std=pytest.approx((2/3)**.5), alignment=pytest.approx(.1), alignment_std=pytest.approx(0, abs=1e-6))
    flow = Toy(); assert Evaluator(flow, bright, PS[:1], 1, 3, features=dict(perceptual=blocks), cache=False)(flow) == dict(reward=pytest.approx(.5, abs=.1), reward_std=0.) and flow.drawn == [1]

def test_on_a_tiny_stable_diffusion(tmp_path):
    "Base and finetuned of a pipeline from disk: equal before the adapter learns, and the alignment of CLIP features"
    from tiny_sd3 import make_tiny_sd3
    from vggflow.worlds.emoji import load_clip
    model = make_tiny_sd3(tmp_path/'base'); flow = load_model(str(model), guidance_scale=2., lora_rank=4); kw = dict(n=2, steps=2, batch_size=3, progress=False, seed=1)
    draw_images(tmp_path/'f', flow, ['a cat','an owl'], **kw); draw_images(tmp_path/'b', flow, ['a cat','an owl'], base=True, **kw)
    f,b = saved_images(tmp_path/'f'),saved_images(tmp_path/'b'); assert all(torch.equal(read_images(f[p]), read_images(b[p])) for p in f)
    with torch.no_grad(): [p.add_(.3*torch.randn(p.shape, generator=torch.Generator().manual_seed(0))) for p in flow.trainable_parameters()]
    flow.save_lora(tmp_path/'lora'); again = load_model(str(model), tmp_path/'lora', guidance_scale=2.)
    with pytest.raises(ValueError, match='another weights'): draw_images(tmp_path/'f', again, ['a cat','an owl'], **kw)
    draw_images(tmp_path/'g', again, ['a cat','an owl'], **kw); g = saved_images(tmp_path/'g'); assert (read_images(g['a cat'])-read_images(b['a cat'])).abs().max() > .01
    clip = load_clip(); r = evaluate_sets(tmp_path/'out', dict(finetuned=g, base=b), dict(reward=bright), dict(perceptual=clip, clip=clip), progress=False)
    x = read_images([*g['a cat'], *g['an owl']]); assert r['sets']['finetuned']['alignment'] == pytest.approx(clip.similarity(x, ['a cat']*2+['an owl']*2).mean().item(), abs=1e-5)
