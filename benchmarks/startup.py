"""CPU seconds that are spent before any work, and beside it.

Of a process that imports the package, of the shell command, and of what a run card and a
figure cost besides their own work: more of them in one call, less fewer of them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import child_seconds, interleaved, spread

ROOT = Path(__file__).parents[1]
CLI = (sys.executable, "-m", "vggflow.cli")
COMMANDS = {
    "python": (sys.executable, "-c", "pass"),
    "import torch": (sys.executable, "-c", "import torch"),
    "import vggflow": (sys.executable, "-c", "import vggflow"),
    "vggflow --help": (*CLI, "--help"),
    "vggflow status": (*CLI, "status", "--profile", "quick"),
}
CARDS = """
[profiles]
smoke = "as little as a run can do"

[cards]
template = "finetune"
parameters = {world = "emoji", batch_size = 2, steps = 1, transitions = 1, save_every = 1}
grid = {seed = SEEDS}

[cards.smoke]
updates = 1
eval_every = 1
eval_prompts = 1
images_per_prompt = 2
"""


def checkout(folder, experiments):
    "A checkout with experiments of its own, and everything else from here"
    (folder / "experiments.toml").write_text(experiments)
    shutil.copy(ROOT / "Snakefile", folder)
    shutil.copytree(ROOT / "nbs/experiments", folder / "nbs/experiments")
    return folder


def in_checkout(folder, *words):
    "CPU seconds of a command of the shell there"
    environment = dict(os.environ, VGGFLOW_ROOT=str(folder))
    return child_seconds([*CLI, *words], env=environment)


def cards_seconds(count):
    "CPU seconds of a call that makes so many runs"
    with tempfile.TemporaryDirectory() as folder:
        experiments = CARDS.replace("SEEDS", str(list(range(count))))
        root = checkout(Path(folder), experiments)
        call = ("figures", "--experiment", "cards", "--profile", "smoke", "--cores", "1")
        return in_checkout(root, *call)


def figures_seconds(*names):
    "CPU seconds of a call that draws these figures from the committed tables"
    with tempfile.TemporaryDirectory() as folder:
        root = checkout(Path(folder), (ROOT / "experiments.toml").read_text())
        (root / "data").mkdir()
        (root / "data/results").symlink_to(ROOT / "data/results")
        return in_checkout(root, "figures", *names, "--redraw", "--cores", "1")


def of_one_more(few, many, count):
    "Spread of what one more costs: pairs of calls, `count` things apart"
    return spread([(b - a) / count for a, b in zip(few, many)])


def overheads(rounds, cards=3, figures=("fig05", "fig06", "fig07", "fig08")):
    "CPU seconds of one more card that does next to nothing, and of one more figure"
    cases = {
        "one card": lambda: cards_seconds(1),
        "cards": lambda: cards_seconds(cards),
        "one figure": lambda: figures_seconds(figures[0]),
        "figures": lambda: figures_seconds(*figures),
    }
    found = {name: [fn() for _ in range(rounds)] for name, fn in cases.items()}
    return {
        "a call of vggflow figures, with one card": spread(found["one card"]),
        "a card": of_one_more(found["one card"], found["cards"], cards - 1),
        "a figure": of_one_more(found["one figure"], found["figures"], len(figures) - 1),
    }


def measure(rounds, calls, cards=3, figures=("fig05", "fig06", "fig07", "fig08")):
    "The stage"
    found = interleaved(COMMANDS, rounds, clock=child_seconds)
    seconds = {name: spread(values) for name, values in found.items()}
    more = overheads(calls, cards, figures) if calls else {}
    return dict(seconds={**seconds, **more})
