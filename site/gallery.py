"The gallery: each figure with its command, its record, our numbers beside the paper's"

import csv
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

from markup import menu, table
from pictures import DRAWN, template_paints
from places import CONTENTS, ROOT
from words import summary
from words import title as page_title

sys.path.insert(0, str(ROOT))
from vggflow.experiments.cards import read_experiments  # noqa: E402
from vggflow.experiments.gallery import figure_title, read_records  # noqa: E402

PAGE = "pages/gallery"
WIDTH = 480  # pixels of a thumbnail
METRICS = {  # ours -> (the paper's, what it is called)
    "reward": ("reward", "reward"),
    "perceptual_diversity": ("dreamsim_diversity", "perceptual diversity"),
    "clip_diversity": ("clip_diversity", "CLIP diversity"),
    "fid": ("fid", "Fréchet distance ↓"),
}
GROUPS = {
    "The paper's figures": lambda name: name.startswith(("fig", "table")),
    "Studies of this project": lambda name: not name.startswith(("fig", "table")),
}


experiments = cache(read_experiments)


@cache
def records() -> dict:
    "Figure -> its record, the paper's in its order"
    found = read_records()
    paper = sorted(name for name in found if name.startswith("fig"))
    return {name: found[name] for name in [*paper, *(n for n in found if n not in paper)]}


def title(name: str) -> str:
    "How a figure is called, with what it shows"
    if name.startswith("fig") or name == "table1":
        return figure_title(name)
    return CONTENTS["figures"].get(name) or template_title(name)


def template_title(name: str) -> str:
    "What the template of a figure is called"
    return page_title(f"experiments/{records()[name]['template']}")


def about(name: str) -> str:
    "The question of the experiment to which a figure belongs"
    said = experiments()[records()[name]["experiment"]].get("about", "")
    return re.sub(r": Figs?\. .*", "", said)


def first_sentence(text: str) -> str:
    "Up to the first full stop that ends a sentence"
    return re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".") + "."


def alt(name: str) -> str:
    "A figure in words"
    said = records()[name].get("caption") or about(name)
    plain = re.sub(r"[$\\\"<>{}]", "", said).replace("\n", " ")
    return f"{title(name)}: {plain}"


def picture_class(
    name: str,
    option: str = "class",  # Of the directive
) -> str:  # A line; '' for a picture that shows images
    "The class of a figure that is lines on white"
    return "" if template_paints(records()[name]["template"]) else f":{option}: {DRAWN}\n"


# ----------------------------------------------------------------------------- numbers


def short(value) -> str:
    "A number with three digits"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "–" if value is None else str(value).replace("|", "\\|")


@cache
def published() -> tuple:
    "The paper's curves"
    with open(ROOT / "data/paper/figures.csv", encoding="utf8") as file:
        return tuple(csv.DictReader(file))


def published_end(number: str, metric: str, series: str) -> float | None:
    "Where a published curve ends: the middle of its band at the last update"
    rows = [r for r in published() if (r["figure"], r["metric"]) == (number, metric)]
    rows = [r for r in rows if r["series"] == series and r["statistic"] != "point"]
    last = max((float(r["x"]) for r in rows), default=None)
    ends = {r["statistic"]: float(r["y"]) for r in rows if float(r["x"]) == last}
    if "mean" in ends:
        return ends["mean"]
    return sum(ends.values()) / len(ends) if ends else None


@cache
def betas() -> dict:
    "Our β -> the paper's, as experiments.toml pairs them"
    ours = experiments()["beta"]
    pairs = zip(ours["series"], ours["sd3"]["series"])
    return {here["beta"]: there["beta"] for here, there in pairs}


def series_of(row: dict, vary: str) -> str:
    "The name that the paper's data give to a series"
    names = {
        "beta": lambda beta: f"beta={betas()[beta]:.0e}".replace("e+0", "e"),
        "eta": lambda eta: f"eta={eta}",
        "transitions": lambda count: f"rate={count / 20:g}",  # of 20 steps
    }
    return names.get(vary, str)(row[vary])


def beside_the_paper(name: str, record: dict) -> str:
    "The end of each curve, ours and the paper's"
    vary = record["vary"]
    head = [vary]
    for _, text in METRICS.values():
        head += [text, "paper"]
    rows = [ends_of(row, vary, str(int(name[3:]))) for row in record["numbers"]]
    kept = [k for k in range(len(head)) if any(row[k] != "–" for row in rows)]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in rows])


def ends_of(
    row: dict,  # Of a record's numbers
    vary: str,  # What its series differ in
    number: str,  # Of the paper's figure
) -> list:  # Cells: the series, then each metric, ours and the paper's
    "Where the curves of one series end"
    cells = [row[vary]]
    if vary == "beta":
        cells = [f"{row[vary]:g}, the paper's {series_of(row, vary)[5:]}"]
    for metric, (theirs, _) in METRICS.items():
        end = published_end(number, theirs, series_of(row, vary))
        cells += [short(row.get(metric)) + spread(row, metric), short(end)]
    return cells


def numbers_of(record: dict) -> str:
    "The record's numbers, one row for each series"
    rows = [r for r in record.get("numbers", []) if isinstance(r, dict)]
    plain = [
        {k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows
    ]
    names = list(dict.fromkeys(name for row in plain for name in row))
    names = [n for n in names if not n.endswith(("_low", "_high", "_sd", "_at_start"))]
    names = [n for n in names if "sd_over_seeds" not in n][:10]
    if not names:
        return ""
    cells = [[short(row.get(n)) + spread(row, n) for n in names] for row in plain]
    return table([n.replace("_", " ") for n in names], cells)


def spread(row: dict, name: str) -> str:
    "± the standard deviation of a number, where the record has it"
    value = row.get(f"{name}_sd", row.get(f"{name}_sd_over_seeds"))
    return f" ± {short(value)}" if isinstance(value, float) else ""


# ----------------------------------------------------------------------------- verdicts


@cache
def claims() -> tuple:
    "The rows of the register of claims"
    text = (ROOT / "data/results/claims.json").read_text(encoding="utf8")
    return tuple(json.loads(text)["claims"])


def figures_of(where: str) -> set:
    "Names of the figures that a place in the paper means: Figs. 2–4 is fig02, fig03, fig04"
    found = {"table1"} if "Table 1" in where else set()
    for part in re.findall(r"Figs?\. ([\d–, ]+)", where):
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", part):
            numbers = range(int(first), int(last or first) + 1)
            found |= {f"fig{number:02d}" for number in numbers}
    return found


def claims_on(name: str) -> list:
    "The claims that rest on a figure"
    return [row for row in claims() if name in figures_of(row["where"])]


def verdict_of(row: dict) -> str:
    "A verdict as it is shown"
    kinds = {"reproduced": "holds", "not reproduced": "corrected", "undecided": "condition"}
    said = row["verdict"]
    kind = next((v for k, v in kinds.items() if said.startswith(k)), "open")
    return f'<span class="verdict {kind}">{said}</span>'


def claim_row(row: dict) -> list:
    "One claim: ours with its interval, the paper's, the verdict"
    ours = "–"
    if row.get("mean") is not None:
        ours = f"{short(row['mean'])} [{short(row['low'])}, {short(row['high'])}]"
    says = row["says"].replace("|", "\\|")
    return [says, row.get("unit", ""), ours, short(row.get("paper")), verdict_of(row)]


def claims_table(rows: list) -> str:
    "Claims with our number beside the paper's"
    head = ["the paper's claim", "number", "here, 95 % interval", "paper", "verdict"]
    return ":::{div} claims\n" + table(head, [claim_row(row) for row in rows]) + "\n:::"


def verdict_text(record: dict) -> str:
    "The verdict that a study's record has"
    said = record.get("verdict") or ""
    if isinstance(said, dict):
        said = said.values()
    return said if isinstance(said, str) else " ".join(said)


# ----------------------------------------------------------------------------- pages


def files_of(name: str) -> dict:
    "The files of a figure, by what a page calls them"
    tables = [data["file"] for data in records()[name]["data"].values()]
    files = {"record": f"figures/{name}.json", "PDF": f"figures/{name}.pdf"}
    return files | {os.path.basename(file): file for file in tables}


def links(name: str) -> str:
    "Links to the files of a figure, and to the template that draws it"
    shown = [f"[{text}](../{file})" for text, file in files_of(name).items()]
    template = f"[template](../experiments/{records()[name]['template']}.ipynb)"
    return " · ".join([*shown, template])


def made_by(record: dict) -> str:
    "Seeds and versions, from the record"
    versions = record["versions"]
    names = ("python", "torch", "diffusers", "transformers", "peft")
    said = ", ".join(f"{n} {versions[n]}" for n in names if n in versions)
    seeds = ", ".join(map(str, record.get("seeds") or [])) or "none"
    return f"Profile `{record['profile']}` · seeds {seeds} · {said}"


def figure_page(name: str) -> str:
    "The page of one figure"
    record = records()[name]
    command = f"vggflow figures {name} --profile {record['profile']}"
    parts = [f"# {title(name)}", f"> {words_of(name)}"]
    shown = f"```{{image}} {name}.png\n:alt: {alt(name)}\n{picture_class(name)}```"
    parts += [f"::::{{div}} wide\n{shown}\n::::"]
    parts += [record.get("caption", "")]
    parts += [f"```sh\n{command}\n```", f"{links(name)}\n\n{made_by(record)}"]
    parts += ["## Verdict", verdict_text(record)] if verdict_text(record) else []
    found = claims_on(name)
    if found:
        words = "What the paper claims of this figure, tested here by "
        words += "[rules that were fixed before](../pages/claims.ipynb)."
        parts += ["## Our numbers beside the paper's", words, claims_table(found)]
    parts += numbers_part(name, record)
    return "\n\n".join(part for part in parts if part) + "\n"


def numbers_part(name: str, record: dict) -> list:
    "The numbers of a record; beside the paper's curve where it has one"
    if name == "table1":
        return ["## The table", record["markdown"]]
    if record["template"] == "convergence" and name.startswith("fig"):
        words = (
            "Each curve where it ends: ours in the emoji world, the paper's with Stable "
        )
        words += "Diffusion 3 and its own rewards. The two scales are not the same."
        return ["## Where the curves end", words, beside_the_paper(name, record)]
    shown = numbers_of(record)
    return ["## Numbers", shown] if shown else []


def words_of(name: str) -> str:
    "What a figure shows: what its template draws, and of which experiment"
    if name == "table1":
        return summary("experiments/table1")
    kind = template_title(name)
    named = name.startswith("fig") and not kind.startswith("Figure")
    return f"{kind} · {about(name)}" if named else about(name)


def card(name: str, up: str) -> str:
    "A figure in the gallery"
    found = claims_on(name)
    counts = {}
    for row in found:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    said = said or first_sentence(verdict_text(records()[name]))
    said = said if len(said) < 150 else said[:150].rpartition(" ")[0] + " …"
    words = words_of(name)
    if said.strip("."):
        words += f"\n\n```{{card-footer}}\n{said}\n```"
    return (
        f":::{{grid-item-card}} {title(name)}\n:link: ../figures/{name}\n:link-type: doc\n"
        f":img-top: {up}/figures/small/{name}.jpg\n:img-alt: {title(name)}\n"
        f"{picture_class(name, 'class-img-top')}\n{words}\n:::"
    )


def overview() -> str:
    "All figures as cards"
    parts = []
    for heading, belongs in GROUPS.items():
        cards = "\n\n".join(card(name, "..") for name in records() if belongs(name))
        parts.append(f"## {heading}\n\n::::{{grid}} 1 2 3 3\n:gutter: 3\n\n{cards}\n::::")
    return "\n\n".join([*parts, menu([f"../figures/{name}" for name in records()])])


def of_template(
    template: str,  # E.g. trade_off
) -> str:
    "The figures that a template draws, or that are drawn from its runs"
    drawn = [n for n, r in records().items() if r["template"] == template]
    runs = [n for n, r in records().items() if runs_by(r["experiment"]) == template]
    names = drawn or runs
    if not names:
        return "No figure of this template is committed: its runs are not done yet."
    what = "Drawn by this template" if drawn else "Drawn from the runs of this template"
    first = names[0]
    others = ", ".join(f"[{title(n)}](../figures/{n}.md)" for n in names)
    record = f"[record](../figures/{first}.json)"
    text = f"```{{figure}} ../figures/{first}.png\n:alt: {alt(first)}\n"
    text += f"{picture_class(first)}\n"
    text += f"{title(first)}: {records()[first].get('caption', '')} {record}\n```\n\n"
    return text + f"{what}: {others}."


def runs_by(name: str) -> str:
    "The template that makes the runs of an experiment"
    experiment = experiments()[name]
    return experiment.get("template") or runs_by(experiment["like"])


def write_thumbnails(to: Path):
    "Small copies of the figures, for the gallery"
    from PIL import Image

    to.mkdir(parents=True, exist_ok=True)
    for name in records():
        with Image.open(ROOT / "figures" / f"{name}.png") as image:
            by = max(1, image.width // WIDTH)
            image.convert("RGB").reduce(by).save(to / f"{name}.jpg", quality=88)
