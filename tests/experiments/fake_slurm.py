"""Slurm's commands for a test: `install(folder)` makes programs that note their calls.

sbatch keeps its arguments and its script, and refuses the job: nothing runs."""

import json
import os
import stat
import sys
from pathlib import Path

COMMANDS = ("sbatch", "sacct", "squeue", "sinfo", "sacctmgr", "scontrol")
PROGRAM = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
folder = Path({{folder!r}})
name = Path(sys.argv[0]).name
if name == "sbatch":
    script = "" if sys.stdin.isatty() else sys.stdin.read()
    call = dict(arguments=sys.argv[1:], script=script)
    file = folder / f"{{{{os.getpid()}}}}.json"
    file.write_text(json.dumps(call))
    sys.exit("written down, not run")
"""


def install(folder) -> dict:
    "Make the commands in a folder; an environment in which they are found first"
    calls = folder / "calls"
    calls.mkdir(parents=True)
    for name in COMMANDS:
        file = folder / name
        file.write_text(PROGRAM.format(folder=str(calls)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")


def submitted(folder) -> list:
    "What sbatch was asked for: {arguments, script}"
    files = sorted(Path(folder, "calls").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]
