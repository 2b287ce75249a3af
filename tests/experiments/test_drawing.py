"Figures: when they are drawn, their records, their bytes"

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from toy_checkout import ROOT, finish

from vggflow.common.data import data_file
from vggflow.common.files import sha256
from vggflow.experiments.cards import read_cards, read_experiments, template_path
from vggflow.experiments.figures import draw_figure, figure_state, read_figures, redraw
from vggflow.experiments.paper_data import published_curve
from vggflow.experiments.tables import collect

matplotlib.use("agg")
COMMITTED = sorted((ROOT / "figures").glob("*.json"))


def make_table(*rewards, profile="smoke"):
    "Finished runs and their table"
    for card, reward in zip(read_cards("toy", profile), rewards or (1.0, 1.0)):
        finish(card, reward)
    return collect("toy", profile)


def test_a_figure_knows_when_it_is_out_of_date(checkout):
    make_table()
    figure = read_figures()["figtoy"]
    assert figure_state(figure, "smoke") == "missing"
    draw_figure("figtoy", "smoke")
    assert figure_state(figure, "smoke") == ""
    wider = replace(figure, parameters=dict(width=2.0))
    assert figure_state(wider, "smoke") == "parameters changed"
    template = template_path("toyfig")
    code = template.read_text()
    template.write_text(code.replace("plt.subplots()", "plt.subplots( )  # form"))
    assert figure_state(figure, "smoke") == "", "form and comments do not count"
    template.write_text(code.replace("plt.subplots()", "plt.subplots(2)"))
    assert figure_state(figure, "smoke") == "template changed"
    template.write_text(code.replace('"metadata": {', '"metadata": {"x": 1,', 1))
    assert figure_state(figure, "smoke") == ""
    make_table(2.0, 1.0)
    assert figure_state(figure, "smoke") == "toy-smoke.csv has changed"


def test_a_figure_drawn_from_uncommitted_source_says_so(checkout):
    "And is drawn again from a commit"
    make_table()
    figure = read_figures()["figtoy"]
    (checkout / ".gitignore").write_text("/data/runs/\n/figures/smoke/\n")
    git(checkout, "init", "-q")
    png = draw_figure("figtoy", "smoke")
    record = json.loads(png.with_suffix(".json").read_text())
    assert "uncommitted" not in record, "there is no commit to differ from"
    clean = png.read_bytes()
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "all")
    (checkout / "notes.py").write_text("x = 1")
    draw_figure("figtoy", "smoke", fresh=True)
    assert json.loads(png.with_suffix(".json").read_text())["uncommitted"] is True
    assert png.read_bytes() != clean
    assert figure_state(figure, "smoke") == ""
    (checkout / "notes.py").unlink()
    assert figure_state(figure, "smoke") == "drawn from source that was in no commit"
    draw_figure("figtoy", "smoke")
    assert figure_state(figure, "smoke") == "" and png.read_bytes() == clean


def git(folder, *words):
    "In a small checkout, as nobody"
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True)


def test_a_figure_that_is_up_to_date_is_left_alone(checkout):
    make_table()
    png = draw_figure("figtoy", "smoke")
    record = png.with_suffix(".json").read_bytes()
    png.write_bytes(b"drawn with the fonts of another machine")
    draw_figure("figtoy", "smoke")
    assert redraw(["figtoy"], "smoke") == 0
    assert png.read_bytes() == b"drawn with the fonts of another machine"
    draw_figure("figtoy", "smoke", fresh=True)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert png.with_suffix(".json").read_bytes() == record


def test_a_record_has_nothing_that_changes_with_a_commit(checkout):
    make_table()
    record = json.loads(draw_figure("figtoy", "smoke").with_suffix(".json").read_text())
    assert not [name for name in record if "commit" in name]


def test_drawing_one_profile_touches_no_other(checkout):
    make_table()
    make_table(profile="paper")
    shown = draw_figure("figtoy", "paper")
    assert shown == checkout / "figures" / "figtoy.png"
    before = {file: file.read_bytes() for file in shown.parent.glob("figtoy.*")}
    other = draw_figure("figtoy", "smoke")
    assert other == checkout / "figures" / "smoke" / "figtoy.png"
    assert before == {file: file.read_bytes() for file in shown.parent.glob("figtoy.*")}


def test_a_figure_whose_sheets_are_gone_is_kept(checkout, capsys):
    make_table()
    png = draw_figure("figtoy", "smoke")
    file = png.with_suffix(".json")
    record = json.loads(file.read_text())
    record["data"]["samples"] = dict(file="data/results/gone.png", sha256="")
    file.write_text(json.dumps(record))
    before = png.read_bytes()
    assert redraw(["figtoy"], "smoke") == 0
    assert png.read_bytes() == before
    assert "figtoy is kept as it is: gone.png is gone" in capsys.readouterr().out


# --- the committed ones


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_record_names_its_data(file):
    record = json.loads(file.read_text())
    assert {"profile", "data", "versions", "numbers", "seeds", "runs"} <= set(record)
    assert "commit" not in record
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert file.with_suffix(".pdf").read_bytes()[:4] == b"%PDF"
    for entry in record["data"].values():
        if (ROOT / entry["file"]).exists():
            assert sha256(ROOT / entry["file"]) == entry["sha256"], (
                f"{file.name} was drawn from another {entry['file']}: call "
                f"vggflow figure {record['figure']} --profile {record['profile']}"
            )


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_figure_is_up_to_date(file):
    "So that drawing all again leaves a clean tree; the data of every figure are committed"
    record = json.loads(file.read_text())
    figure = read_figures(read_experiments(ROOT / "experiments.toml"))[record["figure"]]
    assert record["profile"] == figure.shown
    assert figure_state(figure, figure.shown) == ""


def test_the_papers_figures_are_kept():
    records = [json.loads(file.read_text()) for file in COMMITTED]
    papers = {record["figure"] for record in records if record["profile"] == "paper"}
    assert {f"fig{number:02}" for number in range(1, 21)} | {"table1"} <= papers


def test_same_data_same_bytes(tmp_path):
    import matplotlib.pyplot as plt

    from vggflow.experiments.plots import draw_band, figure_record, save_figure
    from vggflow.experiments.style import use_style

    drawn = []
    with plt.style.context("default"):
        use_style()
        for i in range(2):
            fig, ax = plt.subplots()
            curve = published_curve(5, "reward", "VGG-Flow")
            draw_band(ax, curve, "VGG-Flow", ls="--")
            record = figure_record("smoke", dict(paper=data_file("paper/figures.csv")))
            paths = save_figure(fig, "x", record, tmp_path / str(i))
            drawn.append([Path(path).read_bytes() for path in paths])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_no_figure_of_the_project_is_drawn_from_uncommitted_source(file):
    assert "uncommitted" not in json.loads(file.read_text())
