"A tiny Stable Diffusion 3 on disk, a run of it, and the command line in this process"

import shlex

import pytest
import torch

from vggflow import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    "Folder of a tiny pipeline without T5"
    from tiny_sd3 import make_tiny_sd3

    return make_tiny_sd3(tmp_path_factory.mktemp("sd3") / "base", t5=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory, and a cache of its own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VGGFLOW_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path


FAST = "--quiet --steps 2 --updates 2 --batch-size 2 --eval-every 0 --lr 1e-2"
FAST += " --lora-rank 2 --guidance-scale 2 --transitions 2"


@pytest.fixture
def fast():
    "Options of a run of two updates"
    return FAST


@pytest.fixture(scope="session")
def run(model, tmp_path_factory):
    "A run of the tiny pipeline, made by the command line"
    out = tmp_path_factory.mktemp("run") / "r"
    reward = out.parent / "mine.py"
    reward.write_text("def bright(images, prompts): return images.mean((1, 2, 3))\n")
    line = f"finetune --model {model} --reward {reward}:bright --prompts 'a cat' 'an owl'"
    line += f" --method VGG-Flow --beta 30 --option clip=0.8 --out {out} {FAST}"
    assert cli.main(shlex.split(line)) == 0
    return out
