"The main job, small: the emoji pipeline is aligned by VGG-Flow, and stock diffusers loads what comes out."
import json
import pytest, torch
from diffusers import StableDiffusion3Pipeline
from vggflow.emoji import asset, load_flow, load_reward, prompts
from vggflow.evaluate import draw
from vggflow.finetune import FinetuneConfig, finetune
from vggflow.methods import ReFL, VGGFlow


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
    from vggflow.checkpoint import checkpoints, load_checkpoint
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
