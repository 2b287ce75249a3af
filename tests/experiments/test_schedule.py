"The graph: from nothing to figures, killed and called again"

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_tables import read_rows as read_table
from toy_checkout import make_figures, rewrite, start_figures

from vggflow.common.files import lock, sha256
from vggflow.common.seals import read_rows


def wait_for(condition, process=None, log=None):
    "Poll until it holds"
    begun = time.time()
    while not condition():
        assert time.time() - begun < 180, "too slow"
        if process and process.poll() is not None:
            pytest.fail(log.read_text() if log else process.communicate()[0])
        time.sleep(0.05)


def made_at(folder):
    "When finished runs were made"
    return {file: file.stat().st_mtime_ns for file in folder.glob("*/run.ipynb")}


def test_figures_from_nothing_then_nothing_to_do(checkout):
    status, text = make_figures("--profile", "smoke")
    assert status == 0, text
    figures = checkout / "figures" / "smoke"
    for end in ("png", "pdf", "json"):
        assert (figures / f"figtoy.{end}").stat().st_size
    assert "[toy] vgg-flow seed 0: update 3/3, reward 3.00; done in" in text
    assert "figures/smoke/figtoy.png" in text
    assert [path.name for path in (checkout / "figures").iterdir()] == ["smoke"]
    table = checkout / "data/results/toy-smoke.csv"
    ends = [(row["method"], float(row["reward"])) for row in read_table(table)]
    assert ends == [
        ("VGG-Flow", 0.0),
        ("VGG-Flow", 3.0),
        ("ReFL", 0.0),
        ("ReFL", 1.5),
    ]
    record = json.loads((figures / "figtoy.json").read_text())
    assert record["profile"] == "smoke"
    assert record["data"]["results"]["sha256"] == sha256(table)
    before = made_at(checkout / "data/runs/toy")
    status, text = make_figures("--profile", "smoke")
    assert status == 0 and "starts" not in text and "drawing" not in text, text
    assert before == made_at(checkout / "data/runs/toy")


def test_a_new_draw_of_the_same_results_leaves_the_same_files(checkout):
    assert make_figures("--profile", "paper", "figsweep")[0] == 0
    kept = [*(checkout / "figures").glob("*"), *(checkout / "data/results").glob("*")]
    before = {file: file.read_bytes() for file in kept}
    shutil.rmtree(checkout / "data/runs")
    for file in before:
        os.utime(file, (1, 1))  # a clone keeps no dates
    template = checkout / "nbs/experiments/toyfig.ipynb"
    os.utime(template)
    status, text = make_figures("--profile", "paper", "figsweep")
    assert status == 0 and "starts" not in text, text
    assert before == {file: file.read_bytes() for file in before}


def test_sigkill_and_again(checkout):
    process = start_figures("--profile", "paper", "--cores", "1")
    runs = checkout / "data/runs/toy"

    def half_done():
        open_runs = [d for d in runs.glob("*") if not (d / "run.ipynb").exists()]
        return [d for d in open_runs if 3 < len(read_rows(d / "metrics.jsonl")) < 25]

    wait_for(lambda: made_at(runs) and half_done(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done, cut = made_at(runs), half_done()[0]
    rows = len(read_rows(cut / "metrics.jsonl"))
    assert len(done) == 1 and not (checkout / "figures/figtoy.png").exists()
    status, text = make_figures("--profile", "paper", "--cores", "1")
    assert status == 0, text
    assert done.items() <= made_at(runs).items(), "a finished run was repeated"
    assert "resumes after update" in text and (checkout / "figures/figtoy.png").exists()
    assert len(read_rows(cut / "metrics.jsonl")) == 30 and rows < 30


def test_sigkill_of_the_driver_alone(checkout):
    rewrite(checkout, ("updates = 30\npause = 0.1", "updates = 12\npause = 0.1"))
    runs, log = checkout / "data/runs/toy", checkout / "log"
    call = [sys.executable, "-m", "vggflow.cli", "figures", "--profile", "paper"]
    with log.open("a") as file:
        process = subprocess.Popen(call, stdout=file, stderr=file)
        wait_for(lambda: any(map(read_rows, runs.glob("*/metrics.jsonl"))), process, log)
        process.kill()
        process.wait()
        again = subprocess.run(call, stdout=file, stderr=file, timeout=240)
    text = log.read_text()
    assert again.returncode == 0, text
    # the scheduler lived on, and the second call waited for its runs
    assert text.count("starts (") == 2 and "resumes" not in text, text
    for file in runs.glob("*/metrics.jsonl"):
        assert [row["update"] for row in read_rows(file)] == list(range(1, 13))
    assert (checkout / "figures/figtoy.png").exists()


def test_only_a_named_figure_and_redraw(checkout):
    png = checkout / "figures/smoke/figsweep.png"
    status, text = make_figures("figsweep", "--profile", "smoke")
    assert status == 0 and png.exists(), text
    assert not (checkout / "data/results/toy-smoke.csv").exists()
    shutil.rmtree(checkout / "data/runs")
    shutil.rmtree(checkout / "figures")
    status, text = make_figures("--redraw")
    assert status == 0 and "starts" not in text and png.exists(), text
    assert "no table yet for figtoy, fig07" in text
    status, text = make_figures("figsweep", "--profile", "smoke", "--", "--dry-run")
    assert status == 0 and "2 kept from the committed table" in text, text
    assert "rule run" not in text
    status, text = make_figures("figsweep", "--profile", "smoke")
    assert status == 0 and "starts" not in text, text
    shutil.rmtree(checkout / ".snakemake")  # as in a fresh clone
    status, text = make_figures("figsweep", "--profile", "smoke", "--fresh")
    assert status == 0 and text.count("starts (") == 2, text


def test_a_failing_run_does_not_stop_the_others(checkout):
    rewrite(checkout, ("lr = 1\n", "lr = 1\nbad = true\n"))
    status, text = make_figures("--profile", "smoke", "--cores", "1")
    assert status != 0 and "the disk is full" in text and ".failed.ipynb" in text
    assert "refl seed 0: update 3/3, reward 1.50; done" in text
    assert not list(checkout.glob("figures/**/figtoy.png"))


def test_a_second_call_waits(checkout):
    path = checkout / ".lock"
    code = (
        "from vggflow.common.files import lock\n"
        f"with lock({str(path)!r}, 'x'): print('mine', flush=True)"
    )
    with lock(path, "x"):
        call = [sys.executable, "-c", code]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        assert "waiting" in process.stdout.readline() and process.poll() is None
    assert process.communicate(timeout=60)[0] == "mine\n"
