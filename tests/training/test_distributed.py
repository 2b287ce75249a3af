"One run on one process or on two: the same numbers, the same files, the same errors."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from forked import status_of
from short_runs import EVERY_METHOD, column, distance

from vggflow.common.seals import read_rows
from vggflow.methods.registry import METHODS
from vggflow.training.run_directory import RunDirectory

CARD = dict(
    world="gaussian",
    method="VGG-Flow",
    updates=4,
    eval_every=2,
    batch_size=8,
    save_every=2,
    progress=False,
)
CONFIGS = Path(__file__).parents[2] / "configs/accelerate"
PIPELINES = ("tiny", "whole", *two_processes.OTHER_PIPELINES)
IN_DOUBLE = 1e-12  # of the size of the numbers: sums in another order
IN_SINGLE = 5e-5


def alone() -> dict:
    "The environment of a process that no launcher started"
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    return {k: v for k, v in os.environ.items() if k not in launcher}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "The folder; what one process found alone, and each of two together"
    folder = tmp_path_factory.mktemp("processes")
    (folder / "card.json").write_text(json.dumps(CARD))
    assert status_of(two_processes.main, folder) == 0
    files = [folder / f"{name}.pt" for name in ("one", "0", "1")]
    return folder, *(torch.load(file, weights_only=False) for file in files)


def same(a, b) -> bool:
    "To the last bit"
    if a["rows"] != b["rows"] or a["evals"] != b["evals"]:
        return False
    return all(torch.equal(value, b["state"][name]) for name, value in a["state"].items())


def test_two_processes_do_what_one_does(found):
    """Every method on the Gaussian and on a tiny Stable Diffusion 3 with guidance, five on
    one with T5 and without guidance, two on FLUX and on Z-Image; quantiles and units are
    those of all samples"""
    _, one, first, second = found
    assert one["number"] == 1 and first["number"] == second["number"] == 2
    assert set(METHODS.values()) <= {type(make()) for make in EVERY_METHOD.values()}
    off = {name: distance(run, first["both"][name]) for name, run in one["both"].items()}
    assert len(off) == len(EVERY_METHOD) + 1 + len(METHODS) + 5 + 4 + 3
    assert max(off.values()) < IN_SINGLE, off
    double = [v for k, v in off.items() if k.split()[0] not in PIPELINES]
    assert max(double) < IN_DOUBLE, off
    assert all(same(first["both"][name], second["both"][name]) for name in off)
    evals = second["both"]["ema"]["evals"]
    assert len(evals) == 3 and evals[-1]["w"] != 0


@pytest.mark.parametrize("fault", ["for_itself", "same_noise"])
def test_a_fault_between_processes_would_be_noticed(found, fault):
    "A quantile of a process's own samples; the same noise on both"
    _, one, first, _ = found
    assert distance(one["both"]["gaussian vgg"], one["wrong"][fault]) == 0
    assert distance(one["wrong"][fault], first["wrong"][fault]) > 1e6 * IN_DOUBLE


def test_micro_batches_on_two_processes(found):
    _, one, first, _ = found
    off = {k: distance(one["both"][f"gaussian {k}"], r) for k, r in first["micro"].items()}
    assert off.keys() == EVERY_METHOD.keys() and max(off.values()) < 1e-9, off


def test_sharding_the_frozen_transformer_changes_nothing(found):
    """FSDP2 by fully_shard, with guidance; with gradient checkpointing and with the
    correction as a second adapter too"""
    _, one, first, second = found
    assert len(first["sharded"]) == 9
    for name, run in first["sharded"].items():
        assert same(run, second["sharded"][name]), name
        whole = one["both"].get(f"tiny {name} 3.0") or one["both"].get(f"tiny {name}")
        if name == "carried":  # it has no counterpart
            assert whole is None
        else:
            assert distance(whole, run) < IN_SINGLE, name


def test_killed_and_resumed_on_two_processes_to_the_last_bit(found):
    "Every method, with dropout: every process has its own random numbers back"
    folder, _, first, second = found
    assert len(first["interrupted"]) == len(METHODS)
    for name in first["interrupted"]:
        for process in (first, second):
            runs = process["interrupted"][name]
            assert same(runs["whole"], runs["again"]), name
        both = (process["interrupted"][name]["whole"] for process in (first, second))
        assert same(*both)
        rows = read_rows(folder / f"cut-{name}/metrics.jsonl")
        assert [row["update"] for row in rows] == [1, 2, 3, 4, 5]
    parts = RunDirectory(folder / "cut-vgg").load_newest().parts
    assert set(parts) == {"flow", "method", "optimizer", "rng", "ema"}
    assert set(parts["rng"]) == {"torch", "torch.1"}
    assert not torch.equal(parts["rng"]["torch"], parts["rng"]["torch.1"])


def test_a_signal_to_one_of_two_ends_both_after_the_same_update(found):
    "With a checkpoint, from which they go on to the last bit"
    _, _, first, second = found
    for run in (first["told"], second["told"]):
        assert (run["code"], run["kept"]) == (143, [3])
        assert same(run["whole"], run["again"])


def test_two_processes_draw_together_what_one_draws(found):
    "Bit for bit; of a sharded model within rounding"
    _, _, first, second = found
    assert first["drawing"] == {5: 0.0, 7: 0.0}
    assert second["drawing"] == second["sharded drawing"] == {5: True, 7: True}
    assert max(first["sharded drawing"].values()) < 1e-6


def test_the_first_process_judges_for_both(found):
    _, _, first, second = found
    a, b = first["judged"], second["judged"]
    assert a["evals"] == b["evals"] and [row["update"] for row in a["evals"]] == [0, 1]
    assert {"reward", "perceptual_diversity", "fid", "fid_base"} <= set(a["evals"][0])
    assert a["said"] == [12, 12, "the judge is ill"] and b["said"] == ["the judge is ill"]


def test_prompts_are_encoded_by_the_first_process_for_both(found):
    "To the last bit what each would make of them"
    _, _, first, second = found
    prompts = {*two_processes.PROMPTS, ""}
    assert len(first["encoded"]["asked"]) == 4 and {*first["encoded"]["asked"]} == prompts
    assert second["encoded"]["asked"] == []
    assert first["encoded"]["same"] and second["encoded"]["same"]


def test_the_first_process_alone_loads_text_encoders(found):
    "The others are told the encodings, and find them on the disk"
    _, _, first, second = found
    assert first["placed"]["there"] == [True] * 3
    assert second["placed"]["there"] == [False] * 3
    assert first["placed"]["same"] and second["placed"]["same"]
    assert first["placed"]["recipe"] == second["placed"]["recipe"]


def test_two_processes_evaluate_what_one_evaluates(found):
    "Every image drawn by one of them, bit for bit; one table"
    folder, one, first, second = found
    assert one["evaluated"] == first["evaluated"] == second["evaluated"] == 0
    drawn, tables = [], []
    for name in ("judged-1", "judged-2"):
        files = (folder / name).rglob("*.png")
        drawn.append({f.relative_to(folder / name): f.read_bytes() for f in files})
        tables.append(json.loads((folder / name / "evaluation.json").read_text()))
    assert len(drawn[0]) == 3 * 7 + 1 and drawn[0] == drawn[1]
    assert tables[0] == tables[1] and tables[0]["sets"]["base"]["reward"] > 0


def test_no_two_processes_share_noise(found):
    _, _, first, second = found
    for name in ("x0", "normal", "uniform", "torch"):
        x = first["noise"][name]
        x = x.flatten(1) if x.dim() > 1 else x[:, None]
        assert len(x) == 8
        assert (torch.cdist(x, x) + torch.eye(8)).min() > 1e-4
    assert len(first["noise"]["cond"]) == len(second["noise"]["cond"]) == 4


def test_what_goes_wrong_on_one_goes_wrong_on_both(found):
    _, _, first, second = found
    first, second = first["faults"], second["faults"]
    assert first["stops"] == second["stops"]
    assert "update 2: the loss is nan" in first["stops"]
    assert same(first["skips"], second["skips"])
    skipped = [row.get("skipped") for row in first["skips"]["rows"]]
    assert skipped == [None, True, None]
    assert "batch_size=7 cannot be shared by 2 processes" in second["odd"]
    assert second["shared"] == "the evaluation is broken"


def test_a_card_is_run_once_by_both(found, tmp_path):
    from vggflow.commands.run import run

    folder, _, first, second = found
    assert first["card"] == second["card"] == 0
    history = run(**CARD, out=tmp_path)
    rows = read_rows(folder / "card2/metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx(column(history, "loss"), abs=1e-6)
    files = {p.name for p in (folder / "card2").iterdir()}
    files -= {"command.json", "report.html"}
    assert files == {p.name for p in tmp_path.iterdir()}
    asked = RunDirectory(folder / "card2").settings
    assert asked == {k: v for k, v in CARD.items() if k != "progress"}


@pytest.mark.parametrize(
    "name,kind,number",
    [
        ("one_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("cpu2", "MULTI_GPU", 2),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, number):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert str(config.distributed_type).endswith(kind)
    assert config.num_processes == number
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2


def test_accelerate_launch_runs_a_card(tmp_path):
    """The guide's command, started by accelerate itself, on a pipeline from disk with all
    its text encoders and with guidance; at a rate of 1e-3 Adam's first step would turn
    the rounding of the smallest gradients into 0.4 % of the second loss"""
    from tiny_sd3 import make_tiny_sd3

    from vggflow.commands.run import run

    card = dict(
        world="sd3",
        model=str(make_tiny_sd3(tmp_path / "model")),
        reward="redness",
        prompts=["a cat", "an owl"],
        updates=2,
        batch_size=4,
        steps=3,
        transitions=2,
        guidance_scale=3.0,
        lora_rank=2,
        lr=1e-4,
        eval_every=2,
        images_per_prompt=2,
        progress=False,
    )
    (tmp_path / "card.json").write_text(json.dumps(card))
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu2.yaml"]
    command = ["-m", "vggflow.train", tmp_path / "card.json", "--out", tmp_path / "two"]
    done = subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env=alone(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = run(**card, out=tmp_path / "one")
    two = RunDirectory(tmp_path / "two")
    assert [row["update"] for row in two.metrics] == [1, 2]
    losses = [row["loss"] for row in two.metrics]
    assert losses == pytest.approx(column(history, "loss"), rel=1e-3)
    assert [row["update"] for row in two.evals] == [0, 2]
    reward = history.evals[-1]["reward"]
    assert two.evals[-1]["reward"] == pytest.approx(reward, abs=1e-3)
    assert (tmp_path / "two/lora/pytorch_lora_weights.safetensors").exists()
