"Short runs on a Gaussian, in a fraction of a second each"

import torch

from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.estimates import (
    CalibratedEta,
    CoarseAdjoint,
    EndGradient,
    LookAhead,
    TruncatedAdjoint,
)
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune

# every method, and those of its options that take another way through it
EVERY_METHOD = dict(
    vgg=lambda: VGGFlow(beta=2.0, eta=lambda t: t / 2, clip=0.7),
    carried=lambda: VGGFlow(mode="trajectory", mu=0.9, clip=0.7),
    jittered=lambda: VGGFlow(mode="exact-jittered"),
    reused=lambda: VGGFlow(reuse=True, clip=0.7),
    pmp=lambda: VGGFlowPMP(clip=0.7),
    am=lambda: AdjointMatching(clip=0.7),
    draft=lambda: DRaFT(k=2, lv=2),
    checkpointed=lambda: DRaFT(checkpointed=True),
    refl=ReFL,
    end=lambda: EndGradient(clip=0.7),
    calibrated=lambda: CalibratedEta(clip=0.7),
    ahead=lambda: LookAhead(clip=0.7),
    truncated=lambda: TruncatedAdjoint(clip=0.7),
    coarse=lambda: CoarseAdjoint(clip=0.7, every=3),
)


def linear(x, prompts=None):
    return x.sum(-1)


def wave(x, prompts=None):
    return torch.sin(x).sum(-1)


def run(out, method=None, **settings):
    "Six updates of VGG-Flow, a checkpoint every second: the flow and the history"
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)
    config = FinetuneConfig(**{**dict(updates=6, batch_size=4, save_every=2), **settings})
    method = method or VGGFlow()
    return flow, finetune(flow, linear, method, config, out=out, progress=False)


def equal_weights(flow, other):
    "Whether two flows are the same to the last bit"
    return all(torch.equal(p, q) for p, q in zip(flow.parameters(), other.parameters()))


def column(history, name):
    "A number of each update"
    return [row[name] for row in history.rows]


def smooth(method):
    """AdamW with a large epsilon, for which a step is proportional to the gradient.
    With the usual one, the sign of a gradient that is only rounding makes a whole step"""
    own = method.parameter_groups
    method.parameter_groups = lambda flow, lr: [dict(g, eps=1.0) for g in own(flow, lr)]
    return method


def gaussian_run(method, reward=wave, out=None, stop_on=("non-finite",), **settings):
    "A run in double precision, from a model that is not its base any more"
    evaluate = settings.pop("evaluate", None)
    torch.manual_seed(0)
    flow = GaussianFlow([0.3, -0.2], 0.6).double()
    torch.nn.init.normal_(flow.residual.net[-1].weight, std=0.3)
    usual = dict(updates=3, batch_size=8, steps=8, transitions=4, lr=0.1)
    history = finetune(
        flow,
        reward,
        smooth(method),
        FinetuneConfig(**{**usual, **settings}),
        out=out,
        stop_on=stop_on,
        evaluate=evaluate,
        progress=False,
    )
    return outcome(flow, history)


def outcome(flow, history) -> dict:
    "What two runs must have in common"
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    weights = {k: v.clone() for k, v in flow.trainable_state().items()}
    return dict(rows=rows, evals=history.evals, state=weights)


def distance(one: dict, other: dict) -> float:
    """Largest difference of two outcomes: numbers of rows by their size (a twentieth
    for gradient norms), weights by the size of the largest"""
    found = []
    for kind in ("rows", "evals"):
        for row, same in zip(one[kind], other[kind], strict=True):
            for name in row:
                by = 20.0 if name == "grad_norm" else 1.0
                size = by * max(1.0, abs(row[name]))
                found.append(abs(row[name] - same[name]) / size)
    largest = max(value.abs().max() for value in one["state"].values())
    for name, value in one["state"].items():
        found.append(((value - other["state"][name]).abs().max() / largest).item())
    return max(found)
