"The main job, small: the emoji pipeline is aligned, and stock diffusers loads the result"

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from vggflow import (
    FinetuneConfig,
    RunDirectory,
    VGGFlow,
    cli,
    finetune,
    get_reward,
    load_flow,
)
from vggflow.common.seals import read_rows
from vggflow.judging.evaluation import draw
from vggflow.methods.registry import METHODS
from vggflow.worlds.emoji_data import asset
from vggflow.worlds.world import get_world

ROOT = Path(__file__).parents[2]
PROMPTS = list(get_world("emoji").prompts)


def warm(images, prompts):
    "More red than blue: the reward of the README"
    red, blue = images[:, 0], images[:, 2]
    return 10 * (red - blue).mean((1, 2))


def mean_reward(flow, reward, base=False):
    "Of eight prompts, from fixed noise"
    images, cond = draw(flow, PROMPTS[:8], 3, steps=10, seed=3, base=base)
    with torch.no_grad():
        return reward(images.clamp(0, 1), cond).mean().item()


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    "Flow, reward, run directory and history of 25 updates"
    out = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    flow, reward = load_flow("emoji"), get_reward("emoji-aesthetic")
    small = dict(updates=25, batch_size=8, steps=10, transitions=4, lr=3e-3)
    config = FinetuneConfig(**small, save_every=10)
    method = VGGFlow(beta=30.0, mode="trajectory", clip=0.8)
    more = dict(prompts=PROMPTS, progress=False)
    history = finetune(flow, reward, method, config, out=out, **more)
    return flow, reward, out, history


def test_vgg_flow_raises_the_reward_of_the_emoji_world(aligned):
    flow, reward, _, _ = aligned
    assert mean_reward(flow, reward) > mean_reward(flow, reward, base=True) + 0.4


def test_the_base_is_untouched(aligned):
    flow = aligned[0]
    generator = torch.Generator().manual_seed(0)
    x, cond = flow.prior(2, PROMPTS[:2], generator), PROMPTS[:2]
    t = torch.tensor([0.2, 0.8])
    with torch.no_grad():
        base, fresh = (
            flow.base_velocity(x, t, cond),
            load_flow("emoji").velocity(x, t, cond),
        )
        tuned = flow.velocity(x, t, cond)
    allowed = 1e-5 * fresh.abs().max()
    assert (base - fresh).abs().max() < allowed
    assert (tuned - fresh).abs().max() > 100 * allowed  # teeth: training would be noticed


def test_the_value_network_learned_and_is_saved(aligned):
    run = RunDirectory(aligned[2])
    update, parts, _ = run.load_newest()
    assert update == 25
    assert parts["method"]["value.correction.net.proj_out.weight"].abs().sum() > 0
    assert run.record["method"]["beta"] == 30.0


def test_stock_diffusers_loads_the_adapter(aligned, tmp_path):
    aligned[0].save_lora(tmp_path)
    pipe = StableDiffusion3Pipeline.from_pretrained(asset("base"))
    pipe.set_progress_bar_config(disable=True)

    def draw_one():
        noise = torch.Generator().manual_seed(0)
        how = dict(num_inference_steps=5, guidance_scale=1.0, output_type="np")
        return pipe("a cat", generator=noise, **how).images

    before = draw_one()
    pipe.load_lora_weights(tmp_path)
    assert abs(draw_one() - before).mean() > 0.01


EVERY = {
    **METHODS,
    "exact": lambda: VGGFlow(beta=5.0, mode="exact"),
    "finite-difference": lambda: VGGFlow(beta=5.0, mode="finite-difference"),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_method_steps_with_guidance(name):
    torch.manual_seed(0)
    flow = load_flow("emoji", guidance_scale=2.0)
    config = FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2)
    more = dict(prompts=PROMPTS, progress=False)
    history = finetune(flow, warm, EVERY[name](), config, **more)
    for row in history.rows:
        assert torch.isfinite(torch.tensor(row["loss"])) and row["grad_norm"] > 0


# --- a run that is killed

KILLED = """
[profiles]
smoke = "a"
[kill]
template = "finetune"
[kill.parameters]
world = "gaussian"
reward = "quadratic"
beta = 1.0
updates = 240
batch_size = 64
save_every = 10
eval_every = 60
options = {mode = "exact"}
"""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    "A checkout with one card of the real template"
    from vggflow.experiments.cards import read_cards

    (tmp_path / "experiments.toml").write_text(KILLED)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "experiments").symlink_to(ROOT / "nbs" / "experiments")
    monkeypatch.setenv("VGGFLOW_ROOT", str(tmp_path))
    (card,) = read_cards("kill", "smoke")
    card.save()
    return card


def start(card):
    "The run as Snakemake starts it, whatever this process does with SIGINT"
    command = [sys.executable, "-m", "vggflow.cli", "run", str(card.folder / "card.json")]

    def hear_interrupts():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, preexec_fn=hear_interrupts, **pipes)


def wait_for_checkpoint(process, card, update):
    "Wait for a checkpoint after an update; the process must be alive"
    folder = card.folder / "checkpoints"
    while not any(int(f.name) > update for f in folder.glob("[0-9]*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return len(read_rows(card.folder / "metrics.jsonl"))


def test_sigkill_of_a_kernel_and_of_a_run(killed):
    from vggflow.experiments.status import run_state

    notebook = killed.folder / "run.ipynb"
    first = start(killed)
    at = wait_for_checkpoint(first, killed, 10)
    for kernel in psutil.Process(first.pid).children(recursive=True):
        kernel.kill()
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 2 and "died" in text and not notebook.exists(), text
    assert run_state(killed).state == "cut off"
    second = start(killed)
    later = wait_for_checkpoint(second, killed, at + 20)
    second.kill()
    text = second.communicate()[0]
    assert "resumes after update" in text and later < 240
    third = start(killed)
    text = third.communicate(timeout=240)[0]
    assert third.returncode == 0 and "resumes after update" in text, text
    rows = read_rows(killed.folder / "metrics.jsonl")
    evals = read_rows(killed.folder / "eval.jsonl")
    assert [r["update"] for r in rows] == list(range(1, 241))
    assert [e["update"] for e in evals] == [0, 60, 120, 180, 240]
    written = notebook.stat().st_mtime_ns
    # a finished run is let be
    assert cli.main(["run", str(killed.folder / "card.json")]) == 0
    assert notebook.stat().st_mtime_ns == written


def test_a_run_of_the_shell_ends_on_sigint_and_goes_on(tmp_path, monkeypatch):
    "Exit status 130, then the same command to the end"
    line = "finetune --world gaussian --updates 4000 --eval-every 0 --save-every 5 --quiet"
    command = [sys.executable, "-m", "vggflow.cli", *line.split(), "--out", "run"]

    def hear_interrupts():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    how = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, preexec_fn=hear_interrupts, **how)
    while not list(tmp_path.glob("run/checkpoints/[0-9]*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on" in err, err
    done = len(read_rows(tmp_path / "run" / "metrics.jsonl"))
    monkeypatch.chdir(tmp_path)
    words = [str(done + 2) if word == "4000" else word for word in command[3:]]
    assert cli.main(words) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [r["update"] for r in rows] == list(range(1, done + 3))
    asked = json.loads((tmp_path / "run" / "command.json").read_text())
    assert asked["updates"] == done + 2
