"Names, options and randomness of the methods."

import pytest
import torch
from method_worlds import (
    ALL,
    draw_samples,
    gaussian,
    loss_of,
    made_for,
    mixture,
    quadratic,
    wave,
)

from vggflow.methods.costate import AdjointMatching, VGGFlowPMP, unguided
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.estimates import ESTIMATES
from vggflow.methods.method import Method, Samples
from vggflow.methods.registry import FIVE, METHODS, get_method, make_method
from vggflow.methods.value_gradient import VGGFlow


def first_loss(method):
    "Of one update on the mixture"
    flow = mixture()
    method = made_for(flow, wave, method)
    return loss_of(flow, wave, method, draw_samples(flow)).item()


BAD = {
    "k at least 1": (lambda: DRaFT(k=0), "at least 1"),
    "k whole": (lambda: DRaFT(k=1.5), "at least 1"),
    "lv": (lambda: DRaFT(lv=-1), "re-noised"),
    "k too large": (lambda: first_loss(DRaFT(k=11)), "at most the 10 steps"),
    "beta of PMP": (lambda: VGGFlowPMP(beta=0), "must be positive"),
    "beta of AM": (lambda: AdjointMatching(beta=-1.0), "must be positive"),
    "beta": (lambda: VGGFlow(beta=0), "must be positive"),
    "last": (lambda: ReFL(last=0), "share"),
    "an option": (lambda: make_method("AM", bta=1.0), "beta"),
    "a method": (lambda: make_method("VGG-Flow-PNP"), "VGG-Flow-PMP"),
    "clip": (lambda: first_loss(AdjointMatching(clip=2.0)), "quantile"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_in_one_line(name):
    make, says = BAD[name]
    with pytest.raises(ValueError) as e:
        make()
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("VGG-Flow", dict(mu="abc"), "mu must be a number, got 'abc'"),
        ("VGG-Flow", dict(clip="abc"), "clip must be a number"),
        ("VGG-Flow", dict(value_lr="abc"), "value_lr must be a number"),
        (
            "VGG-Flow",
            dict(correction="maybe"),
            "correction must be true or false, got 'maybe'",
        ),
        ("VGG-Flow", dict(beta=float("nan")), "beta must be a number"),
        ("VGG-Flow", dict(mode=3), "mode must be text"),
        ("VGG-Flow", dict(value_lr=-1.0), "value_lr must be at least 0"),
        ("VGG-Flow", dict(clip=1.5), "clip is a quantile in (0, 1], got 1.5"),
        ("AM", dict(clip=0), "clip is a quantile in (0, 1], got 0"),
        ("DRaFT", dict(k="abc"), "k must be a number"),
        ("DRaFT", dict(k=1.5), "k must be a whole number"),
        ("ReFL", dict(last="abc"), "last must be a number"),
        ("ReFL", dict(relu=2), "relu must be true or false"),
        ("ReFL", dict(last=True), "last must be a number"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused_when_the_method_is_made(name, options, says):
    with pytest.raises(ValueError) as e:
        make_method(name, **options)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_options_as_a_command_line_says_them():
    said = dict(correction="False", reuse="no", clip="none", beta=2)
    method = make_method("VGG-Flow", **said)
    assert not method.learn and not method.reuse and method.clip is None
    assert method.hyper == VGGFlow(beta=2, correction=False).hyper
    draft = make_method("DRaFT", lv="false", checkpointed="yes", relu=1)
    assert (draft.lv, draft.checkpointed, draft.relu) == (0, True, True)
    assert make_method("DRaFT", lv=2).lv == 2
    assert make_method("DRaFT", lv=True).lv == 1
    assert make_method("VGG-Flow").hyper == VGGFlow().hyper
    assert make_method("VGG-Flow", eta="t").hyper["eta"] == "t"


def test_all_five_are_known_by_their_printed_names():
    assert {type(make_method(n)) for n in ALL} == set(FIVE)
    assert {type(make_method(c.label)) for c in METHODS.values()} == {*FIVE, *ESTIMATES}
    assert all(issubclass(cls, Method) for cls in METHODS.values())
    assert {cls.label for cls in FIVE} == set(ALL)
    assert get_method("vggflow") is get_method("VGG-Flow") is VGGFlow
    options = dict(beta=2.0, clip=0.8)
    assert make_method("VGG-Flow-PMP", **options).hyper == options


def test_a_method_of_the_users_own_is_named_by_its_import_path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from vggflow.methods.method import Method\n"
        "class Mine(Method):\n"
        "    def __init__(self, pull: float = 1.0):\n"
        "        super().__init__(pull=pull)\n"
        "other = 3\n"
    )
    method = make_method(f"{file}:Mine", pull=2.0)
    assert (method.label, method.hyper) == ("Mine", dict(pull=2.0))
    for name, says in [
        (f"{file}:Mein", "Mine"),
        (f"{file}:other", "no subclass of vggflow.Method"),
        ("nowhere.py:Mine", "no file nowhere.py"),
    ]:
        with pytest.raises(ValueError, match=says) as e:
            make_method(name)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="pull"):
        make_method(f"{file}:Mine", pul=2.0)
    with pytest.raises(ValueError, match="pull must be a number"):
        make_method(f"{file}:Mine", pull="far")


def test_what_a_method_tells_of_itself():
    "What the run and the doctor ask, in the place of names"
    with pytest.raises(
        ValueError, match="transitions must be at most the 4 steps .* got 5"
    ):
        VGGFlow().check(4, 5)
    with pytest.raises(ValueError, match="transitions must be"):
        AdjointMatching().check(4, 5)
    with pytest.raises(ValueError, match="k of DRaFT must be at most the 4 steps .* got 6"):
        DRaFT(k=6).check(4, 5)
    for method in (VGGFlow(), VGGFlowPMP(), DRaFT(), ReFL(), Method()):
        method.check(5, 5)
    ReFL().check(4, 5)  # takes no transitions
    assert VGGFlow().memory() == dict(graphs=0, correction=True)
    assert VGGFlow(correction=False).memory() == dict(graphs=0, correction=False)
    assert AdjointMatching().memory() == dict(graphs=0, correction=False)
    one = dict(graphs=1, transitions=1, correction=False)
    assert ReFL().memory() == DRaFT(k=6, checkpointed=True).memory() == one
    assert DRaFT(k=2, lv=3).memory() == dict(one, graphs=6)
    kinds = {cls.label: cls.weights_dtype for cls in METHODS.values()}
    assert kinds == dict.fromkeys(kinds) | {"AM": "float32"} and {*ALL} <= {*kinds}


def test_a_large_model_has_usual_options():
    usual = VGGFlow.usual_options
    assert usual({}, large=True) == dict(reuse=True)
    assert usual(None) == usual({}, large=False) == {}
    assert usual(dict(reuse=False), large=True) == dict(reuse=False)
    assert usual(dict(mode="trajectory"), large=True)["reuse"]
    assert "reuse" not in usual(dict(mode="trajectory", mu=0.5), large=True)
    assert "reuse" not in usual(dict(mode="exact"), large=True)
    assert DRaFT.usual_options(dict(k=2), large=True) == dict(k=2)


@pytest.mark.parametrize("name", ALL)
def test_every_random_choice_comes_from_the_samples(name):
    def loss(seed, other):
        flow = mixture()
        torch.manual_seed(3)
        method = made_for(flow, wave, ALL[name]())
        torch.manual_seed(other)
        drawn = draw_samples(flow)
        samples = Samples(drawn.x0, drawn.times, seed=seed)
        return loss_of(flow, wave, method, samples).item()

    assert loss(0, 1) == loss(0, 2)
    if name != "DRaFT":
        assert len({loss(seed, 1) for seed in range(6)}) > 1


@pytest.mark.parametrize("name", ["VGG-Flow-PMP", "AM", "DRaFT"])
def test_resumes_to_the_last_bit(tmp_path, name):
    from vggflow.training.config import FinetuneConfig
    from vggflow.training.loop import finetune

    def run(out, updates):
        flow = gaussian()
        method = DRaFT(k=2, lv=2) if name == "DRaFT" else ALL[name]()
        config = FinetuneConfig(updates=updates, batch_size=4, save_every=2)
        options = dict(out=out, progress=False)
        history = finetune(flow, quadratic, method, config, **options)
        return flow, [row["loss"] for row in history.rows]

    whole, losses = run(tmp_path / "a", 6)
    run(tmp_path / "b", 3)
    torch.rand(5)
    again, more = run(tmp_path / "b", 6)
    assert losses == more
    pairs = zip(whole.parameters(), again.parameters())
    assert all(torch.equal(p, q) for p, q in pairs)


def test_unguided_is_set_back_after_an_error():
    class Flow:
        guidance_scale = 5.0

    flow = Flow()
    with pytest.raises(KeyError):
        with unguided(flow):
            assert flow.guidance_scale == 1.0
            raise KeyError
    assert flow.guidance_scale == 5.0
    with unguided(object()):
        pass
