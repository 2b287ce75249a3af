"""The repository itself: notebooks, exports, imports, form and settings agree."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import style

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vggflow"
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("_")
)
STANDS_ON = {  # a floor -> the floors right below it
    "common": [],
    "theory": ["common"],
    "methods": ["theory"],
    "training": ["methods"],
    "judging": ["theory"],
    "worlds": ["judging"],
    "experiments": ["common"],
    "commands": ["training", "worlds", "experiments"],
    "cli": ["commands"],
    "train": ["cli"],
}


def floors_below(floor: str) -> set:
    "A floor and all that it stands on, down to the ground"
    return {floor}.union(*(floors_below(other) for other in STANDS_ON[floor]))


def imported_floors(source: str, floor: str = "") -> set:
    "Floors that a module of `floor` imports, anywhere in it"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= floors_of_import(node, floor)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "vggflow" and len(name) > 1}
    return found & STANDS_ON.keys()


def floors_of_import(node: ast.ImportFrom, floor: str) -> set:
    "Floors that one `from … import …` names"
    parts = (node.module or "").split(".")
    names = {alias.name for alias in node.names}
    if node.level == 1 and floor:
        return {floor}
    if node.level:
        return {parts[0]} if parts[0] else names
    if parts[0] != "vggflow":
        return set()
    return {parts[1]} if len(parts) > 1 else names


def environment() -> dict:
    "The variables of this process, with this environment's programs in reach"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down_only(module):
    floor, _, name = module.rpartition("/")
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf8")
    upward = imported_floors(source, floor) - floors_below(floor or name)
    assert not upward, f"{module} may not import {sorted(upward)}"


def test_the_import_check_sees_all_forms():
    source = (
        "from ..theory.flow import x\n"
        "def f():\n"
        "    from vggflow.worlds.emoji import y\n"
        "    import vggflow.train\n"
        "    from vggflow import experiments\n"
        "    from .near import z\n"
    )
    expected = {"theory", "worlds", "train", "experiments", "judging"}
    assert imported_floors(source, "judging") == expected


def test_every_module_stands_on_a_floor():
    places = {module.split("/")[0] for module in MODULES}
    assert places <= STANDS_ON.keys(), "a new folder: say in STANDS_ON what it may import"


def test_no_module_is_named_like_a_name_of_the_top_level():
    import vggflow

    top = {module for module in MODULES if "/" not in module}
    assert not top & set(vggflow.__all__)


def test_import_vggflow_is_light():
    code = (
        "import sys, vggflow, vggflow.cli, vggflow.experiments.cards; "
        "print(*(name in sys.modules for name in ('torch', 'diffusers')))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == ["False", "False"], said.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(notebook):
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counted = [cell for cell in code if cell.get("execution_count")]
    assert not counted, "execution counts: run make clean-notebooks"
    stray = [cell for cell in cells if not set(cell["metadata"]) <= {"tags"}]
    assert not stray, "stray cell metadata: run make clean-notebooks"
    parameters = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    if notebook.parent.name in ("experiments", "emoji"):
        assert len(parameters) == 1, "needs exactly one cell tagged 'parameters'"
    if notebook.parent.name == "experiments":
        assert not any(cell["outputs"] for cell in code), "templates keep no outputs"
    said = json.dumps([cell["outputs"] for cell in code])
    assert '"name": "stderr"' not in said, "keeps warnings or bars: clear these outputs"
    assert str(ROOT) not in said and "site-packages" not in said, "a path of this machine"
    assert notebook.stat().st_size < 250_000, "over 250 KB"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_idea_to_a_cell(notebook):
    "A cell has at most 40 lines, a class with its methods at most 65"
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    for cell in cells:
        source = "".join(cell["source"])
        most = 65 if re.search(r"^class ", source, re.M) else 40
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= most, source.splitlines()[:3]


def test_export_leaves_no_difference(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "vggflow"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path)
    variables = {name: value for name, value in environment().items() if name != "IN_TEST"}
    done = subprocess.run(
        ["nbdev-export"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here, there = exported(ROOT), exported(tmp_path)
    changed = [
        name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
    ]
    assert not changed, "vggflow/ differs from the notebooks: run make export"
    settings = [(folder / "pyproject.toml").read_text() for folder in (ROOT, tmp_path)]
    assert settings[0] == settings[1]


def exported(root: Path) -> dict:
    "Modules of a checkout and their text"
    found = (root / "vggflow").rglob("*.py")
    return {path.relative_to(root).as_posix(): path.read_text() for path in found}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_comes_from_a_notebook(module):
    assert "AUTOGENERATED! DO NOT EDIT!" in (PACKAGE / f"{module}.py").read_text()


def test_no_two_functions_share_a_name():
    places = {}
    for module in MODULES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf8"))
        for node in tree.body:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if named and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    own = {name: where for name, where in twice.items() if name not in VERBS}
    assert not own, own


VERBS = {  # a command has the name of what it calls
    *("finetune", "sample", "evaluate", "doctor", "export", "prompts", "main", "report"),
    *("figures", "figure", "status", "cards", "run", "collect", "equations", "claims"),
}


def test_readme_is_in_step():
    from vggflow.experiments.notebooks import readme

    shown = (ROOT / "README.md").read_text(encoding="utf8")
    assert shown == readme(), "README.md differs from nbs/index.ipynb: run make readme"
    assert len(shown.split()) <= 900, "README.md has more than 900 words"


def test_settings_ini_equals_pyproject():
    import vggflow

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, nbdev = settings["project"], settings["tool"]["nbdev"]
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    own = parser["DEFAULT"]
    assert own["version"] == vggflow.__version__
    assert own["lib_name"] == project["name"]
    assert own["description"] == project["description"]
    assert own["min_python"] == project["requires-python"].lstrip(">=")
    assert own["author"] == project["authors"][0]["name"]
    assert (own["license"], project["license"]) == ("apache2", "Apache-2.0")
    keywords = [keyword.replace(" ", "_") for keyword in project["keywords"]]
    assert own["keywords"].split() == keywords
    assert own["requirements"].split() == project["dependencies"]
    assert own["dev_requirements"].split() == project["optional-dependencies"]["dev"]
    assert own["console_scripts"] == f"vggflow={project['scripts']['vggflow']}"
    for name, value in nbdev.items():
        assert own[name] == (" ".join(value) if isinstance(value, list) else str(value)), (
            name
        )


def test_every_folder_of_the_package_is_packed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = set(settings["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"vggflow.data"} == packed


def test_constraints_are_what_is_installed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["torchvision"] == "0.28.0"
    for name, pinned in pins.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            continue
        assert have.split("+")[0] == pinned, f"{name} {have} is installed, pinned {pinned}"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = settings["project"]["dependencies"]
    names = {re.match("[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in needed}
    assert not names - set(pins), "a dependency without a pin"


def test_emoji_world_is_small():
    files = (path for path in (ROOT / "data/emoji").rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 25e6


def test_experiments_file_is_whole():
    from vggflow.experiments.cards import (
        experiment_names,
        has_profile,
        read_cards,
        read_experiments,
    )

    experiments = read_experiments()
    for name in experiment_names(experiments):
        for profile in experiments["profiles"]:
            if not has_profile(experiments[name], profile):
                continue
            found = [card.id for card in read_cards(name, profile, experiments)]
            assert found and len(set(found)) == len(found)
    paper = read_cards("aesthetic", "paper", experiments)
    assert {card.parameters["seed"] for card in paper} == {0, 1, 2}
    assert {card.parameters["updates"] for card in paper} == {400}


# ------------------------------------------------------------------------------ form


def run_ruff(*arguments: str) -> subprocess.CompletedProcess:
    "Ruff over everything that is written by hand"
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_ruff_has_nothing_to_say():
    done = run_ruff("check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout[-3000:]


def test_everything_is_formatted():
    done = run_ruff("format", "--check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_form_is_within_its_limits():
    problems = style.over_limits(style.measure())
    assert not problems, "\n".join(problems)
