"What holds for every test"

import os
import shlex

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggflow import cli


@pytest.fixture(autouse=True)
def plain_attention_where_the_cpu_is_said_to_be_less():
    "torch's fused attention in bfloat16 asks the CPU itself, not ATEN_CPU_CAPABILITY"
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def call(capsys):
    "Call `vggflow` with the words of a line and further arguments: status, stdout, stderr"

    def call_words(line, *more):
        status = cli.main([*shlex.split(line), *map(str, more)])
        return status, *capsys.readouterr()

    return call_words
