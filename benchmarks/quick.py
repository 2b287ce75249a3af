"""The quick profile by stage: what one of each part costs, times how often the plan has it.

CPU seconds. Updates and evaluations are measured in this process; what a card and a figure
cost beside their own work comes from the stage of start-up. Where runs of the plan have
been made, the seconds that they wrote down stand beside it.
"""

import tempfile
from collections import Counter

import torch

from benchmarks.measure import cpu_seconds, interleaved, spread
from vggflow.commands.run import method_of
from vggflow.common.seals import read_rows
from vggflow.experiments.schedule import make_plan
from vggflow.judging.prompts import evenly
from vggflow.training.config import FinetuneConfig
from vggflow.training.update import TrainingState, draw_samples, take_step
from vggflow.worlds.world import get_world

COUNTED = ("method", "updates", "batch_size", "steps", "transitions", "eval_every")
COUNTED += ("guidance_scale", "eval_prompts", "images_per_prompt")
LOOKED = ("eval_prompts", "images_per_prompt", "steps")


def kinds_of_runs(profile="quick"):
    "(cards, figures, settings that cost -> how many runs have them), nothing kept"
    plan = make_plan(profile, fresh=True)
    cards = [card for cards in plan.cards.values() for card in cards]
    kinds = Counter(tuple(card.parameters[name] for name in COUNTED) for card in cards)
    return cards, plan.figures, {key: kinds[key] for key in sorted(kinds)}


def one_step(kind):
    "An update of the loop with the settings of some runs"
    settings = dict(zip(COUNTED, kind))
    place = get_world("emoji")
    built = place.build(guidance_scale=settings["guidance_scale"])
    loop = {key: settings[key] for key in ("batch_size", "steps", "transitions")}
    config = FinetuneConfig(shift=1.0, lr=1e-3, **loop)
    clip = dict(clip=0.8) if settings["method"] == "VGG-Flow" else {}
    method = method_of(place, settings["method"], 0.0, clip)
    state = TrainingState(built.flow, built.reward, method, config)

    def step():
        samples = draw_samples(built.flow, config, built.prompts, state.update)
        take_step(state, built.reward, samples)
        state.update += 1

    return step


def evaluation_seconds(prompts, images, steps):
    "CPU seconds of the base's images, of the evaluation at update 0, and of a later one"
    place = get_world("emoji")
    built = place.build()
    asked = evenly(built.prompts, prompts)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        how = dict(prompts=asked, images_per_prompt=images, steps=steps, shift=1.0)

        def prepare():
            found["judge"] = place.evaluator(built, cache=folder, **how)

        first, again = cpu_seconds(prepare), cpu_seconds(prepare)
        judge = found["judge"]
        start = cpu_seconds(lambda: judge(built.flow, 0))
        for weight in built.flow.trainable_parameters():
            torch.nn.init.normal_(weight, std=0.01)
        later = cpu_seconds(lambda: judge(built.flow, 1))
    return dict(base=first, base_again=again, at_start=start, later=later)


def evaluations(kinds, part):
    "CPU seconds of all evaluations: the base's once, the others in every run"
    total = part["base"]
    for kind, count in kinds.items():
        settings = dict(zip(COUNTED, kind))
        later = settings["updates"] // settings["eval_every"]
        total += count * (part["base_again"] + part["at_start"] + later * part["later"])
    return total


def seconds_of_runs(cards):
    "Seconds that finished runs of the plan wrote down for their updates"
    done = [card for card in cards if card.finished]
    rows = [row for card in done for row in read_rows(card.folder / "metrics.jsonl")]
    return dict(
        runs=len(done), of=len(cards), updates=sum(row.get("seconds", 0) for row in rows)
    )


def beside_the_work(overheads, cards, figures):
    "CPU seconds of starting all cards and of drawing all figures, where they are known"
    counts = {
        "a card": ("starting cards", len(cards)),
        "a figure": ("figures", len(figures)),
    }
    return {
        name: count * overheads[kind]["median"]
        for kind, (name, count) in counts.items()
        if kind in overheads
    }


def measure(rounds, overheads, profile="quick"):
    "The stage; `overheads` are the seconds of the stage of start-up"
    torch.set_num_threads(1)
    cards, figures, kinds = kinds_of_runs(profile)
    found = interleaved({kind: one_step(kind) for kind in kinds}, rounds)
    rows = [
        dict(zip(COUNTED, kind), runs=count, seconds=spread(found[kind]))
        for kind, count in kinds.items()
    ]
    first = rows[0]
    part = evaluation_seconds(*(first[name] for name in LOOKED))
    work = sum(row["runs"] * row["updates"] * row["seconds"]["median"] for row in rows)
    stages = dict(updates=work, evaluations=evaluations(kinds, part))
    stages |= beside_the_work(overheads, cards, figures)
    return dict(
        profile=profile,
        cards=len(cards),
        figures=len(figures),
        evaluation={name: round(seconds, 4) for name, seconds in part.items()},
        updates=rows,
        minutes={name: round(seconds / 60, 2) for name, seconds in stages.items()},
        total_minutes=round(sum(stages.values()) / 60, 2),
        of_runs=seconds_of_runs(cards),
    )
