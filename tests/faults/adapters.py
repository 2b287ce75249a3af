"Damage to lora/, the adapter that a run leaves, of a tiny Stable Diffusion 3"

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from tiny_sd3 import make_tiny_sd3

from faults.damage import Fault, changed, flipped, removed, zeroed
from faults.judge import Outcome, watched
from faults.runs import made
from vggflow.common.seals import MANIFEST
from vggflow.methods.direct import ReFL
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.training.run_directory import RunDirectory
from vggflow.worlds.checks import quietly
from vggflow.worlds.sd3 import SD3Flow


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


@cache
def adapters() -> Path:
    "A folder of two runs that differ in their adapters, 'run' and 'other'"
    folder = made()
    base = make_tiny_sd3(folder / "base")
    for name, seed in (("run", 0), ("other", 1)):
        torch.manual_seed(seed)
        with quietly():
            flow = SD3Flow.from_pretrained(base, lora_rank=2, max_sequence_length=8)
        config = FinetuneConfig(updates=2, batch_size=2, steps=2, save_every=1, seed=seed)
        how = dict(prompts=["a cat"], out=folder / name, progress=False)
        finetune(flow, brightness, ReFL(), config, **how)
    return folder


def contents(folder: Path) -> dict:
    "The files of an adapter, without their checksums"
    files = (file for file in folder.iterdir() if file.name != MANIFEST)
    return {file.name: file.read_bytes() for file in files}


@dataclass
class AdapterFault(Fault):
    "One fault of an adapter: whoever takes it gets the right one, or is refused"

    def outcome(self, folder: Path) -> Outcome:
        "Damage a copy of the run, and take its adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapters() / "run", folder)
        self.inject(folder)
        right = contents(adapters() / "run/lora")

        def judge(found, told):
            if not isinstance(found, Path):  # the weights of the last checkpoint
                return "healed"
            return "healed" if contents(found) == right else "silent"

        return watched(lambda: RunDirectory(folder).adapter(), folder, judge)


def damaged_adapters() -> Iterator[Fault]:
    "Files of lora/ flipped, zeroed, cut, gone, or those of another run; lora/ is stale"
    for file in sorted((adapters() / "run/lora").iterdir()):
        size, name = file.stat().st_size, f"lora/{file.name}"
        places = {
            f"byte {at}": partial(changed, name, partial(flipped, at, 3))
            for at in range(size // 20, size, max(1, size // 10))
        }
        places["zeroed"] = partial(changed, name, partial(zeroed, size // 2, 64))
        places["half"] = partial(changed, name, lambda data: data[: len(data) // 2])
        places["gone"] = partial(removed, name)
        places["another's"] = partial(of_other, name)
        for what, inject in places.items():
            yield AdapterFault("damaged adapter", "adapter", f"{name}: {what}", inject)
    yield AdapterFault("damaged adapter", "adapter", "lora/: another's", all_of_other)
    yield AdapterFault("damaged adapter", "adapter", "lora/: stale", stale)


def of_other(name: str, folder: Path):
    "Take a file of the other run's adapter"
    shutil.copyfile(adapters() / "other" / name, folder / name)


def all_of_other(folder: Path):
    "Take the other run's adapter"
    shutil.rmtree(folder / "lora")
    shutil.copytree(adapters() / "other/lora", folder / "lora")


def stale(folder: Path):
    "An extension was killed after its first checkpoint"
    run = RunDirectory(folder)
    found = run.load_newest()
    run.save_checkpoint(found.update + 1, found.rows, **found.parts)
