"""Metadata of adapters of every kind: peft's scale, or one line

`VGGFLOW_EXAMPLES=2000` asks for the long form."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from vggflow.worlds.adapters import ADAPTER_FILES, read_adapter

often = settings(max_examples=int(os.environ.get("VGGFLOW_EXAMPLES", 40)), deadline=None)
DOWN, UP = torch.randn(4, 6), torch.randn(5, 4)
odd = st.one_of(
    st.none(), st.booleans(), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)
number = st.one_of(st.integers(-3, 20), st.floats(-9, 9), st.floats(), odd)
pattern = st.sampled_from(["to_q", "attn.to_q", ".*", "to_k", "(", "block.0.attn.to_q"])
facts = st.fixed_dictionaries(
    {},
    optional=dict(
        r=st.one_of(st.just(4), number),
        lora_alpha=number,
        use_rslora=st.one_of(st.booleans(), odd),
        alpha_pattern=st.one_of(st.dictionaries(pattern, number, max_size=2), odd),
        rank_pattern=st.one_of(st.dictionaries(pattern, st.just(4), max_size=2), odd),
        use_dora=st.one_of(st.just(False), odd),
        bias=st.one_of(st.just("none"), odd),
        peft_type=st.one_of(st.just("LORA"), odd),
        made_up=number,
    ),
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 5)


class Net(nn.Module):
    "One layer under the name block.0.attn.to_q"

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList([nn.ModuleDict(dict(attn=Attention()))])


def scale_of_peft(said):
    "What peft multiplies by; None where it refuses, or means another rank"
    known = {k: v for k, v in said.items() if k not in ("made_up", "peft_type")}
    try:
        config = LoraConfig(target_modules=["to_q"], **known)
        layer = inject_adapter_in_model(config, Net()).block[0]["attn"].to_q
        return layer.scaling["default"] if layer.r["default"] == 4 else None
    except Exception:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@often
@given(said=facts)
def test_metadata_give_pefts_scale_or_one_line(folder, said):
    name = "transformer.block.0.attn.to_q.lora_{}.weight"
    about = {f"transformer.{key}": value for key, value in said.items()}
    metadata = {"lora_adapter_metadata": json.dumps(about)}
    tensors = {name.format("A"): DOWN, name.format("B"): UP}
    save_file(tensors, folder / ADAPTER_FILES[0], metadata)
    try:
        ((down, up),) = read_adapter(folder).factors.values()
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    assert torch.equal(down, DOWN) and up.isfinite().all()
    wanted = scale_of_peft({k: v for k, v in said.items() if v is not None})
    if wanted is not None and any(value is not None for value in said.values()):
        assert torch.allclose(up, wanted * UP)
