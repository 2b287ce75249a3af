"Every figure template on a small table: what it writes, what it refuses"

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from toy_checkout import ROOT

from vggflow.common.files import sha256, write_text
from vggflow.experiments.results import by_series, read_results
from vggflow.experiments.style import COLORS, PAGE
from vggflow.experiments.tables import write_table

matplotlib.use("agg")
PAPERS = [*(ROOT / "figures").glob("fig*.json"), ROOT / "figures" / "table1.json"]
MAIN = [method for method in COLORS if method != "Base"]
SWEEPS = dict(
    beta=("beta", [10.0, 30.0, 100.0]),
    eta=("eta", ["t^2", "t", "0"]),
    subsampling=("transitions", [5, 10]),
)


@pytest.mark.parametrize("file", sorted(PAPERS), ids=lambda path: path.stem)
def test_numbers_are_those_of_the_tables(file):
    record = json.loads(file.read_text())
    files = [Path(entry["file"]) for entry in record["data"].values()]
    tables = [f.stem for f in files if f.parent.name == "results" and f.suffix == ".csv"]
    results = {name: read_results(*name.rsplit("-", 1)) for name in tables}
    for row in record["numbers"]:
        if "reward" in row and "update" in row:
            experiment = row.get("experiment", record["experiment"])
            mine = rows_of(row, record, results[f"{experiment}-{record['profile']}"])
            ends = {r["seed"]: r["reward"] for r in mine if r["update"] == row["update"]}
            assert row["reward"] == pytest.approx(np.mean(list(ends.values())), rel=1e-5)


def rows_of(row, record, results):
    "The rows of a table that a number of a figure is of"
    vary = record.get("vary", "method")
    if row["method"] == "Base":
        return results.rows
    if "run" in row:
        return [r for r in results.rows if r["run"] == row["run"]]
    return by_series(results, vary)[row[vary]]


# --- invented tables


def invented(experiment, seeds=2, methods=MAIN, updates=40):
    "Rows and runs in the shape of a table: numbers for trying the templates"
    vary, values = SWEEPS.get(experiment, ("method", methods))
    rows, runs = [], []
    for place, value in enumerate(values):
        for seed in range(seeds):
            own = dict(method="VGG-Flow", seed=seed, world="emoji")
            own |= dict(reward=f"emoji-{experiment}", updates=updates, steps=20)
            own |= dict(transitions=5, images_per_prompt=4, eval_prompts=6)
            own[vary] = value
            run = f"{str(value).rpartition(':')[2]}-s{seed}"
            runs.append(dict(id=run, parameters=own))
            for update in range(0, updates + 1, 10):
                row = dict(method=own["method"], seed=seed, run=run, update=update)
                row[vary] = value
                way = (1 + 0.5 * place + 0.05 * seed) * update / updates
                rows.append(row | invented_numbers(way))
    return rows, runs


def invented_numbers(way):
    "Metrics of a run that has come so far"
    fall = np.exp(-0.4 * way**2)
    return dict(
        reward=2 * way,
        perceptual_diversity=0.4 * fall,
        clip_diversity=0.25 * fall,
        fid=2000 - 1250 * fall,
        fid_base=760.0,
        accuracy=fall,
    )


def write_results(root, experiment, rows, runs):
    "A table, its record and its sample sheets, as real ones"
    table = root / "data" / "results" / f"{experiment}-smoke.csv"
    write_table(table, rows)
    record = dict(runs=runs, versions={})
    write_text(table.with_suffix(".json"), json.dumps(record))
    folder = table.with_name(f"{table.stem}-samples")
    folder.mkdir(exist_ok=True)
    first = [run["id"] for run in runs if run["parameters"]["seed"] == 0]
    for run in first:
        for update in range(0, 41, 10):
            pixels = np.random.default_rng(update).random((6 * 8, 4 * 8, 3))
            plt.imsave(folder / f"{run}-{update:05}.png", pixels)
    sheets = {run: dict.fromkeys(range(0, 41, 10)) for run in first}
    prompts = [f"prompt {i}" for i in range(1, 7)]
    kept = dict(seed=0, prompts=prompts, sheets=sheets)
    write_text(Path(f"{folder}.json"), json.dumps(kept))


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A checkout with small invented tables, written as real ones"
    (tmp_path / "experiments.toml").write_text('[profiles]\nsmoke = ""\n')
    monkeypatch.setenv("VGGFLOW_ROOT", str(tmp_path))
    for experiment in ("aesthetic", "hpsv2", "pickscore", *SWEEPS):
        write_results(tmp_path, experiment, *invented(experiment))
    yield tmp_path
    plt.close("all")


def draw(template, **parameters):
    "Run the cells of a template here, with other parameters; its figure"
    notebook = json.loads((ROOT / "nbs/experiments" / f"{template}.ipynb").read_text())
    scope = {}
    with plt.rc_context():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), scope)
                if "parameters" in cell["metadata"].get("tags", []):
                    assert set(parameters) <= set(scope)
                    scope.update(parameters)
    fig = scope["fig"]
    texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip()]
    assert fig.get_size_inches()[0] == PAGE
    assert min(t.get_fontsize() for t in texts) >= 7, "too small at the width of a page"
    return fig


FIGURES = [
    ("convergence", "fig05", {}),
    ("convergence", "fig11", dict(experiment="beta", vary="beta")),
    ("pareto", "fig08", dict(experiment="hpsv2")),
    ("pareto", "fig14", dict(experiment="eta", vary="eta")),
    ("pareto", "fig16", dict(experiment="subsampling", vary="transitions")),
    ("samples", "fig02", {}),
    ("samples", "fig17", dict(kind="degradation")),
    ("samples", "fig18", dict(page=1)),
    ("table1", "table1", {}),
    ("teaser", "fig01", {}),
]


@pytest.mark.parametrize("template,figure,more", FIGURES)
def test_template_draws_from_the_table_alone(root, template, figure, more):
    out = root / "figures"
    draw(template, figure=figure, profile="smoke", out=str(out), **more)
    record = json.loads((out / f"{figure}.json").read_text())
    known = {"profile", "data", "versions", "numbers", "seeds", "runs", "experiment"}
    assert known <= set(record) and record["numbers"]
    assert (out / f"{figure}.png").stat().st_size > 1e4
    assert (out / f"{figure}.pdf").read_bytes()[:4] == b"%PDF"
    name = f"data/results/{more.get('experiment', 'aesthetic')}-smoke.csv"
    assert record["data"]["results"] == dict(file=name, sha256=sha256(root / name))


MOST = ["convergence", "pareto", "samples", "table1"]


@pytest.mark.parametrize("template", MOST)
def test_a_method_of_ones_own_is_drawn_in_a_colour_of_its_own(root, template):
    rows, runs = invented("aesthetic", methods=["VGG-Flow", "my.py:Mine"])
    write_results(root, "aesthetic", rows, runs)
    figure = "own" if template in ("convergence", "pareto") else "fig02"
    fig = draw(template, figure=figure, profile="smoke", out=str(root / "figures"))
    texts = {text.get_text().split("\n")[0] for text in fig.findobj(matplotlib.text.Text)}
    assert "Mine" in texts and "my.py:Mine" not in texts


@pytest.mark.parametrize("template", MOST)
def test_one_seed_is_enough(root, template):
    write_results(root, "aesthetic", *invented("aesthetic", seeds=1))
    draw(template, profile="smoke", out=str(root / "figures"))


def repeat_beginnings(root, updates=20, add=0.0, leave=()):
    "A table of the beginnings of the runs of `aesthetic`, evaluated every five updates"
    rows, runs = invented("aesthetic")
    begun = []
    for run in runs:
        if run["id"] not in leave:
            own = {**run["parameters"], "updates": updates, "eval_every": 5}
            begun.append(dict(id=f"early-{run['id']}", parameters=own))
    new = []
    for row in rows:
        for update in (row["update"], row["update"] + 5):
            if row["run"] not in leave and update <= updates:
                own = dict(run=f"early-{row['run']}", update=update, updates=updates)
                new.append({**row, **own, "reward": row["reward"] + add})
    table = root / "data" / "results" / "early-smoke.csv"
    write_table(table, new)
    write_text(table.with_suffix(".json"), json.dumps(dict(runs=begun, versions={})))
    return runs


def test_evaluations_of_repeated_beginnings_are_added(root):
    plain = read_results("aesthetic", "smoke")
    runs = repeat_beginnings(root)
    results = read_results("aesthetic", "smoke")
    first = results.rows[0]["run"]
    updates = [row["update"] for row in results.rows if row["run"] == first]
    assert updates == [0, 5, 10, 15, 20, 30, 40]
    assert results.early.name == "early-smoke.csv" and plain.early is None
    assert set(results.rows[1]) == set(plain.rows[0])
    assert {row["run"] for row in results.rows} == {row["run"] for row in plain.rows}
    assert read_results("beta", "smoke").early is None, "not all of its runs were repeated"
    repeat_beginnings(root, leave=[runs[0]["id"]])
    assert read_results("aesthetic", "smoke").rows == plain.rows
    repeat_beginnings(root, add=0.1)
    says = "early-smoke.csv is not of the runs of aesthetic-smoke.csv"
    with pytest.raises(ValueError, match=says):
        read_results("aesthetic", "smoke")


@pytest.mark.parametrize(
    "template", ["convergence", "pareto", "samples", "table1", "teaser"]
)
def test_without_a_table_nothing_is_drawn(root, template):
    with pytest.raises(FileNotFoundError, match="make figures PROFILE=paper"):
        draw(template, profile="paper", out=str(root / "figures"))
    assert not (root / "figures").exists()
