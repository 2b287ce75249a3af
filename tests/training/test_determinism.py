"""The same run gives the same bytes; other threads and portions change the rounding only

`VGGFLOW_EXAMPLES=2000` asks for the long form."""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import status_of
from hypothesis import given, settings
from hypothesis import strategies as any_of
from short_runs import EVERY_METHOD, distance, gaussian_run

from vggflow.common.files import write_json
from vggflow.experiments.cards import Card, card_id, load_card
from vggflow.methods.registry import METHODS
from vggflow.training.run_directory import RunDirectory
from vggflow.worlds.emoji import load_emoji

EXAMPLES = int(os.environ.get("VGGFLOW_EXAMPLES", 8))
FEW = settings(max_examples=EXAMPLES, deadline=None)
CONFIGS = any_of.fixed_dictionaries(
    dict(
        batch_size=any_of.integers(1, 6),
        steps=any_of.integers(4, 9),
        transitions=any_of.integers(1, 2),
        seed=any_of.integers(0, 2**31),
        shift=any_of.sampled_from([None, 0.5, 1.0, 3.0]),
        grad_clip=any_of.sampled_from([0.0, 0.1, 1.0]),
        schedule=any_of.sampled_from(["constant", "cosine"]),
        ema=any_of.sampled_from([0.0, 0.5, 0.99]),
    )
)
VALUES = any_of.none() | any_of.booleans() | any_of.integers() | any_of.text(max_size=9)
PARAMETERS = any_of.dictionaries(any_of.from_regex("[a-z_]{1,9}", fullmatch=True), VALUES)


def emoji_run(folder, method, threads=1):
    "Two updates on the emoji world, in a folder"
    from vggflow import FinetuneConfig, finetune

    torch.set_num_threads(threads)
    config = FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2, lr=1e-3)
    call = dict(out=folder, prompts=["cat", "dog"], progress=False)
    finetune(load_emoji(lora_rank=2), bright, METHODS[method](), config, **call)


def bright(images, prompts=None):
    return 10 * images.mean((1, 2, 3))


def weights_of(folder) -> dict:
    "The adapter and the checkpoint of a run, as bytes"
    files = (
        *folder.glob("lora/*.safetensors"),
        *folder.glob("checkpoints/*/*.safetensors"),
    )
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("method", ["VGGFlow", "CoarseAdjoint"])
def test_the_same_run_in_another_process_gives_the_same_bytes(tmp_path, method):
    for name in ("a", "b"):
        assert status_of(emoji_run, tmp_path / name, method) == 0
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert len(one) > 4 and one == other


def test_another_number_of_threads_changes_the_rounding_only(tmp_path):
    for threads in (1, 2):
        assert status_of(emoji_run, tmp_path / str(threads), "VGGFlow", threads) == 0
    rows = [RunDirectory(tmp_path / name).metrics for name in ("1", "2")]
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "reward", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


@FEW
@given(any_of.sampled_from(sorted(EVERY_METHOD)), CONFIGS)
def test_any_run_goes_on_to_the_last_bit(name, config):
    config = {**config, "schedule": "constant"}  # a cosine has its end in it
    whole = gaussian_run(EVERY_METHOD[name](), **config)
    with tempfile.TemporaryDirectory() as folder:
        gaussian_run(EVERY_METHOD[name](), out=folder, updates=2, **config)
        again = gaussian_run(EVERY_METHOD[name](), out=folder, **config)
    assert again["rows"] == whole["rows"]
    assert all(torch.equal(v, again["state"][k]) for k, v in whole["state"].items())


@FEW
@given(any_of.sampled_from(sorted(EVERY_METHOD)), CONFIGS, any_of.integers(1, 3))
def test_portions_change_the_rounding_only(name, config, size):
    whole = gaussian_run(EVERY_METHOD[name](), **config)
    parts = dict(micro_batch=size, forward_batch=size)
    assert distance(whole, gaussian_run(EVERY_METHOD[name](), **config, **parts)) < 1e-9


@FEW
@given(PARAMETERS, any_of.randoms())
def test_a_card_is_told_by_what_it_holds(parameters, random):
    names = list(parameters)
    random.shuffle(names)
    other = {name: parameters[name] for name in names}
    mine = card_id("toy", parameters)
    assert card_id("toy", {**other, "out": "elsewhere", "progress": True}) == mine
    assert card_id("another", parameters) != mine
    assert card_id("toy", {**parameters, "lr": 0.125}) != mine
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "card.json"
        write_json(file, asdict(Card("e", "toy", parameters)))
        assert load_card(file).parameters == parameters
