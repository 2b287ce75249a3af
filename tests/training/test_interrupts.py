"A run that is told to end keeps every update that it has done."

import signal
import warnings

import pytest
import torch
from short_runs import column, equal_weights, linear, run

from vggflow.common.seals import read_rows
from vggflow.methods.direct import ReFL
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.training.run_directory import RunDirectory
from vggflow.training.update import TrainingState

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_of_a_terminal():
    "Those of a fresh Python, whatever the parent of the tests ignores (`nohup ... &`)"
    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


def told_at(update, how):
    "VGG-Flow that gets a signal, or an error, in the middle of an update"

    class Told(VGGFlow):
        updates = 0

        def prepare(self, *args):
            items = super().prepare(*args)
            Told.updates += 1
            if Told.updates == update:
                how()
            return items

    Told.__name__ = "VGGFlow"
    return Told()


def raise_interrupt():
    raise KeyboardInterrupt


def interrupt():
    signal.raise_signal(signal.SIGINT)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def updates_kept(folder):
    return [int(path.name) for path in RunDirectory(folder).checkpoints()]


@pytest.mark.parametrize(
    "how,error",
    [
        (raise_interrupt, KeyboardInterrupt),
        (interrupt, KeyboardInterrupt),
        (terminate, SystemExit),
    ],
    ids=["raised", "SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("update", [1, 4])
def test_told_to_end_keeps_every_update(tmp_path, update, how, error):
    "No checkpoint is due before the end; what is kept goes on to the last bit"
    settings = dict(save_every=100, ema=0.5)
    whole, history = run(tmp_path / "a", **settings)
    before = [signal.getsignal(number) for number in SIGNALS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as end:
            run(tmp_path / "b", told_at(update, how), **settings)
    assert before == [signal.getsignal(number) for number in SIGNALS]
    assert error is KeyboardInterrupt or end.value.code == 143
    assert updates_kept(tmp_path / "b") == ([update - 1] if update > 1 else [])
    again, rest = run(tmp_path / "b", **settings)
    assert equal_weights(whole, again)
    assert column(history, "loss") == column(rest, "loss")


def test_a_signal_while_a_step_is_taken_waits_for_its_end(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "a", save_every=100)

    def told(state):  # between the step and its row
        if state.update == 2:
            terminate()

    monkeypatch.setattr(TrainingState, "follow_average", told)
    with pytest.warns(RuntimeWarning, match="ended after update 3"):
        with pytest.raises(SystemExit):
            run(tmp_path / "b", save_every=100)
    monkeypatch.undo()
    rows = read_rows(tmp_path / "b/metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert equal_weights(whole, run(tmp_path / "b", save_every=100)[0])


def test_an_ignored_signal_stays_ignored_and_the_other_ends_the_run(tmp_path):
    "As under `nohup ... &`"
    whole, _ = run(tmp_path / "a", save_every=100)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    again, _ = run(tmp_path / "b", told_at(2, interrupt), save_every=100)
    assert equal_weights(whole, again)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit):
            run(tmp_path / "c", told_at(4, terminate), save_every=100)
    assert updates_kept(tmp_path / "c") == [3]


def evaluated_run(out, evaluate):
    "Five updates with an average of the weights, evaluated after the third"
    torch.manual_seed(0)
    flow = GaussianFlow([0.0, 0.0], 0.6)
    config = FinetuneConfig(updates=5, batch_size=4, save_every=100, eval_every=3, ema=0.5)
    finetune(flow, linear, VGGFlow(), config, out=out, progress=False, evaluate=evaluate)
    return flow


def test_a_signal_in_an_evaluation_leaves_the_trained_weights(tmp_path):
    "And not the averaged ones that the evaluation saw"

    def told(flow, update):
        if update == 3:
            terminate()
        return {}

    whole = evaluated_run(tmp_path / "a", lambda flow, update: {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit):
            evaluated_run(tmp_path / "b", told)
    assert updates_kept(tmp_path / "b") == [3]
    again = evaluated_run(tmp_path / "b", lambda flow, update: {})
    assert equal_weights(whole, again)


def test_a_non_finite_update_keeps_the_state_before_it(tmp_path):
    whole, _ = run(tmp_path / "a", save_every=100)

    class Blows(VGGFlow):
        updates = 0

        def loss(self, *args):
            Blows.updates += 1
            loss, logs = super().loss(*args)
            return (loss * float("inf") if Blows.updates == 4 else loss), logs

    Blows.__name__ = "VGGFlow"
    said = "update 4: the loss is inf.*a lower lr.*name a new out"
    with pytest.raises(FloatingPointError, match=said):
        run(tmp_path / "b", Blows(), save_every=100)
    assert updates_kept(tmp_path / "b") == [3]
    with pytest.warns(RuntimeWarning, match="goes on"):
        again, _ = run(tmp_path / "b", save_every=100)
    assert equal_weights(whole, again)


def test_a_reward_that_gives_no_numbers_is_named():
    calls = []

    def broken(x, prompts=None):
        calls.append(1)
        return x.sum(-1) * (1.0 if len(calls) == 1 else float("nan"))  # after the trial

    torch.manual_seed(0)
    flow = GaussianFlow([0.0], 0.6)
    config = FinetuneConfig(updates=1, batch_size=2)
    said = "see what the reward 'test_a_reward_that.*broken' does"
    with pytest.raises(FloatingPointError, match=said):
        finetune(flow, broken, ReFL(), config, progress=False)
