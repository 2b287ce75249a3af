"Trackers mirror the rows, and the reward that is watched is the reward."

import pytest
import torch
from short_runs import column, linear, run

from vggflow.methods.direct import ReFL
from vggflow.methods.method import Method
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.diagnostics import spread
from vggflow.training.loop import finetune
from vggflow.training.monitors import WatchedReward


def tracker_of_notes(told):
    "A tracker of accelerate that notes what it is told"
    from accelerate import tracking

    class Notes(tracking.GeneralTracker):
        name = "notes"
        requires_logging_directory = True
        main_process_only = True
        tracker = None

        def __init__(self, run_name, logging_dir):
            super().__init__()
            told.append(("start", run_name, logging_dir))

        def start(self):
            pass

        def store_init_configuration(self, values):
            told.append(("config", values))

        def log(self, values, step=None, **more):
            told.append((step, values))

        def finish(self):
            told.append("end")

    return Notes


def test_rows_go_to_trackers_of_accelerate(tmp_path, monkeypatch):
    from accelerate import tracking

    told = []
    notes = tracker_of_notes(told)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", notes)
    _, history = run(tmp_path, log_to="notes")
    assert told[0] == ("start", "vggflow", str(tmp_path)) and told[-1] == "end"
    assert told[1][1]["config.lr"] == 3e-3
    losses = [(step, values["train/loss"]) for step, values in told[2:-1]]
    assert losses == [(row["update"], row["loss"]) for row in history.rows]
    with pytest.raises(ValueError, match="no tracker 'note', only"):
        run(None, log_to="note")

    def no_key(self):
        raise KeyError("no API key configured")

    monkeypatch.setattr(notes, "start", no_key)
    said = "log_to='notes' does not start .KeyError: .no API key"
    with pytest.raises(RuntimeError, match=said):
        run(None, log_to="notes")


def test_tensorboard_reads_the_rows(tmp_path, monkeypatch):
    from accelerate import PartialState, tracking
    from tensorboard.backend.event_processing import event_accumulator

    PartialState._reset_state()  # as in a process that has started nothing of accelerate
    run(tmp_path, log_to="tensorboard", updates=4)
    _, history = run(tmp_path, log_to="tensorboard")  # goes on
    seen = {}
    for file in tmp_path.rglob("events.out.tfevents*"):
        events = event_accumulator.EventAccumulator(str(file.parent))
        events.Reload()
        for name in events.Tags()["scalars"]:
            values = {scalar.step: scalar.value for scalar in events.Scalars(name)}
            seen.setdefault(name, {}).update(values)
    updates = column(history, "update")
    assert sorted(seen["train/loss"]) == updates
    losses = [seen["train/loss"][update] for update in updates]
    assert losses == pytest.approx(column(history, "loss"), rel=1e-6)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(None, log_to=("tensorboard",))


# --- the watched reward ---


class Scaled:
    "A reward with an option and a name"

    name = "r"

    def __call__(self, x, prompts=None, scale=1.0):
        return scale * x.sum(1)


def test_watched_reward_stands_in_for_the_reward():
    watched = WatchedReward(Scaled())
    x = torch.randn(4, 3)
    assert torch.equal(watched(x, None, scale=2.0), 2 * x.sum(1))
    assert watched.name == "r"
    watched(10 * x)
    assert watched.logs() == dict(spread=pytest.approx(spread(x).item()))  # of the first
    alone = WatchedReward(Scaled())
    alone(x[:1])
    assert alone.logs() == {}


def test_watched_reward_is_seen_through_by_derivatives():
    x = torch.randn(4, 3)
    inside = WatchedReward(Scaled())
    torch.func.vmap(inside)(x[None])
    assert isinstance(inside.logs(), dict)
    derived = WatchedReward(Scaled())
    torch.func.vjp(derived, x)
    assert derived.logs() == dict(spread=pytest.approx(spread(x).item()))


def test_a_methods_own_spread_wins():
    class Says(Method):
        def loss(self, flow, items):
            size = sum(p.pow(2).sum() for p in flow.trainable_parameters())
            return size, dict(reward=0.0, spread=7.0)

    assert run(None, Says(), updates=2)[1].rows[0]["spread"] == 7.0


def test_progress_is_shown_of_a_method_that_logs_no_reward(capsys):
    class Silent(ReFL):
        def loss(self, flow, items):
            return super().loss(flow, items)[0], {}

    for show in (True, "plain"):
        flow = GaussianFlow([0.0], 1.0)
        config = FinetuneConfig(updates=2, batch_size=4, steps=5)
        finetune(flow, linear, Silent(), config, progress=show)
    assert "update 2/2, reward nan" in capsys.readouterr().out
