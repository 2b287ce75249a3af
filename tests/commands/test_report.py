"report.html: written when a run ends, whole in itself, and true"

import base64
import html
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import WIDTHS, opened, too_wide
from PIL import Image

from vggflow.commands.report import write_report

HOSTILE = "<script>alert(1)</script> & 'a \"cat\"'"


def page(folder) -> str:
    "The report of a run"
    return (Path(folder) / "report.html").read_text(encoding="utf8")


def code_in(text: str) -> list:
    "What stands in a report to be copied"
    return [html.unescape(code) for code in re.findall(r"<pre>(.*?)</pre>", text, re.S)]


@pytest.fixture(scope="module")
def reported(model, tmp_path_factory):
    "A run of a tiny Stable Diffusion 3 with two evaluations and a prompt that is HTML"
    from vggflow import cli

    out = tmp_path_factory.mktemp("reported") / "a run"
    reward = out.parent / "mine.py"
    reward.write_text("def bright(images, prompts): return images.mean((1, 2, 3))\n")
    line = f"finetune --model {model} --reward {reward}:bright --method ReFL --quiet"
    line += (
        f" --prompts 'a cat' {shlex.quote(HOSTILE)} --updates 2 --batch-size 2 --steps 2"
    )
    line += " --lora-rank 2 --guidance-scale 2 --lr 1e-2 --eval-every 2 --perceptual none"
    line += f" --images-per-prompt 3 --out {shlex.quote(str(out))}"
    assert cli.main(shlex.split(line)) == 0
    return out


def test_its_path_is_the_last_line_printed(call, here):
    line = "finetune --world gaussian --updates 2 --batch-size 2 --eval-every 2 --quiet"
    status, out, err = call(f"{line} --out runs/one")
    assert status == 0, err
    assert out.splitlines()[-1] == "report: runs/one/report.html"
    assert "Has done all of its 2 updates." in page("runs/one")


def test_it_holds_all_it_shows(reported):
    text = page(reported)
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith("data:") for link in links)
    assert "<script" not in text and "http" not in re.sub("http-equiv", "", text)
    assert html.unescape(text).count(HOSTILE) >= 4


def test_its_numbers_are_those_of_the_run(reported):
    rows = (reported / "eval.jsonl").read_text().splitlines()
    first, last = (json.loads(row)["reward"] for row in (rows[0], rows[-1]))
    assert f"<td>Reward</td><td>{first:.4g}</td>\n<td>{last:.4g}</td>" in page(reported)


def test_its_snippet_draws_what_the_exported_card_draws(reported, call, here):
    "For stock diffusers, with the run's guidance, size and times"
    assert call(f"export {shlex.quote(str(reported))} given")[0] == 0
    card = Path("given/README.md").read_text()
    of_card = re.search("```python\n(.*?)```", card, re.S)[1]
    model = json.loads((reported / "command.json").read_text())["model"]
    of_card = of_card.replace("'this folder or its hub id'", "'given'")
    of_card = of_card.replace("from_pretrained('base'", f"from_pretrained({model!r}")
    images = []
    for code in (code_in(page(reported))[0], of_card):
        torch.manual_seed(0)
        said = {}
        exec(code, said)
        images.append(np.asarray(said["image"]).astype(int))
    assert images[0].std() > 0
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_snippet_of_the_emoji_world_draws(here, call):
    line = "finetune --method ReFL --reward redness --prompts 'a cat' --updates 1 --quiet"
    line += " --batch-size 2 --steps 2 --eval-every 0 --lora-rank 2 --out r"
    assert call(line)[0] == 0
    said = {}
    exec(code_in(page("r"))[0], said)
    assert said["image"].size == (64, 64)


def test_an_interrupted_run_has_one(call, here):
    Path("mine.py").write_text(
        "calls = []\n"
        "def twice(x, prompts=None):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 4: raise KeyboardInterrupt\n"
        "    return x.sum(-1)\n"
    )
    line = "finetune --world gaussian --reward mine.py:twice --method ReFL --updates 50"
    status, out, _ = call(f"{line} --batch-size 2 --eval-every 0 --quiet --out r")
    assert status == 130
    assert out.splitlines()[-1] == "report: r/report.html"
    done = re.search(r"Has done (\d+) of 50 updates; the same command goes on", page("r"))
    assert 0 < int(done[1]) < 50


def test_a_refused_command_leaves_none(call, here):
    assert call("finetune --world gaussian --updates 2 --stop-on colapse --out r")[0] == 2
    assert not Path("r").exists()


def test_a_run_of_python_is_reported_from_the_shell(call, here):
    from short_runs import run

    run("r")
    status, out, err = call("report r")
    assert (status, out) == (0, "r/report.html\n"), err
    assert "flow.load_trainable_state" in page("r")
    status, _, err = call("report nowhere")
    assert status == 2 and "no run directory 'nowhere'" in err


def test_a_run_that_cannot_be_reported_is_no_error(call, here):
    "A folder stands where the page would be"
    Path("r/report.html").mkdir(parents=True)
    line = "finetune --world gaussian --updates 2 --batch-size 2 --eval-every 0 --quiet"
    status, out, err = call(f"{line} --out r")
    assert status == 0 and "report:" not in out
    assert "no report (" in err and "vggflow report r writes it" in err


def test_a_checkpoint_without_an_adapter_is_exported_by_a_command(reported, tmp_path):
    folder = shutil.copytree(reported, tmp_path / "r")
    shutil.rmtree(folder / "lora")
    text = write_report(folder).read_text()
    assert "adapter of its checkpoint at update 2" in text
    assert code_in(text)[0] == f"vggflow export {folder} FOLDER"


def test_large_images_stay_light(reported, tmp_path):
    "Rows of 256 pixels and more are JPEG, and as close as one would see"
    folder = shutil.copytree(reported, tmp_path / "r")
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    sheet = np.broadcast_to(ramp[None, :, None], (512, 1024, 3))
    for file in (folder / "samples").glob("*.png"):
        Image.fromarray(sheet.copy()).save(file)
    text = write_report(folder).read_text()
    rows = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(rows) == 4
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(rows[0]))))
    assert np.abs(shown.astype(int) - sheet[:256]).mean() < 2
    assert 'class="small"' not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(reported, width):
    with opened((reported / "report.html").as_uri(), width) as (shown, errors):
        assert too_wide(shown) <= 0
        sizes = shown.evaluate("[...document.images].map(i => [i.naturalWidth, i.width])")
        assert len(sizes) == 4 and all(natural and width for natural, width in sizes)
        assert shown.locator("svg[aria-label]").count() > 4
        assert not errors
