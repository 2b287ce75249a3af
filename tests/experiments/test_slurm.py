"The quick profile on a cluster: what Slurm is asked for, read from the jobs themselves"

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from guide import page_calls

from vggflow.experiments.schedule import make_plan

ROOT = Path(__file__).parents[2]


def command_of_the_guide():
    "Of the quick profile, and all jobs at once"
    (words,) = [words for words in page_calls("vggflow") if words[1] == "figures"]
    others = dict(sd3="quick", **{"20": "60"})
    return [others.get(word, word) for word in words[1:]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    "The jobs of the quick profile, as sbatch got them; and the plan"
    root = tmp_path_factory.mktemp("cluster")
    shutil.copy(ROOT / "Snakefile", root)
    shutil.copy(ROOT / "experiments.toml", root)
    shutil.copytree(ROOT / "nbs/experiments", root / "nbs/experiments")
    environment = fake_slurm.install(root / "slurm")
    environment["VGGFLOW_ROOT"] = str(root)
    command = [sys.executable, "-m", "vggflow.cli", *command_of_the_guide()]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode, "a job that was refused counted as made"
    found = fake_slurm.submitted(root / "slurm")
    assert found, done.stderr[-3000:]
    return found


def commands(jobs):
    "What each job runs"
    wrapped = [word for job in jobs for word in job["arguments"] if "--wrap" in word]
    return [shlex.split(word.removeprefix("--wrap=")) for word in wrapped]


def card_of(words):
    "The run card that a job waits for"
    return next(word for word in words if word.endswith("card.json"))


def test_every_run_is_a_job_of_its_own(jobs):
    plan = make_plan("quick", fresh=True)
    cards = [card for cards in plan.cards.values() for card in cards]
    wanted = {f"data/runs/{card.experiment}/{card.id}/card.json" for card in cards}
    asked = [card_of(words) for words in commands(jobs)]
    assert len(asked) == len(jobs) and set(asked) == wanted


def test_a_job_asks_for_the_time_the_memory_and_the_gpu_that_the_user_set(jobs):
    for job in jobs:
        asked = " ".join(job["arguments"])
        for text in ("-p gpu", "-t 1440", "--mem 64000", "--gpus=1", "--cpus-per-task=1"):
            assert text in asked


def test_a_job_runs_this_python_on_this_checkout(jobs):
    for job, words in zip(jobs, commands(jobs)):
        root = Path(job["arguments"][job["arguments"].index("-D") + 1])
        assert words[:3] == [sys.executable, "-m", "snakemake"]
        assert Path(words[words.index("--snakefile") + 1]) == root / "Snakefile"
        assert "profile=quick" in words and "slurm-jobstep" in words
        assert (root / card_of(words)).exists()
