"A run that was killed goes on to the last bit, in its own folder and in no other."

import json
import shutil

import pytest
import torch
from short_runs import column, equal_weights, linear, run

from vggflow.common.seals import read_rows, remove_rows
from vggflow.methods.direct import ReFL
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.training.run_directory import RunDirectory


class Killed(Exception):
    pass


def killed_at(update):
    "VGG-Flow that is killed in the middle of an update"

    class Dies(VGGFlow):
        updates = 0

        def loss(self, *args):
            Dies.updates += 1
            if Dies.updates == update:
                raise Killed
            return super().loss(*args)

    Dies.__name__ = "VGGFlow"
    return Dies()


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_update(out, reward=linear, **keywords):
    "One update of ReFL on one dimension"
    config = FinetuneConfig(updates=1, batch_size=2)
    flow = GaussianFlow([0.0], 0.6)
    return finetune(flow, reward, ReFL(), config, out=out, progress=False, **keywords)


@pytest.mark.parametrize("update", [1, 2, 4, 6])
def test_killed_anywhere_resumes_to_the_last_bit(tmp_path, update):
    whole, history = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", killed_at(update))
    with open(tmp_path / "b/metrics.jsonl", "a") as file:
        file.write('{"update": 3, "lo')  # the last line torn
    again, _ = run(tmp_path / "b")
    assert equal_weights(whole, again)
    rows = read_rows(tmp_path / "b/metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == column(history, "loss")


def test_finished_run_is_not_repeated(tmp_path):
    _, first = run(tmp_path)
    _, second = run(tmp_path)
    assert column(first, "seconds") == column(second, "seconds")


def test_a_cosine_is_not_extended(tmp_path):
    "Its learning rate has come down to zero; another end would be another curve"
    whole, _ = run(tmp_path, schedule="cosine")
    said = "updates: 6 ≠ 9 .where the cosine schedule ends."
    with pytest.raises(ValueError, match=said):
        run(tmp_path, schedule="cosine", updates=9)
    again, history = run(tmp_path, schedule="cosine", save_every=3)
    assert equal_weights(whole, again) and len(history.rows) == 6


def test_a_run_can_be_extended(tmp_path):
    long, _ = run(tmp_path / "a", updates=9)
    run(tmp_path / "b")
    more, history = run(tmp_path / "b", updates=9)
    assert equal_weights(long, more) and len(history.rows) == 9


def test_micro_batches_may_change_on_resume(tmp_path):
    whole, history = run(tmp_path / "a")
    run(tmp_path / "b", updates=4)
    other, again = run(tmp_path / "b", micro_batch=3, forward_batch=1)
    assert len(again.rows) == 6
    pairs = zip(whole.parameters(), other.parameters())
    assert max((p - q).abs().max() for p, q in pairs) < 1e-5
    assert column(again, "spread") == pytest.approx(column(history, "spread"))


def test_a_moved_run_goes_on_where_it_is(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "old/run", updates=3)
    (tmp_path / "old/run").rename(tmp_path / "new")
    again, history = run(tmp_path / "new")
    assert equal_weights(whole, again) and len(history.rows) == 6
    assert not (tmp_path / "old/run").exists()
    stored = "".join(file.read_text() for file in (tmp_path / "new").glob("*.json*"))
    assert str(tmp_path / "old") not in stored


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    whole, _ = run(tmp_path / "a", updates=8)
    run(tmp_path / "b")
    older, last = RunDirectory(tmp_path / "b").checkpoints()
    (last / "flow.safetensors").write_bytes(b"x" * 10)
    with pytest.warns(RuntimeWarning, match=f"{last.name} is damaged.*update 4 is taken"):
        again, history = run(tmp_path / "b", updates=8)
    assert equal_weights(whole, again) and len(history.rows) == 8
    assert column(history, "update") == list(range(1, 9))


def test_without_a_whole_checkpoint_a_run_is_refused_in_a_line(tmp_path):
    run(tmp_path)
    for checkpoint in RunDirectory(tmp_path).checkpoints():
        (checkpoint / "state.json").unlink()
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint.*begins anew") as error:
        run(tmp_path, updates=8)
    assert "\n" not in str(error.value) and files_of(tmp_path).keys() == before.keys()


def test_a_lost_checkpoint_is_made_again(tmp_path):
    whole, _ = run(tmp_path)
    shutil.rmtree(RunDirectory(tmp_path).newest_checkpoint())
    again, history = run(tmp_path)
    assert equal_weights(whole, again) and len(history.rows) == 6


# --- whose folder it is ---


@pytest.mark.parametrize(
    "other,name",
    [
        (dict(lr=1e-2), "lr"),
        (dict(seed=1), "seed"),
        (dict(method=ReFL()), "method.name"),
        (dict(method=VGGFlow(beta=2.0)), "method.beta"),
    ],
)
def test_another_runs_folder_is_refused_untouched(tmp_path, other, name):
    run(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=f"holds another run.*{name}"):
        run(tmp_path, **other)
    assert before == files_of(tmp_path)


def test_another_reward_is_another_run(tmp_path):
    def other(x, prompts=None):
        return -x.sum(-1)

    one_update(tmp_path)
    with pytest.raises(ValueError, match="holds another run.*reward: 'linear' ≠"):
        one_update(tmp_path, other)


def test_no_resume_never_overwrites(tmp_path):
    one_update(tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        one_update(tmp_path, resume=False)


def test_a_run_from_before_an_option_resumes_with_its_default(tmp_path):
    whole, _ = run(tmp_path / "a")
    run(tmp_path / "b", updates=4)
    path = tmp_path / "b/config.json"
    old = json.loads(path.read_text())
    del old["seal"]
    newer = ("micro_batch", "forward_batch", "ema", "optimizer", "log_to", "sample_every")
    for name in newer:
        del old["config"][name]
    assert old["config"]["shift"] == 1.0
    path.write_text(json.dumps(old))
    again, _ = run(tmp_path / "b")
    assert equal_weights(whole, again)
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="config.ema: 0.0 ≠ 0.5"):
        run(tmp_path / "b", ema=0.5)


def test_a_run_of_the_first_edition_is_read_and_not_continued(tmp_path):
    "Its random numbers were drawn otherwise"
    run(tmp_path, updates=4)
    path = tmp_path / "config.json"
    later = ("edition", "seal")
    first = {k: v for k, v in json.loads(path.read_text()).items() if k not in later}
    path.write_text(json.dumps(first))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="of edition 1.*choose another") as error:
        run(tmp_path)
    assert "\n" not in str(error.value) and before == files_of(tmp_path)
    assert len(RunDirectory(tmp_path).metrics) == 4
    shutil.rmtree(tmp_path / "checkpoints")
    remove_rows(tmp_path / "metrics.jsonl")  # one without updates is free
    assert len(run(tmp_path)[1].rows) == 6


def test_a_first_attempt_that_came_to_nothing_frees_its_folder(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at(1), lr=1.0)
    (tmp_path / "eval.jsonl").write_text('{"update": 0, "x": 1}\n')
    _, history = run(tmp_path, lr=1e-3)
    assert len(history.rows) == 6 and not history.evals
    assert RunDirectory(tmp_path).record["config"]["lr"] == 1e-3


@pytest.mark.parametrize("name", ["metrics.jsonl", "lora", "config.json"])
def test_files_of_something_else_are_let_be(tmp_path, name):
    if name == "lora":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=f"{name}.*choose another folder") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_a_record_says_about_a_run_counts_where_both_say_it(tmp_path):
    one_update(tmp_path)
    one_update(tmp_path, about=dict(reward="r"))
    one_update(tmp_path, about=dict(sources={"m.py": "1"}))
    known = dict(reward="r", sources={"m.py": "1"})
    assert RunDirectory(tmp_path).record["about"] == known
    with pytest.raises(ValueError, match="about.sources.m.py: '1' ≠ '2'"):
        one_update(tmp_path, about=dict(sources={"m.py": "2"}))

    def other(x, prompts=None):
        return -x.sum(-1)

    with pytest.raises(ValueError, match="reward: .linear. ≠"):
        one_update(tmp_path, other, about=dict(reward="r"))


def test_a_weighted_sum_is_told_by_its_text_without_paths(tmp_path):
    def called(text):
        def total(x, prompts=None):
            return x.sum(-1)

        total.__qualname__ = text  # as weighted sums are
        return total

    about = dict(reward="mine.py:f=2.0")
    one_update(tmp_path, called("mine.py:f=2"), about=about)
    history = one_update(tmp_path, called("/there/mine.py:f=2"), about=about)
    assert len(history.rows) == 1


def test_lines_of_a_run_in_the_same_process_are_not_mixed(tmp_path):
    "The folder is locked for the length of a run, and free afterwards"
    seen = []

    def looks(flow, update):
        with RunDirectory(tmp_path).lock():  # of this process: it does not wait
            seen.append(update)
        return {}

    torch.manual_seed(0)
    config = FinetuneConfig(updates=1, batch_size=2, eval_every=1)
    flow = GaussianFlow([0.0], 0.6)
    finetune(flow, linear, ReFL(), config, out=tmp_path, evaluate=looks, progress=False)
    assert seen == [0, 1]
