"The updates that are measured: each method, and the reference to compare with"

from vggflow.methods.cost import one_update, reference_update, take_gradients
from vggflow.methods.method import Samples
from vggflow.methods.registry import make_method
from vggflow.theory.flow import time_grid

REFERENCE = "reference"
RECIPES = {  # Name in the tables -> method and options
    "VGG-Flow": ("VGG-Flow", dict(beta=5e4, clip=0.8)),
    "VGG-Flow, reuse": ("VGG-Flow", dict(beta=5e4, clip=0.8, reuse=True)),
    "VGG-Flow, no correction": ("VGG-Flow", dict(beta=5e4, clip=0.8, correction=False)),
    "VGG-Flow-PMP": ("VGG-Flow-PMP", dict(beta=5e4)),
    "AM": ("AM", dict(beta=5e3)),
    "DRaFT": ("DRaFT", {}),
    "ReFL": ("ReFL", {}),
}
EVERY = (REFERENCE, *RECIPES)


def fresh_method(name, checkpointed=False):
    "A method of the table"
    method, options = RECIPES[name]
    more = dict(checkpointed=checkpointed) if method == "DRaFT" else {}
    return make_method(method, **options, **more)


def make_samples(flow, update=0, *, batch=1, steps=20, transitions=5, shift=3.0):
    "The samples of an update"
    times = time_grid(steps, shift).to(flow.device)
    indices = range(batch)
    prompts = ["a cat"]
    return Samples.draw(flow, prompts, times, 0, update, indices, transitions=transitions)


def whole_update(name, checkpointed=False):
    "The update of a fresh method, with its set-up"
    if name == REFERENCE:
        return reference_update
    method = fresh_method(name, checkpointed)
    return lambda flow, reward, samples: one_update(flow, reward, method, samples)


def prepared_update(name, flow, reward, checkpointed=False):
    "The update without its set-up, which a run has once"
    if name == REFERENCE:
        return reference_update
    method = fresh_method(name, checkpointed)
    method.setup(flow, reward)
    return lambda flow, reward, samples: take_gradients(flow, reward, method, samples)
