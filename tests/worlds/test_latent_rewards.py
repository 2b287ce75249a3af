"Rewards of latents: every method, a run, an evaluation, and what is refused"

import json

import pytest
import torch
from test_pipelines import KINDS, TWO, method_gradient, open_flow
from tiny_flows import all_close

from vggflow import evaluate, latent_reward
from vggflow.commands.doctor import doctor
from vggflow.commands.run import run
from vggflow.common.seals import read_rows
from vggflow.common.trial import check_reward, try_on_flow
from vggflow.judging.evaluation import draw
from vggflow.judging.rewards import get_reward
from vggflow.methods.registry import METHODS
from vggflow.theory.flow import sample

NAMES = ("sd3", "dev", "z_image")


@latent_reward
def lopsided(latents, prompts=None):
    "More on the left, and more where the prompt is long"
    assert latents.shape[1] == 4 and latents.dtype == torch.float32
    half = latents.shape[-1] // 2
    lengths = latents.new_tensor([len(prompt) for prompt in prompts or "aa"])
    return lengths * latents[..., :half].tanh().mean((1, 2, 3))


def of_images(images, prompts=None):
    "The same, not declared"
    return lopsided(images, prompts)


def never(*_):
    raise AssertionError("decoded")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_it_and_decodes_nothing(pipelines, monkeypatch, name, method):
    flow = open_flow(pipelines[name], image_size=(16, 8), **KINDS[name].plain)
    with monkeypatch.context() as patch:
        patch.setattr(type(flow), "decode", never)
        loss, gradient = method_gradient(flow, method, lopsided)
    monkeypatch.setattr(type(flow), "decode", lambda self, x: x)
    wanted, right = method_gradient(flow, method, of_images)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert all_close(gradient, right, 1e-5)
    assert max(part.abs().max() for part in gradient) > 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_judged_on_the_latents_that_are_drawn(pipelines, name):
    flow = open_flow(pipelines[name], **KINDS[name].plain)
    row = evaluate(flow, lopsided, TWO, 2, 3, perceptual="none", cache=False)
    latents = []
    images, cond = draw(flow, TWO, 2, 3, seed=12345, latents=latents)
    latents = torch.cat(latents)
    assert latents.shape == (4, 4, 8, 8) and images.shape == (4, 3, 16, 16)
    noise = flow.prior(4, generator=torch.Generator().manual_seed(12345))
    with torch.no_grad():
        again = sample(flow, noise, flow.times(3), cond).x1
    assert torch.allclose(latents, again, atol=1e-5)
    wanted = lopsided(latents, cond)
    assert row["reward"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert row["reward_std"] == pytest.approx(wanted.std().item(), rel=1e-4)


MINE = """
from torch import nn
from vggflow import latent_reward

@latent_reward
def calm(latents, prompts):
    assert latents.shape[1:] == (4, 8, 4)
    return -latents.diff(dim=-1).square().mean((1, 2, 3))

@latent_reward
def flat(latents, prompts):
    return latents.detach().mean((1, 2, 3))

class Net(nn.Module):
    takes_latents = True
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 3)
    def forward(self, latents, prompts):
        return self.conv(latents).mean((1, 2, 3))
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_the_command_line(pipelines, tmp_path, call, name):
    (tmp_path / "mine.py").write_text(MINE)
    line = (
        f"--model {pipelines[name]} --image-size 16x8 --max-sequence-length 16 --updates 2"
    )
    line += f" --batch-size 2 --steps 3 --eval-every 1 --reward {tmp_path / 'mine.py'}:calm"
    line += " --prompts 'a cat' 'an owl' --perceptual none --sample-every 2 --transitions 2"
    out = tmp_path / "run"
    status, _, err = call(f"finetune {line} --quiet --method VGG-Flow --out {out}")
    assert status == 0, err
    rows = read_rows(out / "eval.jsonl")
    assert len(rows) == 3 and len({row["reward"] for row in rows}) == 3
    assert json.loads((out / "config.json").read_text())["reward"] == "calm"
    assert (out / "sheets/00002.png").exists()
    status, said, err = call(f"doctor {line} --out {out}")
    assert status == 0 and "one finite number per latent" in said, said + err
    draws = f"evaluate --trust --run {out} --out {tmp_path / 'numbers'} --perceptual none"
    status, _, err = call(draws)
    assert status == 2 and "takes latents, and files of images have none" in err


def test_a_wrong_one_is_refused_before_the_model_is_loaded(pipelines, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    how = dict(model=str(pipelines["sd3"]), prompts=TWO, progress=False, updates=1)
    with pytest.raises(ValueError, match="'flat' has no gradient in the latents"):
        run(reward=f"{tmp_path / 'mine.py'}:flat", out=tmp_path / "run", **how)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match="one takes latents and one images"):
        get_reward(f"redness,{tmp_path / 'mine.py'}:calm")
    net = get_reward(f"{tmp_path / 'mine.py'}:Net")
    check_reward(net, torch.randn(2, 4, 8, 8))
    try_on_flow(open_flow(pipelines["sd3"]), net, TWO)
    checks = doctor(reward=f"{tmp_path / 'mine.py'}:calm")
    (found,) = [check for check in checks if check.name == "reward"]
    assert found.status == "warning" and "name the model" in found.remedy
