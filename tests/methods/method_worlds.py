"Small worlds, rewards and a loop for the tests of methods."

import math

import torch

from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.method import Samples
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow, MixtureFlow, time_grid

DIRECTION = torch.tensor([1.0, 0.5])
ALL = {
    "VGG-Flow": VGGFlow,
    "VGG-Flow-PMP": VGGFlowPMP,
    "AM": AdjointMatching,
    "DRaFT": lambda: DRaFT(k=2),
    "ReFL": ReFL,
}
TEMPERED = [VGGFlow, VGGFlowPMP, AdjointMatching]


def linear(x, prompts=None):
    return x @ DIRECTION.to(x)


def quadratic(x, prompts=None):
    return (0.8 * x - 0.25 * x**2).sum(-1)


def wave(x, prompts=None):
    return torch.sin(x).sum(-1)


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def gaussian(std=0.6):
    "A fresh Gaussian flow, always the same"
    torch.manual_seed(0)
    return GaussianFlow([0.0, 0.0], std)


def mixture(seed=0):
    "A mixture in double precision, its finetuned velocity away from the base"
    torch.manual_seed(seed)
    flow = MixtureFlow(torch.randn(3, 2), 0.5).double()
    torch.nn.init.normal_(flow.residual.net[-1].weight, std=0.3)
    return flow


def draw_samples(flow, n=8, steps=10, transitions=5, seed=0, **options):
    "A whole batch, of the flow's type of numbers"
    times = time_grid(steps).to(next(flow.parameters()))
    options = dict(indices=range(n), transitions=transitions, seed=seed) | options
    return Samples.draw(flow, None, times, **options)


def made_for(flow, reward, method):
    "The method with its networks, of the flow's type of numbers"
    method.setup(flow, reward)
    return method.to(next(flow.parameters()).dtype)


def loss_of(flow, reward, method, samples):
    "The loss of one update"
    return method.loss(flow, method.prepare(flow, reward, samples))[0]


def gradient(flow, loss):
    "With respect to the flow's weights, in one vector"
    grads = torch.autograd.grad(loss, flow.trainable_parameters())
    return torch.cat([g.flatten() for g in grads])


def difference(a, b):
    "Of two vectors, relative to the size of the second"
    return ((a - b).norm() / b.norm()).item()


def train(
    flow, reward, method, updates=150, batch=32, lr=2e-2, shift=1.0, decay=0.0, cosine=True
):
    "A small loop as users have it: AdamW, clipped gradients; the losses"
    torch.manual_seed(0)
    method.setup(flow, reward)
    groups = method.parameter_groups(flow, lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    times, losses = time_grid(20, shift), []
    for update in range(updates):
        samples = Samples.draw(flow, None, times, 0, update, range(batch))
        loss = loss_of(flow, reward, method, samples)
        optimizer.zero_grad()
        loss.backward()
        share = 0.5 * (1 + math.cos(math.pi * update / updates)) if cosine else 1.0
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = lr * share
        optimizer.step()
        losses.append(loss.item())
    return losses
