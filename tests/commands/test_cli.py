"The command line: made from signatures, light, and one line for what is wrong"

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import parsed

from vggflow import cli
from vggflow.commands.options import declared, option_value

ERRORS = [
    ("finetune --out r --model /no/folder --reward redness --prompts a", "/no/folder"),
    ("finetune --out r --model {} --reward rednes --prompts a", "did you mean 'redness'"),
    ("finetune --out r --model {} --reward redness", "prompts"),
    ("finetune --out r --model {} --reward redness --prompts no.csv", "'no.csv'"),
    ("finetune --out r --method VGG-Flaw", "did you mean 'VGG-Flow'"),
    ("finetune --option clip", "name=value"),
    ("finetune --out r --world gaussian --option clop=1 --eval-every 0", "clop"),
    ("finetune --updates x", "--updates: invalid int value: 'x'"),
    ("finetune --updtes 3", "Did you mean --updates"),
    ("finetune --out r --updates 0", "updates must be at least 1"),
    ("train --out r --stop-on colapse", "colapse"),
    ("finetune --updates 3", "Give --out"),
    ("finetune --out r --option beta=abc", "'abc'"),
    (
        "finetune --out r --images-per-prompt 0",
        "--images-per-prompt: must be at least 1, got 0",
    ),
    ("finetune --out r --device cuda:9", "'cuda:9' is not here"),
    ("finetun --out r", "did you mean 'finetune'"),
    ("sample --lora nowhere --model {} 'a cat'", "nowhere"),
    ("sample --model {} --dtype int a", "int"),
    ("sample a --device cuda:9", "'cuda:9' is not here"),
    ("sample a --device gpu", "unknown device"),
    ("sample a --compare", "--run DIR"),
    ("sample a --out a.xyz", ".xyz"),
    ("sample a --out a", "without a suffix"),
    ("sample a --n 0", "--n: must be at least 1"),
    ("sample a --steps 0", "--steps: must be"),
    ("evaluate", "what is to be evaluated"),
    ("evaluate --images x --run y", "leave --model"),
    ("evaluate --run nowhere --out x", "no run directory 'nowhere'"),
    ("evaluate --lora l --out x --device cuda:9 --reward redness", "'cuda:9' is not here"),
    ("evaluate --batch-size 0", "--batch-size: must be"),
    ("evaluate --lora l --out x --images-per-prompt 1", "--perceptual none"),
    ("evaluate --images x --out y", "which reward"),
    ("prompts animals --limit -1", "--limit: must be at least 0"),
    ("export nowhere x", "nowhere"),
    ("doctor --micro-batch many", "invalid int"),
    ("status -- -n", "takes nothing after --"),
    ("", "a verb is needed"),
]


@pytest.mark.parametrize("line,says", ERRORS)
def test_one_line_and_exit_2(model, call, here, line, says, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = call(line.format(model))
    assert status == 2
    assert says in err
    assert err.strip().count("\n") == 0, err


def test_options_of_a_method_by_their_words():
    words = ("False", "TRUE", "no", "Yes", "None", "null", "0.8", "t^2", '"no"')
    meant = [False, True, False, True, None, None, 0.8, "t^2", "no"]
    assert [option_value(f"x={w}")[1] for w in words] == meant


def test_settings_reach_the_function_as_python_takes_them():
    _, said = parsed("finetune --option a=1 --option b=c --dtype BF16 --resolution 64")
    assert said == dict(options=dict(a=1, b="c"), dtype="bfloat16", image_size=64)
    _, said = parsed("finetune --quiet --no-resume --cfg-in-turn --stop-on --prompts a b")
    assert said == dict(
        progress=False, resume=False, cfg_batched=False, stop_on=[], prompts=["a", "b"]
    )
    args, said = parsed("sample 'a cat' an --n 2 --compare")
    assert args == ("a cat", "an") and said == dict(n=2, compare=True)
    assert parsed("figures 5 --jobs 3")[1] == dict(cores=3)


def test_the_home_folder_is_put_where_a_path_begins():
    home = os.path.expanduser("~")
    line = "finetune --out=~/runs/a --model=~/sd3 --reward clip@~/clip=2,~/my.py:f"
    _, said = parsed(line + " --prompts ~/my.csv:text --embeddings=~/e --taesd=~/t")
    assert said == dict(
        out=f"{home}/runs/a",
        model=f"{home}/sd3",
        reward=f"clip@{home}/clip=2,{home}/my.py:f",
        prompts=[f"{home}/my.csv:text"],
        embeddings=f"{home}/e",
        taesd=f"{home}/t",
    )
    _, said = parsed(
        "evaluate --images=~/i --reference=~/r --floor=~/f --lora=~/l --run=~/n"
    )
    assert all(v.startswith(home) for v in said.values()) and len(said) == 5


def test_help_needs_no_torch_and_knows_every_setting():
    "Every parameter of a run, of the loop and of the model has an option"
    from vggflow.commands.run import LOOKS, LOOP, run
    from vggflow.worlds.world import get_world

    settings = cli.VERBS["finetune"].settings
    names = {*inspect.signature(run).parameters, *LOOP, *LOOKS, *get_world("sd3").options()}
    own = {
        "more",
        "built",
        "command",
        "token",
        "path",
        "pipe",
        "options",
        "self",
        "text_encoders",
        "cls",
        "kwargs",
    }
    assert not names - own - {*settings}
    code = (
        "import sys; from vggflow.cli import main; main(['finetune', '--help']); "
        "main(['--help']); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.stdout.strip().endswith("[]"), p.stderr
    for text in ("examples:", "--micro-batch", "--resolution", "exit status", "130", "143"):
        assert text in p.stdout
    assert "None" not in p.stdout.replace("None is the model's own", "")


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_says_something_of_every_option(name):
    for setting in cli.VERBS[name].settings.values():
        assert setting.help, (
            f"{name} --{setting.name} has no help: write a comment behind it"
        )


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_switch_changes_something(name):
    "One that is on already is spelled by what turns it off"
    settings = cli.VERBS[name].settings.values()
    idle = {s.name for s in settings if s.kind is bool and s.default} - {*cli.OFF}
    assert not idle


@pytest.mark.parametrize("name", ["finetune", "sample", "evaluate", "doctor"])
def test_options_stand_in_groups(name):
    grouped = " ".join(cli.GROUPS.values()).split()
    loose = [s.name for s in cli.VERBS[name].settings.values() if not s.positional]
    assert not {*loose} - {*grouped}


def test_help_reads_the_defaults_of_the_run():
    "What is shown is what `run` takes, not what the loop does"
    from vggflow.commands.run import run

    shown = cli.VERBS["finetune"].settings
    usual = {k: p.default for k, p in inspect.signature(run).parameters.items()}
    for name in ("lr", "updates", "save_every", "eval_every"):
        assert shown[name].default == usual[name]
    loop = declared("training.config:FinetuneConfig")
    assert loop["updates"].default != usual["updates"]  # teeth: the two differ
    assert shown["batch_size"] == loop["batch_size"]


def test_completion_scripts_know_verbs_and_options():
    app = cli.whole_app()
    for shell in ("bash", "zsh", "fish"):
        script = app.generate_completion(shell=shell)
        for word in ("finetune", "gradient-checkpointing", "no-floor"):
            assert word in script, (shell, word)


def test_prompts_verb(call, here):
    Path("a.csv").write_text("prompt\nx\ny\n")
    assert call("prompts a.csv animals --limit 2")[1].split() == ["x", "butterfly"]
    assert call("prompts a.csv")[1] == "x\ny\n"


def test_json_is_all_that_is_printed_for_programs(call):
    for line in ("cards", "claims", "equations", "status", "doctor --world gaussian"):
        status, out, err = call(f"{line} --json")
        assert status in (0, 1), err
        json.loads(out)


def test_doctor_verb(model, call):
    more = "--reward redness --prompts animals --image-size 16 --batch-size 2 --json"
    status, out, _ = call(f"doctor --model {model} {more}")
    checks = {c["name"]: c for c in json.loads(out)}
    assert status == 0
    assert checks["model"]["status"] == checks["memory"]["status"] == "ok"
    assert "2 text encoders" in checks["model"]["found"]
    assert "45" in checks["prompts"]["found"]
    faults = {"--steps 3": "settings", "--image-size 17": "sizes"}
    faults["--device cuda:9 --reward redness"] = "device"
    for more, name in faults.items():
        status, out, _ = call(f"doctor --model {model} {more}")
        assert status == 1 and out.splitlines()[-1] == f"1 failed ({name})"
    status, out, _ = call(f"doctor --model {model}/vae --reward rednes")
    assert status == 1
    assert "did you mean 'redness'" in out and "failed" in out.splitlines()[-1]


def test_out_of_memory_names_what_helps(monkeypatch, call, here):
    def run_out_of_memory(**settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("vggflow.commands.finetune.run", run_out_of_memory)
    status, _, err = call("finetune --out r")
    assert status == 2 and "--micro-batch 1" in err and err.count("\n") == 1


def test_interrupted_says_that_it_goes_on(monkeypatch, call, here):
    def interrupt(**settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("vggflow.commands.finetune.run", interrupt)
    status, _, err = call("finetune --out r")
    assert status == 130 and "goes on" in err


WHOLE = (
    "updates",
    "batch-size",
    "steps",
    "transitions",
    "seed",
    "save-every",
    "eval-early",
)
REAL = ("lr", "shift", "weight-decay", "grad-clip", "ema", "beta")


@pytest.mark.parametrize("option", [*WHOLE, *REAL])
@pytest.mark.parametrize("value", ["nan", "-inf", "1e400", "many", ""])
def test_a_number_that_is_none_is_named_with_its_option(capsys, option, value):
    assert (
        cli.main(["finetune", "--world", "gaussian", f"--{option}={value}", "--out", "x"])
        == 2
    )
    err = capsys.readouterr().err
    assert f"--{option}: " in err and err.count("\n") == 1


@pytest.mark.parametrize("option", WHOLE)
@pytest.mark.parametrize("value", ["1.5", "-0.5", "2.0000001", "1e-3"])
def test_a_count_is_not_cut_off(capsys, option, value):
    "int('1.5') is 1 for some"
    assert (
        cli.main(["finetune", "--world", "gaussian", f"--{option}={value}", "--out", "x"])
        == 2
    )
    assert f"--{option}: must be a whole number, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sample", "evaluate", "finetune"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_shift_is_positive_wherever_it_is_given(capsys, verb, value):
    assert cli.main([verb, f"--shift={value}", "--out", "x"]) == 2
    assert "--shift: must be positive" in capsys.readouterr().err


def test_large_seeds_are_exact():
    class Token:
        value = "9007199254740993"  # no float

    assert cli.number_reader(int)(int, [Token]) == 9007199254740993
