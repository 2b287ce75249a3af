"""The checks of two processes that train together, `main(folder)`.

Two processes, connected by gloo, and one alone do them. All three are forks of one that
has done the slow thing, importing torch and diffusers."""

import copy
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from short_runs import EVERY_METHOD, gaussian_run, outcome, smooth, wave
from tiny_flux import make_tiny_flux
from tiny_sd3 import make_tiny_sd3
from tiny_z_image import make_tiny_z_image
from torch.distributed.tensor import DTensor

from vggflow import cli, train
from vggflow.judging.evaluation import Evaluator, draw
from vggflow.methods.costate import AdjointMatching, VGGFlowPMP
from vggflow.methods.direct import DRaFT, ReFL
from vggflow.methods.estimates import (
    CalibratedEta,
    CoarseAdjoint,
    EndGradient,
    LookAhead,
    TruncatedAdjoint,
)
from vggflow.methods.method import Samples
from vggflow.methods.value_gradient import VGGFlow
from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.loop import finetune
from vggflow.training.processes import Processes, launched, shard, wants_shards
from vggflow.training.update import draw_samples
from vggflow.worlds.world import get_world

PROMPTS = ["a cat", "a red dog", "two fish"]
RECOMPUTED = dict(gradient_checkpointing=True)
OPTIONS = dict(
    checkpointed=dict(RECOMPUTED, decode_checkpointing=True),
    adapter=dict(correction="adapter"),
    both=dict(RECOMPUTED, correction="adapter"),
)
FIVE = dict(
    vgg=lambda: VGGFlow(clip=0.7),
    pmp=VGGFlowPMP,
    am=AdjointMatching,
    draft=lambda: DRaFT(k=2),
    refl=ReFL,
)
OTHER_PIPELINES = dict(
    flux=("FluxPipeline", make_tiny_flux), z_image=("ZImagePipeline", make_tiny_z_image)
)
EACH = dict(
    FIVE,
    end=EndGradient,
    calibrated=CalibratedEta,
    ahead=LookAhead,
    truncated=TruncatedAdjoint,
    coarse=lambda: CoarseAdjoint(every=2),
)


def pale(images, prompts=None):
    return 300 * images.mean((1, 2, 3))


def tiny_flow(pipeline, **options):
    from vggflow.common.names import load_object
    from vggflow.worlds.checks import flow_of_class

    torch.manual_seed(0)
    flow = load_object(flow_of_class(type(pipeline).__name__), "flow")
    return flow(copy.deepcopy(pipeline), **{"lora_rank": 2, **options})


def tiny_run(method, pipeline, out=None, options=None, guidance_scale=1.0, **settings):
    "A run on a tiny Stable Diffusion 3"
    flow = tiny_flow(pipeline, guidance_scale=guidance_scale, **(options or {}))
    usual = dict(updates=2, batch_size=4, steps=3, transitions=2, lr=0.01)
    config = FinetuneConfig(**{**usual, **settings})
    call = dict(out=out, prompts=PROMPTS, progress=False)
    history = finetune(flow, pale, smooth(method), config, **call)
    sharded = any(isinstance(p, DTensor) for p in flow.transformer.parameters())
    assert wants_shards() == sharded
    assert not any(isinstance(p, DTensor) for p in flow.trainable_parameters())
    return outcome(flow, history)


def loaded(folder, t5=False):
    "The tiny pipeline, read from disk, with all its text encoders or without T5"
    from diffusers import StableDiffusion3Pipeline

    without = {} if t5 else dict(text_encoder_3=None, tokenizer_3=None)
    place = folder / ("whole" if t5 else "tiny")
    pipeline = StableDiffusion3Pipeline.from_pretrained(place, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def other_pipeline(folder, kind):
    "A tiny pipeline of another kind, read from disk"
    import diffusers

    pipeline = getattr(diffusers, OTHER_PIPELINES[kind][0]).from_pretrained(folder / kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class ForItself(VGGFlow):
    "A fault: the clip's quantile and the unit of a process's own samples"

    def prepare(self, flow, reward, samples):
        samples.over_batch = lambda values: values
        return super().prepare(flow, reward, samples)


class SameNoise(VGGFlow):
    "A fault: every process draws the first samples of the batch"

    def prepare(self, flow, reward, samples):
        numbers = (samples.seed, samples.update, range(len(samples.x0)))
        shared = (samples.transitions, samples.over_batch)
        again = Samples.draw(flow, None, samples.times, *numbers, *shared)
        return super().prepare(flow, reward, again)


FAULTS = dict(
    for_itself=lambda: ForItself(beta=2.0, eta=lambda t: t / 2, clip=0.7),
    same_noise=lambda: SameNoise(beta=2.0, eta=lambda t: t / 2, clip=0.7),
)


def same_on_both(folder) -> dict:
    "What must not depend on the number of processes"
    found = {f"gaussian {name}": gaussian_run(m()) for name, m in EVERY_METHOD.items()}

    def weight_sum(flow, update):
        return dict(w=flow.residual.net[-1].weight.sum().item())

    often = dict(ema=0.8, eval_every=2, evaluate=weight_sum)
    found["ema"] = gaussian_run(VGGFlow(), **often)
    pipelines = dict(tiny=loaded(folder), whole=loaded(folder, t5=True))
    for kind, scale, methods in (("tiny", 3.0, EACH), ("whole", 1.0, FIVE)):
        for name, make in methods.items():
            run = tiny_run(make(), pipelines[kind], guidance_scale=scale)
            found[f"{kind} {name} {scale}"] = run
    for kind in OTHER_PIPELINES:
        pipeline = other_pipeline(folder, kind)
        for name in ("vgg", "am"):
            options = dict(image_size=16, max_sequence_length=16)
            found[f"{kind} {name}"] = tiny_run(FIVE[name](), pipeline, options=options)
    for name, options in OPTIONS.items():
        method = VGGFlow(clip=0.7)
        run = tiny_run(method, pipelines["tiny"], options=options, guidance_scale=3.0)
        found[f"tiny {name}"] = run
    return found


def killed(method, update=4):
    "The method, killed in an update"
    own = method.prepare
    calls = []

    def prepare(*args):
        calls.append(1)
        if len(calls) == update:
            raise InterruptedError
        return own(*args)

    method.prepare = prepare
    return method


def interrupted(folder: Path) -> dict:
    """Runs, and the same runs killed in their fourth update and called again: with
    dropout, so that torch's own random numbers count; T5 and guidance in every second"""
    found = {}
    for i, (name, make) in enumerate(EACH.items()):
        pipeline = loaded(folder, t5=i % 2 == 1)
        settings = dict(updates=5, save_every=2, ema=0.5, options=dict(lora_dropout=0.3))
        settings["guidance_scale"] = 2.0 if i % 2 == 0 else 1.0
        whole = tiny_run(make(), pipeline, out=folder / f"uncut-{name}", **settings)
        cut = folder / f"cut-{name}"
        try:
            tiny_run(killed(make()), pipeline, out=cut, **settings)
        except InterruptedError:
            again = tiny_run(make(), pipeline, out=cut, **settings)
            found[name] = dict(whole=whole, again=again)
    return found


def said_by(error, fn, *args, **keywords):
    "What an error says that a call must raise"
    try:
        fn(*args, **keywords)
    except error as raised:
        return str(raised)


def faults(processes) -> dict:
    "A reward that fails on the second process only, and other faults"

    def bad():
        calls = []

        def reward(x, prompts=None):
            calls.append(1)
            ill = processes.rank == 1 and len(calls) == 3  # the first is a trial
            return wave(x) * (float("nan") if ill else 1.0)

        return reward

    def fails(flow, update):  # raised by the first process
        raise ValueError("the evaluation is broken")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skips = gaussian_run(ReFL(), reward=bad(), stop_on=())
    broken = dict(eval_every=1, evaluate=fails)
    return dict(
        skips=skips,
        stops=said_by(FloatingPointError, gaussian_run, ReFL(), reward=bad()),
        odd=said_by(ValueError, gaussian_run, ReFL(), batch_size=7),
        shared=said_by(ValueError, gaussian_run, ReFL(), **broken),
    )


def told(processes, folder) -> dict:
    "A signal that reaches the second process only, in its third update"
    settings = dict(updates=5, save_every=100, ema=0.5)
    whole = gaussian_run(VGGFlow(), out=folder / "told-uncut", **settings)
    method = VGGFlow()
    own = method.prepare
    calls = []

    def prepare(*args):
        calls.append(1)
        if len(calls) == 3 and processes.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return own(*args)

    method.prepare = prepare
    code = None
    cut = folder / "told-cut"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gaussian_run(method, out=cut, **settings)
        except SystemExit as end:
            code = end.code
    kept = sorted(int(p.name) for p in (cut / "checkpoints").glob("[0-9]*"))
    processes.accelerator.wait_for_everyone()  # before the first one goes on
    again = gaussian_run(VGGFlow(), out=cut, **settings)
    return dict(code=code, kept=kept, whole=whole, again=again)


def noise(processes) -> dict:
    "The rows of every process: noise, what a method draws, and torch's own numbers"
    flow = GaussianFlow([0.0, 0.0], 1.0)
    config = FinetuneConfig(batch_size=8)
    samples = draw_samples(flow, config, list("abcde"), processes=processes)
    gather = processes.gather
    return dict(
        x0=gather(samples.x0),
        normal=gather(samples.normal(3, 2)),
        uniform=gather(samples.uniform(4)),
        cond=samples.cond,
        torch=gather(torch.rand(4)),
    )


def drawing(processes, pipeline, sharded=False) -> dict:
    """Images that two processes draw together, and what one draws alone: five, and seven,
    of which the last batch is smaller"""
    flow = tiny_flow(pipeline, guidance_scale=3.0)
    alone = {n: draw(flow, PROMPTS, n, 3, batch_size=3)[0] for n in (5, 7)}
    if sharded:
        shard(flow, processes)
    found = {}
    for n in (5, 7):
        images = draw(flow, PROMPTS, n, 3, batch_size=3, processes=processes)[0]
        if processes.main:
            found[n] = (images - alone[n]).abs().max().item()
        else:
            found[n] = images is None
    return found


def judged(processes, pipeline) -> dict:
    "An evaluation that all call and the first judges; a fault of the judge is everybody's"
    flow = tiny_flow(pipeline)
    said = []
    features = dict(perceptual=lambda x: x.flatten(1)) if processes.main else {}

    def judge(x, prompts):
        said.append(len(x))
        return pale(x)

    def broken(*args):
        raise ValueError("the judge is ill")

    together = dict(batch_size=5, cache=False, processes=processes)
    evaluator = Evaluator(flow, judge, PROMPTS, 4, 3, features=features, **together)
    config = FinetuneConfig(updates=1, batch_size=4, steps=3, eval_every=1)
    call = dict(evaluate=evaluator, prompts=PROMPTS, progress=False)
    history = finetune(flow, pale, ReFL(), config, **call)
    evaluator.reward = broken
    error = said_by(ValueError, finetune, flow, pale, ReFL(), config, **call)
    return dict(evals=history.evals, said=[*said, error])


def encoded(processes, pipeline) -> dict:
    "What this process encodes of the prompts of a run, and what it then knows"
    flow, alone = tiny_flow(pipeline), tiny_flow(pipeline)
    own, asked = flow.encode_prompts, []
    flow.encode_prompts = lambda prompts: asked.extend(prompts) or own(prompts)
    flow.remember(PROMPTS, processes.share)
    flow.drop_text_encoders()
    alone.remember(PROMPTS)
    pairs = zip(flow.encode(PROMPTS), alone.encode(PROMPTS))
    return dict(asked=asked, same=all(torch.equal(*pair) for pair in pairs))


def placed(processes, folder) -> dict:
    "Text encoders of a model that a run or an evaluation loads, and what it then knows"
    world = get_world("sd3")
    words = dict(lora_rank=2, embeddings=str(folder / "words"))
    place = words | world.place(processes)
    flow = world.build(f"{__file__}:pale", PROMPTS, model=folder / "whole", **place).flow
    there = [encoder is not None for encoder in flow.encoders()]
    flow.remember(PROMPTS, processes.share)
    kept = {name: parts[0].clone() for name, parts in flow._cache.items()}
    flow._cache.clear()  # what is on the disk is found without an encoder
    same = all(torch.equal(flow.encode([name])[0][0], kept[name]) for name in kept)
    return dict(there=there, recipe=flow.recipe, same=same and len(kept) == 4)


def evaluated(folder, out) -> int:
    "`vggflow evaluate`: seven images of three prompts in batches of two"
    words = "--images-per-prompt 7 --steps 2 --batch-size 2 --no-floor --perceptual none"
    return cli.main(
        [
            "evaluate",
            *("--model", str(folder / "tiny")),
            *("--reward", f"{__file__}:pale"),
            *("--prompts", *PROMPTS),
            *f"{words} --clip none --quiet".split(),
            *("--out", str(folder / out)),
        ]
    )


def one(folder):
    "What one process alone finds"
    found = dict(
        number=Processes(launched()).number,
        both=same_on_both(folder),
        wrong={name: gaussian_run(make()) for name, make in FAULTS.items()},
        evaluated=evaluated(folder, "judged-1"),
    )
    torch.save(found, folder / "one.pt")


def two(folder):
    "What each of two finds"
    processes = Processes(launched())
    parts = dict(micro_batch=3, forward_batch=3)
    found = dict(
        number=processes.number,
        both=same_on_both(folder),
        wrong={name: gaussian_run(make()) for name, make in FAULTS.items()},
        micro={name: gaussian_run(m(), **parts) for name, m in EVERY_METHOD.items()},
        interrupted=interrupted(folder),
        faults=faults(processes),
        told=told(processes, folder),
        noise=noise(processes),
        drawing=drawing(processes, loaded(folder)),
        judged=judged(processes, loaded(folder)),
        encoded=encoded(processes, loaded(folder, t5=True)),
        placed=placed(processes, folder),
        evaluated=evaluated(folder, "judged-2"),
        card=train.main([str(folder / "card.json"), "--out", str(folder / "card2")]),
    )
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # what configs/accelerate/fsdp2.yaml sets
    found.update(sharded_runs(processes, loaded(folder)))
    torch.save(found, folder / f"{processes.rank}.pt")


def sharded_runs(processes, pipeline) -> dict:
    "What the frozen transformer gives, spread over both"
    drawn = drawing(processes, pipeline, sharded=True)
    modes = dict(FIVE, carried=lambda: VGGFlow(mode="trajectory", mu=1.0))
    runs = {n: tiny_run(m(), pipeline, guidance_scale=3.0) for n, m in modes.items()}
    for name, options in OPTIONS.items():
        method = VGGFlow(clip=0.7)
        runs[name] = tiny_run(method, pipeline, options=options, guidance_scale=3.0)
    return {"sharded drawing": drawn, "sharded": runs}


def forked(fn, folder, **environment) -> int:
    "The id of a new process that calls `fn(folder)`"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        fn(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_two(fn, folder, **environment) -> tuple:
    "The ids of two processes that call `fn(folder)`, and what connects them"
    # the store stands here, so that no one else can take the port
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    world = dict(
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        **environment,
    )
    ranks = [dict(RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    return {forked(fn, folder, **world, **rank) for rank in ranks}, store


def status_of_all(pids: set) -> int:
    "0 where all processes end well; 1, and their end, where one does not"
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status:
            for other in pids:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def main(folder) -> int:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()  # what goes wrong is to be seen
    of_transformers.disable_progress_bar()
    torch.set_num_threads(1)
    make_tiny_sd3(folder / "tiny", t5=False)
    make_tiny_sd3(folder / "whole")
    for kind, (_, make) in OTHER_PIPELINES.items():
        make(folder / kind)
    pids, _store = start_two(two, folder)
    return status_of_all({forked(one, folder), *pids})
