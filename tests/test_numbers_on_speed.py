"Prose has no number on speed of its own: the page on speed reads them from the bench."

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNIT = r"(?:s|ms|seconds?|minutes?|min|hours?|CPU[- ]\w+|GFLOPs?|TFLOPs?)"
MEASURED = re.compile(
    rf"\b\d[\d.,]* {UNIT}\b(?! of start)|\b(?:two|ten|twenty|half an?) (?:seconds|hours?)\b"
    r"|\b\d[\d.]* times (?:faster|slower|as long)|run in (?:an?|one|two|half)"
)
READING = re.compile(r"\*\*Takes\*\*[^.]*\.")  # how long a chapter takes to read
ASKED = re.compile(r"`[^`]*`|```.*?```", re.DOTALL)  # what a user may write


def prose(path):
    "The text of a page or of a notebook, without code and reading times"
    text = path.read_text(encoding="utf8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        written = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        text = "\n\n".join(written)
    return READING.sub("", ASKED.sub("", text))


def test_no_page_has_a_number_on_speed_of_its_own():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("nbs/**/*.ipynb")]
    found = {str(p.relative_to(ROOT)): MEASURED.findall(prose(p)) for p in pages}
    assert not {name: numbers for name, numbers in found.items() if numbers}


def test_such_a_number_would_be_noticed():
    said = "24 min 30 s", "28 s", "0.9 s", "5 minutes", "2 times faster", "run in a minute"
    assert all(MEASURED.search(text) for text in said)
    assert not MEASURED.search("after 53 updates, at most 33 of 40 runs")
