"What holds for every test"

import gc
import os
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from xdist.scheduler import LoadScopeScheduling

from vggflow import cli

NOTEBOOKS = "test_notebooks"
LONG = (  # notebooks and files of tests, the longest first: two workers end together
    *("pages/judges", "1_theory/bounds", "3_training/loop", "1_theory/control"),
    "2_methods/registry",
    *("1_theory/adjoint", "5_worlds/emoji", "1_theory/differences", "1_theory/exercises"),
    *("3_training/diagnostics", "emoji/manifest", "1_theory/value", "experiments/peaks"),
    *("test_distributed", "test_warm", "test_devices", "test_where_they_end"),
    *("test_bench", "test_schedule", "test_end_to_end", "test_contributing"),
    *("test_templates", "test_sd3_updates", "test_theory", "test_wheel", "test_cost"),
)


def unit(nodeid: str) -> str:
    "What one worker does as a whole: a notebook, or a file, whose tests share fixtures"
    file, _, test = nodeid.partition("::")
    name = Path(file).stem
    return test.partition("[")[2][:-1] if name == NOTEBOOKS else name


def place(item) -> tuple:
    "Notebooks first, while nothing else has run in their process; long before short"
    name = unit(item.nodeid)
    first = item.path.stem == NOTEBOOKS
    return not first, LONG.index(name) if name in LONG else len(LONG)


def pytest_collection_modifyitems(items):
    "Order the tests"
    items.sort(key=place)


class Units(LoadScopeScheduling):
    "A worker takes whole units, in their order (with `--no-loadscope-reorder`)"

    def _split_scope(self, nodeid):
        return unit(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Units(config, log)


def pytest_collection_finish():
    "Keep the garbage collector away from what was imported"
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plain_attention_where_the_cpu_is_said_to_be_less():
    "torch's fused attention in bfloat16 asks the CPU itself, not ATEN_CPU_CAPABILITY"
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def full_products_after_every_test():
    "`--tf32` is a setting of the whole process"
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def call(capsys):
    "Call `vggflow` with the words of a line and further arguments: status, stdout, stderr"

    def call_words(line, *more):
        status = cli.main([*shlex.split(line), *map(str, more)])
        return status, *capsys.readouterr()

    return call_words
