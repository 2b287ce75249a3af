"One class reads and writes all that a run leaves, wherever the folder stands."

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from vggflow.common import files
from vggflow.common.files import write_text
from vggflow.common.provenance import EDITION
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.keeping import LOCKED, Taken
from vggflow.training.loop import finetune
from vggflow.training.record import (
    own_settings,
    record_differences,
    run_record,
    without_secrets,
)
from vggflow.training.run_directory import RunDirectory


def linear(x, prompts=None):
    return x.sum(-1)


def python_run(folder, **about):
    "A run that is made in Python"
    torch.manual_seed(0)
    flow = GaussianFlow([0.0], 0.6)
    flow.recipe = dict(name="gaussian", mean=[0.0], token="hf_secret")
    config = FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2)
    method = VGGFlow(beta=2.0)
    prompts = dict(prompts=["a cat", "an owl"])
    finetune(
        flow, linear, method, config, out=folder, progress=False, about=about, **prompts
    )
    return RunDirectory(folder)


def test_a_run_made_in_python_says_all_that_a_command_needs(tmp_path):
    run = python_run(tmp_path, reward="clip@/models/clip")
    assert run.recipe == dict(name="gaussian", mean=[0.0])
    assert run.prompts == ["a cat", "an owl"] and run.reward_name == "clip@/models/clip"
    settings = run.settings
    assert settings["method"] == "VGGFlow" and settings["options"]["beta"] == 2.0
    known = dict(updates=2, batch_size=2, steps=4, transitions=2, shift=1.0)
    assert {name: settings[name] for name in known} == known
    assert settings["reward"] == run.reward_name and settings["prompts"] == run.prompts
    assert run.command_file is None and run.record["edition"] == EDITION


def test_no_file_holds_a_secret(tmp_path):
    run = python_run(tmp_path)
    run.path = tmp_path / "fresh"
    run.note_command(dict(model="m", token="hf_secret", nested=[dict(api_key="hf_secret")]))
    for file in tmp_path.rglob("*.json*"):
        assert "hf_secret" not in file.read_text(), file.name
    kept = dict(max_tokens=3, tokenizer="t", prompts=["token"])
    assert without_secrets(kept) == kept


def test_texts_in_the_runs_own_folder_follow_it(tmp_path):
    run = RunDirectory(tmp_path / "old")
    inside = dict(embeddings=f"{run.path}/texts", reward=f"a=1,{run.path}/mine.py:f=2")
    run.note_command({**inside, "model": "/models/sd3", "out": str(run.path)})
    assert str(tmp_path) not in (run.path / "command.json").read_text()
    run.path.rename(tmp_path / "new")
    new = RunDirectory(tmp_path / "new")
    assert new.settings == dict(
        embeddings=f"{new.path}/texts",
        reward=f"a=1,{new.path}/mine.py:f=2",
        model="/models/sd3",
    )


def test_no_command_is_written_over_something_else(tmp_path):
    run = RunDirectory(tmp_path / "a")
    known = {"world", "updates", "progress", "out"}
    asked = dict(world="gaussian", out=str(run.path), updates=3, progress=False)
    run.note_command(asked, known)
    run.note_command({**asked, "updates": 4}, known)  # an attempt before any work
    assert run.settings == dict(world="gaussian", updates=4)
    for text in ('{"build": "make all"}', "ls", "[1]"):
        (run.path / "command.json").write_text(text)
        with pytest.raises(ValueError, match="is not the command of a run"):
            run.note_command(asked, known)
        assert (run.path / "command.json").read_text() == text
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds metrics.jsonl and no config.json"):
        RunDirectory(tmp_path / "b").note_command(asked, known)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_the_command_of_a_run_that_has_begun_stays_but_follows_what_may_change(tmp_path):
    run = RunDirectory(tmp_path)
    run.note_command(dict(updates=2, log_to=["trackio"]))
    python_run(tmp_path)
    run.note_command(dict(updates=9))
    assert run.settings == dict(updates=2, log_to=["trackio"])
    names = {"updates", "log_to", "micro_batch"}
    usual = dict(updates=20, log_to=(), micro_batch=0)
    run.renew_command(dict(updates=9, log_to=("trackio",), micro_batch=0), names, usual)
    assert run.settings == dict(updates=9, log_to=["trackio"])


def test_a_card_says_what_was_asked(tmp_path):
    card = dict(name="x", parameters=dict(world="emoji", reward="emoji-hps"))
    (tmp_path / "card.json").write_text(json.dumps(card))
    run = RunDirectory(tmp_path)
    assert run.settings == card["parameters"] and run.reward_name == "emoji-hps"
    run.note_command(dict(world="gaussian"))
    assert not (tmp_path / "command.json").exists()


def test_what_is_missing_is_empty_and_what_is_damaged_is_named(tmp_path):
    run = RunDirectory(tmp_path / "none")
    assert (run.record, run.settings, run.recipe) == ({}, {}, {})
    assert (run.prompts, run.reward_name, run.newest_checkpoint()) == (None, "", None)
    assert run.history.rows == run.history.evals == run.history.flags == []
    assert run.load_newest() == (0, {}, None) and not run.begun()
    run.path.mkdir()
    (run.path / "config.json").write_text('{"flow": 3}')
    with pytest.raises(ValueError, match="is damaged .its 'flow' is no object."):
        _ = run.record
    (run.path / "command.json").write_text("[")
    with pytest.raises(ValueError, match="command.json is damaged"):
        _ = run.settings


def test_an_adapter_is_that_of_the_end_or_of_the_last_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished run.*same command"):
        run.adapter()
    flow = dict(name="SD3Flow", lora_rank=2, lora_alpha=4, guidance_scale=1.0)
    record = dict(config={}, method={}, flow=flow)
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "command.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="python -m vggflow.train .*command.json"):
        run.adapter()
    weights = dict(w=torch.ones(2))
    run.save_checkpoint(9, flow=weights)
    run.save_checkpoint(10, flow=weights, ema=dict(w=torch.zeros(2)))
    settings, kept = run.adapter()
    assert settings == dict(lora_rank=2, lora_alpha=4) and not kept["w"].any()
    (tmp_path / "lora").mkdir()
    assert run.adapter() == tmp_path / "lora"


def test_the_newest_checkpoint_is_the_one_with_the_most_updates(tmp_path):
    "Also where their number outgrows its six places"
    run = RunDirectory(tmp_path)
    for update in (999_999, 1_000_000):
        run.save_checkpoint(update, flow=dict(w=torch.ones(1)))
    assert run.load_newest()[0] == 1_000_000


def test_records_differ_in_what_makes_another_run():
    flow = GaussianFlow([0.0], 0.6)

    def record(method=None, prompts=None, **settings):
        config = FinetuneConfig(**settings)
        made = run_record(flow, linear, method or VGGFlow(), config, prompts)
        return json.loads(json.dumps(made))

    base = record()
    own = own_settings(flow, FinetuneConfig())
    assert base["config"]["shift"] == own.shift == 1.0
    assert base["config"]["lr"] == own.lr == flow.usual_lr
    assert record_differences(base, record(updates=9, micro_batch=2, log_to="x")) == []
    assert record_differences(base, record(lr=1.0)) == ["config.lr: 0.003 ≠ 1.0"]
    assert record_differences(base, record(VGGFlow(beta=3.0))) == ["method.beta: 1.0 ≠ 3.0"]
    assert record_differences(base, record(prompts=["a"])) == ["prompts: None ≠ ['a']"]
    partial = dict(config=dict(lr=1.0), flow={})
    found = record_differences(base, partial, partial=True)
    assert found == ["config.lr: 0.003 ≠ 1.0"]


WAITS = """
import sys
from vggflow.training.run_directory import RunDirectory

with RunDirectory(sys.argv[1]).lock():
    print("has it")
"""


def test_another_process_waits_for_the_folder(tmp_path):
    run = RunDirectory(tmp_path)
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    with run.lock():
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = f"process {os.getpid()} on {socket.gethostname()} works on the run in"
        assert other.stdout.readline().startswith(said)
        time.sleep(0.2)
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "has it\n" and other.returncode == 0


ELSEWHERE = (
    "filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=1f\nduration={}\nstart=1\n"
)


def lease_of_another_machine(folder, seconds):
    "What a process of another machine leaves that shares the disk"
    write_text(folder / ".training.lease", ELSEWHERE.format(seconds))


def test_another_machines_run_is_waited_for_until_it_is_silent(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(files, "SILENT", 0.5)
    lease_of_another_machine(tmp_path, 0.5)
    with RunDirectory(tmp_path).lock():
        said = capsys.readouterr().out
        assert said.startswith(f"process 7 on elsewhere works on the run in {tmp_path}")
        assert "until it ends, or has been silent for 0.5 s" in said
    assert not (tmp_path / ".training.lease").exists()


def test_what_a_killed_process_kept_is_free_at_once(tmp_path, capsys):
    ending = WAITS + "    import os; os.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", ending, str(tmp_path)], capture_output=True)
    assert (tmp_path / ".training.lease").exists()
    with RunDirectory(tmp_path).lock():
        assert not capsys.readouterr().out


@pytest.mark.parametrize("torn", ["", "filelock/2\npid=", "7\nelsewhere\n", "\0" * 40])
def test_a_torn_lease_holds_nobody_up(tmp_path, torn, capsys):
    (tmp_path / ".training.lease").write_text(torn)
    with RunDirectory(tmp_path).lock():
        assert not capsys.readouterr().out
    assert not (tmp_path / ".training.lease").exists()


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SILENT", 0.3)
    calls = []

    def reward(x, prompts=None):
        calls.append(1)
        if len(calls) == 3:
            lease_of_another_machine(tmp_path, 0.3)
            while not files.is_taken(LOCKED[str(tmp_path)]):
                time.sleep(0.05)
        return x.sum(-1)

    config = FinetuneConfig(updates=9, batch_size=2, steps=5)
    call = (GaussianFlow([0.0], 1.0), reward, VGGFlow(beta=1.0), config, tmp_path)
    with pytest.raises(Taken, match="taken over by another process"):
        finetune(*call, progress=False)
    run = RunDirectory(tmp_path)
    assert len(run.metrics) < 3 and not run.checkpoints()
    assert "elsewhere" in (tmp_path / ".training.lease").read_text()
