"Commands run by children of a warm process: the same notebooks, signals and ends"

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import nbformat
import psutil
import pytest
from test_schedule import wait_for
from toy_checkout import make_checkout, make_figures, start_figures, write_notebook

from vggflow.common.seals import read_rows
from vggflow.experiments.cards import read_cards
from vggflow.experiments.warm import WarmProcess, may_fork

pytestmark = pytest.mark.skipif(not may_fork(), reason="plain kernels: nothing forks here")
OWNER = """
import json, sys
from vggflow.experiments.warm import WarmProcess
with WarmProcess() as warm:
    print(json.dumps([warm.command, warm.process.pid]), flush=True)
    sys.stdin.read()
"""
PARAMETERS = """
method: str = 'VGG-Flow'
updates: int = 1
seed: int = 0
lr: float = 0.0
pause: float = 0.0
out: str = ''
"""


def hear_signals():
    "Whatever this process does with them: under nohup it ignores SIGINT"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start(command, **more):
    "A process that hears signals, its output in a pipe"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, preexec_fn=hear_signals, **pipes, **more)


@contextmanager
def owner():
    "A process that owns a warm one: (itself, words before a command, the warm one)"
    process = start([sys.executable, "-c", OWNER], stdin=subprocess.PIPE)
    command, pid = json.loads(process.stdout.readline())
    try:
        yield process, command, psutil.Process(pid)
    finally:
        process.stdin.close()
        process.wait()


@pytest.fixture(scope="module")
def warm():
    "Words before a command"
    with owner() as (_, command, _):
        assert "-I" in command
        yield command


def toy(folder, *cells):
    "A checkout whose first card has a template of these cells: the card's file"
    folder.mkdir(exist_ok=True)
    make_checkout(folder)
    write_notebook(folder / "nbs/experiments/toy.ipynb", PARAMETERS, cells[0])
    notebook = nbformat.read(folder / "nbs/experiments/toy.ipynb", 4)
    notebook.cells += [nbformat.v4.new_code_cell(cell.strip()) for cell in cells[1:]]
    nbformat.write(notebook, folder / "nbs/experiments/toy.ipynb")
    before = os.environ.get("VGGFLOW_ROOT")
    os.environ["VGGFLOW_ROOT"] = str(folder)
    try:
        return read_cards("toy", "smoke")[0].save()
    finally:
        os.environ.pop("VGGFLOW_ROOT")
        os.environ.update({"VGGFLOW_ROOT": before} if before else {})


def run(command, card, **more):
    "Exit status and text of a card's run, in its checkout"
    process = start([*command, "run", str(card)], cwd=card.parents[4], **more)
    text = process.communicate(timeout=240)[0]
    return process.returncode, text


def outputs(card):
    "What a run's notebook shows, without what differs between two runs of a kernel"
    notebook = nbformat.read(card.with_name("run.ipynb"), 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags") for cell in cells]
    assert [cell.metadata.papermill.status for cell in cells] == ["completed"] * len(cells)
    assert notebook.metadata.papermill.duration > 0
    about = notebook.metadata.language_info, notebook.metadata.kernelspec
    return [(cell.execution_count, cell.outputs) for cell in cells], tags, about


SHOWS = """
import sys
from IPython.display import HTML, clear_output, display
print("a")
print("b")
print("error", file=sys.stderr)
"""
DRAWS = """
import matplotlib.pyplot as plt
plt.plot([0, 1]);
"""
CHANGES = """
print("gone")
clear_output()
shown = display(HTML("<b>old</b>"), display_id="x")
shown.update(HTML("<b>new</b>"))
{"a": 1}
"""


def test_warm_and_plain_leave_the_same_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    found = []
    with owner() as (_, command, _):
        for name, words in (
            ("plain", [sys.executable, "-m", "vggflow.cli"]),
            ("warm", command),
        ):
            card = toy(tmp_path / name, SHOWS, DRAWS, CHANGES, "1 + 1;", "%pwd")
            status, text = run(words, card)
            assert status == 0 and "done in" in text, text
            found.append(outputs(card))
            where = found[-1][0].pop()[1][0]["data"]["text/plain"]
            assert where == repr(str(tmp_path / name))
    assert found[0] == found[1]
    kinds = [output.output_type for _, shown in found[1][0] for output in shown]
    assert kinds == ["stream", "stream", "display_data", "display_data", "execute_result"]


SPOILS = """
import os, random, sys
import matplotlib.pyplot as plt
import mine
import numpy as np
print(mine.NAME, plt.rcParams["lines.linewidth"], os.getcwd(), "os.spoilt" in sys.modules)
first = random.random(), np.random.rand()
plt.rcParams["lines.linewidth"] = 77
sys.modules["os.spoilt"] = os
os.chdir("/")
random.seed(0)
np.random.seed(0)
print(*first)
"""


def test_two_notebooks_do_not_see_each_other(tmp_path, warm):
    said = []
    for name in ("a", "b"):
        card = toy(tmp_path / name, SPOILS)
        (tmp_path / name / "mine.py").write_text(f"NAME = {name!r}")
        status, text = run(warm, card)
        assert status == 0, text
        notebook = nbformat.read(card.with_name("run.ipynb"), 4)
        said.append(notebook.cells[-1].outputs[0].text.splitlines())
    states = [lines[0].split() for lines in said]
    assert [s[0] for s in states] == ["a", "b"]
    assert [s[2] for s in states] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert states[0][1] == states[1][1] != "77" and states[1][3] == "False"
    assert not set(said[0][1].split()) & set(said[1][1].split()), "the same random numbers"


def test_a_failing_cell_is_named_and_its_notebook_kept(tmp_path, warm):
    card = toy(tmp_path / "a", "print('so far')\nraise OSError('the disk is full')")
    status, text = run(warm, card)
    assert status == 2 and "toy failed: OSError: the disk is full" in text, text
    failed = nbformat.read(card.with_name("run.failed.ipynb"), 4)
    kinds = [output.output_type for output in failed.cells[-1].outputs]
    assert kinds == ["stream", "error"]
    assert not card.with_name("run.ipynb").exists()


BUSY = """
import os, time
from pathlib import Path
Path(out, "pid").write_text(str(os.getpid()))
time.sleep(120)
"""


def busy(folder, command):
    "A client, and the child that works for it"
    card = toy(folder, BUSY)
    client = start([*command, "run", str(card)], cwd=folder)
    file, begun = card.with_name("pid"), time.time()
    while not (file.exists() and file.read_text()):
        assert client.poll() is None and time.time() - begun < 120
        time.sleep(0.05)
    return card, client, psutil.Process(int(file.read_text()))


def gone(process, seconds=20):
    "Whether a process ends"
    end = time.time() + seconds
    while time.time() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_client_ends_the_child(tmp_path, warm, number, status):
    card, client, child = busy(tmp_path / "a", warm)
    client.send_signal(number)
    assert client.wait(60) == status and gone(child)
    left = {file.name for file in card.parent.glob("run*")}
    assert left == {"run.running.ipynb"}, "cut off: it goes on where it was"


def test_a_killed_client_leaves_no_child(tmp_path, warm):
    _, client, child = busy(tmp_path / "a", warm)
    client.kill()
    assert gone(child)


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_child_that_dies_is_said_in_one_line(tmp_path, warm, end):
    card = toy(tmp_path / "a", f"import os\n{end}")
    status, text = run(warm, card)
    assert status == 1 and text.splitlines()[-1].endswith("its process was killed"), text
    assert run(warm, toy(tmp_path / "b", "print(1)"))[0] == 0, "the warm one lives on"


def test_a_killed_owner_leaves_nothing(tmp_path):
    with owner() as (process, command, server):
        _, client, child = busy(tmp_path / "a", command)
        process.kill()
        assert gone(child) and gone(server)
        assert client.wait(60) != 0
        assert not os.path.exists(os.path.dirname(command[4]))


def test_without_the_warm_process_the_client_runs_the_command_itself(tmp_path):
    with owner() as (_, command, server):
        server.kill()
        status, text = run(command, toy(tmp_path / "a", "print(1)"))
    assert status == 0 and "done in" in text, text


def test_plain_commands_where_asked_or_where_the_socket_has_no_place(tmp_path, monkeypatch):
    plain = [sys.executable, "-m", "vggflow.cli"]
    monkeypatch.setenv("VGGFLOW_WARM", "0")
    with WarmProcess() as process:
        assert process.command == plain
    monkeypatch.delenv("VGGFLOW_WARM")
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with WarmProcess() as process:
        assert process.command == plain and not list(deep.iterdir())


def test_it_has_one_thread_when_it_forks(tmp_path):
    "With all that a run of the emoji world imports"
    code = (
        "import os; from vggflow.experiments.warm import import_for; "
        "import_for('finetune', 'convergence'); print(len(os.listdir('/proc/self/task')))"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("this system does not list threads")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert said.stdout.split() == ["1"], said.stderr


@pytest.mark.parametrize("whole", [True, False], ids=["ctrl-c", "sigterm"])
def test_figures_that_are_interrupted_end_their_runs_and_go_on(checkout, whole):
    process = start_figures("--profile", "paper", preexec_fn=hear_signals)
    runs = checkout / "data/runs/toy"
    wait_for(lambda: any(map(read_rows, runs.glob("*/metrics.jsonl"))), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "Snakemake, the warm process and a client"
    if whole:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.terminate()
    text = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if whole else 143), text
    assert all(map(gone, family)) and "Error" not in text, text
    assert not list(runs.glob("*/run.ipynb"))
    status, text = make_figures("--profile", "paper")
    assert status == 0 and "resumes after update" in text, text
    for file in runs.glob("*/metrics.jsonl"):
        assert [row["update"] for row in read_rows(file)] == list(range(1, 31))


def test_a_job_of_a_cluster_has_a_warm_process_of_its_own(checkout):
    "The call that Snakemake makes inside a job: no process of the caller is asked"
    card = read_cards("toy", "smoke")[0].save()
    target = f"run_toy:run={card.parent.name}"
    call = [sys.executable, "-m", "snakemake", "--mode", "remote", "--executor", "local"]
    call += ["--target-jobs", target, "--allowed-rules", "run_toy", "--cores", "1"]
    call += ["--nolock", "--config", "profile=smoke"]
    done = subprocess.run(call, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(card.with_name("run.ipynb"), 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "iopub.status.busy" not in str(code[0].metadata), "run by a kernel"
