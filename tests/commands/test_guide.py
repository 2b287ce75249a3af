"The commands of the guide are commands of this version"

import json
import re
import shlex
from pathlib import Path

import pytest

from vggflow import cli

GUIDE = Path(__file__).parents[2] / "nbs/pages/sd3_guide.ipynb"


def commands():
    "Lines that begin with vggflow, in blocks of shell"
    cells = json.loads(GUIDE.read_text(encoding="utf8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    blocks = re.findall("```sh\n(.*?)```", text, re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return re.findall(r"^vggflow (.*)$", joined, re.M)


@pytest.mark.parametrize("line", commands())
def test_every_option_of_the_guide_is_one(line):
    words = shlex.split(line, comments=True)
    verb, words = words[0], words[1:]
    words = words[: words.index("--")] if "--" in words else words
    program = f"vggflow {verb}"
    assert cli.parse(program, cli.VERBS[verb], words) is not None


def test_a_wrong_option_would_be_noticed():
    with pytest.raises(ValueError, match="micro-batsh"):
        cli.parse("vggflow finetune", cli.VERBS["finetune"], ["--micro-batsh", "1"])
    assert len(commands()) > 8


SMALL = "--image-size 16 --max-sequence-length 16 --batch-size 2 --steps 3 --updates 2"
SMALL += " --transitions 2 --eval-every 2 --eval-prompts 1 --images-per-prompt 2 --quiet"


@pytest.mark.parametrize("folder", ["runs/12", "runs/24", "runs/80", "runs/ink"])
def test_a_run_of_the_guide_on_a_tiny_model(folder, call, model, here, run):
    "As it stands, but for model, reward and sizes"
    (line,) = [text for text in commands() if f"--out {folder}" in text]
    line = line.replace("$MODEL", str(model)).replace("styles/ink", f"{run}/lora")
    line = line.replace("--reward pickscore", "--reward redness --perceptual none")
    line = re.sub(r"--image-size \d+|--batch-size \d+", "", line)
    assert call(f"{line} {SMALL} --device cpu --dtype float32")[0] == 0
    status, _, err = call(f"export {folder} given")
    assert status == 0, err
    assert Path("given/pytorch_lora_weights.safetensors").exists()
