"Parts of the transformer that see no state, computed for a whole grid: the same samples"

import pytest
import torch
from tiny_flows import TWO, T, X, close, reload, shaken_emoji

from vggflow import sample
from vggflow.theory.flow import portions
from vggflow.worlds import ahead, folding
from vggflow.worlds.ahead import GridValues, looks_ahead


@pytest.fixture
def looks(monkeypatch):
    "Steps whose values were known, None for those that were not"
    seen, embedded = [], GridValues.embedded

    def noted(values, *args):
        out = embedded(values, *args)
        seen.append(values.step)
        return out

    monkeypatch.setattr(GridValues, "embedded", noted)
    return seen


@torch.no_grad()
def drawn(flow, x0, cond, **how):
    return sample(flow, x0, flow.times(5), cond, **how).x1


def both_ways(monkeypatch, flow, x0, cond, **how):
    "Samples with and without looking ahead"
    quick = drawn(flow, x0, cond, **how)
    with monkeypatch.context() as patch:
        patch.setattr(folding, "looks_ahead", lambda net: False)
        return quick, drawn(flow, x0, cond, **how)


@pytest.mark.parametrize("how", [dict(), dict(base=True), dict(method="midpoint")], ids=str)
def test_samples_are_those_of_step_by_step(how, monkeypatch, looks):
    flow = shaken_emoji(guidance_scale=2.0)
    x0 = flow.prior(2, TWO, torch.Generator().manual_seed(1))
    quick, slow = both_ways(monkeypatch, flow, x0, ["a cat", "an owl"], **how)
    assert close(quick, slow, 5e-6)
    steps = looks[::2] if how.get("method") else looks
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "how", [dict(cfg_batched=False), dict(guidance_scale=1.0)], ids=str
)
@pytest.mark.parametrize("kind", ["t5", "sd35"])
def test_guidance_and_the_kind_of_35(tiny, how, kind, monkeypatch, looks):
    flow = reload(tiny[kind], **{"guidance_scale": 3.0, "dtype": torch.float32, **how})
    assert close(*both_ways(monkeypatch, flow, X, TWO), 5e-6)
    assert None not in looks


def test_portions_of_other_prompts_have_values_of_their_own(tiny, monkeypatch):
    flow = reload(tiny["t5"])
    whole = drawn(flow, X, TWO)
    with portions(without_gradients=1):
        assert close(drawn(flow, X, TWO), whole, 5e-6)
    assert not close(drawn(flow, X, TWO[::-1]), whole, 1e-3)


def test_times_that_differ_within_a_batch_are_computed_as_ever(tiny, looks):
    flow = reload(tiny["t5"])
    with torch.no_grad():
        usual = flow.velocity(X, T, TWO)
        with flow.drawing(flow.times(5)):
            assert close(flow.velocity(X, T, TWO), usual, 5e-6)
    assert looks == [None]


def test_large_tables_are_not_made(tiny, monkeypatch, looks):
    monkeypatch.setattr(ahead, "MOST_NUMBERS", 10)
    flow = reload(tiny["t5"])
    drawn(flow, X, TWO)
    assert set(looks) == {None}


def test_values_are_made_once_for_a_block(tiny, monkeypatch):
    made, every_step = [], GridValues._every_step

    def counted(values, pooled):
        made.append(len(pooled))
        return every_step(values, pooled)

    monkeypatch.setattr(GridValues, "_every_step", counted)
    for dtype in (torch.float32, torch.bfloat16):
        drawn(reload(tiny["t5"], dtype=dtype), X, TWO)
    drawn(reload(tiny["t5"], guidance_scale=2.0, cfg_batched=False), X, TWO)
    assert len(made) == 2 + 2  # prompts and empty prompts in turn


def test_an_adapter_among_these_parts_is_respected(tiny, monkeypatch):
    flow = reload(tiny["t5"], lora_targets=["norm1.linear", "attn.to_q"])
    assert not looks_ahead(flow.transformer)
    assert close(*both_ways(monkeypatch, flow, X, TWO), 5e-6)
