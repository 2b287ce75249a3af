"""CONTRIBUTING.md: every worked example is written down and run as a reader would."""

import os
import re
import shlex
from pathlib import Path

import pytest
from forked import status_of

from vggflow import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")


def section(title: str) -> str:
    "The text of one section"
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n")[1], flags=re.M)[0]


def files(text: str) -> dict:
    "name -> content of the files that a section writes"
    return dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.S))


def commands(text: str) -> list:
    "Commands that a section calls, without the prompt"
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    return [line[2:] for block in blocks for line in block.splitlines()]


@pytest.fixture
def checkout(tmp_path):
    "What a command needs of a checkout, in a folder of its own"
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/experiments").symlink_to(ROOT / "nbs/experiments")
    for name in ("Snakefile", "experiments.toml"):
        (tmp_path / name).write_text(
            (ROOT / name).read_text(encoding="utf8"), encoding="utf8"
        )
    return tmp_path


def call(words: list, folder: Path) -> int:
    "Exit status of a command in a folder"
    os.chdir(folder)
    os.environ.update(HF_HUB_OFFLINE="1", VGGFLOW_ROOT=str(folder))
    return cli.main(words)


def follow(title: str, folder: Path) -> None:
    "Write the files of a section and call its commands, each in a process of its own"
    text = section(title)
    for name, content in files(text).items():
        (folder / name).write_text(content, encoding="utf8")
    for command in commands(text):
        program, *words = shlex.split(command)
        assert program == "vggflow", f"{title}: {command}"
        assert status_of(call, words, folder) == 0, command


@pytest.mark.parametrize("what", ["reward", "method", "model"])
def test_the_example_trains_from_the_command_line(what, checkout):
    follow(f"Adding a {what}", checkout)
    runs = [path.parent for path in (checkout / "runs").glob("*/metrics.jsonl")]
    assert len(runs) == 1
    assert len((runs[0] / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_example_of_a_figure_is_drawn_with_a_colour_of_its_own(checkout):
    from vggflow.experiments.style import COLORS, color

    for name, content in files(section("Adding a method")).items():
        (checkout / name).write_text(content, encoding="utf8")
    table = re.search(r"```toml\n(.*?)```", section("Adding a figure"), re.S)[1]
    with (checkout / "experiments.toml").open("a", encoding="utf8") as file:
        file.write(table)
    follow("Adding a figure", checkout)
    assert (checkout / "figures/smoke/climbing.png").stat().st_size > 10_000
    assert color("climb.py:Climb") not in COLORS.values()


def test_the_example_of_a_method_is_short():
    source = files(section("Adding a method"))["climb.py"]
    assert len(source.splitlines()) <= 25
