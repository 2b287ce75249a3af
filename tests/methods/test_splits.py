"Results do not depend on how samples are spread: halves, portions and parts of items."

import copy
import threading

import pytest
import torch
from method_worlds import difference, gaussian, linear, quadratic, wave

from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.method import Items, Method, Samples, itself, stratified_transitions
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import MixtureFlow, portions, time_grid

OPEN = dict(eta=lambda t: t / 2, alpha=0.7, clip=0.8)  # leaves the boundary open
MADE = {
    "residual": lambda: VGGFlow(1.3, **OPEN),
    "reuse": lambda: VGGFlow(1.3, clip=0.8, reuse=True),
    "no correction": lambda: VGGFlow(1.3, clip=0.8, correction=False),
    "trajectory": lambda: VGGFlow(1.3, mode="trajectory", clip=0.8),
    "carried": lambda: VGGFlow(1.3, mode="trajectory", mu=0.9, **OPEN),
    "exact": lambda: VGGFlow(1.3, mode="exact", **OPEN),
    "exact-jittered": lambda: VGGFlow(1.3, mode="exact-jittered", **OPEN),
    "finite-difference": lambda: VGGFlow(1.3, mode="finite-difference", clip=0.8),
    "paper": lambda: VGGFlow(1.3, mode="paper", clip=0.8),
    "PMP": lambda: VGGFlowPMP(clip=0.8),
    "AM": lambda: AdjointMatching(clip=0.8),
    "ReFL": lambda: ReFL(0.5, True),
    "DRaFT": lambda: DRaFT(checkpointed=True),
    "DRaFT-LV": lambda: DRaFT(k=2, lv=2),
}
CLIPPED = [name for name in MADE if not name.startswith(("ReFL", "DRaFT"))]
N, MEANS = 8, torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.0]])


class Prompted(MixtureFlow):
    "A mixture that is moved by the length of the prompt"

    def base_velocity(self, x, t, cond=None):
        lengths = x.new_tensor([len(c) for c in cond])[:, None]
        return super().base_velocity(x, t) + 0.2 * lengths


def reward(x, prompts=None):
    "Steeper for longer prompts"
    return x.new_tensor([len(p) for p in prompts]) * (quadratic(x) + wave(x))


def wake(flow, method):
    "Give all networks weights as if they had learned, in double precision"
    torch.manual_seed(1)
    method.setup(flow, reward)
    torch.nn.init.normal_(flow.residual.net[-1].weight, std=0.3)
    if getattr(method, "learn", False):
        torch.nn.init.normal_(method.value.correction.net[-1].weight, std=0.1)
    flow.double()
    return flow, method.double()


def prompted(name):
    "A flow and a method on it"
    torch.manual_seed(0)
    return wake(Prompted(MEANS, 0.5), MADE[name]())


def draw(flow, indices=range(N), over_batch=itself):
    prompts, times = ["a", "bb", "cccc"], time_grid(10).double()
    options = dict(transitions=4, over_batch=over_batch)
    return Samples.draw(flow, prompts, times, 3, 1, indices, **options)


def all_gradients(flow, method, loss):
    "Of flow and method, in one vector"
    weights = [*flow.trainable_parameters(), *method.parameters()]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    zeros = (torch.zeros_like(w) if g is None else g for g, w in zip(found, weights))
    return torch.cat([g.flatten() for g in zeros])


def whole_step(name):
    "Loss and gradients of one update, all samples in one call"
    flow, method = prompted(name)
    loss = method.loss(flow, method.prepare(flow, reward, draw(flow)))[0]
    return loss.item(), all_gradients(flow, method, loss)


class Exchange:
    "Two threads that hand each other their values, as two processes do"

    def __init__(self):
        self.values, self.barrier = [None, None], threading.Barrier(2, timeout=60)

    def of(self, rank):
        "The collective of one of them"

        def over_batch(values):
            self.values[rank] = values
            self.barrier.wait()
            joined = torch.cat(self.values)
            self.barrier.wait()
            return joined

        return over_batch


def halves_step(name, join=True, indices=(range(N // 2), range(N // 2, N))):
    "The same from two halves, each with a copy of the weights"
    exchange, results = Exchange(), [None, None]
    copies = [prompted(name) for _ in range(2)]

    def prepare(rank):
        flow, method = copies[rank]
        over_batch = exchange.of(rank) if join else itself
        samples = draw(flow, indices[rank], over_batch)
        results[rank] = method.prepare(flow, reward, samples)

    threads = [threading.Thread(target=prepare, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses = [m.loss(f, items)[0] for (f, m), items in zip(copies, results)]
    grads = [all_gradients(f, m, loss) for (f, m), loss in zip(copies, losses)]
    return sum(loss.item() for loss in losses) / 2, sum(grads) / 2


@pytest.mark.parametrize("name", MADE)
def test_two_halves_take_the_step_of_the_whole(name):
    loss, whole = whole_step(name)
    half_loss, halves = halves_step(name)
    assert half_loss == pytest.approx(loss, rel=1e-9)
    assert difference(halves, whole) < 1e-9
    # teeth: the random numbers of other samples
    assert difference(halves_step(name, indices=[range(N // 2)] * 2)[1], whole) > 1e-3


@pytest.mark.parametrize("name", CLIPPED)
def test_halves_that_do_not_join_take_another_step(name):
    "Teeth: unit and quantile of each half for itself"
    assert difference(halves_step(name, join=False)[1], whole_step(name)[1]) > 1e-3


def parts_step(name, n, weighted=True):
    "The same with items in parts, as the loop takes micro-batches"
    flow, method = prompted(name)
    items = method.prepare(flow, reward, draw(flow))
    loss, grads, parts = 0.0, 0.0, items.split(n)
    for part in parts:
        weight = len(part) / len(items) if weighted else 1 / len(parts)
        part_loss = method.loss(flow, part)[0] * weight
        loss, grads = (
            loss + part_loss.item(),
            grads + all_gradients(flow, method, part_loss),
        )
    return loss, grads


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("name", MADE)
def test_parts_of_the_items_take_the_step_of_the_whole(name, n):
    loss, whole = whole_step(name)
    part_loss, parts = parts_step(name, n)
    assert part_loss == pytest.approx(loss, rel=1e-9)
    assert difference(parts, whole) < 1e-9
    if n > 1:  # teeth: the last part is smaller, and counts for less
        assert difference(parts_step(name, n, weighted=False)[1], whole) > 1e-6


@pytest.mark.parametrize("name", ["residual", "carried", "exact", "exact-jittered"])
def test_the_boundary_loss_has_the_weight_of_its_samples_in_every_part(name):
    "Each final state counts for all transitions of its sample, and only once"
    flow, method = prompted(name)
    items = method.prepare(flow, reward, draw(flow))
    whole = method.loss(flow, items)[1]["boundary"]
    parts = [(len(part), method.loss(flow, part)[1]["boundary"]) for part in items.split(3)]
    mean = sum(length * value for length, value in parts) / len(items)
    assert whole > 0 and float(mean) == pytest.approx(float(whole), rel=1e-9)
    assert any(value == 0 for _, value in parts)  # a part without a final state
    plain = method.alpha * squares_at_the_end(flow, method, items)
    assert float(whole) == pytest.approx(float(plain), rel=1e-9)


def squares_at_the_end(flow, method, items):
    "E‖g(x_1, 1) + ∇r(x_1)‖² over the samples, in squared units; the gradients clipped"
    x1, rg, factors = items.x1[::4], items.rg1[::4], items.factors1[::4]
    t, cond = x1.new_ones(N), items.cond[::4]
    g = method.value(x1, t, cond, torch.zeros_like(x1), factors, rg)
    miss = (g + factors[:, None] * rg) / method.value.unit
    return miss.pow(2).sum(1).mean().item()


@pytest.mark.parametrize("name", MADE)
def test_rows_at_once_change_no_item(name):
    flow, method = prompted(name)
    whole = method.prepare(flow, reward, draw(flow))
    flow, method = prompted(name)
    with portions(with_gradients=3, without_gradients=5):
        cut = method.prepare(flow, reward, draw(flow))
    assert whole.tensors.keys() == cut.tensors.keys() and whole.cond == cut.cond
    for key, rows in whole.tensors.items():
        assert torch.allclose(rows, cut.tensors[key], rtol=1e-9, atol=1e-12), key
    for key, value in whole.logs.items():
        assert float(cut.logs[key]) == pytest.approx(float(value), rel=1e-9)


# ---------------------------------------------------------------- as it was


RECORDED = {  # loss, norm of all gradients
    "residual": (0.591949, 1.75858),
    "reuse": (0.466487, 1.55774),
    "no correction": (0.416177, 1.50996),
    "trajectory": (0.465768, 1.56148),
    "carried": (1.97223, 3.18732),
    "exact": (1.17367, 1.79653),
    "exact-jittered": (1.24547, 1.92034),
    "finite-difference": (2.40435, 2.56025),
    "paper": (1.98237, 2.2417),
    "PMP": (5.64559, 7.36059),
    "AM": (1.82744, 8.27756),
    "ReFL": (-1.15351, 0.800753),
    "DRaFT": (-0.538144, 2.32582),
    "DRaFT-LV": (-0.531543, 1.0903),
}


@pytest.mark.parametrize("name", MADE)
def test_losses_are_the_recorded_ones(name):
    """Second update of a seeded run in float32. Compared once, on the same samples, with
    the losses of the first edition, to which all were equal within 1e-6 until VGG-Flow's
    push was matched after the step; its five rows were recorded then"""
    loss, norm = RECORDED[name]
    found, size = second_update(name)
    assert found == pytest.approx(loss, rel=1e-4)
    assert size == pytest.approx(norm, rel=1e-4)


def second_update(name):
    "Loss and size of the gradient; the first update sets the unit"

    def both(x, prompts=None):
        return quadratic(x) + wave(x)

    torch.manual_seed(0)
    flow, method = MixtureFlow(MEANS, 0.5), MADE[name]()
    torch.nn.init.normal_(flow.residual.net[-1].weight, std=0.3)
    method.setup(flow, both)
    if getattr(method, "learn", False):
        torch.nn.init.normal_(method.value.correction.net[-1].weight, std=0.1)
    for update in range(2):
        options = dict(update=update, indices=range(N), transitions=4)
        samples = Samples.draw(flow, None, time_grid(10), **options)
        loss = method.loss(flow, method.prepare(flow, both, samples))[0]
    return loss.item(), all_gradients(flow, method, loss).norm().item()


# ---------------------------------------------------------------- samples and items


def test_a_sample_keeps_its_numbers_wherever_it_is_drawn():
    flow = gaussian()

    def some(indices):
        options = dict(seed=3, update=7, indices=indices)
        return Samples.draw(flow, list("abcdefgh"), time_grid(10), **options)

    def numbers(samples):
        k = stratified_transitions(samples)
        return [samples.x0, k, samples.uniform(), samples.normal(2, 3), samples.prior(flow)]

    whole, parts = some(range(6)), [some(range(1)), some(range(1, 4)), some(range(4, 6))]
    assert whole.cond == [c for part in parts for c in part.cond]
    joined = [torch.cat(rows) for rows in zip(*map(numbers, parts))]
    for mine, theirs in zip(numbers(whole), joined):
        assert torch.equal(mine, theirs)
        assert len(mine.reshape(6, -1).unique(dim=0)) > 1
    assert {part.shared_integer(0, 10**6) for part in parts} == {
        whole.shared_integer(0, 10**6)
    }


def test_samples_updates_and_seeds_have_numbers_of_their_own():
    "Also the number that all samples share, and those of the first sample"
    flow, times = gaussian(), time_grid(10)
    seen = [
        Samples.draw(flow, None, times, seed, update, range(i, i + 1)).x0[0, 0].item()
        for seed in range(3)
        for update in range(3)
        for i in range(3)
    ]
    assert len(set(seen)) == 27
    samples = Samples(torch.zeros(1, 2), times)
    shared = torch.rand((), generator=samples.common_generator)
    assert shared != samples.uniform()[0]


def test_a_method_needs_only_a_loss():
    class Ascent(Method):
        def loss(self, flow, items):
            x = items.x0 + flow.velocity(items.x0, torch.zeros(len(items)))
            reward = items.reward(flow.decode(x), items.cond).mean()
            return -reward, dict(reward=reward.item())

    flow, method = gaussian(), Ascent()
    items = method.prepare(flow, linear, Samples(flow.prior(8), time_grid(10)))
    whole = all_gradients(flow, method, method.loss(flow, items)[0])
    parts = [
        all_gradients(flow, method, method.loss(flow, part)[0]) * len(part) / 8
        for part in items.split(3)
    ]
    assert difference(sum(parts), whole) < 1e-5
    assert method.label == "Ascent" and method.hyper == {}
    with pytest.raises(NotImplementedError, match="must have loss"):
        Method().loss(flow, items)


def test_items_are_copied_and_split_with_their_prompts():
    items = Items(cond=list("abcde"), x=torch.arange(5), logs=dict(reward=1.0))
    assert [part.cond for part in items.split(2)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part.x.tolist() for part in items.split(2)] == [[0, 1], [2, 3], [4]]
    assert items.split(0) == items.split(7) == [items]
    assert copy.deepcopy(items).x.tolist() == items.x.tolist()
