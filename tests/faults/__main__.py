"""Inject faults into runs, and write down what becomes of them.

python -m faults              # all, into data/bench/faults.json
python -m faults torn         # only the kinds with this word in their name
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults.adapters import damaged_adapters
from faults.breaks import BREAKS
from faults.damage import DAMAGE
from faults.judge import BAD, GOOD
from vggflow.common.files import write_json
from vggflow.common.provenance import git_commit, versions

FILE = Path(__file__).parents[2] / "data/bench/faults.json"


KINDS = (*DAMAGE, damaged_adapters, *BREAKS)


def campaign(kinds, word: str = "") -> list:
    "A row for each kind of fault: how many were injected, and what became of them"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            start, counts, bad = time.time(), Counter(), []
            for fault in kind():
                if word not in fault.kind:
                    break
                outcome = fault.outcome(Path(folder) / "run")
                counts[outcome.name] += 1
                if outcome.name in BAD:
                    place = f"{fault.run}: {fault.place}"
                    bad.append(dict(place=place, outcome=outcome.name, said=outcome.said))
            if counts:
                numbers = {name: counts[name] for name in (*GOOD, *BAD)}
                row = dict(kind=fault.kind, how=kind.__doc__, count=counts.total())
                rows.append({**row, **numbers, "bad": bad})
                print(row["kind"], numbers, f"{time.time() - start:.0f} s", flush=True)
    return rows


def main(words=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("faults", description=__doc__, formatter_class=raw)
    parser.add_argument("word", nargs="?", default="", help="in the name of a kind")
    args = parser.parse_args(words)
    about = dict(date=str(datetime.date.today()), commit=git_commit(), versions=versions())
    rows = campaign(KINDS, args.word)
    for row in rows:
        for bad in row["bad"]:
            print(f"{bad['outcome']}: {row['kind']}, {bad['place']}: {bad['said']}")
    if not args.word:
        write_json(FILE, {**about, "seed": 0, "rows": rows})
    return sum(len(row["bad"]) for row in rows) > 0


if __name__ == "__main__":
    sys.exit(main())
