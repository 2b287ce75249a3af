"The methods on a real pipeline made small."

import math

import pytest
import torch
from method_worlds import ALL, difference, seeded

from vggflow.methods.costate import unguided
from vggflow.methods.method import Samples
from vggflow.theory.adjoint import costates
from vggflow.theory.flow import Trajectory, time_grid
from vggflow.worlds import emoji


@pytest.fixture(scope="module", params=[1.0, 2.0])
def world(request):
    return emoji.load_emoji(guidance_scale=request.param), emoji.load_reward()


def take_step(flow, reward, method, prompts):
    "One update of two samples; its loss and the size of the gradient"
    torch.manual_seed(0)
    method.setup(flow, reward)
    optimizer = torch.optim.AdamW(method.parameter_groups(flow, 5e-4))
    options = dict(indices=range(2), transitions=2)
    samples = Samples.draw(flow, prompts, flow.times(5), **options)
    loss = method.loss(flow, method.prepare(flow, reward, samples))[0]
    optimizer.zero_grad()
    loss.backward()
    size = torch.nn.utils.clip_grad_norm_(flow.trainable_parameters(), 1.0)
    optimizer.step()
    return loss.item(), size.item()


@pytest.mark.parametrize("name", ALL)
def test_one_update_on_the_emoji_flow(world, name):
    flow, reward = world
    prompts = emoji.prompts[:3]
    start = {key: value.clone() for key, value in flow.trainable_state().items()}
    x, t = flow.prior(2, generator=seeded()), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        base = flow.base_velocity(x, t, prompts[:2])
    loss, size = take_step(flow, reward, ALL[name](), prompts)
    state = flow.trainable_state()
    moved = [key for key, value in state.items() if not torch.equal(value, start[key])]
    with torch.no_grad():
        after, now = flow.base_velocity(x, t, prompts[:2]), flow.velocity(x, t, prompts[:2])
    flow.load_trainable_state(start)
    assert math.isfinite(loss) and size > 0 and len(moved) > len(start) / 3
    # the base stays, the finetuned velocity moves
    assert torch.equal(base, after) and not torch.equal(now, after)


def test_emoji_costates_are_backpropagation(world):
    "float32, LoRA switched off, guidance inside: autograd through the same Euler steps"
    flow, reward = world
    cond, times = emoji.prompts[:2], time_grid(4)
    x = [flow.prior(2, generator=seeded()).requires_grad_()]
    for t, h in zip(times, times.diff()):
        x.append(x[-1] + h * flow.base_velocity(x[-1], t.expand(2), cond))
    total = -reward(flow.decode(x[-1]), cond).sum()
    want = torch.stack(torch.autograd.grad(total, x))
    path = Trajectory(torch.stack(x).detach(), None, times)
    found = costates(flow, path, want[-1], cond)
    assert difference(found, want) < 1e-5
    with unguided(flow):
        other = costates(flow, path, want[-1], cond)
    # without guidance it is the same costate; with it, another one
    assert (difference(found, other) < 1e-5) == (flow.guidance_scale == 1.0)
    assert flow.guidance_scale in (1.0, 2.0)  # and the switch is set back
