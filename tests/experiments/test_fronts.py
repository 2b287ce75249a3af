"Fronts against brute force, intervals against scipy, and series of a table"

import numpy as np
import pytest

from vggflow.experiments.fronts import (
    at_equal_reward,
    hypervolume,
    pareto_front,
    t_interval,
)
from vggflow.experiments.results import Results, by_series
from vggflow.experiments.style import COLORS, method_colors


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("up", [True, False])
def test_front_is_the_set_that_nothing_beats(seed, up):
    points = np.random.default_rng(seed).normal(size=(40, 2)).round(1)
    signs = np.array([1, 1 if up else -1])

    def beaten(point):
        better = (points * signs >= point * signs).all(1)
        return (better & (points != point).any(1)).any()

    front = pareto_front(points, up)
    slow = np.unique([point for point in points if not beaten(point)], axis=0)
    assert (front == slow).all()
    area, reference = count_cells(points, signs)
    assert hypervolume(points, reference, up) == pytest.approx(area, rel=0.02)
    outside = points[:, 0].min() - 1, points[:, 0].max() + 1
    metric = at_equal_reward(points, [outside[0], *front[:, 0], outside[1]], up)
    assert metric[0] == front[0, 1] and (metric[1:-1] == front[:, 1]).all()
    assert np.isnan(metric[-1])


def count_cells(points, signs, cells=500):
    "Area that points dominate, by the cells of a grid; and the reference point"
    seen = points * signs
    low, high = seen.min(0), seen.max(0)
    sides = [np.linspace(low[i], high[i], cells + 1)[1:] for i in range(2)]
    corners = np.stack(np.meshgrid(*sides), -1)
    dominated = (corners[..., None, :] <= seen + 1e-9).all(-1).any(-1)
    return dominated.mean() * np.prod(high - low), low * signs


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
