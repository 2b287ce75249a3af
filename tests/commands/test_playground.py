"The playgrounds: what stands behind their sliders, and both pages in a real JupyterLab"

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from browser import chromium, opened

from vggflow.commands.playground import (
    ADJOINT,
    BEST,
    GUESS,
    EmojiPlayground,
    LineWish,
    Wish,
    runs_in,
    solve_line,
)

PAGES = Path(__file__).parents[2] / "nbs" / "playground"


@pytest.fixture(scope="module")
def playground():
    torch.set_num_threads(1)
    return EmojiPlayground()


SMALL = Wish(images=2, steps=3)


def test_every_slider_changes_the_images(playground):
    start = playground.draw(SMALL).pushed
    moves = dict(prompt="an owl", reward="redness", push=GUESS, beta=30.0, guidance=4.0)
    for name, value in dict(moves, seed=1).items():
        moved = playground.draw(replace(SMALL, **{name: value})).pushed
        assert (moved - start).abs().max() > 1e-3, name
    guess = [playground.draw(replace(SMALL, push=GUESS, eta=eta)) for eta in ("t^2", "1")]
    assert (guess[0].pushed - guess[1].pushed).abs().max() > 1e-4


def test_without_a_push_it_is_the_base(playground):
    for push in (ADJOINT, GUESS):
        shown = playground.draw(replace(SMALL, beta=0.0, push=push))
        assert (shown.base - shown.pushed).abs().max() < 1e-4


def test_another_beta_takes_what_was_kept(playground):
    playground.draw(SMALL)
    known = list(playground.kept)
    playground.draw(replace(SMALL, beta=20.0))
    assert list(playground.kept) == known


def test_a_run_is_drawn_with_its_adapter(playground, call, here):
    line = "finetune --method ReFL --reward redness --prompts 'a cat' --updates 2 --quiet"
    line += " --batch-size 2 --steps 3 --eval-every 0 --lr 1e-2 --out runs/red"
    assert call(line)[0] == 0
    assert runs_in("runs") == ["runs/red"]
    shown = playground.draw(replace(SMALL, push="runs/red"))
    assert (shown.base - shown.pushed).abs().max() > 1e-4
    assert runs_in("nowhere") == []


def test_what_is_wrong_is_said_in_a_line(playground):
    with pytest.raises(ValueError, match="did you mean 'redness'"):
        playground.draw(replace(SMALL, reward="rednes"))


@pytest.mark.parametrize("push", [BEST, "t"])
@pytest.mark.parametrize("problem", ["one Gaussian", "four modes"])
def test_values_on_the_line_are_those_of_a_grid(problem, push):
    "The optimum pays what the Hamilton–Jacobi–Bellman equation says; a guess pays more"
    from vggflow.commands.playground import PROBLEMS
    from vggflow.theory.control import grid_value_1d
    from vggflow.theory.flow import MixtureFlow

    wish = LineWish(problem, push, beta=1.0, goal=0.8)
    line = solve_line(wish)
    flow = MixtureFlow(**PROBLEMS[problem]).double()
    grid = torch.linspace(-6, 6, 601).double()
    values = grid_value_1d(flow, wish.reward, 1.0, grid, torch.tensor([0.0, 1.0]))[0]
    near = (line.paths[0].abs() < 2).nonzero()[:, 0]
    at = ((line.paths[0][near] + 6) / 0.02).round().long()
    error = line.values[0][near] - values[at]
    if push == BEST:
        assert error.abs().mean() < 0.02
    else:
        assert error.mean() > 0.02


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@contextmanager
def jupyterlab(folder: Path):
    "Address of a JupyterLab on a folder, with settings of its own"
    port = free_port()
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    own = {f"JUPYTER_{name}": str(folder / f".{name}") for name in names}
    own.update(PYTHONPATH=os.pathsep.join([str(PAGES.parents[1]), *sys.path]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", f"--notebook-dir={folder}", "--expose-app-in-browser"]
    command += ["--IdentityProvider.token=", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen(command, env={**os.environ, **own}, cwd=folder, **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def wait_for(address: str):
    "Until a server answers"
    for _ in range(600):
        try:
            return urlopen(f"{address}/api").read()
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


# what is looked at: a picture, and the handle of the slider β
SEEN = dict(emoji="img.widget-image", line=".jp-OutputArea-output img")
OPEN = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session"
READY = f"{OPEN}?.kernel?.status == 'idle'"
RUN_ALL = "void window.jupyterapp.commands.execute('notebook:run-all-cells')"


@pytest.mark.parametrize("name", SEEN)
def test_a_slider_moves_in_jupyterlab(name, tmp_path):
    "Run all, a picture; β one step up, another picture, and no cell in error"
    chromium()
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    shutil.copy(PAGES / f"{name}.ipynb", tmp_path)
    with jupyterlab(tmp_path) as address, opened(f"{address}/lab/tree/{name}.ipynb") as lab:
        page, patience = lab[0], dict(timeout=180_000)
        page.wait_for_function(READY, **patience)
        page.evaluate(RUN_ALL)
        picture = page.locator(SEEN[name]).first
        picture.wait_for(**patience)
        before = picture.get_attribute("src")
        row = page.locator(".widget-hslider").filter(has_text="β")
        row.locator(".noUi-handle").press("ArrowRight")
        changed = "([css, src]) => document.querySelector(css)?.src != src"
        page.wait_for_function(changed, arg=[SEEN[name], before], **patience)
        page.wait_for_timeout(1000)
        page.screenshot(path=os.environ.get("SCREENSHOTS", str(tmp_path)) + f"/{name}.png")
        assert picture.evaluate("image => image.naturalWidth") > 200
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
