"""Updates, rewards and features on a device that is not there: `python fake_gpu.py` prints one line for each, and ends with 1 where a tensor is on the wrong device or the one that is misplaced on purpose goes unnoticed.
Fake tensors have shapes, dtypes and a device and no numbers: an operation on tensors of two devices fails as on a GPU. Every number that is read from one is 1"""
import os, sys, tempfile, traceback
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent)); os.environ['HF_HUB_OFFLINE'] = '1'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

class Module:
    "What torch asks of a device's module"
    @staticmethod
    def is_available(): return True
    is_initialized = is_available
    @staticmethod
    def current_device(): return 0
    @staticmethod
    def device_count(): return 1
    @staticmethod
    def _is_in_bad_fork(): return False
    @staticmethod
    def manual_seed_all(seed): pass
    @staticmethod
    def get_rng_state(device=0): return None
    @staticmethod
    def set_rng_state(state, device=0): pass
    @staticmethod
    def get_amp_supported_dtype(): return [torch.bfloat16, torch.float16]

_setup_privateuseone_for_python_backend('gpu', backend_module=Module)
import test_rewards
from tiny_sd3 import make_tiny_sd3
from vggflow.worlds import emoji; from vggflow.judging import metrics, rewards
from vggflow.judging.evaluation import draw
from vggflow.training.loop import FinetuneConfig, finetune
from vggflow.methods.methods import AdjointMatching, DRaFT, ReFL, VGGFlow, VGGFlowPMP
from vggflow.worlds.sd3 import SD3Flow

aten = torch.ops.aten

class Fake(FakeTensorMode):
    "Fake tensors that answer where numbers are asked for"
    avoid_device_init = True   # there is no device
    def dispatch(self, func, types, args=(), kwargs=None):
        if func in (aten.allclose.default, aten.equal.default):
            if args[0].device!=args[1].device: raise RuntimeError(f'{func} of tensors on {args[0].device} and {args[1].device}')
            return func is aten.allclose.default
        if func is aten._local_scalar_dense.default: return True if args[0].dtype is torch.bool else 1. if args[0].dtype.is_floating_point else 1
        return super().dispatch(func, types, args, kwargs or {})

def _apply(self, fn, recurse=True):
    "nn.Module._apply by new parameters: those that are fake cannot be swapped in place"
    for m in self.children(): m._apply(fn)
    with torch.no_grad(): new = {k: fn(p) for k,p in self._parameters.items() if p is not None}
    self._parameters.update({k: torch.nn.Parameter(v.detach(), self._parameters[k].requires_grad) for k,v in new.items() if v is not self._parameters[k]})
    self._buffers.update({k: fn(b) for k,b in self._buffers.items() if b is not None})
    return self

def _copy(self, memo):
    "A deep copy by an operation: the storage of a fake tensor cannot be copied"
    if id(self) not in memo:
        with torch.no_grad(): c = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(c, self.requires_grad) if isinstance(self, torch.nn.Parameter) else c
    return memo[id(self)]

def prepare():
    torch.nn.Module._apply = _apply; torch.Tensor.__deepcopy__ = torch.nn.Parameter.__deepcopy__ = _copy
    SD3Flow.fingerprint = lambda self: {}   # a checksum of numbers

def attempt(name, fn)->bool:
    "Call `fn`; say how it went"
    try: fn(); print('ok', name, flush=True); return True
    except Exception as e:
        place = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__) if f'{os.sep}vggflow{os.sep}' in f.filename]
        print('FAILED', name, place[-4:], f'{type(e).__name__}: {str(e)[:300]}', flush=True); return False

def bright(images, prompts=None):
    assert images.device.type=='gpu', f'images on {images.device}'
    return images.float().mean((1, 2, 3))

def make_flow(options, **kw):
    "A tiny pipeline in bfloat16 on the device"
    flow = SD3Flow(make_tiny_sd3(None, **kw).to('gpu', torch.bfloat16), lora_rank=4, guidance_scale=3., **{k:v for k,v in options.items() if k!='checkpointing'})
    if 'checkpointing' in options: flow.gradient_checkpointing()
    return flow

def updates()->list:
    "An update of each method through the loop, with the options of memory, and an evaluation's images"
    every = (VGGFlow(beta=2., clip=.8), VGGFlow(reuse=True), VGGFlow(mode='finite-difference'), VGGFlow(mode='trajectory', mu=.5), VGGFlow(correction=False), VGGFlowPMP(), AdjointMatching(), DRaFT(k=2, checkpointed=True), ReFL())
    frugal = dict(checkpointing=True, decode_checkpointing=True, cfg_batched=False),dict(micro_batch=1, forward_batch=2, optimizer='adamw-fused')
    done = []
    for options,config,methods in (({}, {}, every), (*frugal, every[::3]), (dict(correction='adapter'), dict(ema=.9, schedule='cosine'), every[:1])):
        for m in methods:
            c = FinetuneConfig(updates=1, batch_size=2, steps=3, transitions=2, eval_every=0, **config)
            name = f"{type(m).__name__} {getattr(m, 'mode', '')} {options} {config}"
            done.append(attempt(name, lambda: finetune(make_flow(options, t5=False, sd35='correction' in options), bright, m, c, prompts=['a cat','a dog'], progress=False)))
    return done+[attempt('drawing', lambda: draw(make_flow({}), ['a cat','a dog'], 2, 4, 3.))]

def misplaced(images, prompts=None): return images.float().mean((1, 2, 3))+torch.zeros(len(images))

def on_gpu(mode, module):
    "A module that was loaded, its weights as fake tensors on the device; a tensor that is neither parameter nor buffer stays where it is"
    return module._apply(lambda t: mode.from_tensor(t.detach()).to('gpu'))

def scored(module, *more):
    "Call a reward with gradient, or an extractor without"
    x = torch.rand(2, 3, 32, 32, device='gpu').requires_grad_(bool(more)); y = module(x, *more)
    assert y.device.type=='gpu', f'result on {y.device}'
    if more: y.sum().backward()

def judges()->list:
    "Every reward through its loader, and the feature extractors, in float32"
    class Folders:
        mktemp = staticmethod(lambda name: Path(tempfile.mkdtemp(name)))
    clip,blip = (f._get_wrapped_function()(Folders) for f in (test_rewards.folder, test_rewards.blip))
    found = {n: getattr(rewards, n).from_pretrained(clip) for n in ('PickScoreReward','HPSv2Reward','ClipReward')} | dict(ImageReward=rewards.ImageReward.from_pretrained(blip))
    found |= {n: emoji.load_reward(n) for n in ('emoji-aesthetic','emoji-hps','emoji-pick')}; mode = Fake(allow_non_fake_inputs=True)
    with mode: return [attempt(n, lambda: scored(on_gpu(mode, r), ['a cat','a dog'])) for n,r in found.items()] + [attempt(type(f).__name__, lambda: scored(on_gpu(mode, f))) for f in features]

if __name__=='__main__':
    features = emoji.load_clip(),metrics.EfficientNetFeatures(); prepare()
    with Fake():
        good = updates()
        seen = not attempt('a reward that makes a tensor on the wrong device', lambda: finetune(make_flow({}), misplaced, ReFL(), FinetuneConfig(updates=1, batch_size=2, steps=3, eval_every=0), prompts=['a cat','a dog'], progress=False))
    sys.exit(not all([*good, seen, *judges()]))
