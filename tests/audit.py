"""What is known of the packages that this project stands on, into data/bench/audit.json.

python tests/audit.py               # vulnerabilities and licences of what is installed
python tests/audit.py --lowest DIR  # also the lowest versions, installed in DIR and tested

It needs pip-audit, pip-licenses and uv beside it, as `make audit` has them."""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
INSTALLED = ROOT / ".venv"
FILE = ROOT / "data/bench/audit.json"
TOOLS = Path(sys.executable).parent
ASK = re.compile("GPL|UNKNOWN", re.I)  # Licences that somebody should look at
PARTS = ("common", "theory", "methods", "training", "worlds", "judging")
TESTS = ("pytest", "pytest-xdist", "hypothesis", "tensorboard", "torchmetrics")
EXTRAS = "figures,fid"  # In any versions that go with the lowest of what all need


def called(*words, **how) -> subprocess.CompletedProcess:
    "What a program gives"
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **how)


def vulnerabilities() -> dict:
    "Packages with a known vulnerability, and how many could be asked about"
    (site,) = (INSTALLED / "lib").glob("python*/site-packages")
    words = ("--path", site, "--skip-editable", "--progress-spinner", "off", "-f", "json")
    answer = called(TOOLS / "pip-audit", *words)
    if not answer.stdout.startswith("{"):
        return dict(asked=0, known=[], why=answer.stderr.strip().splitlines()[-1])
    packages = json.loads(answer.stdout)["dependencies"]
    asked = [package for package in packages if "vulns" in package]
    known = [
        f"{package['name']} {package['version']}: {found['id']}"
        for package in asked
        for found in package["vulns"]
    ]
    return dict(asked=len(asked), not_asked=len(packages) - len(asked), known=known)


def licences() -> dict:
    "How many packages have which licence, and those to look at"
    words = ("--python", INSTALLED / "bin/python", "--from", "mixed", "--format", "json")
    packages = json.loads(called(TOOLS / "pip-licenses", *words, check=True).stdout)
    look = {p["Name"]: p["License"] for p in packages if ASK.search(p["License"])}
    counts = Counter(package["License"] for package in packages)
    return dict(packages=len(packages), look=look, counts=dict(counts.most_common()))


def lowest_versions() -> list:
    "The lowest versions that pyproject.toml allows of what it names, as uv resolves them"
    words = ("pip", "compile", "-q", "--no-header", "--no-annotate")
    words += ("--resolution", "lowest-direct", "--only-binary", ":all:")
    words += ("--no-binary", "dreamsim", ROOT / "pyproject.toml")
    pins = called(TOOLS / "uv", *words, check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {Requirement(line).name for line in project["dependencies"]} - {"torch"}
    return [pin for pin in pins if pin.partition("==")[0] in direct]


def lowest(folder: Path, torch: str) -> dict:
    "The tests of the package with the lowest versions of what every installation needs"
    python, pins = folder / "bin/python", folder / "lowest.txt"
    pinned = [*torch.split(), *lowest_versions()]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins.write_text("\n".join(pinned))
    subprocess.run([python, "-m", "pip", "install", "-q", *torch.split()], check=True)
    more = ("-c", pins, "-e", f"{ROOT}[{EXTRAS}]", *TESTS)
    install = (TOOLS / "uv", "pip", "install", "-q", "--python", python)
    subprocess.run([*install, *more], check=True)
    tests = [f"tests/{part}" for part in PARTS]
    answer = called(python, "-m", "pytest", "-n", "2", *tests, cwd=ROOT)
    print(answer.stdout[-4000:])  # its last line counts the tests
    return dict(pinned=pinned, said=answer.stdout.splitlines()[-1])


def main(words=None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("audit", description=__doc__, formatter_class=raw)
    parser.add_argument("--lowest", type=Path, help="folder of an environment to be made")
    parser.add_argument("--torch", default="torch==2.13.0 torchvision==0.28.0")
    asked = parser.parse_args(words)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    found.update(date=str(datetime.date.today()), python=sys.version.split()[0])
    found.update(vulnerabilities=vulnerabilities(), licences=licences())
    if asked.lowest:
        found["lowest"] = lowest(asked.lowest.resolve(), asked.torch)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    for name in ("vulnerabilities", "licences", "lowest"):
        print(name, json.dumps(found.get(name, "not tried"))[:2000])
    return bool(found["vulnerabilities"]["known"])


if __name__ == "__main__":
    sys.exit(main())
