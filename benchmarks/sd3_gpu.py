"""Time, memory, passes and operations of one update of each method on Stable Diffusion 3.

    python benchmarks/sd3_gpu.py              # a GPU: SD3-medium at 512 and 1024
    python benchmarks/sd3_gpu.py --size small # the same code, in seconds on a CPU
    python benchmarks/sd3_gpu.py --size medium --count   # operations, on no device at all

Beside the methods stands a loop with the passes of the public preview
(vggflow.methods.cost.reference_update). Every ratio is to that loop, measured in the same
run. Weights are random and prompts' embeddings too: costs do not depend on them, and
nothing is downloaded.
"""

import argparse
import csv
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from torch.nn.functional import interpolate

from vggflow import __version__
from vggflow.common.torchvision_cpu import cure
from vggflow.methods.cost import (
    flops,
    one_update,
    reference_update,
    sampling,
    take_gradients,
    update_passes,
)
from vggflow.methods.method import Samples
from vggflow.methods.registry import make_method
from vggflow.theory.flow import time_grid
from vggflow.worlds.sd3 import SD3Flow

cure()

# --- Sizes: `medium` is stable-diffusion-3-medium and the ViT-H/14 of PickScore and HPSv2;
# the parts of `small` have like shares of the operations as those of `medium` at 512

SMALL = dict(
    transformer=dict(
        num_layers=12,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=96,
    ),
    vae=dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=8),
    tokens=77,
    vision=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
    text=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    projection_dim=32,
)
MEDIUM = dict(
    transformer=dict(
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    ),
    vae=dict(block_out_channels=(128, 256, 512, 512), norm_num_groups=32),
    tokens=333,
    vision=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    text=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
    projection_dim=1024,
)
SIZES = dict(small=SMALL, medium=MEDIUM)

# Dense bfloat16, operations a second, from vendors' data sheets
PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}

REFERENCE = "reference structure"
RECIPES = {  # Name in the table -> method and options
    "VGG-Flow": ("VGG-Flow", dict(beta=5e4, clip=0.8)),
    "VGG-Flow, reuse": ("VGG-Flow", dict(beta=5e4, clip=0.8, reuse=True)),
    "VGG-Flow, no correction": ("VGG-Flow", dict(beta=5e4, clip=0.8, correction=False)),
    "VGG-Flow-PMP": ("VGG-Flow-PMP", dict(beta=5e4)),
    "AM": ("AM", dict(beta=5e3)),
    "DRaFT": ("DRaFT", {}),
    "ReFL": ("ReFL", {}),
}


def fresh_method(name, checkpointed):
    "A method of the table"
    method, options = RECIPES[name]
    more = dict(checkpointed=checkpointed) if method == "DRaFT" else {}
    return make_method(method, **options, **more)


# --- Random weights


class RandomPrompts(SD3Flow):
    "An `SD3Flow` whose prompts have random embeddings: no text encoder is needed"

    def set_tokens(self, tokens):
        self.__dict__["tokens"] = tokens
        return self

    def encode(self, prompts):
        config = self.transformer.config
        generator = torch.Generator().manual_seed(0)

        def make(*shape):
            numbers = torch.randn(*shape, generator=generator)
            return numbers.to(self.device, self.transformer.dtype)

        embeddings = make(1, self.tokens, config.joint_attention_dim)
        pooled = make(1, config.pooled_projection_dim)
        n = len(prompts)
        return embeddings.expand(n, -1, -1), pooled.expand(n, -1)


def make_transformer(size, resolution):
    "A transformer with random weights"
    latents = dict(sample_size=resolution // 8, in_channels=16, out_channels=16)
    shape = SIZES[size]["transformer"]
    return diffusers.SD3Transformer2DModel(patch_size=2, **latents, **shape)


def make_decoder(size, resolution):
    "An autoencoder with random weights"
    shape = SIZES[size]["vae"]
    n = len(shape["block_out_channels"])
    return diffusers.AutoencoderKL(
        latent_channels=16,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=resolution,
        **shape,
    )


def make_pipeline(size, resolution, device, dtype):
    "A pipeline without text encoders, made on `device`"
    with torch.device(device):
        transformer = make_transformer(size, resolution).to(dtype)
        vae = make_decoder(size, resolution).to(dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kinds = [
        f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")
    ]
    none = dict.fromkeys(kinds)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, **none)


class RandomClipScore(torch.nn.Module):
    "Cosine of image features with a fixed direction: a CLIP reward as far as cost goes"

    def __init__(self, size, device, dtype):
        super().__init__()
        shape = SIZES[size]
        config = transformers.CLIPConfig(
            text_config=shape["text"],
            vision_config=shape["vision"],
            projection_dim=shape["projection_dim"],
        )
        with torch.device(device):
            self.clip = transformers.CLIPModel(config).to(dtype)
        self.clip.requires_grad_(False).eval()

    def forward(self, images, prompts=None):
        side = self.clip.config.vision_config.image_size
        pixels = interpolate(images, size=side, mode="bicubic", antialias=True)
        return self.clip.get_image_features(pixel_values=pixels).pooler_output.mean(1)


def build(args, resolution, device, dtype):
    "(flow, reward) with random weights"
    torch.manual_seed(0)
    pipeline = make_pipeline(args.size, resolution, device, dtype)
    own = dict(lora_rank=args.lora_rank, guidance_scale=args.guidance)
    flow = RandomPrompts(pipeline, **own).set_tokens(SIZES[args.size]["tokens"])
    if args.checkpointing:
        flow.gradient_checkpointing()
    return flow, RandomClipScore(args.size, device, torch.float32)


# --- One update, looked at in three ways


def make_samples(flow, args, update=0):
    "The samples of an update"
    times = time_grid(args.steps, 3.0).to(flow.device)
    indices = range(args.batch)
    return Samples.draw(
        flow, ["a cat"], times, 0, update, indices, transitions=args.transitions
    )


RESET = Path("/proc/self/clear_refs")  # Linux: 5 sets the highest memory back


def clear(flow):
    "Free what an update leaves, and start to note the highest memory"
    for parameter in flow.trainable_parameters():
        parameter.grad = None
    gc.collect()
    if flow.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        RESET.write_text("5")


def peak_gib(flow):
    "Highest memory since `clear`: of the GPU, or of the whole process"
    if flow.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not RESET.exists():
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    highest = next(line for line in lines if line.startswith("VmHWM"))
    return int(highest.split()[1]) / 2**20


def measure_time(update, flow, reward, args):
    "Median seconds and peak memory (GiB) of `repeats` updates after one to warm up"
    seconds = []
    for i in range(1 + args.repeats):
        clear(flow)
        samples = make_samples(flow, args, i)
        start = time.perf_counter()
        update(flow, reward, samples)
        if flow.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), peak_gib(flow)


def update_of(name, args):
    "The update of a fresh method, with its set-up"
    if name == REFERENCE:
        return reference_update
    method = fresh_method(name, args.checkpointing)
    return lambda flow, reward, samples: one_update(flow, reward, method, samples)


def prepared_update(name, flow, reward, args):
    "The update without its set-up, which a run has once"
    if name == REFERENCE:
        return reference_update
    method = fresh_method(name, args.checkpointing)
    method.setup(flow, reward)
    return lambda flow, reward, samples: take_gradients(flow, reward, method, samples)


def operations(fn):
    "Operations of a call; nan where the plain attention that is counted does not fit"
    try:
        return flops(fn)
    except torch.OutOfMemoryError:
        return float("nan")


def measure_update(name, flow, reward, args):
    "A row: passes for each sample and transition, operations, seconds, memory"
    samples = make_samples(flow, args)
    whole, part = update_passes(flow, reward, update_of(name, args), samples)
    passes = (whole - part).per(args.batch * args.transitions)
    clear(flow)
    base = operations(lambda: sampling(flow, reward, samples))
    update = update_of(name, args)
    total = operations(lambda: update(flow, reward, make_samples(flow, args)))
    clear(flow)
    seconds = memory = float("nan")
    if args.repeats:
        update = prepared_update(name, flow, reward, args)
        seconds, memory = measure_time(update, flow, reward, args)
    return dict(
        method=name,
        **{kind: round(n, 3) for kind, n in passes.items() if kind != "reward"},
        tflop=total / 1e12,
        tflop_sampling=base / 1e12,
        tflop_training=(total - base) / 1e12,
        seconds=seconds,
        peak_gib=memory,
        tflop_per_s=total / 1e12 / seconds,
    )


def add_ratios(rows):
    "Add each row's shares of the reference's, which may have been out of memory"
    reference = next((row for row in rows if row["method"] == REFERENCE), {})
    for row in rows:
        for kind in ("tflop_training", "tflop", "seconds", "peak_gib"):
            row[f"{kind}_ratio"] = row[kind] / reference.get(kind, float("nan"))
    return rows


# --- Operations at full size, on the meta device


def part_operations(args, resolution):
    "Operations for one sample: model forward and backward, correction, decoder and reward"
    flow, reward = build(args, resolution, "meta", torch.bfloat16)
    correction = flow.make_correction()
    x, prompt = flow.prior(1).to("meta"), ["a cat"]
    t, zero = torch.full((1,), 0.5, device="meta"), torch.zeros_like(x)
    y = x.clone().requires_grad_()

    def seen(y):
        return reward(flow.decode(y), prompt)

    with torch.no_grad():
        velocity = flops(lambda: flow.velocity(x, t, prompt))
        look = flops(lambda: correction(x, t, prompt, (zero, zero)))
        see = flops(lambda: seen(x))

    def backward(forward, fn, *args):
        return flops(lambda: fn(*args).float().sum().backward()) - forward

    hints = (zero, zero)
    return dict(
        velocity=velocity,
        velocity_backward=backward(velocity, flow.velocity, x, t, prompt),
        base_backward=backward(velocity, flow.base_velocity, y, t, prompt),
        reward=see,
        reward_backward=backward(see, seen, y),
        correction=look,
        correction_backward=backward(look, correction, x, t, prompt, hints),
    )


def at_full_size(args, resolution):
    "Operations of an update of VGG-Flow and of the reference, from parts and passes"
    part, m = part_operations(args, resolution), args.transitions
    rate = part["reward"] + part["reward_backward"]
    sampled = args.steps * part["velocity"] + part["reward"]
    passes = 2 * part["velocity"] + part["velocity_backward"] + part["base_backward"]
    correction = 3 * part["correction"] + 2 * part["correction_backward"]
    ours = m * (passes + 2 * rate + correction)
    reuse = ours - m * rate
    model = 13 * part["velocity"] + 8 * part["velocity_backward"]
    reference = m * (model + 3 * part["base_backward"] + 3 * rate)
    return dict(
        resolution=resolution,
        **{name: count / 1e12 for name, count in part.items()},
        sampling=sampled / 1e12,
        training=ours / 1e12,
        reference_training=reference / 1e12,
        training_ratio=ours / reference,
        update_ratio=(sampled + ours) / (sampled + reference),
        reuse_training_ratio=reuse / reference,
        reuse_update_ratio=(sampled + reuse) / (sampled + reference),
    )


# --- The command


def make_parser():
    "The options"
    gpu = torch.cuda.is_available()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    size_help = "random weights of this size (default: medium with a GPU, else small)"
    size = "medium" if gpu else "small"
    add("--size", choices=SIZES, default=size, help=size_help)
    pixels = "pixels; default 512 1024, small: 64"
    add("--resolution", type=int, nargs="+", default=None, help=pixels)
    add("--batch", type=int, default=1, help="samples")
    add("--transitions", type=int, default=5)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=5.0)
    add("--lora-rank", type=int, default=8)
    add("--repeats", type=int, default=3, help="timed updates; 0 times nothing")
    add("--methods", nargs="+", default=None, help="only these")
    recompute = "recompute activations of the transformer"
    add("--checkpointing", action="store_true", help=recompute)
    add("--device", default="cuda" if gpu else "cpu")
    kinds, kind = ("bfloat16", "float32"), "bfloat16" if gpu else "float32"
    add("--dtype", choices=kinds, default=kind, help="of the model; the reward is float32")
    count = "only count operations at this size, on no device"
    add("--count", action="store_true", help=count)
    add("--out", default="data/results", help="folder of the tables")
    return parser


def read_arguments():
    "The options as they were given, checked"
    parser = make_parser()
    args = parser.parse_args()
    args.resolution = args.resolution or ([64] if args.size == "small" else [512, 1024])
    bad = [side for side in args.resolution if side % 16]
    if bad:
        parser.error(f"--resolution {bad[0]} is not a multiple of 16")
    unknown = [name for name in args.methods or () if name not in RECIPES]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}: use one of {list(RECIPES)}")
    return args


def device_name(args):
    "What the numbers were measured on"
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}"


def report_row(row):
    "Print a row while the next one is measured"
    print(
        f"{row['resolution']}  {row['method']:24s} {row['seconds']:.3g} s  "
        f"{row['tflop']:.4g} TFLOP  {row['peak_gib']:.3g} GiB  "
        f"forward {row['forward']:g}  backward {row['backward']:g}  "
        f"reward gradients {row['reward_backward']:g}",
        flush=True,
    )


def measure_resolution(args, resolution, before):
    "Rows of all methods; they are kept beside the rows `before` as they come"
    name = device_name(args)
    peak = next((rate for card, rate in PEAK.items() if card in name), float("nan"))
    flow, reward = build(args, resolution, args.device, getattr(torch, args.dtype))
    rows = []
    for method in (REFERENCE, *(m for m in RECIPES if m in (args.methods or RECIPES))):
        try:
            row = measure_update(method, flow, reward, args)
        except torch.OutOfMemoryError:
            print(f"{method} at {resolution}: out of memory, left out", flush=True)
            clear(flow)
            continue
        share = row["tflop_per_s"] * 1e12 / peak
        rows.append(dict(resolution=resolution, **row, share_of_peak=share))
        report_row(rows[-1])
        save(args, before + add_ratios(rows), "cost")
    return rows


def measure(args):
    "Rows of all methods at all resolutions"
    rows = []
    for resolution in args.resolution:
        rows += measure_resolution(args, resolution, rows)
        gc.collect()
    return rows


def save(args, rows, kind):
    "Write the table and its record, which names device, versions and settings"
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    device = "" if args.count else "-" + torch.device(args.device).type
    file = folder / f"sd3-{kind}-{args.size}{device}.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: as_cell(value) for name, value in row.items()} for row in rows
        )
    record = dict(
        device="none: counted on the meta device" if args.count else device_name(args),
        settings={k: v for k, v in vars(args).items() if k not in ("out", "count")},
        versions=dict(
            vggflow=__version__,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
            transformers=transformers.__version__,
            python=platform.python_version(),
        ),
    )
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return file


def as_cell(value):
    "A number with six digits"
    return f"{value:.6g}" if isinstance(value, float) else value


def print_operations(row):
    "What was counted at full size"
    print(
        f"{row['resolution']}: training {row['training']:.4g} TFLOP, "
        f"{row['training_ratio']:.3f} of the reference structure; "
        f"update with sampling {row['update_ratio']:.3f}; "
        f"with reuse {row['reuse_training_ratio']:.3f} "
        f"and {row['reuse_update_ratio']:.3f}"
    )


def print_ratios(row):
    "What was measured, beside the reference"
    print(
        f"{row['resolution']}  {row['method']:24s} of the reference: "
        f"training operations {row['tflop_training_ratio']:.3f}, "
        f"all operations {row['tflop_ratio']:.3f}, "
        f"seconds {row['seconds_ratio']:.3f}"
    )


def main():
    args = read_arguments()
    if args.count:
        rows = [at_full_size(args, resolution) for resolution in args.resolution]
    else:
        rows = measure(args)
    if not rows:
        sys.exit(
            "nothing fitted the memory: lower --batch, --transitions or --resolution, "
            "or pass --checkpointing"
        )
    for row in rows:
        (print_operations if args.count else print_ratios)(row)
    print(save(args, rows, "operations" if args.count else "cost"))


if __name__ == "__main__":
    sys.exit(main())
