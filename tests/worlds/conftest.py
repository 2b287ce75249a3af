"Tiny pipelines, made once: all three text encoders, without T5, and of the kind of 3.5"

import os

import pytest
import torch
from tiny_sd3 import make_tiny_sd3, make_tiny_taesd
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def plain_attention_where_the_cpu_is_said_to_be_less():
    "torch's fused attention in bfloat16 asks the CPU itself, not ATEN_CPU_CAPABILITY"
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "Folders of pipelines"
    root = tmp_path_factory.mktemp("tiny")
    return dict(
        t5=make_tiny_sd3(root / "t5"),
        no_t5=make_tiny_sd3(root / "no_t5", t5=False),
        sd35=make_tiny_sd3(root / "sd35", sd35=True, dtype=torch.bfloat16),
        wide=make_tiny_sd3(root / "wide", heads=4),
        taesd=make_tiny_taesd(root / "taesd"),
        root=root,
    )
