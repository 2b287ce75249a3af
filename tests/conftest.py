"What holds for every test"

import os

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def plain_attention_where_the_cpu_is_said_to_be_less():
    "torch's fused attention in bfloat16 asks the CPU itself, not ATEN_CPU_CAPABILITY"
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
