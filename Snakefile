# The graph: run cards -> executed notebooks -> result tables -> figures. Called by `vggflow figures` (vggflow.experiments.cards.make_figures);
# on a cluster: vggflow figures --profile paper --executor slurm --jobs 20, or snakemake itself with --config profile=paper.
# Checkpoints and metrics of a run are not declared: Snakemake would delete them when a job fails, and they are what a run resumes from.
import sys
from vggflow.experiments.cards import make_plan, template_path

names = lambda key: [n for n in str(config.get(key) or "").split(",") if n]
PROFILE,FRESH = config.get("profile", "quick"),bool(int(config.get("fresh", 0)))
PLAN = make_plan(PROFILE, names("figures"), names("experiments"), FRESH)
NAMES,FIGURES = list(PLAN.cards),PLAN.figures
RUNS = {e: [str(c.save().parent.relative_to(workflow.basedir)) for c in PLAN.todo(e)] for e in NAMES}
VGGFLOW = f'"{sys.executable}" -m vggflow.cli'

wildcard_constraints:
    experiment = "|".join(NAMES),
    figure = "|".join(FIGURES) or "none",
    run = "[^/]+"

rule all:
    input:
        expand("figures/{p}/{f}.{end}", p=PROFILE, f=FIGURES, end=["png", "pdf", "json"]),
        expand("data/results/{e}-{p}.csv", e=NAMES, p=PROFILE)

rule run:
    input: ancient("data/runs/{folder}/{run}/card.json")
    output: "data/runs/{folder}/{run}/run.ipynb"
    shell: "{VGGFLOW} run {input:q}"

rule table:
    input: lambda w: [f"{r}/run.ipynb" for r in RUNS[w.experiment]]
    output: f"data/results/{{experiment}}-{PROFILE}.csv", f"data/results/{{experiment}}-{PROFILE}.json"
    params: fresh = "--fresh" if FRESH else ""
    shell: "{VGGFLOW} collect {wildcards.experiment} --profile {PROFILE} {params.fresh}"

rule figure:
    input:
        lambda w: [f"data/results/{e}-{PROFILE}.csv" for e in FIGURES[w.figure].needs],
        lambda w: str(template_path(FIGURES[w.figure].template).relative_to(workflow.basedir))
    output: expand("figures/{p}/{{figure}}.{end}", p=PROFILE, end=["png", "pdf", "json"])
    shell: "{VGGFLOW} figure {wildcards.figure} --profile {PROFILE}"
