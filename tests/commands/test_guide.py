"The guide, followed on a tiny model: every command and every snippet of the page is run"

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from forked import status_of
from guide import ROOT, blocks, calls, page_calls
from tiny_sd3 import make_tiny_sd3
from two_processes import start_two, status_of_all

from vggflow import RunDirectory, cli, train
from vggflow.judging.prompts import PROMPT_SETS

MODEL = "stabilityai/stable-diffusion-3.5-medium"
FEW = {"--images-per-prompt": "2", "--perceptual": "none", "--clip": "none"}
SMALL = dict(FEW, **{"--batch-size": "2", "--steps": "3", "--updates": "2"})
SMALL |= {"--image-size": "16", "--transitions": "2", "--eval-every": "2"}
SMALL |= {"--eval-prompts": "1", "--device": "cpu", "--dtype": "bfloat16"}
SIZES = dict(finetune=SMALL, doctor=SMALL, evaluate=dict(FEW, **{"--limit": "2"}))
NEEDY = ("prompts", "figures")  # of a network; of a cluster, see test_slurm.py


def tiny(words, model) -> list:
    "A command as it stands, but for the model, the reward and the sizes"
    others = dict(pickscore="redness", drawbench="animals")
    words = [others.get(word, word).replace(MODEL, str(model)) for word in words]
    verb = next((word for word in words if word in SIZES), None)
    for option, value in SIZES.get(verb, {}).items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Folder of a tiny pipeline with all its text encoders"
    return make_tiny_sd3(tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture(scope="module")
def desk(model, tmp_path_factory):
    "Where the guide is followed: an own LoRA, and an own model in a single file"
    folder = tmp_path_factory.mktemp("guide")
    (folder / "styles").mkdir()
    (folder / "styles/ink").symlink_to("../runs/pick/lora")
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, folder / "finetuned.safetensors")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture
def at_desk(desk, here, monkeypatch):
    monkeypatch.chdir(desk)


def one_line(words) -> str:
    return " ".join(words)[:60]


@pytest.mark.parametrize("words", page_calls("vggflow", "python"), ids=one_line)
def test_a_command_of_the_guide(words, at_desk, model, call):
    "In the order of the page, in one folder"
    program, *words = tiny(words, model)
    if program == "python":
        assert words[0] == "-c"
        exec(words[1], {})
    elif words[0] in NEEDY:
        own = words[: words.index("--")] if "--" in words else words
        assert cli.parse(f"vggflow {own[0]}", cli.VERBS[own[0]], own[1:]) is not None
    else:
        known = set(Path("embeddings").glob("*")) if "runs/12" in words else None
        status, _, err = call("", *words)
        assert status == 0, err
        assert known is None or known == set(Path("embeddings").glob("*"))


@pytest.mark.parametrize("code", blocks("python"))
def test_a_snippet_of_the_guide(code, at_desk, model, monkeypatch):
    "As it stands, but on the CPU"
    monkeypatch.setenv("MODEL", str(model))
    names = {}
    exec(code.replace("'cuda'", "'cpu'"), names)
    pipe = names["pipe"]
    weights = pipe.transformer.state_dict()
    assert any(w.any() for name, w in weights.items() if "lora_B.default_0" in name)
    assert pipe("a cat", num_inference_steps=1, height=16, width=16).images


def launch(words) -> int:
    "What `accelerate launch` starts, as two forks of this process on a CPU"
    asked = launch_command_parser().parse_args(words[2:])
    kind = str(load_config_from_file(asked.config_file).distributed_type)
    sharded = str(kind.endswith("FSDP")).lower()
    start = {"vggflow.train": train.main, "vggflow.cli": cli.main}[asked.training_script]
    torch.set_num_threads(1)

    def begin(words):
        assert start(words) == 0

    pids, _store = start_two(begin, asked.training_script_args, ACCELERATE_USE_FSDP=sharded)
    return status_of_all(pids)


def launches() -> list:
    "Those of the page, and those that it submits to Slurm"
    wrapped = [words[words.index("--wrap") + 1] for words in page_calls("sbatch")]
    return [
        *page_calls("accelerate"),
        *(words for text in wrapped for words in calls(text)),
    ]


@pytest.mark.parametrize("words", launches(), ids=one_line)
def test_a_launch_of_the_guide(words, at_desk, model):
    "By two processes; a run has the losses of the one that it repeats"
    assert status_of(launch, tiny(words, model)) == 0
    out = Path(words[words.index("--out") + 1])
    if "evaluate" in words:
        assert (out / "evaluation.json").exists()
    else:
        alone, both = RunDirectory("runs/pick"), RunDirectory(out)
        losses = [[row["loss"] for row in run.metrics] for run in (alone, both)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert (out / "lora/pytorch_lora_weights.safetensors").exists()


def test_every_run_of_the_guide_can_be_published(at_desk, call):
    for run in sorted(Path("runs").glob("*/lora")):
        assert call("export", run.parent, Path("given") / run.parent.name)[0] == 0
    assert len(list(Path("given").glob("*/pytorch_lora_weights.safetensors"))) == 9


def test_what_the_guide_installs_is_there():
    "The file of versions, and extras of the package"
    known = metadata.metadata("vggflow").get_all("Provides-Extra")
    installs = page_calls("pip")
    assert len(installs) == 2
    for _, _, option, file, what in installs:
        assert option == "-c" and (ROOT / file).is_file()
        assert set(what.removeprefix(".[").removesuffix("]").split(",")) <= set(known)


def test_the_sets_of_prompts_of_the_guide_are_known():
    names = [words[2] for words in page_calls("vggflow") if words[1] == "prompts"]
    assert names and set(names) <= set(PROMPT_SETS)


def test_a_wrong_option_would_be_noticed(here, call):
    status, _, err = call("finetune --micro-batsh 1")
    assert status == 2 and "micro-batsh" in err
    assert not os.listdir(here)
