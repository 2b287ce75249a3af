"Result tables: rows outlive their runs, and a table knows when it is out of date"

import csv
import json
import shutil

import pytest
from toy_checkout import finish, rewrite

from vggflow.common.files import sha256, write_text
from vggflow.experiments import tables
from vggflow.experiments.cards import read_cards
from vggflow.experiments.makers import note_maker
from vggflow.experiments.schedule import make_plan
from vggflow.experiments.tables import (
    collect,
    kept_runs,
    table_path,
    table_record,
    table_state,
)


def read_rows(table):
    "Rows of a table, as text"
    with table.open() as file:
        return list(csv.DictReader(file))


def test_rows_are_kept_where_runs_are_gone(checkout):
    for card in read_cards("toy", "smoke") + read_cards("sweep", "smoke"):
        finish(card)
    before = collect("toy", "smoke").read_bytes()
    collect("sweep", "smoke")
    shutil.rmtree(checkout / "data/runs")
    assert collect("toy", "smoke").read_bytes() == before
    assert table_state("toy", "smoke") == ""
    plan = make_plan("smoke")
    assert not plan.unkept("toy") and len(plan.kept["toy"]) == 2
    assert len(make_plan("smoke", fresh=True).unkept("toy")) == 2
    with pytest.raises(FileNotFoundError, match="2 of 2 runs"):
        collect("toy", "smoke", fresh=True)
    # the run that both ask for is kept by the other's table
    table_path("toy", "smoke").unlink()
    left = [card.parameters["method"] for card in make_plan("smoke").unkept("toy")]
    assert left == ["ReFL"]


def test_a_number_that_is_called_like_a_setting_is_kept(checkout):
    "The control energy of an evaluation, and the setting that asks for it"
    for card in read_cards("toy", "smoke"):
        finish(card)
        file = card.folder / "eval.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_text(file, "".join(json.dumps({**row, "lr": 7.5}) + "\n" for row in rows))
    before = collect("toy", "smoke").read_bytes()
    assert {row["lr"] for row in read_rows(table_path("toy", "smoke"))} == {"7.5"}
    shutil.rmtree(checkout / "data/runs")
    assert collect("toy", "smoke").read_bytes() == before


def test_changed_settings_keep_only_the_runs_that_are_still_asked_for(checkout):
    for card in read_cards("toy", "smoke"):
        finish(card)
    collect("toy", "smoke")
    shutil.rmtree(checkout / "data/runs")
    rewrite(checkout, ("lr = 0.5", "lr = 0.25"))
    state = "other settings: 1 runs missing, 1 not asked for"
    assert table_state("toy", "smoke") == state
    (new,) = make_plan("smoke").unkept("toy")
    finish(new, 2.0)
    rows = read_rows(collect("toy", "smoke"))
    ends = [(r["method"], r["lr"], r["reward"]) for r in rows if r["update"] == "3"]
    assert ends == [("VGG-Flow", "1.0", "1.0"), ("ReFL", "0.25", "2.0")]
    rewrite(checkout, ("lr = 1\n", "lr = 7\n"), ("lr = 0.5", "lr = 9"))
    assert table_state("toy", "smoke") == "made by other settings"


def test_a_partial_table_says_what_is_missing(checkout):
    one, other = read_cards("toy", "smoke")
    with pytest.raises(FileNotFoundError, match="nothing to collect"):
        collect("toy", "smoke", partial=True)
    finish(one)
    with pytest.raises(FileNotFoundError, match=f"1 of 2 runs .* first {other.id}"):
        collect("toy", "smoke")
    assert table_record(collect("toy", "smoke", partial=True))["missing"] == [other.id]
    assert table_state("toy", "smoke") == "partial: 1 runs missing"
    assert make_plan("smoke").unkept("toy") == [one, other]


def test_a_table_knows_when_it_is_out_of_date(checkout):
    cards = read_cards("toy", "smoke")
    for card in cards:
        finish(card)
    table = collect("toy", "smoke")
    assert table_state("toy", "smoke") == ""
    finish(cards[0], 5.0)
    assert table_state("toy", "smoke") == f"older than run {cards[0].id}"
    table.write_text(table.read_text() + "x\n")
    assert table_state("toy", "smoke") == "does not match its record"
    assert not kept_runs("toy", "smoke")


def test_a_table_made_again_is_the_same_whatever_commit_and_versions(checkout, monkeypatch):
    cards = read_cards("toy", "smoke")
    for card in cards:
        finish(card)
        note_maker(card, card.folder)
    table = collect("toy", "smoke")
    record = table.with_suffix(".json")
    before = record.read_bytes()
    (maker,) = table_record(table)["makers"]
    assert maker["versions"]["torch"] and "toy.ipynb" in maker["code"]
    monkeypatch.setattr(tables, "versions", lambda: dict(python="another"))
    collect("toy", "smoke")
    assert record.read_bytes() == before
    finish(cards[0], 5.0)
    collect("toy", "smoke")
    assert json.loads(record.read_text())["versions"] == dict(python="another")


def test_tables_of_the_first_edition_are_readable(checkout):
    "Their records name one commit, and not every run names its own"
    for card in read_cards("toy", "smoke"):
        finish(card)
    table = collect("toy", "smoke")
    record = table_record(table)
    for run in record["runs"]:
        del run["made"]
    del record["makers"]
    write_text(table.with_suffix(".json"), json.dumps(dict(record, commit="old")))
    kept = kept_runs("toy", "smoke").values()
    assert [run["made"] for _, run, _ in kept] == [[dict(commit="old")]] * len(kept)


def test_sample_sheets_are_bundled(checkout):
    cards = read_cards("toy", "smoke")
    for card in cards:
        finish(card, sheets=(0, 1, 2, 3))
    collect("toy", "smoke")
    first, other = (card.id for card in cards)
    folder = checkout / "data/results/toy-smoke-samples"
    names = {f"{card.id}-{update:05}.png" for card in cards for update in (0, 1, 2, 3)}

    def there():
        return {file.name for file in folder.iterdir()}

    assert there() == names
    assert (folder / f"{first}-00002.png").read_text() == f"{first} 2"
    shutil.rmtree(cards[0].folder)
    collect("toy", "smoke")
    assert there() == names, "kept, as its rows are"
    record = json.loads((checkout / "data/results/toy-smoke-samples.json").read_text())
    assert record["prompts"] == ["a cat"] and set(record["sheets"]) == {first, other}
    checksum = sha256(folder / f"{first}-00002.png")
    assert record["sheets"][first]["2"]["sha256"] == checksum
    rewrite(checkout, ("lr = 0.5", "lr = 1\nseed = 9"))
    finish(read_cards("toy", "smoke")[1])
    collect("toy", "smoke")
    assert there() == {f"{first}-{update:05}.png" for update in (0, 1, 2, 3)}


def test_sheets_with_a_name_are_bundled(checkout):
    for card in read_cards("toy", "smoke"):
        finish(card)
        write_text(card.folder / "samples" / "model-0.png", card.id)
        write_text(card.folder / "samples" / "model-0.json", '{"name": "base"}')
    collect("toy", "smoke")
    record = json.loads((checkout / "data/results/toy-smoke-samples.json").read_text())
    for run, sheets in record["sheets"].items():
        assert sheets["model-0"]["name"] == "base"
        file = checkout / "data/results/toy-smoke-samples" / f"{run}-model-0.png"
        assert file.read_text() == run
