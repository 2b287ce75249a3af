"The wheel: built from the repository, installed by itself, used from another folder"

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked_files():
    "Files of the repository, by their names"
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    p = subprocess.run(command, capture_output=True, text=True, check=True)
    return [f for f in p.stdout.split("\0") if f and (ROOT / f).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy"
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "src"
    for name in tracked_files():
        if not name.startswith(("nbs/", "figures/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    alone = ["-q", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *alone, "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("vggflow-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "An environment of its own with the wheel; the other packages are those of this one"
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ask = [python, "-c", 'import sysconfig; print(sysconfig.get_path("purelib"))']
    site = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    install = [*pip, "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    needed = ("theory/flow.py", "vggflow.mplstyle", "py.typed", "__init__.pyi")
    for name in (*needed, "data/paper/figures.csv"):
        assert f"vggflow/{name}" in names
    assert any(n.startswith("vggflow/data/emoji/base/") for n in names)
    for name in ("LICENSE", "NOTICE"):
        assert any(n.endswith(f"licenses/{name}") for n in names)
    known = ("vggflow/data/paper/", "vggflow/data/emoji/")
    data = [n for n in names if n.startswith("vggflow/data/")]
    assert not [n for n in data if not n.startswith(known)]
    assert not [n for n in names if not n.startswith("vggflow")]


def call_python(python, code, folder):
    "Run code in the environment, without this checkout's settings"
    own = ("VGGFLOW_DATA", "VGGFLOW_ROOT", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if k not in own}
    env["HF_HUB_OFFLINE"] = "1"
    how = dict(cwd=folder, capture_output=True, text=True, env=env)
    return subprocess.run([python, "-c", code], **how)


def call_command(python, line, folder):
    "Run the command line in the environment"
    words = line.split()
    code = f"from vggflow.cli import main; raise SystemExit(main({words!r}))"
    return call_python(python, code.replace("a_cat", "a cat"), folder)


def test_is_the_wheel_and_not_the_checkout(python, tmp_path):
    p = call_python(python, "import vggflow; print(vggflow.__file__)", tmp_path)
    said = p.stdout + p.stderr
    assert str(ROOT) not in p.stdout and "site-packages" in p.stdout, said


def test_paper_numbers_from_any_folder(python, tmp_path):
    code = (
        "from vggflow.experiments.paper_data import published_curve, published_table1\n"
        "last = published_curve(5, 'reward', 'VGG-Flow')['mean'][-1]\n"
        "print(len(published_table1()), round(float(last), 2))"
    )
    p = call_python(python, code, tmp_path)
    assert p.stdout.split() == ["18", "8.24"], p.stderr


def test_draws_a_cat_from_any_folder(python, tmp_path):
    p = call_command(python, "sample a_cat --out cat.png --steps 10", tmp_path)
    assert p.returncode == 0, p.stderr
    from PIL import Image

    image = Image.open(tmp_path / "cat.png")
    assert image.size == (128, 128) and len(image.getcolors(1 << 16) or []) > 20
    p = call_command(python, "sample a_cat --out cat.png", tmp_path)
    assert p.returncode == 2 and "exists" in p.stderr
