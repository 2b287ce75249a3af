"The guide to Stable Diffusion 3, as what its reader copies from it"

import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "nbs/pages/sd3_guide.ipynb"
PROGRAMS = ("vggflow", "accelerate", "sbatch", "pip", "hf", "python")
NOTE = r"""%s() { printf '%%s\0' %s "$@" $'\f' >> "$NOTES"; }"""


def blocks(language: str) -> list:
    "Blocks of the page in a language"
    cells = json.loads(PAGE.read_text(encoding="utf8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    return re.findall(f"```{language}\n(.*?)```", text, re.S)


def calls(script: str) -> list:
    "The words of each program that bash would start for a script; it starts none"
    noting = [NOTE % (name, name) for name in PROGRAMS]
    bash = [shutil.which("bash"), "-euo", "pipefail", "-c", "\n".join([*noting, script])]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data/prompts").mkdir(parents=True)
        notes = Path(folder, "notes")
        env = dict(PATH="", NOTES=str(notes))
        subprocess.run(bash, env=env, cwd=folder, check=True)
        return [call.split("\0")[:-1] for call in notes.read_text().split("\f\0")[:-1]]


@cache
def page_calls(*programs: str) -> list:
    "What the shell of the whole page calls, of some programs"
    return [words for words in calls("\n".join(blocks("sh"))) if words[0] in programs]
