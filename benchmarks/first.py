"""First impressions with a clock: to a picture, to a reward of one's own, to a figure.

    python3 -m benchmarks.first

What README.md says is done in a fresh clone: seconds by the clock and of the processor, and
how busy the machine was before, into data/bench/first.json. Needs git, make and a network.
"""

import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = (
    "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in"
)
VERSIONS += " ('torch', 'diffusers', 'transformers', 'peft')}))"
PACE = 200  # words that one reads in a minute


def example() -> str:
    "The reward of one's own, as README.md has it"
    text = (ROOT / "README.md").read_text(encoding="utf8")
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def steps(python: str) -> dict:
    "What is done -> its command, in the clone"
    install = ".venv/bin/python -m pip install -q --disable-pip-version-check"
    return {
        "environment": f"{python} -m venv .venv",
        "installation": f"{install} -c constraints.txt .",
        "first picture": '.venv/bin/vggflow sample "a cat" --out cat.png',
        "a reward of one's own": ".venv/bin/python example.py",
        "set-up for figures": "make -s setup",
        "first figure": ".venv/bin/vggflow figures 5 --redraw --fresh",
    }


def cpu_seconds() -> float:
    "Seconds of the processor that all commands so far have taken"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: str, folder: Path) -> dict:
    "What a command takes, and how busy the machine was before"
    load, start, before = os.getloadavg()[0], time.monotonic(), cpu_seconds()
    subprocess.run(command, shell=True, check=True, cwd=folder)
    clock, cpu = time.monotonic() - start, cpu_seconds() - before
    return dict(seconds=round(clock, 1), cpu_seconds=round(cpu, 1), load=round(load, 1))


def words_to_first_check(chapter: str = "nbs/1_theory/flow.ipynb") -> int:
    "Words of a chapter up to the cell that checks Eq. (1)"
    cells = json.loads((ROOT / chapter).read_text(encoding="utf8"))["cells"]
    checks = [k for k, c in enumerate(cells) if "eq-01" in c["metadata"].get("tags", [])]
    prose = [c for c in cells[: checks[0]] if c["cell_type"] == "markdown"]
    return sum(len("".join(cell["source"]).split()) for cell in prose)


def main():
    "Measure, and write the file"
    about = dict(date=str(date.today()), python=platform.python_version())
    about |= dict(system=f"{platform.system()} {platform.machine()}", cores=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        found = {"clone": timed(f"git clone -q {ROOT} {clone}", ROOT)}
        (clone / "example.py").write_text(example(), encoding="utf8")
        for name, command in steps(sys.executable).items():
            found[name] = timed(command, clone)
            print(name, found[name], flush=True)
        asked = [clone / ".venv/bin/python", "-c", VERSIONS]
        about["versions"] = json.loads(subprocess.check_output(asked))
    reading = dict(words=words_to_first_check(), words_a_minute=PACE)
    text = json.dumps(dict(about, steps=found, first_equation=reading), indent=1)
    (ROOT / "data/bench/first.json").write_text(text + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
