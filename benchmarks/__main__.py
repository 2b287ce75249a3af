"""Measure the speed of this project, stage by stage.

    python -m benchmarks                      # all stages, into data/bench
    python -m benchmarks --size small         # as little as shows that it works
    python -m benchmarks updates growth       # only these

A stage whose code, settings and versions are those of its file is not measured again.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from benchmarks import gpu, growth, passes, projection, quick, startup, updates
from vggflow.common.files import write_text
from vggflow.common.provenance import versions

ROOT = Path(__file__).parents[1]
SOURCES = ("vggflow", "benchmarks", "nbs/experiments", "experiments.toml", "Snakefile")
SIZES = dict(
    small=dict(
        passes=dict(size="tiny", resolutions=[64], guidances=[5.0]),
        updates=dict(
            rounds=1,
            batch=2,
            steps=5,
            guidances=[5.0],
            methods=["reference", "VGG-Flow", "VGG-Flow, reuse"],
        ),
        startup=dict(rounds=1, calls=0),
        quick=dict(rounds=1, profile="smoke"),
        growth=dict(
            rounds=1,
            batch=[1, 2],
            steps=[2, 4],
            transitions=[1, 2],
            resolution=[32, 64],
            layers=[1, 2],
            process_rounds=1,
            plan=dict(batch=2, steps=4, transitions=2),
        ),
        projection={},
        gpu=None,
    ),
    full=dict(
        passes=dict(size="medium", resolutions=[512, 1024]),
        updates=dict(rounds=3, batch=8, steps=20, guidances=[5.0, 1.0]),
        startup=dict(rounds=3, calls=1),
        quick=dict(rounds=3),
        growth=dict(
            rounds=3,
            batch=[1, 2, 4, 8, 16],
            steps=[5, 10, 20, 40],
            transitions=[2, 5, 10],
            resolution=[32, 64, 128],
            layers=[3, 6, 12],
            process_rounds=3,
            plan=dict(batch=8, steps=20, transitions=5),
        ),
        projection={},
        gpu=[],
    ),
)


def machine():
    "What the numbers were measured on"
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    words = Path("/proc/cpuinfo")
    lines = words.read_text().splitlines() if words.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return dict(
        system=f"{platform.system()} {platform.machine()}",
        processor=named[0] if named else platform.processor(),
        cores=os.cpu_count(),
        threads=1,
        gpus=cards,
    )


def source_mark():
    "Checksum of what is measured: the package, the benchmarks, templates and graph"
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*.*"))
        for file in files:
            if file.suffix in (".py", ".ipynb", ".toml", "") and file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def measured(stage, settings, out):
    "Numbers of a stage; some need those of another one"
    if stage == "projection":
        found = read(out, "passes")
        return projection.measure(found["operations"], found["trained_megabytes"])
    if stage == "quick":
        return quick.measure(overheads=read(out, "startup")["seconds"], **settings)
    if stage == "gpu":
        return gpu.measure(settings) if torch.cuda.is_available() else None
    modules = dict(passes=passes, updates=updates, startup=startup, growth=growth)
    return modules[stage].measure(**settings)


def read(out, stage):
    "What a stage wrote"
    file = out / f"{stage}.json"
    if not file.exists():
        raise SystemExit(f"{file} is not there: measure the stage {stage!r} first")
    return json.loads(file.read_text())


def run_stage(stage, size, out, fresh=False):
    "Measure a stage and write its file, unless that is there; its numbers"
    settings, file = SIZES[size][stage], out / f"{stage}.json"
    about = dict(stage=stage, size=size, settings=settings, seed=0, source=source_mark())
    about |= dict(machine=machine(), versions=versions())
    if file.exists() and not fresh:
        known = json.loads(file.read_text())
        if json.loads(json.dumps(about)) == {key: known.get(key) for key in about}:
            print(f"[bench] {stage}: {file} is up to date", flush=True)
            return known
    print(f"[bench] {stage} …", flush=True)
    start = time.time()
    found = measured(stage, settings, out)
    if found is None:
        print(f"[bench] {stage}: no GPU at hand, not measured", flush=True)
        return None
    write_text(file, json.dumps({**about, **found}, indent=1) + "\n")
    print(f"[bench] {stage}: {file}, after {time.time() - start:.0f} s", flush=True)
    return found


def main(words=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=raw)
    stages = list(SIZES["full"])
    parser.add_argument("stages", nargs="*", choices=[[], *stages], help="default: all")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", help="folder; default data/bench, of small _bench")
    parser.add_argument("--fresh", action="store_true", help="measure again")
    args = parser.parse_args(words)
    usual = "data/bench" if args.size == "full" else "_bench"
    out = Path(args.out or ROOT / usual)
    out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages or stages:
        run_stage(stage, args.size, out, args.fresh)


if __name__ == "__main__":
    sys.exit(main())
