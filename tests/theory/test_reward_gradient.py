"The reward's gradient by autograd, and by torch.func where another derivative is taken"

import torch
from torch.func import jvp

from vggflow import GaussianFlow
from vggflow.theory.value import reward_gradient

FLOW = GaussianFlow([0.0, 1.0], 0.5)
X = torch.tensor([[0.3, -1.0], [2.0, 0.7]])


def cubic(x, prompts=None):
    return x.pow(3).sum(1)


def test_plain_and_nested_gradients_are_one():
    plain = reward_gradient(FLOW, cubic, X)
    assert torch.allclose(plain, 3 * X**2)
    nested, tangent = jvp(lambda x: reward_gradient(FLOW, cubic, x), (X,), (X,))
    assert torch.equal(nested, plain)
    assert torch.allclose(tangent, 6 * X * X)  # it let the other derivative through


def test_it_makes_no_graph_and_takes_none():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        inside = reward_gradient(FLOW, cubic, x)
    assert not inside.requires_grad
    assert not reward_gradient(FLOW, cubic, x).requires_grad
    assert x.grad is None


def test_a_reward_that_does_not_depend_on_the_states_has_none():
    for constant in (lambda x, c: torch.ones(len(x)), lambda x, c: x.detach().sum(1)):
        assert torch.equal(reward_gradient(FLOW, constant, X), torch.zeros_like(X))


def test_a_reward_may_write_into_its_images():
    states = X.clone()
    written = reward_gradient(FLOW, lambda x, c: x.clamp_(0, 1).sum(1), states)
    assert torch.equal(written, ((X > 0) & (X < 1)).float())
    assert torch.equal(states, X)
