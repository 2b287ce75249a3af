# The graph: run cards -> executed notebooks -> result tables -> figures. Called by `make figures` (vggflow.experiments.make_figures);
# on a cluster: snakemake --executor slurm --jobs 20 --config profile=paper.
# Checkpoints and metrics of a run are not declared: Snakemake would delete them when a job fails, and they are what a run resumes from.
import sys
from vggflow.experiments import cards, read_experiments, template_path

PROFILE = config.get("profile", "quick")
EXPS = read_experiments()
NAMES = config["experiments"].split(",") if config.get("experiments") else [e for e in EXPS if e != "profiles" and EXPS[e].get("figures") and not EXPS[e].get("study")]
RUNS = {e: [str(c.save().parent.relative_to(workflow.basedir)) for c in cards(e, PROFILE, EXPS)] for e in NAMES}
FIGURES = {f: (e, t) for e in NAMES for f, t in EXPS[e].get("figures", {}).items()}
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
    input: ancient("data/runs/{experiment}/{run}/card.json")
    output: "data/runs/{experiment}/{run}/run.ipynb"
    shell: "{VGGFLOW} run {input:q}"

rule table:
    input: lambda w: [f"{r}/run.ipynb" for r in RUNS[w.experiment]]
    output: f"data/results/{{experiment}}-{PROFILE}.csv", f"data/results/{{experiment}}-{PROFILE}.json"
    shell: "{VGGFLOW} collect {wildcards.experiment} --profile {PROFILE}"

rule figure:
    input:
        lambda w: f"data/results/{FIGURES[w.figure][0]}-{PROFILE}.csv",
        lambda w: str(template_path(FIGURES[w.figure][1]).relative_to(workflow.basedir))
    output: expand("figures/{p}/{{figure}}.{end}", p=PROFILE, end=["png", "pdf", "json"])
    shell: "{VGGFLOW} figure {wildcards.figure} --profile {PROFILE}"
