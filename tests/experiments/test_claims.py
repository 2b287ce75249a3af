"The register of claims: rules that decide, and numbers that follow from committed tables"

import ast
import csv
import json
import statistics

import numpy as np
import pytest
import scipy.stats
from toy_checkout import ROOT

from vggflow.experiments import claims
from vggflow.experiments.claims import claims_table, judge, judge_claim, judge_claims
from vggflow.experiments.comparisons import (
    better_at_end,
    better_at_equal_reward,
    crossings_table,
    faster,
)
from vggflow.experiments.paper_claims import CLAIMS
from vggflow.experiments.results import Results

PAGES = ROOT / "nbs" / "pages"


def straight_runs(**ends):
    "Three seeds each: reward from 0 to `ends[method][0]`, diversity from 0.4 to the other"
    rows, runs = [], []
    for method, (reward, diversity) in ends.items():
        for seed in range(3):
            run = f"{method}-{seed}"
            runs.append(dict(id=run, parameters=dict(method=method, seed=seed)))
            for update in range(0, 101, 10):
                share = update / 100
                fall = (diversity - 0.4 + 0.001 * seed) * share
                row = dict(run=run, method=method, seed=seed, update=update)
                row["reward"] = (reward + 0.01 * seed) * share
                rows.append(dict(row, perceptual_diversity=0.4 + fall))
    return Results("aesthetic", "none", rows, dict(runs=runs))


def find(name):
    "A claim by its id"
    return next(claim for claim in CLAIMS if claim.id == name)


def test_effects_have_the_sign_of_the_table():
    results = straight_runs(
        **{"VGG-Flow": (2.0, 0.38), "AM": (1.0, 0.38), "ReFL": (4.0, 0.1)}
    )
    values = find("aesthetic-faster-than-am").effect(results)
    assert judge(values)["verdict"] == claims.REPRODUCED
    assert judge(faster("AM", "VGG-Flow")(results))["verdict"] == claims.CONTRARY
    claim = find("aesthetic-refl-collapses")
    verdict = judge(claim.effect(results), claim.low, claim.high)["verdict"]
    assert verdict == claims.REPRODUCED

    def lead(one, other):
        effect = better_at_equal_reward(one, (other,), "perceptual_diversity")
        return np.mean(effect(results))

    assert lead("VGG-Flow", "ReFL") > 0.05 and lead("AM", "VGG-Flow") < 0
    assert np.mean(better_at_end("VGG-Flow", "ReFL")(results)) > 0.2


def test_a_series_that_was_not_run_is_said():
    tables = dict(aesthetic=straight_runs(**{"VGG-Flow": (2.0, 0.3)}))
    row = judge_claim(find("aesthetic-faster-than-am"), tables)
    assert row["verdict"] == claims.NOT_RUN and "AM" in row["reason"]


def test_at_least_fifteen_claims_and_every_rule_can_fail():
    assert len(CLAIMS) >= 15
    rules = [(claim.low, claim.high) for claim in CLAIMS if claim.effect]
    assert all(np.isfinite(low) or np.isfinite(high) for low, high in rules)


def test_file_and_page_follow_from_the_tables():
    rows = judge_claims()
    kept = json.loads((ROOT / "data/results/claims.json").read_text())["claims"]
    assert [row["id"] for row in kept] == [row["id"] for row in rows]
    for old, new in zip(kept, rows):
        assert old["verdict"] == new["verdict"], f"{new['id']}: call make claims"
        if new.get("n"):
            assert old["mean"] == pytest.approx(new["mean"], rel=1e-4, abs=1e-9)
            assert old["table_sha256"] == new["table_sha256"]
    shown = [markdown_of(cell) for cell in code_cells("claims")]
    assert claims_table(rows) in shown, "call make claims"


def code_cells(page):
    "Of a page's notebook"
    cells = json.loads((PAGES / f"{page}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def markdown_of(cell):
    "What a cell shows; None if that is no Markdown"
    found = [output.get("data", {}).get("text/markdown") for output in cell["outputs"]]
    return next(("".join(text) for text in found if text), None)


PAGES_OF_RESULTS = {"results": 10, "../index": 1, "not_reproduced": 2, "gallery": 1}


@pytest.mark.parametrize("page,tables", PAGES_OF_RESULTS.items())
def test_a_page_follows_from_the_tables(page, tables):
    "Everything that the page shows, computed again"
    scope, checked = {}, 0
    for cell in code_cells(page):
        *before, last = ast.parse("".join(cell["source"])).body or [None]
        exec(compile(ast.Module(before, []), "page", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "page", "eval"), scope)
            if markdown_of(cell):
                assert value.data == markdown_of(cell), "call make claims"
                checked += 1
        elif last:
            exec(compile(ast.Module([last], []), "page", "exec"), scope)
    assert checked >= tables


def test_runs_are_compared_at_rewards_that_they_reached():
    names = ("VGG-Flow", "VGG-Flow-PMP")
    series = {name: ("aesthetic", "paper", "method", name) for name in names}
    lines = crossings_table(series, (0.5, 1e9)).splitlines()[2:]
    places = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    assert places == [["0.50", name] for name in names], "nobody gets to the second"
    lines = crossings_table(series).splitlines()[2:]
    assert len(lines) == 4 * len(names), "quarters of the way that both went"


# --- five of them again, by code of its own


def runs_of(experiment, column, **wanted):
    "Values of a column after each update, one dict for each seed, from the file alone"
    found = {}
    with (ROOT / f"data/results/{experiment}-paper.csv").open() as file:
        for row in csv.DictReader(file):
            if all(row[name] == value for name, value in wanted.items()):
                run = found.setdefault(int(row["seed"]), {})
                run[int(row["update"])] = float(row[column])
    return [run for _, run in sorted(found.items())]


def ends_of(experiment, column, **wanted):
    "Last value of a column, one for each seed"
    return [run[max(run)] for run in runs_of(experiment, column, **wanted)]


def shares_left(experiment, column, **wanted):
    "Last value over the first, one for each seed"
    return [run[max(run)] / run[0] for run in runs_of(experiment, column, **wanted)]


def less(ones, others):
    return [one - other for one, other in zip(ones, others, strict=True)]


DIVERSITY = "perceptual_diversity"
BY_HAND = {
    "aesthetic-ends-more-diverse-than-refl": lambda: less(
        ends_of("aesthetic", DIVERSITY, method="VGG-Flow"),
        ends_of("aesthetic", DIVERSITY, method="ReFL"),
    ),
    "hpsv2-keeps-diversity": lambda: shares_left("hpsv2", DIVERSITY, method="VGG-Flow"),
    "aesthetic-draft-collapses": lambda: shares_left(
        "aesthetic", DIVERSITY, method="DRaFT"
    ),
    "pickscore-ends-fid-vgg-flow-pmp": lambda: less(
        ends_of("pickscore", "fid", method="VGG-Flow-PMP"),
        ends_of("pickscore", "fid", method="VGG-Flow"),
    ),
    "beta-overall-reward": lambda: less(
        ends_of("beta", "reward", beta=max(betas(), key=float)),
        ends_of("beta", "reward", beta=min(betas(), key=float)),
    ),
}


def betas():
    "Of the sweep, as the file writes them"
    with (ROOT / "data/results/beta-paper.csv").open() as file:
        return {row["beta"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_claim_again_from_the_file_alone(name):
    row = next(row for row in judge_claims() if row["id"] == name)
    values = BY_HAND[name]()
    mean, n = statistics.fmean(values), len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    assert row["n"] == n and row["mean"] == pytest.approx(mean, rel=1e-6)
    assert row["low"] == pytest.approx(mean - half, rel=1e-6)
    assert row["high"] == pytest.approx(mean + half, rel=1e-6)
    inside = row["rule"][0] < mean < row["rule"][1]
    if row["verdict"] != claims.UNDECIDED:
        assert row["verdict"] == (claims.REPRODUCED if inside else claims.CONTRARY)
        assert row["p_adjusted"] < 0.05


def test_p_adjusted_is_benjamini_and_hochbergs():
    "From the largest p downwards: p times the number of tests over its rank"
    tested = sorted(
        (r for r in judge_claims() if r.get("p") is not None), key=lambda r: r["p"]
    )
    assert len(tested) > 50
    least = 1.0
    for rank, row in reversed(list(enumerate(tested, 1))):
        least = min(least, row["p"] * len(tested) / rank)
        assert row["p_adjusted"] == pytest.approx(least, rel=1e-9)
    assert tested[-1]["p_adjusted"] > tested[0]["p"]


@pytest.mark.parametrize("low,high", [(0.0, np.inf), (-np.inf, 0.5), (-0.1, 0.1)])
def test_p_is_below_the_level_where_the_interval_leaves_the_rule_or_keeps_it(low, high):
    noise = np.random.default_rng(0)
    seen = set()
    for centre in np.linspace(-0.6, 0.9, 60):
        row = judge(noise.normal(centre, 0.03, 3), low, high)
        keeps = low < row["low"] and row["high"] < high
        leaves = row["high"] <= low or row["low"] >= high
        wanted = {(True, False): claims.REPRODUCED, (False, True): claims.CONTRARY}
        assert row["verdict"] == wanted.get((keeps, leaves), claims.UNDECIDED)
        seen.add(row["verdict"])
    assert len(seen) >= 2
