"An update does the same however it is split, and nothing beside it disturbs it."

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from short_runs import (
    EVERY_METHOD,
    column,
    distance,
    equal_weights,
    gaussian_run,
    linear,
    run,
)

from vggflow.common.seals import read_rows
from vggflow.methods.direct import ReFL
from vggflow.methods.method import Method
from vggflow.methods.registry import METHODS
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow, sample
from vggflow.theory.value import clip_factors
from vggflow.training.checkpoint import load_checkpoint
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune

ALLOWED = 1e-9  # in double precision, of the size of the numbers: sums in another order


def test_seeds_differ_and_repeat():
    losses = {seed: column(run(None, seed=seed)[1], "loss") for seed in (0, 1)}
    assert losses[0] == column(run(None, seed=0)[1], "loss")
    assert losses[0] != losses[1]


# --- portions ---


def test_every_method_is_tried():
    assert set(METHODS.values()) <= {type(make()) for make in EVERY_METHOD.values()}


@pytest.fixture(scope="module")
def whole():
    "Each method's run with all items at once"
    return {name: gaussian_run(make()) for name, make in EVERY_METHOD.items()}


@pytest.mark.parametrize("portion", [1, 3, 5, 100])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_results_do_not_depend_on_micro_batches(whole, name, portion):
    method = EVERY_METHOD[name]()
    parts = gaussian_run(method, micro_batch=portion, forward_batch=portion)
    assert distance(whole[name], parts) < ALLOWED


class LocalQuantile(VGGFlow):
    "Clips by the quantile of a micro-batch"

    def loss(self, flow, items):
        items.tensors["factors"] = clip_factors(items.rg, self.clip)
        return super().loss(flow, items)


class EqualWeights(VGGFlow):
    "Forgets that the last micro-batch is smaller"

    def loss(self, flow, items):
        loss, numbers = super().loss(flow, items)
        return loss * 3 / len(items), numbers


@pytest.mark.parametrize("fault", [LocalQuantile, EqualWeights])
def test_a_fault_in_portions_would_be_noticed(whole, fault):
    method = fault(beta=2.0, eta=lambda t: t / 2, clip=0.7)
    assert distance(whole["vgg"], gaussian_run(method, micro_batch=3)) > 1e4 * ALLOWED


def test_evaluation_does_not_disturb_the_run():
    def trained(evaluate):
        torch.manual_seed(0)
        flow = GaussianFlow([0.0, 0.0], 0.6)
        config = FinetuneConfig(updates=6, batch_size=4, eval_every=2)
        return finetune(flow, linear, VGGFlow(), config, progress=False, evaluate=evaluate)

    noisy = trained(lambda flow, update: dict(x=torch.randn(3).sum().item()))
    assert column(noisy, "loss") == column(trained(None), "loss")
    assert [row["update"] for row in noisy.evals] == [0, 2, 4, 6]


def test_samples_along_the_way():
    torch.manual_seed(0)
    flow = GaussianFlow([0.0], 0.6)
    config = FinetuneConfig(updates=5, batch_size=2, sample_every=2)
    seen = []

    def draw_sheet(flow, update):
        seen.append(update)

    finetune(flow, linear, ReFL(), config, progress=False, samples=draw_sheet)
    assert seen == [0, 2, 4, 5]


# --- a method of one's own ---


class Climb(Method):
    "Climbs the reward of full samples"

    def loss(self, flow, items):
        x1 = sample(flow, items.x0, items.times).x1
        reward = items.reward(flow.decode(x1), items.cond).mean()
        return -reward, dict(reward=reward.item())


def test_a_new_method_is_one_class_with_one_loss():
    torch.manual_seed(0)
    flow = GaussianFlow([0.0], 0.6)

    def near_one(x, prompts=None):
        return -((x[:, 0] - 1) ** 2)

    config = FinetuneConfig(updates=40, lr=1e-2, steps=5)
    rows = finetune(flow, near_one, Climb(), config, progress=False).rows
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3


@pytest.mark.parametrize("portion", [1, 3])
def test_a_method_with_only_a_loss_is_split_like_any_other(portion):
    "Its items are the samples"
    whole = gaussian_run(Climb())
    assert distance(whole, gaussian_run(Climb(), micro_batch=portion)) < ALLOWED


def test_a_method_without_a_loss_is_told():
    with pytest.raises(NotImplementedError, match="Method must have"):
        run(None, Method())


# --- numbers that are none, average, optimisers ---


def test_non_finite_loss_stops_and_says_where(tmp_path):
    class Blows(ReFL):
        updates = 0

        def loss(self, *args):
            Blows.updates += 1
            loss, logs = super().loss(*args)
            return (loss * float("inf") if Blows.updates == 4 else loss), logs

    with pytest.raises(FloatingPointError, match="update 4"):
        run(tmp_path, Blows())
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3]


def test_no_clipping_is_clipping_at_a_norm_out_of_reach():
    off, far, near = (run(None, grad_clip=norm)[0] for norm in (0, 1e9, 1e-9))
    assert equal_weights(off, far) and not equal_weights(off, near)


def with_average(out, updates):
    "A run with an average of the weights, and the weights that each evaluation saw"
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)
    config = FinetuneConfig(
        updates=updates, batch_size=4, save_every=2, eval_every=1, ema=0.5, lr=0.1
    )
    seen = []

    def evaluate(flow, update):
        seen.append({k: v.clone() for k, v in flow.trainable_state().items()})
        return {}

    finetune(flow, linear, VGGFlow(), config, out=out, progress=False, evaluate=evaluate)
    return flow, seen


def test_the_average_is_evaluated_kept_and_left_behind(tmp_path):
    flow, seen = with_average(tmp_path / "a", 3)
    with_average(tmp_path / "b", 2)
    again, _ = with_average(tmp_path / "b", 3)
    assert equal_weights(flow, again)
    for name, value in flow.trainable_state().items():
        assert torch.equal(seen[-1][name], value)
    folder = tmp_path / "a/checkpoints"
    before, after = (load_checkpoint(folder / f"00000{update}")[1] for update in (2, 3))
    moved = 0.0
    for name, value in after["ema"].items():
        step = 0.5 * before["ema"][name] + 0.5 * after["flow"][name]
        assert torch.allclose(value, step, atol=1e-6)
        assert torch.equal(value, seen[3][name])
        moved = max(moved, (after["flow"][name] - value).abs().max().item())
    assert moved > 1e-3


def test_optimisers_by_name():
    plain, fused = (run(None, optimizer=name)[0] for name in ("adamw", "adamw-fused"))
    pairs = zip(plain.parameters(), fused.parameters())
    assert max((p - q).abs().max() for p, q in pairs) < 1e-4
    known = "unknown optimizer 'adam': use one of adamw, adamw-fused"
    with pytest.raises(ValueError, match=known):
        FinetuneConfig(optimizer="adam")
    if not find_spec("bitsandbytes"):
        with pytest.raises(ImportError, match="needs bitsandbytes"):
            run(None, optimizer="adamw-8bit")


EIGHT_BIT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.path.append(sys.argv[2])
import torch
from short_runs import equal_weights, run
from vggflow.training.run_directory import RunDirectory

folder, settings = sys.argv[3], dict(optimizer="adamw-8bit", lr=1e-2)
whole, _ = run(folder + "/a", **settings)
run(folder + "/b", updates=4, **settings)
again, history = run(folder + "/b", **settings)
plain, _ = run(None, lr=1e-2)
parts = RunDirectory(folder + "/b").load_newest().parts
kinds = {value.dtype for value in parts["optimizer"].values()}
pairs = zip(whole.parameters(), plain.parameters())
apart = max((p - q).abs().max().item() for p, q in pairs)
same = equal_weights(whole, again)
print(same, len(history.rows), torch.uint8 in kinds, 0 < apart < 0.02)
"""


def test_eight_bit_optimiser_resumes_bit_for_bit(tmp_path):
    "With bitsandbytes itself, in a process of its own: installed, or beside by `make test`"
    beside = Path(sys.prefix) / "beside"
    if not find_spec("bitsandbytes") and not (beside / "bitsandbytes").exists():
        pytest.skip("bitsandbytes is not there: make test fetches it")
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", EIGHT_BIT, tests, str(beside), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "6", "True", "True"]
