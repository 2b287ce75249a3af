"Tiny pipelines, made once: all three text encoders, without T5, and of the kind of 3.5"

import pytest
import torch
from tiny_sd3 import make_tiny_sd3, make_tiny_taesd


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


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    "Kind of pipeline -> the folder of a tiny one"
    from test_pipelines import KINDS

    root = tmp_path_factory.mktemp("pipelines")
    return {name: kind.make(root / name) for name, kind in KINDS.items()}
