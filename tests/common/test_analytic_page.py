"site/playground/analytic.html: its numbers are those of the package, and it moves"

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from browser import WIDTHS, opened, too_wide

from vggflow.commands.playground import PROBLEMS, LineWish, solve_line
from vggflow.theory.flow import MixtureFlow

PAGE = Path(__file__).parents[2] / "site" / "playground" / "analytic.html"
METHOD = re.search(r'<script id="method">(.*?)</script>', PAGE.read_text("utf8"), re.S)[1]


def answer(question: str, folder: Path):
    "What the page's functions give, by Node"
    node = shutil.which("node") or shutil.which("nodejs")
    if not node:
        pytest.skip("Node is not installed")
    (folder / "method.js").write_text(METHOD, encoding="utf8")
    code = "const {velocity, solve, mean, density} = require('./method.js');"
    code += f"console.log(JSON.stringify({question}))"
    command = [node, "-e", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_its_velocity_and_slope(problem, tmp_path):
    flow = MixtureFlow(**PROBLEMS[problem]).double()
    places = [(x, t) for x in (-2.0, -0.3, 0.7, 1.6) for t in (0.0, 0.4, 1.0)]
    x = torch.tensor([[x] for x, _ in places]).double().requires_grad_()
    t = torch.tensor([t for _, t in places]).double()
    v = flow.base_velocity(x, t)
    (slope,) = torch.autograd.grad(v.sum(), x)
    means = [m for (m,) in PROBLEMS[problem]["means"]]
    data = json.dumps(dict(means=means, std=PROBLEMS[problem]["std"]))
    asked = f"{json.dumps(places)}.map(([x, t]) => velocity({data}, x, t))"
    found = answer(asked, tmp_path)
    assert torch.allclose(torch.tensor(found).double(), torch.cat([v, slope], 1), atol=1e-8)


@pytest.mark.parametrize("push", ["best", "t^2", "1"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_its_paths_are_the_package_s(problem, push, tmp_path):
    wish = dict(problem=problem, push=push, beta=2.0, goal=0.8, steps=40)
    line = solve_line(LineWish(**wish), n=100)
    found = answer(f"solve({{...{json.dumps(wish)}, n: 100}})", tmp_path)
    for name, mine in (("x", line.paths), ("u", line.pushes), ("value", line.values)):
        theirs = torch.tensor([path[name] for path in found]).double().T
        assert torch.allclose(theirs, mine, atol=1e-5), name


def test_its_density_is_the_package_s(tmp_path):
    wish = dict(problem="four modes", push="best", beta=1.0, goal=1.0, steps=40)
    x, height = solve_line(LineWish(**wish), n=400).density
    found = answer(f"density(solve({{...{json.dumps(wish)}, n: 400}}))", tmp_path)
    theirs = torch.tensor(found).double()
    assert torch.allclose(theirs[:, 0], x, atol=1e-5)
    near = x.abs() < 2  # mass by the midpoint there, by the distribution here
    assert torch.allclose(theirs[near, 1], height[near], rtol=2e-3, atol=1e-3)


def test_it_asks_no_other_machine():
    "The only address in it is a link for the reader"
    text = PAGE.read_text("utf8")
    assert re.findall(r'(?:src|href)="((?!data:)[^"]*)"', text) == [
        "https://arxiv.org/abs/2512.05116"
    ]
    assert len(text) < 20_000


@pytest.mark.parametrize("width", WIDTHS)
def test_it_moves(width):
    with opened(PAGE.as_uri(), width) as (page, errors):
        assert page.locator("svg[aria-label]").count() == 4
        assert "the optimum: 1.000" in page.locator("#says").inner_text()
        before = page.locator("#panels").inner_html()
        page.locator("#beta").press("ArrowRight")
        assert page.locator("#panels").inner_html() != before
        page.locator("#push").select_option("t^2")
        share = float(page.locator("#says").inner_text().split(": ")[1])
        assert 0 < share < 0.99
        assert too_wide(page) <= 0 and not errors
