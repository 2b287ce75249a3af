"The main job, small: the emoji pipeline is aligned by VGG-Flow, and stock diffusers loads what comes out."
import json, subprocess, sys, time
from pathlib import Path
import psutil, pytest, torch
from diffusers import StableDiffusion3Pipeline
from vggflow.experiments.cards import cards as E, status
from vggflow.worlds.emoji import asset, load_flow, load_reward, prompts
from vggflow.judging.evaluation import draw
from vggflow.training.loop import FinetuneConfig, finetune
from vggflow.methods.methods import ReFL, VGGFlow

ROOT = Path(__file__).parents[2]


def warm(images, prompts):
    "More red than blue: the reward of the README"
    red, blue = images[:, 0], images[:, 2]
    return 10*(red-blue).mean((1, 2))


def mean_reward(flow, reward, base=False):
    images, cond = draw(flow, prompts[:8], 3, steps=10, seed=3, base=base)
    with torch.no_grad(): return reward(images.clamp(0, 1), cond).mean().item()


@pytest.fixture(scope='module')
def aligned(tmp_path_factory):
    out = tmp_path_factory.mktemp('run'); torch.manual_seed(0)
    flow, reward = load_flow(), load_reward('emoji-aesthetic')
    config = FinetuneConfig(updates=25, batch_size=8, steps=10, transitions=4, lr=3e-3, save_every=10)
    history = finetune(flow, reward, VGGFlow(beta=30., mode='trajectory', clip=.8), config, out=out, prompts=prompts, progress=False)
    return flow, reward, out, history


def test_vgg_flow_raises_the_reward_of_the_emoji_world(aligned):
    flow, reward, _, _ = aligned
    assert mean_reward(flow, reward) > mean_reward(flow, reward, base=True)+.4


def test_the_base_is_untouched(aligned):
    flow, reward, _, _ = aligned
    with torch.no_grad():
        x, t, c = flow.prior(2, prompts[:2], torch.Generator().manual_seed(0)), torch.tensor([.2, .8]), prompts[:2]
        assert torch.allclose(flow.base_velocity(x, t, c), load_flow().velocity(x, t, c), atol=1e-5)


def test_the_value_network_learned_and_is_saved(aligned):
    flow, _, out, history = aligned
    from vggflow.training.checkpoint import checkpoints, load_checkpoint
    update, parts = load_checkpoint(checkpoints(out/'checkpoints')[-1])
    assert update == 25 and parts['method']['value.correction.net.proj_out.weight'].abs().sum() > 0
    assert json.loads((out/'config.json').read_text())['method']['beta'] == 30.


def test_stock_diffusers_loads_the_adapter(aligned, tmp_path):
    flow, _, _, _ = aligned
    flow.save_lora(tmp_path)
    pipe = StableDiffusion3Pipeline.from_pretrained(asset('base')); pipe.set_progress_bar_config(disable=True)
    draw_one = lambda: pipe('a cat', num_inference_steps=5, guidance_scale=1., output_type='np', generator=torch.Generator().manual_seed(0)).images
    before = draw_one(); pipe.load_lora_weights(tmp_path); after = draw_one()
    assert abs(after-before).mean() > .01


@pytest.mark.parametrize('method', [VGGFlow(beta=5., mode='exact'), VGGFlow(beta=5., mode='finite-difference'), ReFL()], ids=['exact', 'finite-difference', 'ReFL'])
def test_every_method_steps_with_guidance(method):
    torch.manual_seed(0); flow = load_flow(guidance_scale=2.)
    config = FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2)
    rows = finetune(flow, warm, method, config, prompts=prompts, progress=False).rows
    assert all(torch.isfinite(torch.tensor(r['loss'])) and r['grad_norm'] > 0 for r in rows)


# --- a run that is killed

KILLED = '''
[profiles]
smoke = "a"
[kill]
template = "finetune"
parameters = {world = "gaussian", reward = "quadratic", beta = 1.0, updates = 240, batch_size = 64, save_every = 10, eval_every = 60, options = {mode = "exact"}}
'''

@pytest.fixture
def killed(tmp_path, monkeypatch):
    "A checkout with one card of the real template"
    (tmp_path/'experiments.toml').write_text(KILLED); (tmp_path/'nbs').mkdir()
    (tmp_path/'nbs'/'experiments').symlink_to(ROOT/'nbs'/'experiments')
    monkeypatch.setenv('VGGFLOW_ROOT', str(tmp_path))
    card, = E.cards('kill', 'smoke'); card.save()
    return card


def start(card):
    "The run as Snakemake starts it"
    return subprocess.Popen([sys.executable, '-m', 'vggflow.cli', 'run', str(card.folder/'card.json')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(p, card, update):
    "Wait for a checkpoint after an update; the process must be alive"
    while not any(int(f.name)>update for f in (card.folder/'checkpoints').glob('[0-9]*')):
        assert p.poll() is None, p.communicate()[0]
        time.sleep(.02)
    return len(E.read_rows(card.folder/'metrics.jsonl'))


def test_sigkill_of_a_kernel_and_of_a_run(killed):
    p = start(killed); at = until(p, killed, 10)
    for k in psutil.Process(p.pid).children(recursive=True): k.kill()
    text = p.communicate(timeout=60)[0]
    assert p.returncode == 2 and 'died' in text and not (killed.folder/'run.ipynb').exists(), text
    assert status.run_status(killed).state == 'cut off'
    p = start(killed); at2 = until(p, killed, at+20)
    p.kill(); text = p.communicate()[0]
    assert 'resumes after update' in text and at2 < 240
    p = start(killed); text = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and 'resumes after update' in text, text
    rows, evals = (E.read_rows(killed.folder/f) for f in ('metrics.jsonl', 'eval.jsonl'))
    assert [r['update'] for r in rows] == list(range(1, 241)) and [e['update'] for e in evals] == [0, 60, 120, 180, 240]
    was = (killed.folder/'run.ipynb').stat().st_mtime_ns
    assert start(killed).wait() == 0 and (killed.folder/'run.ipynb').stat().st_mtime_ns == was   # a finished run is let be
