"""Failure signs: each fires on its failing series and on no healthy one, and stops a
run that can go on."""

import csv
import json
import math
import random
import shutil

import pytest
import torch
from short_runs import equal_weights

from vggflow.common.data import project_root
from vggflow.common.seals import read_rows
from vggflow.methods.direct import ReFL
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.diagnostics import (
    SIGNS,
    Thresholds,
    collapse,
    consistency_divergence,
    diagnose,
    hacking,
    non_finite,
    replay,
    share_kept,
    spread,
    stop_names,
)
from vggflow.training.loop import finetune
from vggflow.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rows_of(**series):
    "Rows with these columns"
    names = list(series)
    lines = zip(*series.values())
    return [dict(zip(names, line), update=i) for i, line in enumerate(lines, 1)]


def noisy(levels, seed=0, sigma=0.3):
    "Levels times log-normal noise"
    generator = random.Random(seed)
    return [level * math.exp(generator.gauss(0, sigma)) for level in levels]


def ramp(first, last, n):
    "A geometric row of numbers"
    return [first * (last / first) ** (i / (n - 1)) for i in range(n)]


# --- the signs ---

HEALTHY = dict(
    flat=[1.0] * 200,
    falls=ramp(1.0, 1e-4, 200),
    creeps=ramp(1.0, 4.0, 200),
    hump=[1.0] * 50 + [6.0] * 100 + [0.5] * 50,
)
RISING = dict(
    grows=ramp(1.0, 1e3, 200),
    jumps=[1.0] * 100 + [60.0] * 100,
    at_once=[1.0] + [1e7] * 60,
    explodes=[1.0] * 30 + ramp(1.0, 1e30, 100),
)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("levels", HEALTHY.values(), ids=HEALTHY)
def test_divergence_is_silent_on_noisy_healthy_losses(levels, seed):
    assert not replay(rows_of(consistency=noisy(levels, seed)), [])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("levels", RISING.values(), ids=RISING)
def test_divergence_fires_on_rising_losses(levels, seed):
    seen = replay(rows_of(consistency=noisy(levels, seed)), [])["divergence"]
    assert seen["consistency"] > 15 * seen["consistency_at_start"]


def test_methods_without_a_consistency_loss_never_diverge():
    assert not consistency_divergence(rows_of(loss=[1e9] * 100))


def test_divergence_survives_gaps_and_nothing():
    assert not consistency_divergence([])
    assert not consistency_divergence([dict(update=1, consistency=None)] * 60)
    gaps = [dict(consistency=None), dict(consistency=16.0)] * 20
    assert consistency_divergence([dict(consistency=1.0)] * 10 + gaps)


def test_collapse_by_spread_and_by_evaluations():
    assert collapse(rows_of(spread=noisy([1.0] * 20 + [0.05] * 20)))
    assert not collapse(rows_of(spread=noisy([1.0] * 20 + [0.3] * 20)))
    assert not collapse(rows_of(spread=[1.0] * 5 + [0.01] * 2))  # not yet rows enough
    assert collapse([], [dict(diversity=0.4), dict(diversity=0.05)])
    assert not collapse([], [dict(diversity=0.4), dict(diversity=0.2)])
    assert not collapse([], [])
    assert not collapse([], [dict(reward=1.0)] * 2)


@pytest.mark.parametrize(
    "reward,diversity,accuracy,fires",
    [
        (2.0, 0.9, 0.9, False),
        (2.0, 0.7, 0.7, True),
        (2.0, 0.8, 0.7, False),
        (2.0, 0.1, 1.0, False),
        (2.0, 1.0, 0.4, True),
        (0.2, 0.1, 0.1, False),
        (-1.0, 0.1, 0.1, False),
    ],
)
def test_hacking_wants_reward_up_and_quality_down(reward, diversity, accuracy, fires):
    base = dict(reward=0.0, reward_std=1.0, diversity=1.0, accuracy=1.0)
    now = dict(reward=reward, diversity=diversity, accuracy=accuracy)
    assert bool(hacking([base, now])) is fires


def test_hacking_without_its_numbers_is_silent():
    assert not hacking([]) and not hacking([dict(reward=1.0, accuracy=1.0)])
    assert not hacking([dict(reward=0.0), dict(reward=9.0)])
    assert not hacking([dict(x=1.0), dict(x=2.0)])
    no_number = dict(reward=float("nan"), accuracy=0.0)
    assert not hacking([dict(reward=0.0, accuracy=1.0), no_number])
    assert share_kept([dict(accuracy=0.0), dict(accuracy=1.0)], "accuracy") is None


def test_several_diversities_count_by_their_mean():
    base = dict(perceptual_diversity=0.4, clip_diversity=0.2)
    now = dict(perceptual_diversity=0.2, clip_diversity=0.2)
    assert share_kept([base, now], "diversity") == pytest.approx(0.75)


def test_recorded_runs_are_judged_right():
    """The emoji world's 400 updates: every ReFL and DRaFT is stopped by update 200, no
    other method ever"""
    runs = {}
    texts = ("run", "method", "eta", "noise_sd")
    path = project_root() / "data/results/aesthetic-paper.csv"
    for row in csv.DictReader(open(path)):
        numbers = {k: float(v) for k, v in row.items() if k not in texts and v}
        runs.setdefault((row["method"], row["seed"]), []).append(numbers)
    greedy = ("ReFL", "DRaFT")
    signs = {key: replay([], evals) for key, evals in runs.items()}
    hacked = [
        found.get("hacking", {}).get("update")
        for (method, _), found in signs.items()
        if method in greedy
    ]
    assert hacked and all(update and update <= 200 for update in hacked)
    assert not any(found for (method, _), found in signs.items() if method not in greedy)


def test_spread_is_the_mean_over_pairs_and_costs_little():
    x = torch.randn(5, 3, 8, 8)
    squares = torch.cdist(x.flatten(1), x.flatten(1)).pow(2).sum() / (5 * 4) / (3 * 64)
    assert spread(x).item() == pytest.approx(squares.sqrt().item(), rel=1e-4)
    assert spread(torch.ones(4, 7)).item() == 0
    big = torch.randn(4, 3, 256, 256)
    assert spread(big).item() == pytest.approx(2**0.5, rel=0.02)


def test_non_finite_looks_at_loss_reward_and_gradients_only():
    assert non_finite(dict(loss=1.0, reward=1.0, grad_norm=1.0, fid=math.nan)) == {}
    found = non_finite(dict(loss=math.inf, grad_norm_1=math.nan))
    assert found == dict(loss="inf", grad_norm_1="nan")


@pytest.mark.parametrize("bad", ["hackin", ["collapse", "colapse"], ("nonfinite",)])
def test_unknown_sign_is_refused_before_any_work(tmp_path, bad):
    with pytest.raises(ValueError, match="stop_on: there is no sign"):
        run(tmp_path / "a", stop_on=bad)
    assert not (tmp_path / "a").exists() and stop_names(SIGNS) == SIGNS


def test_diagnose_names_only_known_signs():
    rows = rows_of(consistency=ramp(1.0, 1e9, 60), spread=ramp(1.0, 1e-9, 60))
    assert set(diagnose(rows, [])) == {"divergence", "collapse"} < set(SIGNS)


# --- runs ---


def peak(x, prompts=None):
    return -(x - 1).pow(2).sum(-1)


def run(out=None, method=None, reward=peak, **keywords):
    "Forty updates of ReFL, which collapse: the flow and the history"
    names = ("evaluate", "stop_on", "thresholds")
    call = {name: keywords.pop(name) for name in names if name in keywords}
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 1.0)
    usual = dict(updates=40, batch_size=16, steps=5, lr=2e-2, save_every=25)
    config = FinetuneConfig(**{**usual, **keywords})
    method = method or ReFL()
    return flow, finetune(flow, reward, method, config, out=out, progress=False, **call)


def test_default_flags_and_goes_on():
    with pytest.warns(RuntimeWarning, match="collapse") as warned:
        _, history = run()
    assert len(history.rows) == 40 and history.stopped is None and len(warned) == 1
    assert [flag["sign"] for flag in history.flags] == ["collapse"]


def test_stopped_run_is_whole(tmp_path):
    def evaluate(flow, update):
        return dict(n=update)

    flow, history = run(tmp_path, stop_on=["collapse"], evaluate=evaluate, eval_every=10)
    stopped = history.stopped
    update = stopped["update"]
    assert 0 < update < 40 and stopped["why"] == "collapse"
    assert set(stopped["numbers"]) == {"spread", "spread_at_start"}
    assert RunDirectory(tmp_path).stopped == stopped
    flag = dict(update=update, sign="collapse", numbers=stopped["numbers"])
    files = RunDirectory(tmp_path)
    assert files.flags == history.flags == [flag]
    assert [row["update"] for row in files.metrics] == list(range(1, update + 1))
    assert files.evals[-1]["update"] == update  # a last look
    saved, parts, _ = files.load_newest()
    assert saved == update
    for name, value in flow.trainable_state().items():
        assert torch.equal(parts["flow"][name], value)
    assert not list(tmp_path.rglob("*.tmp"))


def test_stopped_run_stays_stopped_and_goes_on_when_told(tmp_path):
    whole, _ = run(tmp_path / "a")
    _, first = run(tmp_path / "b", stop_on="collapse")
    update = first.stopped["update"]
    said = f"stopped at update {update} by collapse.*without .collapse. goes on"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        _, again = run(tmp_path / "b", stop_on="collapse")
    assert again.stopped == first.stopped and len(again.rows) == update
    assert len(warned) == 1
    said = f"goes on from update {update}; it had been stopped at update {update} by coll"
    with pytest.warns(RuntimeWarning, match=said):
        more, history = run(tmp_path / "b")
    assert equal_weights(whole, more) and len(history.rows) == 40
    assert history.stopped is None and not (tmp_path / "b/stopped.json").exists()
    assert [flag["update"] for flag in history.flags] == [update]  # not said twice


def test_killed_after_the_verdict_is_stopped_again(tmp_path):
    "Checkpoint written, the reason not yet: the rows tell it again"
    _, first = run(tmp_path, stop_on="collapse")
    (tmp_path / "stopped.json").unlink()
    (tmp_path / "diagnostics.jsonl").unlink()
    _, again = run(tmp_path, stop_on="collapse")
    assert again.stopped == first.stopped and again.flags == first.flags
    assert (tmp_path / "stopped.json").exists()


def test_lost_checkpoint_repeats_the_end(tmp_path):
    flow, first = run(tmp_path, stop_on="collapse", save_every=5)
    shutil.rmtree(RunDirectory(tmp_path).newest_checkpoint())
    again, second = run(tmp_path, stop_on="collapse", save_every=5)
    assert equal_weights(flow, again)
    assert second.stopped == first.stopped and second.flags == first.flags


def test_thresholds_move_the_line():
    _, early = run(stop_on="collapse", thresholds=Thresholds(collapse_share=0.5))
    _, late = run(stop_on="collapse")
    assert early.stopped["update"] < late.stopped["update"]


def test_hacking_is_judged_on_evaluations_only(tmp_path):
    def evaluate(flow, update):
        return dict(reward=update, accuracy=1 / (1 + update))

    often = dict(eval_every=6, updates=20, stop_on="hacking")
    _, history = run(tmp_path, VGGFlow(), evaluate=evaluate, **often)
    assert history.stopped["update"] == 6 and history.stopped["why"] == "hacking"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_run_raises_no_flag(seed):
    def quadratic(x, prompts=None):
        return (0.8 * x - 0.25 * x**2).sum(-1)

    def evaluate(flow, update):
        return dict(reward=update, diversity=1 - update / 100, accuracy=1.0)

    torch.manual_seed(seed)
    history = finetune(
        GaussianFlow([0.0, 0.0], 0.6),
        quadratic,
        VGGFlow(beta=1 / 0.7),
        FinetuneConfig(updates=60, seed=seed, lr=1e-2, steps=10, eval_every=20),
        evaluate=evaluate,
        progress=False,
        stop_on=SIGNS,
    )
    assert history.flags == [] and history.stopped is None and len(history.rows) == 60
    assert all("spread" in row for row in history.rows)


# --- numbers that are none ---


class Blows(ReFL):
    "ReFL whose loss, reward or gradient is not finite at chosen updates"

    def __init__(self, how="loss", at=(4,)):
        super().__init__()
        self.how = how
        self.at = at
        self.updates = 0

    def loss(self, *args):
        self.updates += 1
        loss, logs = super().loss(*args)
        if self.updates not in self.at:
            return loss, logs
        if self.how == "loss":
            return loss * math.nan, logs
        if self.how == "reward":
            return loss, dict(logs, reward=math.nan)
        return loss * 0 + (loss * 0).abs().sqrt(), logs  # finite loss, infinite gradient


@pytest.mark.parametrize("how", ["loss", "reward", "gradient"])
def test_non_finite_raises_and_leaves_whole_weights(tmp_path, how):
    remedy = "the reward is nan" if how == "reward" else "lower lr"
    with pytest.raises(FloatingPointError, match=f"update 4: .*{remedy}"):
        run(tmp_path, Blows(how), save_every=2)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3]
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["update"], stopped["why"]) == (4, "non-finite")
    assert RunDirectory(tmp_path).flags[0]["sign"] == "non-finite"
    said = "goes on from update 3; it had been stopped at update 4 by non-finite"
    with pytest.warns(RuntimeWarning, match=said):  # the fault was passing
        flow, history = run(tmp_path, Blows(how, at=()), save_every=2)
    assert equal_weights(flow, run(method=ReFL())[0]) and len(history.rows) == 40


@pytest.mark.parametrize("how", ["loss", "reward", "gradient"])
def test_non_finite_is_skipped_where_stop_on_lets_it(tmp_path, how):
    flow, history = run(tmp_path, Blows(how, at=(4, 9)), stop_on=())
    assert [row["update"] for row in history.rows if row.get("skipped")] == [4, 9]
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert len(history.rows) == 40 and history.flags[0]["sign"] == "non-finite"

    def no_constant(name):
        pytest.fail(f"{name} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    assert read_rows(tmp_path / "metrics.jsonl") == history.rows


def test_many_in_a_row_end_the_run_whatever_stop_on_says():
    with pytest.raises(FloatingPointError, match="10 updates in a row"):
        run(method=Blows(at=range(5, 40)), stop_on=())


def test_every_way_of_progress_survives_a_skipped_update(capsys):
    for show in (True, "plain"):
        torch.manual_seed(0)
        method = Blows("reward", at=(2,))
        config = FinetuneConfig(updates=2, batch_size=4, steps=5)
        flow = GaussianFlow([0.0], 1.0)
        finetune(flow, peak, method, config, progress=show, stop_on=())


def test_an_error_of_the_reward_itself_passes_through():
    calls = []

    def breaks(x, prompts=None):
        calls.append(1)
        if len(calls) == 1:  # the trial before the run
            return x.sum(1)
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="^mine$"):
        run(reward=breaks, stop_on=())


def test_command_line_stops_and_refuses(tmp_path, capsys):
    from vggflow.cli import main

    asked = "train --world gaussian --reward quadratic --method ReFL --lr .02"
    asked = f"{asked} --updates 150 --eval-every 0".split()
    assert main([*asked, "--stop-on", "hackin", "--out", str(tmp_path / "q")]) == 2
    assert "no sign 'hackin'" in capsys.readouterr().err
    signs = ("hacking", "collapse")
    assert main([*asked, "--stop-on", *signs, "--out", str(tmp_path / "r")]) == 0
    assert "by collapse" in capsys.readouterr().out
    assert (tmp_path / "r/stopped.json").exists()
