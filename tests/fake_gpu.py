"""Updates, rewards and features on a device that is not there: `python fake_gpu.py`

Prints one line for each, and ends with 1 where a tensor is on the wrong device, or where
the one that is misplaced on purpose goes unnoticed. Fake tensors have shapes, dtypes and a
device and no numbers: an operation on tensors of two devices fails as on a GPU. Every
number that is read from one is 1."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "judging")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.backend_registration import (  # noqa: E402
    _setup_privateuseone_for_python_backend,
)

import vggflow  # noqa: E402, F401  before transformers, for torchvision


class DeviceModule:
    "What torch asks of a device's module"

    @staticmethod
    def is_available():
        return True

    is_initialized = is_available

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_rng_state(device=0):
        return None

    @staticmethod
    def set_rng_state(state, device=0):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("gpu", backend_module=DeviceModule)

import tiny_rewards  # noqa: E402
from tiny_sd3 import make_tiny_sd3  # noqa: E402

from vggflow.judging import clip_rewards  # noqa: E402
from vggflow.judging.evaluation import draw  # noqa: E402
from vggflow.judging.features import EfficientNetFeatures  # noqa: E402
from vggflow.judging.image_reward import ImageReward  # noqa: E402
from vggflow.methods.costate import AdjointMatching, VGGFlowPMP  # noqa: E402
from vggflow.methods.direct import DRaFT, ReFL  # noqa: E402
from vggflow.methods.value_gradient import VGGFlow  # noqa: E402
from vggflow.training.config import FinetuneConfig  # noqa: E402
from vggflow.training.loop import finetune  # noqa: E402
from vggflow.worlds.emoji_networks import load_clip  # noqa: E402
from vggflow.worlds.emoji_rewards import load_reward  # noqa: E402
from vggflow.worlds.sd3 import SD3Flow  # noqa: E402

aten = torch.ops.aten


class Fake(FakeTensorMode):
    "Fake tensors that answer where numbers are asked for"

    avoid_device_init = True  # there is no device

    def dispatch(self, func, types, args=(), kwargs=None):
        if func in (aten.allclose.default, aten.equal.default):
            one, other = args[0].device, args[1].device
            if one != other:
                raise RuntimeError(f"{func} of tensors on {one} and {other}")
            return func is aten.allclose.default
        if func is aten._local_scalar_dense.default:
            return self.number_of(args[0].dtype)
        return super().dispatch(func, types, args, kwargs or {})

    @staticmethod
    def number_of(dtype):
        "1, in the type of the tensor"
        if dtype is torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1


def apply_by_new_parameters(self, fn, recurse=True):
    "nn.Module._apply: parameters that are fake cannot be swapped in place"
    for child in self.children():
        child._apply(fn)
    for name, weight in self._parameters.items():
        if weight is None:
            continue
        with torch.no_grad():
            new = fn(weight)
        if new is not weight:
            grad = weight.requires_grad
            self._parameters[name] = torch.nn.Parameter(new.detach(), grad)
    buffers = {k: fn(b) for k, b in self._buffers.items() if b is not None}
    self._buffers.update(buffers)
    return self


def copy_by_operation(self, memo):
    "A deep copy: the storage of a fake tensor cannot be copied"
    if id(self) not in memo:
        with torch.no_grad():
            copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
    return memo[id(self)]


def prepare():
    "Let modules and flows work with fake tensors"
    torch.nn.Module._apply = apply_by_new_parameters
    torch.Tensor.__deepcopy__ = copy_by_operation
    torch.nn.Parameter.__deepcopy__ = copy_by_operation
    SD3Flow.fingerprint = lambda self: {}  # a checksum of numbers


def attempt(name, fn, *args, **kw) -> bool:
    "Call `fn` and print how it went"
    try:
        fn(*args, **kw)
    except Exception as e:
        ours = f"{os.sep}vggflow{os.sep}"
        frames = traceback.extract_tb(e.__traceback__)
        place = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in frames
            if ours in frame.filename
        ]
        text = f"{type(e).__name__}: {str(e)[:300]}"
        print("FAILED", name, place[-4:], text, flush=True)
        return False
    print("ok", name, flush=True)
    return True


def bright(images, prompts=None):
    "A reward that looks where its images are"
    assert images.device.type == "gpu", f"images on {images.device}"
    return images.float().mean((1, 2, 3))


def misplaced(images, prompts=None):
    "A reward that makes a tensor on the wrong device"
    return images.float().mean((1, 2, 3)) + torch.zeros(len(images))


def make_flow(options, **kw):
    "A tiny pipeline in bfloat16 on the device"
    own = {name: v for name, v in options.items() if name != "checkpointing"}
    pipe = make_tiny_sd3(None, **kw).to("gpu", torch.bfloat16)
    flow = SD3Flow(pipe, lora_rank=4, guidance_scale=3.0, **own)
    if "checkpointing" in options:
        flow.gradient_checkpointing()
    return flow


def one_update(method, reward=bright, options=None, config=None, **kw):
    "An update of a method through the loop"
    how = dict(updates=1, batch_size=2, steps=2, transitions=2, eval_every=0)
    config = FinetuneConfig(**how, **(config or {}))
    flow = make_flow(options or {}, **kw)
    finetune(flow, reward, method, config, prompts=["a cat", "a dog"], progress=False)


def every_method():
    "All methods, and VGG-Flow in its modes"
    return (
        VGGFlow(beta=2.0, clip=0.8),
        VGGFlow(reuse=True),
        VGGFlow(mode="finite-difference"),
        VGGFlow(mode="trajectory", mu=0.5),
        VGGFlow(correction=False),
        VGGFlowPMP(),
        AdjointMatching(),
        DRaFT(k=2, checkpointed=True),
        ReFL(),
    )


FRUGAL = dict(checkpointing=True, decode_checkpointing=True, cfg_batched=False)
PARTS = dict(micro_batch=1, forward_batch=2, optimizer="adamw-fused")
SECOND = dict(correction="adapter")
AVERAGED = dict(ema=0.9, schedule="cosine")


def updates() -> list:
    "An update of each method, with the options of memory, and an evaluation's images"
    methods = every_method()
    plans = [({}, {}, methods), (FRUGAL, PARTS, methods[::6])]
    plans.append((SECOND, AVERAGED, methods[:1]))
    done = []
    for options, config, chosen in plans:
        for method in chosen:
            mode = getattr(method, "mode", "")
            name = f"{type(method).__name__} {mode} {options} {config}"
            kw = dict(options=options, config=config, sd35="correction" in options)
            done.append(attempt(name, one_update, method, t5=False, **kw))
    return done + [attempt("drawing", draw, make_flow({}), ["a cat", "a dog"], 2, 4, 3.0)]


def on_gpu(mode, module):
    "A module's weights as fake tensors on the device; other tensors stay where they are"
    return module._apply(lambda t: mode.from_tensor(t.detach()).to("gpu"))


def scored(mode, module, *more):
    "Call a reward with gradient, or an extractor without"
    module = on_gpu(mode, module)
    x = torch.rand(2, 3, 32, 32, device="gpu").requires_grad_(bool(more))
    y = module(x, *more)
    assert y.device.type == "gpu", f"result on {y.device}"
    if more:
        y.sum().backward()


def rewards_by_name() -> dict:
    "Every reward through its loader"
    clip, blip = (Path(tempfile.mkdtemp()) for _ in range(2))
    tiny_rewards.save_tiny_clip(clip)
    tiny_rewards.save_tiny_blip(blip)
    names = ("PickScoreReward", "HPSv2Reward", "ClipReward")
    found = {name: getattr(clip_rewards, name).from_pretrained(clip) for name in names}
    found["ImageReward"] = ImageReward.from_pretrained(blip)
    for name in ("emoji-aesthetic", "emoji-hps", "emoji-pick"):
        found[name] = load_reward(name)
    return found


def judges(features) -> list:
    "Every reward and the feature extractors, in float32"
    found, mode = rewards_by_name(), Fake(allow_non_fake_inputs=True)
    asked = ["a cat", "a dog"]
    with mode:
        done = [attempt(name, scored, mode, r, asked) for name, r in found.items()]
        return done + [attempt(type(f).__name__, scored, mode, f) for f in features]


if __name__ == "__main__":
    features = load_clip(), EfficientNetFeatures()
    prepare()
    with Fake():
        good = updates()
        what = "a reward that makes a tensor on the wrong device"
        seen = not attempt(what, one_update, ReFL(), misplaced)
    sys.exit(not all([*good, seen, *judges(features)]))
