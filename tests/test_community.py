"The files for those who come: they parse, and what they name is there"

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from command_line import parsed

import vggflow
from vggflow import cli

ROOT = Path(__file__).parents[1]
TEXTS = ("CONTRIBUTING.md", "RELEASE.md", "SECURITY.md", "CHANGELOG.md")
TEXTS += (".github/pull_request_template.md", ".devcontainer/devcontainer.json")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


def code_in(text: str) -> list:
    "What a text says to type: lines after a prompt, and what stands between backticks"
    typed = re.findall(r"^\$ (.*?)(?: +#.*)?$", text, re.M)
    return typed + re.findall(r"`([^`\n]+)`", text) + re.findall(r'"(make [^"]+)"', text)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_that_are_named_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    for code in code_in(read(name)):
        words = code.split()
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, code
        if words[0] == "vggflow" and len(words) > 1 and words[1][0] not in "-.":
            assert words[1] in {*cli.VERBS, *cli.ALIASES, "VERB"}, code


@pytest.mark.parametrize("name", TEXTS[:4])
def test_files_that_are_linked_exist(name):
    for link in re.findall(r"\]\(([^)#:]+)\)", read(name)):
        assert (ROOT / link).exists(), f"{name} links to {link}"


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == vggflow.__version__


def test_the_citation_is_whole():
    said = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    assert len(said["preferred-citation"]["authors"]) == 5


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_what_is_needed(form):
    said = yaml.safe_load(form.read_text(encoding="utf8"))
    assert {"name", "description", "body"} <= said.keys()
    for part in said["body"]:
        assert part["type"] in ("input", "textarea") and part["attributes"]["label"]
        assert part["validations"]["required"]


def test_the_workflow_runs_what_the_project_runs():
    said = yaml.safe_load(read(".github/workflows/test.yml"))
    when = said[True]  # YAML reads `on` so
    assert {"push", "pull_request", "schedule"} <= when.keys()
    commands = [step.get("run") for step in said["jobs"]["test"]["steps"]]
    assert ".ci/run" in commands and os.access(ROOT / ".ci/run", os.X_OK)
    assert read(".ci/run").rstrip().endswith("make test")


def test_the_containers_begin_with_what_is_there():
    said = json.loads(read(".devcontainer/devcontainer.json"))
    assert said["postCreateCommand"] == "make setup"
    lines = read(".binder/requirements.txt").splitlines()
    (constraints,) = [line.split()[1] for line in lines if line.startswith("-c ")]
    assert (ROOT / ".binder" / constraints).resolve() == ROOT / "constraints.txt"
    assert "-e .[figures,dev]" in lines


def test_the_commands_on_colab_are_understood():
    cells = json.loads(read("colab/vggflow.ipynb"))["cells"]
    lines = [line.strip() for cell in cells for line in cell["source"]]
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("!vggflow ")]
    assert len(calls) == 2
    for words in calls:
        assert parsed(shlex.join(words))
