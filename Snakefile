# The graph: run cards -> executed notebooks -> result tables -> figures.
# Called by `vggflow figures` (vggflow.experiments.schedule.make_figures); on a cluster:
# vggflow figures --profile paper --executor slurm --jobs 20, or snakemake itself with
# --config profile=paper. Checkpoints and metrics of a run are not declared: Snakemake would
# delete them when a job fails, and they are what a run resumes from. Tables and figures are
# updated: Snakemake would delete a committed one before it is made again. What is there to be
# drawn is drawn at once, and one experiment's runs come before those of the next.
import shlex

from vggflow.experiments.cards import template_path
from vggflow.experiments.schedule import make_plan
from vggflow.experiments.warm import WarmProcess


def below_root(path):
    "A path as Snakemake knows it"
    return str(path.relative_to(workflow.basedir))


def names(key):
    "Names of a list in the configuration"
    return [name for name in str(config.get(key) or "").split(",") if name]


PROFILE = config.get("profile", "quick")
FRESH = bool(int(config.get("fresh", 0)))
PLAN = make_plan(PROFILE, names("figures"), names("experiments"), FRESH)
FIGURES = PLAN.figures
TABLES = {name: f"data/results/{name}-{PROFILE}.csv" for name in PLAN.cards}
RUNS = {
    name: [below_root(card.save().parent) for card in PLAN.unkept(name)] for name in PLAN.cards
}
FOLDERS = list(dict.fromkeys(run.split("/")[2] for runs in RUNS.values() for run in runs))
WARM = WarmProcess()  # ends with this process; a job of a cluster starts its own
VGGFLOW = shlex.join(WARM.command)


wildcard_constraints:
    experiment="|".join(TABLES),
    figure="|".join(FIGURES) or "none",
    place=f"figures(/{PROFILE})?",
    run="[^/]+",


# `cores` and `jobs` limit what runs at once; the limit of jobs per second would have the
# scheduler look for jobs each second, and once more for each job that has ended
onstart:
    workflow.scheduler.job_rate_limiter = None


rule all:
    input:
        [below_root(file) for figure in FIGURES.values() for file in figure.files(PROFILE)],
        list(TABLES.values()),


for place, folder in enumerate(FOLDERS):

    rule:
        name:
            f"run_{folder.replace('-', '_')}"
        input:
            ancient(f"data/runs/{folder}/{{run}}/card.json"),
        output:
            f"data/runs/{folder}/{{run}}/run.ipynb",
        priority: len(FOLDERS) - place
        shell:
            "{VGGFLOW} run {input:q}"


rule table:
    input:
        lambda wildcards: [f"{run}/run.ipynb" for run in RUNS[wildcards.experiment]],
    output:
        update(f"data/results/{{experiment}}-{PROFILE}.csv"),
        update(f"data/results/{{experiment}}-{PROFILE}.json"),
    params:
        fresh="--fresh" if FRESH else "",
    priority: 1000
    shell:
        "{VGGFLOW} collect {wildcards.experiment} --profile {PROFILE} {params.fresh}"


rule figure:
    input:
        lambda wildcards: [TABLES[name] for name in FIGURES[wildcards.figure].needs],
        lambda wildcards: below_root(template_path(FIGURES[wildcards.figure].template)),
    output:
        update("{place}/{figure}.png"),
        update("{place}/{figure}.pdf"),
        update("{place}/{figure}.json"),
    priority: 1000
    shell:
        "{VGGFLOW} figure {wildcards.figure} --profile {PROFILE}"
