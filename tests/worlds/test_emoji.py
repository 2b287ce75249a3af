"The emoji world: its files, its data, its judges"
import json, os, random, shutil, subprocess, sys
import pytest, torch
from vggflow.worlds import emoji
from vggflow.worlds.emoji import (ANIMALS, COLOURS, SIZES, asset, captions_of, colour_of, data_dir, draw_factors, load_clip, load_flow, load_probe,
                           load_reward, render, size_of, utility)
from vggflow.theory.flow import sample, time_grid
from vggflow.judging.prompts import all_captions, heldout
from vggflow.judging.rewards import WeightedSum, get_reward, register_reward

@pytest.fixture(scope='module')
def drawn():
    "One sample of each animal in each of three seeds, without guidance"
    flow = load_flow(); g = torch.Generator().manual_seed(11); cond = emoji.prompts*3
    with torch.no_grad(): return torch.cat([flow.decode(sample(flow, flow.prior(24, generator=g), time_grid(20), emoji.prompts, base=True).x1) for _ in range(3)]).clamp(0,1), cond

def copy_of(tmp_path, *names):
    "A data folder with some of the artifacts"
    root = tmp_path/'emoji'; root.mkdir(parents=True)
    for n in (*names, 'manifest.json'):
        src = data_dir()/'emoji'/n; (shutil.copytree if src.is_dir() else shutil.copy)(src, root/n)
    return root

def test_manifest_covers_every_file():
    root = data_dir()/'emoji'; listed = json.loads((root/'manifest.json').read_text())['files']
    there = {p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file()} - {'manifest.json', 'samples.png'}
    assert there == set(listed) and sum(p.stat().st_size for p in root.rglob('*') if p.is_file()) < 25*2**20

@pytest.mark.parametrize('name', ['master.npz', 'base', 'aesthetic', 'hps', 'pick', 'probe', 'clip'])
def test_artifacts_are_whole(name): assert asset(name).exists()

@pytest.mark.parametrize('harm,says', [(lambda p: p.unlink(), 'is missing'), (lambda p: p.write_bytes(p.read_bytes()[:-1]+b'x'), 'is damaged')])
def test_a_harmed_file_is_named(tmp_path, monkeypatch, harm, says):
    root = copy_of(tmp_path, 'aesthetic'); harm(root/'aesthetic/config.json'); monkeypatch.setenv('VGGFLOW_DATA', str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError)) as e: load_reward()
    assert says in str(e.value) and 'aesthetic/config.json' in str(e.value) and 'git checkout' in str(e.value) and '\n' not in str(e.value)

def test_no_data_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv('VGGFLOW_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='manifest.json is missing'): load_flow()

def test_rewards_by_name():
    with pytest.raises(ValueError, match="did you mean 'emoji-aesthetic'") as e: load_reward('emoji-asthetic')
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='registered already'): register_reward('redness')(lambda: None)
    x = torch.rand(3,3,32,32); a,b = get_reward('redness'), load_reward()
    assert torch.allclose(WeightedSum((a,2.), (b,.5,1.,2.))(x, None), 2*a(x) + .25*(b(x)-1), atol=1e-5)

def test_render_is_reproducible_and_true():
    f = draw_factors(64, torch.Generator().manual_seed(5)); x = render(f)
    assert torch.equal(x, render(f)) and x.shape == (64,3,32,32) and 0 <= x.min() and x.max() <= 1
    assert not torch.equal(x, render(draw_factors(64, torch.Generator().manual_seed(6))))
    assert torch.allclose(x[:,:,0,0], emoji.pastel(f.hue, f.sat, f.val), atol=.02) or (x[:,:,0,0]-emoji.pastel(f.hue, f.sat, f.val)).abs().amax(1).median() < .02

def test_captions_say_nothing_false_and_leak_no_held_out_pair():
    f = draw_factors(2000, torch.Generator().manual_seed(7)); texts = captions_of(f, random.Random(0)); known = set(all_captions())
    for t,a,c,s in zip(texts, f.animal.tolist(), colour_of(f.hue).tolist(), size_of(f.scale)):
        w = set(t.split()); assert t in known and ANIMALS[a] in w and w & set(COLOURS) <= {COLOURS[c]} and w & set(SIZES) <= {s}
        assert not (w & set(COLOURS) and heldout(ANIMALS[a], COLOURS[c]))
    assert .3 < sum(bool(set(t.split()) & set(COLOURS)) for t in texts)/2000 < .45

def test_probe_reads_new_pictures():
    f = draw_factors(256, torch.Generator().manual_seed(8)); got = load_probe().read(render(f))
    assert (got.animal == f.animal).float().mean() > .99 and (got.vendor == f.vendor).float().mean() > .98
    assert (((got.hue-f.hue+.5) % 1 - .5).abs()*360).mean() < 6

def test_reward_learned_the_taste():
    f = draw_factors(512, torch.Generator().manual_seed(9)); r = load_reward()(render(f)); u = utility(f.vendor, f.hue, f.sat)
    ranks = lambda v: v.argsort().argsort().double()
    assert torch.corrcoef(torch.stack([ranks(r), ranks(u)]))[0,1] > .7

def test_clip_knows_animals():
    f = draw_factors(96, torch.Generator().manual_seed(10)); x = render(f); clip = load_clip()
    right = clip.similarity(x, [emoji.prompts[a] for a in f.animal]); wrong = clip.similarity(x, [emoji.prompts[(a+1)%24] for a in f.animal])
    assert (right > wrong).float().mean() > .95

def test_samples_show_the_animal(drawn):
    x,cond = drawn; got = load_probe().read(x).animal
    assert (got == torch.arange(24).repeat(3)).float().mean() > .9

def test_reward_is_standardised_on_the_base(drawn):
    r = load_reward()(*drawn); assert abs(r.mean()) < .5 and .6 < r.std() < 1.5

def test_reward_gradient_climbs(drawn):
    x = drawn[0][:8].clone().requires_grad_(True); reward = load_reward(); r = reward(x, None)
    g = torch.autograd.grad(r.sum(), x)[0]
    assert (reward(x+.02*g/g.flatten(1).std(1)[:,None,None,None], None) > r).all()

@pytest.mark.parametrize('code', ["import vggflow; from diffusers import StableDiffusion3Pipeline as P; p = P.from_pretrained(r'{base}')"])
def test_stock_pipeline_draws_after_import_vggflow_alone(tmp_path, code):
    "From another folder, in a fresh process"
    code = code.format(base=asset('base'))+"; im = p('a cat', num_inference_steps=4, guidance_scale=2.).images[0]; print('size', im.size)"
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE':'1'})
    assert 'size (32, 32)' in r.stdout, r.stderr[-500:]

def test_import_vggflow_is_light():
    r = subprocess.run([sys.executable, '-c', "import sys, vggflow; print('torch' in sys.modules, 'diffusers' in sys.modules)"], capture_output=True, text=True)
    assert r.stdout.strip() == 'False False'
