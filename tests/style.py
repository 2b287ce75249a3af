"""The code's form, measured: the row in CONTRIBUTING.md, and what is over a limit."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = 92  # characters in a line of code
WRAP = 90  # characters at which a cell of a notebook wraps on a page
LIMITS = {
    "function lines": (8, 28),  # median and 90th percentile
    "function characters": (None, 900),
    "module lines": 500,
    "one-letter locals": 0.20,
    "cells that wrap": 0.20,
}


def tracked(*patterns: str) -> list:
    "Files of the repository that git keeps"
    said = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in said.stdout.splitlines() if (ROOT / name).is_file()]


def modules() -> list:
    "Modules of the package, without nbdev's index"
    found = sorted((ROOT / "vggflow").rglob("*.py"))
    return [path for path in found if path.name != "_modidx.py"]


def code_cells() -> list:
    "(notebook, source) of every code cell"
    cells = []
    for path in tracked("nbs/*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "code":
                cells.append((path, "".join(cell["source"])))
    return cells


def sources() -> list:
    "(place, code) of everything that is written by hand"
    files = [path for path in tracked("*.py") if ROOT / "vggflow" not in path.parents]
    return [*code_cells(), *((path, path.read_text(encoding="utf8")) for path in files)]


def functions(path: Path) -> list:
    "(name, lines and characters of its body, names that it assigns) of every function"
    text = path.read_text(encoding="utf8")
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
        body = lines[node.body[int(has_docstring)].lineno - 1 : node.end_lineno]
        stored = {
            name.id
            for name in ast.walk(node)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        found.append(
            (node.name, len(body), sum(len(line.strip()) for line in body), stored)
        )
    return found


def semicolons(source: str) -> int:
    "Statements that share a line with the one before, divided by a semicolon"
    lines = source.splitlines()
    count = 0
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, part, None) for part in ("body", "orelse", "finalbody")):
            for before, after in zip(body, body[1:]) if isinstance(body, list) else ():
                same_line = before.end_lineno == after.lineno
                gap = lines[after.lineno - 1][: after.col_offset] if same_line else ""
                count += ";" in gap
    return count


def share_at(values: list, share: float):
    "The value below which a share of the values lies"
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure() -> dict:
    "Every number of the row"
    per_module = {path: functions(path) for path in modules()}
    every = [function for found in per_module.values() for function in found]
    names = [name for *_, stored in every for name in stored if name != "_"]
    cells = [source for _, source in code_cells()]
    lines = [
        (place, len(line)) for place, source in sources() for line in source.splitlines()
    ]
    widths = [width for _, width in lines if width]
    sizes = {path: len(path.read_text(encoding="utf8").splitlines()) for path in modules()}
    return {
        "function lines": [count for _, count, _, _ in every],
        "function characters": [count for _, _, count, _ in every],
        "line p95": share_at(widths, 0.95),
        "lines > 120": sum(width > 120 for width in widths) / len(widths),
        "lines over the limit": [place for place, width in lines if width > LINE],
        "semicolons": sum(semicolons(python(source)) for _, source in sources()),
        "lines": len(widths),
        "one-letter locals": sum(len(name) == 1 for name in names) / len(names),
        "cells that wrap": sum(wraps(source) for source in cells) / len(cells),
        "module lines": sizes,
    }


def python(source: str) -> str:
    "A cell without its magics, and without the semicolon that hides its value"
    kept = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    return "\n".join(kept).rstrip().removesuffix(";")


def wraps(source: str) -> bool:
    "Whether a line of a cell is wider than a page"
    return any(len(line) > WRAP for line in source.splitlines())


def spread(values: list) -> tuple:
    "Median, 90th percentile and largest"
    return int(statistics.median(values)), share_at(values, 0.9), max(values)


def row(found: dict) -> str:
    "The row of the table in CONTRIBUTING.md"
    lines = "/".join(map(str, spread(found["function lines"])))
    characters = "/".join(map(str, spread(found["function characters"])))
    parts = [
        lines,
        characters,
        found["line p95"],
        f"{found['lines > 120']:.1%}",
        f"{100 * found['semicolons'] / found['lines']:.1f}",
        f"{found['one-letter locals']:.0%}",
        f"{found['cells that wrap']:.0%}",
    ]
    return "| vggflow | " + " | ".join(map(str, parts)) + " |"


def over_limits(found: dict) -> list:
    "What is over a limit, a line each"
    said = []
    for name in ("function lines", "function characters"):
        for got, most in zip(spread(found[name]), LIMITS[name]):
            if most is not None and got > most:
                said.append(f"{name}: {got}, at most {most}")
    for name in ("one-letter locals", "cells that wrap"):
        if found[name] > LIMITS[name]:
            said.append(f"{name}: {found[name]:.0%}, at most {LIMITS[name]:.0%}")
    for path, size in found["module lines"].items():
        if size > LIMITS["module lines"]:
            said.append(f"{path.relative_to(ROOT)}: {size} lines, at most 500")
    for place in dict.fromkeys(found["lines over the limit"]):
        count = found["lines over the limit"].count(place)
        said.append(
            f"{place.relative_to(ROOT)}: {count} lines of more than {LINE} characters"
        )
    if found["semicolons"]:
        said.append(f"{found['semicolons']} statements divided by a semicolon")
    return said


HEAD = [
    "function lines",
    "function characters",
    "line p95",
    "lines > 120",
    "`;` per 100 lines",
    "1-letter locals",
    "cells that wrap at 90",
]

if __name__ == "__main__":
    found = measure()
    print("| | " + " | ".join(HEAD) + " |\n" + "|---" * (len(HEAD) + 1) + "|")
    print(row(found))
    problems = over_limits(found)
    print("\n".join(problems))
    sys.exit(bool(problems))
