"`import vggflow` is quick, and type checkers and editors see what it offers"

import json
import subprocess
import sys
from pathlib import Path

import pytest

import vggflow

NAMES = """FlowModel GaussianFlow MixtureFlow Trajectory time_grid sample ValueGradient
Method
VGGFlow VGGFlowPMP AdjointMatching ReFL DRaFT FinetuneConfig finetune History RunDirectory
SD3Flow lora_settings load_flow get_reward latent_reward load_prompts read_images evaluate
gap_closed write_report""".split()

EXAMPLE = """
from pathlib import Path

from torch import Tensor

from vggflow import FinetuneConfig, RunDirectory, VGGFlow, finetune, load_flow, time_grid


def warm(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[:, 0] - images[:, 2]).mean((1, 2))


flow = load_flow("emoji", lora_rank=4)
config = FinetuneConfig(updates=20, batch_size=8, lr=1e-3)
method = VGGFlow(beta=30.0, clip=0.8)
history = finetune(flow, warm, method, config, out=Path("run"), prompts=["a cat"])
print(history.rows[-1]["loss"], RunDirectory("run").record, time_grid(20))
reveal_type(history)
reveal_type(method)
reveal_type(config.ema)
"""


def test_the_top_level_is_what_users_need():
    assert set(NAMES) <= set(dir(vggflow))
    assert set(vggflow.__all__) == {*NAMES, "__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there(name):
    found = getattr(vggflow, name)
    assert found.__name__ == name and found.__doc__
    assert found.__module__.startswith("vggflow.")


def test_the_stub_says_the_same():
    stub = Path(vggflow.__file__).with_suffix(".pyi").read_text()
    for name in NAMES:
        module = getattr(vggflow, name).__module__.removeprefix("vggflow")
        assert f"from {module} import {name} as {name}\n" in stub
    assert stub.count("\nfrom .") == len(NAMES)
    assert Path(vggflow.__file__).with_name("py.typed").exists()


def test_what_diffusers_asks_for_is_there():
    for name in ("EmojiCodec", "EmojiT5Encoder", "ModelMixin", "PreTrainedModel"):
        assert isinstance(getattr(vggflow, name), type)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        vggflow.nothing_of_that_name  # noqa: B018


def test_the_import_is_light():
    "No library is imported"
    heavy = ("torch", "numpy", "diffusers", "transformers", "pydantic", "cyclopts")
    code = f"import sys, vggflow; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.stdout.strip() == "[]", p.stdout + p.stderr


def test_pyright_understands_a_users_script(tmp_path):
    pytest.importorskip("basedpyright")
    (tmp_path / "example.py").write_text(EXAMPLE)
    strict = dict(typeCheckingMode="standard", include=["example.py"])
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(strict))
    root = Path(vggflow.__file__).parents[1]
    settings = ["--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    command = [sys.executable, "-m", "basedpyright", *settings]
    how = dict(capture_output=True, text=True, cwd=tmp_path)
    import os

    p = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, **how)
    said = json.loads(p.stdout)["generalDiagnostics"]
    wrong = [d["message"] for d in said if d["severity"] == "error"]
    assert not wrong, wrong
    told = [d["message"] for d in said if d["severity"] == "information"]
    for kind in ("History", "VGGFlow", "float"):
        assert any(f'is "{kind}"' in text for text in told), told


def test_jedi_completes_names_and_methods():
    jedi = pytest.importorskip("jedi")

    def completions(code):
        return {c.name for c in jedi.Script(code).complete()}

    assert set(NAMES) <= completions("import vggflow\nvggflow.")
    found = completions("from vggflow import VGGFlow\nmethod = VGGFlow(beta=1.0)\nmethod.")
    assert {"prepare", "loss", "setup", "parameter_groups"} <= found
    assert {"claim", "history"} <= completions(
        "import vggflow\nrun = vggflow.RunDirectory('run')\nrun."
    )
