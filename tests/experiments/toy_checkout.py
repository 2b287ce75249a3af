"A small checkout of its own, whose runs take a second"

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from vggflow.common.files import write_text

ROOT = Path(__file__).parents[2]
RUN = """
import json, time
from pathlib import Path
folder = Path(out)
metrics = folder/'metrics.jsonl'
made = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with metrics.open('a') as file:
    for i in range(made, updates):
        time.sleep(pause)
        row = dict(update=i+1, reward=lr*(i+1)+seed, seconds=pause)
        file.write(json.dumps(row)+'\\n')
        file.flush()
if bad:
    raise OSError('the disk is full')
rows = [dict(update=u, reward=lr*u+seed) for u in (0, updates)]
(folder/'eval.jsonl').write_text(''.join(json.dumps(row)+'\\n' for row in rows))
"""
RUN_PARAMETERS = """
method: str = 'VGG-Flow'
lr: float = 0.0
updates: int = 1
seed: int = 0
pause: float = 0.0
bad: bool = False
out: str = ''
"""
DRAW = """
import csv
import matplotlib.pyplot as plt
from vggflow.common.data import project_root
from vggflow.experiments.plots import figure_record, save_figure
table = project_root()/'data'/'results'/f'{experiment}-{profile}.csv'
rows = list(csv.DictReader(table.open()))
fig, ax = plt.subplots()
ax.plot([float(row['reward']) for row in rows], lw=width)
if out:
    save_figure(fig, figure, figure_record(profile, dict(results=table)), out)
"""
DRAW_PARAMETERS = """
profile: str = 'smoke'
experiment: str = 'toy'
figure: str = 'figtoy'
width: float = 1.0
out: str = ''
"""
TOML = """
[profiles]
smoke = "a"
paper = "b"
[toy]
template = "toy"
figures = {figtoy = "toyfig"}
parameters = {updates = 3}
grid = {seed = [0]}
[[toy.series]]
method = "VGG-Flow"
lr = 1
[[toy.series]]
method = "ReFL"
lr = 0.5
[toy.smoke]
pause = 0.01
[sweep]
study = true
like = "toy"
folder = "toy"
series = [{method = "VGG-Flow", lr = 1}, {method = "VGG-Flow", lr = 2}]
[sweep.figures]
figsweep = {template = "toyfig", width = 3}
fig07 = {template = "both", needs = ["toy", "sweep"]}
[toy.paper]
updates = 30
pause = 0.1
"""  # noqa: E501


def write_notebook(path, parameters, code):
    "A template of two cells"
    cells = [
        nbformat.v4.new_code_cell(parameters.strip()),
        nbformat.v4.new_code_cell(code.strip()),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def make_checkout(folder):
    "Experiments, templates and the graph"
    (folder / "experiments.toml").write_text(TOML)
    shutil.copy(ROOT / "Snakefile", folder)
    templates = folder / "nbs" / "experiments"
    write_notebook(templates / "toy.ipynb", RUN_PARAMETERS, RUN)
    write_notebook(templates / "toyfig.ipynb", DRAW_PARAMETERS, DRAW)
    both = "profile: str = 'smoke'\nneeds: list = []\nout: str = ''"
    write_notebook(templates / "both.ipynb", both, "pass")
    return folder


def rewrite(folder, *pairs, more=""):
    "experiments.toml with some texts replaced"
    text = TOML
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (folder / "experiments.toml").write_text(text + more)


def start_figures(*words, **options):
    "The command, in a session of its own"
    return subprocess.Popen(
        [sys.executable, "-m", "vggflow.cli", "figures", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def make_figures(*words):
    "Run the command to its end: (exit status, text)"
    process = start_figures(*words)
    text = process.communicate(timeout=240)[0]
    return process.returncode, text


def finish(card, reward=1.0, sheets=()):
    "What a finished run leaves"
    updates = card.parameters["updates"]
    card.save()
    evaluations = [dict(update=u, reward=reward * u / 3) for u in (0, updates)]
    metrics = [dict(update=i + 1, seconds=0.5) for i in range(updates)]
    for name, rows in dict(eval=evaluations, metrics=metrics).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(card.folder / f"{name}.jsonl", lines)
    for update in sheets:
        write_text(card.folder / "samples" / f"{update:05}.png", f"{card.id} {update}")
    if sheets:
        write_text(card.folder / "samples" / "prompts.json", '["a cat"]')
    write_text(card.folder / "run.ipynb", "{}")
