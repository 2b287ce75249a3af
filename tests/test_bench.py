"The bench at its small size, in this process, and what the pages say of it."

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu, measure, projection
from benchmarks.__main__ import SIZES, main
from benchmarks.recipes import REFERENCE

ROOT = Path(__file__).parents[1]
STAGES = [stage for stage in SIZES["small"] if stage != "gpu"]  # here there is none


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "All stages, measured once"
    folder = tmp_path_factory.mktemp("bench")
    main(["--size", "small", "--out", str(folder)])
    return folder


def read(folder, stage):
    return json.loads((folder / f"{stage}.json").read_text())


def test_every_stage_names_machine_versions_seed_and_settings(out):
    for stage in STAGES:
        found = read(out, stage)
        assert found["machine"]["cores"] and found["versions"]["torch"]
        assert found["seed"] == 0 and found["settings"] == SIZES["small"][stage]


def test_what_is_there_is_not_measured_again(out, capsys):
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.json")}
    main([*STAGES, "--size", "small", "--out", str(out)])
    assert capsys.readouterr().out.count("is up to date") == len(STAGES)
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.json")}


def test_a_stage_with_other_settings_is_measured_again(out, capsys):
    file = out / "projection.json"
    file.write_text(file.read_text().replace('"size": "small"', '"size": "other"'))
    main(["projection", "--size", "small", "--out", str(out)])
    assert "is up to date" not in capsys.readouterr().out
    assert read(out, "projection")["size"] == "small"


def test_an_update_is_cheaper_than_the_references_and_dearer_than_the_floor(out):
    for row in read(out, "updates")["rows"]:
        assert 0 < row["floor_share"] < 1
        if row["method"] != REFERENCE:
            assert row["of_reference"]["median"] < 1


def test_growth_is_to_the_first_value_and_processes_have_efficiencies(out):
    found = read(out, "growth")
    for name in ("batch", "steps", "transitions", "resolution", "parameters"):
        rows = [row for row in found["rows"] if row["along"] == name]
        assert rows[0]["of_first"]["median"] == 1 and len(rows) > 1
    together = found["processes"]
    assert 0 < together["efficiency"]["median"] < 1.5
    assert set(together["seconds"]) == {"alone", "half", "shared", "runs"}


def test_the_profile_is_the_sum_of_its_stages(out):
    found = read(out, "quick")
    assert found["total_minutes"] == pytest.approx(sum(found["minutes"].values()), abs=0.02)
    runs = sum(row["runs"] for row in found["updates"])
    assert runs == found["cards"]


def test_sizes_of_a_gpu_run_on_a_cpu_at_a_tiny_one():
    words = "--size tiny --resolution 64 --steps 2 --transitions 1 --repeats 1"
    found = gpu.measure([*words.split(), "--device", "cpu", "--methods", "VGG-Flow"])
    assert [row["method"] for row in found["rows"]] == [REFERENCE, "VGG-Flow"]
    assert found["rows"][1]["of_reference"]["median"] > 0 and found["device"] == "CPU"


def test_a_paired_ratio_does_not_see_a_slow_round():
    assert measure.paired([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])["high"] == 0.5


def test_interleaved_measures_every_case_once_a_round():
    calls = []
    cases = {name: name for name in "abc"}
    found = measure.interleaved(cases, 2, clock=lambda name: calls.append(name) or 1.0)
    assert found == {name: [1.0, 1.0] for name in "abc"}
    assert calls == [*"abc", *"bca", *"cab"]


def test_twice_the_gpus_do_not_more_than_twice_the_work():
    rows = projection.project(tflop=185.0, megabytes=100.0)
    assert [row["gpus"] for row in rows] == [1, 8, 64, 512]
    hours = [row["hours"] for row in rows]
    assert hours == sorted(hours, reverse=True)
    assert all(row["efficiency"] <= 1.001 for row in rows)
    assert rows[0]["efficiency"] == pytest.approx(1, abs=1e-3)


def test_the_readme_says_what_was_counted():
    text = (ROOT / "README.md").read_text()
    said = re.search(
        r"takes ([\d.]+) of that loop's operations at 512², the whole update with its "
        r"sampling ([\d.]+); with two ([\d.]+) and ([\d.]+)\.",
        text,
    )
    rows = read(ROOT / "data/bench", "passes")["operations"]
    counted = {row["method"]: row for row in rows if row["resolution"] == 512}
    methods = ("VGG-Flow, reuse", "VGG-Flow")
    shares = [
        counted[m][f"{kind}_ratio"] for m in methods for kind in ("training", "whole")
    ]
    assert list(said.groups()) == [f"{share:.2f}" for share in shares]
