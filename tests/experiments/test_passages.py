"First passages against a fine walk, intervals against scipy, and series of a table"

import numpy as np
import pytest

from vggflow.experiments.passages import (
    first_crossing,
    lead_at_equal_reward,
    passage_curve,
    passage_numbers,
    t_interval,
)
from vggflow.experiments.results import Results, by_series
from vggflow.experiments.style import COLORS, method_colors


@pytest.mark.parametrize("seed", range(20))
def test_a_passage_is_where_a_fine_walk_first_reaches_the_reward(seed):
    noise = np.random.default_rng(seed)
    updates = np.sort(noise.choice(400, 12, replace=False)).astype(float)
    run = np.array([updates, noise.normal(size=12).cumsum(), noise.normal(size=12)])
    level = noise.uniform(run[1, 0], run[1].max())
    walk = np.linspace(updates[0], updates[-1], 400_001)
    reward, metric = (np.interp(walk, updates, values) for values in run[1:])
    first = int((reward >= level).argmax())
    update, found = first_crossing(run, level)
    assert update == pytest.approx(walk[first], abs=0.01)
    assert found == pytest.approx(metric[first], abs=0.01)


def test_more_evaluations_of_the_same_curve_give_no_lead():
    updates = np.linspace(0, 400, 81)
    straight = np.array([updates, updates / 100, 1 - updates / 800])
    sparse = straight[:, ::8]
    assert lead_at_equal_reward(straight, sparse, True) == pytest.approx(0, abs=1e-12)
    steeper = straight * [[1], [1], [0.5]] + [[0], [0], [0.5]]
    assert lead_at_equal_reward(steeper, straight, True) > 0.1
    assert lead_at_equal_reward(steeper, straight, False) < -0.1


def test_what_was_passed_before_the_first_evaluation_does_not_count():
    "Two runs on one curved front: the fast one's first step is a chord that cuts it"
    shares = np.linspace(0, 1, 41)
    slow = np.array([shares * 400, shares, 1 - shares**2])
    fast = slow[:, [0, *range(20, 41, 2)]]
    lead = lead_at_equal_reward(slow, fast, True)
    assert 0 <= lead < 1e-3
    chord = np.interp(0.25, fast[1], fast[2])
    assert first_crossing(slow, 0.25)[1] - chord > 0.05, "teeth: the chord is far off"


def test_numbers_of_a_series_are_those_of_its_seeds():
    updates = np.arange(0.0, 101.0, 10)
    runs = [np.array([updates, updates / 50 + k / 10, updates * k]) for k in range(3)]
    low, high = passage_numbers(runs, [1.0, 2.15])
    by_hand = [first_crossing(run, 1.0)[1] for run in runs]
    assert low["n"] == 3 and low["mean"] == pytest.approx(np.mean(by_hand))
    assert low["sd"] == pytest.approx(np.std(by_hand, ddof=1))
    assert high["n"] == 1 and high["low"] is None  # one seed gets there
    curve = passage_curve(runs, n=10)
    assert curve["x"][-1] == pytest.approx(2.0), "what every seed reached"
    assert (curve["low"] <= curve["mean"]).all() and (curve["mean"] <= curve["high"]).all()


def test_interval_is_students():
    from scipy import stats

    values = np.random.default_rng(0).normal(size=5)
    interval = t_interval(values)
    expected = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (interval["low"], interval["high"]) == pytest.approx(expected)
    single = dict(n=1, mean=1.0, sd=None, low=None, high=None)
    assert t_interval([1.0]) == single and t_interval([np.nan])["mean"] is None


def test_a_missing_setting_is_in_the_cards():
    row = dict(method="VGG-Flow", seed=0, update=0, reward=0.0)
    rows = [dict(row, run="a", eta=None), dict(row, run="b", eta="t")]
    options = dict(a={}, b=dict(eta="t"))
    runs = [dict(id=run, parameters=dict(options=own)) for run, own in options.items()]
    results = Results("eta", "paper", rows, dict(runs=runs))
    assert list(by_series(results, "eta")) == ["t^2", "t"]
    for row in rows:
        del row["eta"]
    assert list(by_series(results, "eta")) == ["t^2", "t"]


def test_methods_of_ones_own_have_colours_of_their_own():
    ours = [f"my.py:Mine{i}" for i in range(9)]
    colors = method_colors([*COLORS, *ours])
    assert len(set(colors.values())) == len(colors)
    assert {name: colors[name] for name in COLORS} == COLORS
    assert method_colors([*reversed(ours), *COLORS]) == colors, "whatever the order"
