"""Time, memory, passes and operations of one update of each method on Stable Diffusion 3 with random weights.

    python benchmarks/sd3_gpu.py                          # a GPU: SD3-medium at 512 and 1024; no GPU: the small configuration
    python benchmarks/sd3_gpu.py --size small             # the same code on a small transformer, in seconds on a CPU
    python benchmarks/sd3_gpu.py --size medium --count    # operations at full size, on no device at all

Beside the methods stands a loop with the passes of the public preview (vggflow.methods.cost.reference_update). Every ratio is to that loop, measured
in the same run. Weights are random and prompts' embeddings too: costs do not depend on them, and nothing is downloaded.
"""
import argparse, csv, gc, json, platform, statistics, sys, time
from functools import partial
from pathlib import Path
import torch
from torch.nn.functional import interpolate
from vggflow.common.torchvision_cpu import cure; cure()
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPConfig, CLIPModel
from vggflow import __version__
from vggflow.methods.cost import flops, one_update, reference_update, sampling, update_passes
from vggflow.theory.flow import time_grid
from vggflow.methods.methods import AdjointMatching, Batch, DRaFT, ReFL, VGGFlow, VGGFlowPMP
from vggflow.worlds.sd3 import SD3Flow

SIZES = dict(   # transformer, decoder, CLIP; `medium` is stabilityai/stable-diffusion-3-medium and the ViT-H/14 of PickScore and HPSv2
    small=dict(   # a miniature: its parts' shares of the operations are like those of `medium` at 512
        transformer=dict(num_layers=12, attention_head_dim=24, num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=96, pooled_projection_dim=128, pos_embed_max_size=96),
        vae=dict(block_out_channels=(16,32,32,32), norm_num_groups=8), tokens=77,
        vision=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14),
        text=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2), projection_dim=32),
    medium=dict(
        transformer=dict(num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192),
        vae=dict(block_out_channels=(128,256,512,512), norm_num_groups=32), tokens=333,
        vision=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224, patch_size=14),
        text=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16), projection_dim=1024))

PEAK = {'H100':989e12, 'H200':989e12, 'A100':312e12, 'L40S':362e12, 'RTX 4090':165e12}   # dense bfloat16, operations a second, vendors' data sheets

def methods(checkpointed=False):
    "Name -> a fresh method"
    return {'VGG-Flow':VGGFlow(beta=5e4, clip=.8), 'VGG-Flow, reuse':VGGFlow(beta=5e4, clip=.8, reuse=True), 'VGG-Flow, no correction':VGGFlow(beta=5e4, clip=.8, correction=False), 'VGG-Flow-PMP':VGGFlowPMP(beta=5e4),
            'AM':AdjointMatching(beta=5e3), 'DRaFT':DRaFT(checkpointed=checkpointed), 'ReFL':ReFL()}

# --- Random weights

class RandomPrompts(SD3Flow):
    "An `SD3Flow` whose prompts have random embeddings: no text encoder is needed"
    def set_tokens(self, tokens): self.__dict__['tokens'] = tokens; return self
    def encode(self, prompts):
        c,g = self.transformer.config,torch.Generator().manual_seed(0)
        make = lambda *s: torch.randn(*s, generator=g).to(self.device, self.transformer.dtype)
        return make(1, self.tokens, c.joint_attention_dim).expand(len(prompts), -1, -1),make(1, c.pooled_projection_dim).expand(len(prompts), -1)

def make_pipeline(size, resolution, device, dtype):
    "A pipeline without text encoders, made on `device`"
    s = SIZES[size]
    with torch.device(device):
        transformer = SD3Transformer2DModel(sample_size=resolution//8, patch_size=2, in_channels=16, out_channels=16, **s['transformer'])
        n = len(s['vae']['block_out_channels'])
        vae = AutoencoderKL(latent_channels=16, layers_per_block=2, down_block_types=('DownEncoderBlock2D',)*n, up_block_types=('UpDecoderBlock2D',)*n,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=.0609, sample_size=resolution, **s['vae'])
    none = dict.fromkeys(('text_encoder','tokenizer','text_encoder_2','tokenizer_2','text_encoder_3','tokenizer_3'))
    return StableDiffusion3Pipeline(transformer.to(dtype), FlowMatchEulerDiscreteScheduler(shift=3.), vae.to(dtype), **none)

class RandomClipScore(torch.nn.Module):
    "Cosine of image features with a fixed direction: a CLIP reward as far as its cost goes"
    def __init__(self, size, device, dtype):
        super().__init__()
        s = SIZES[size]
        with torch.device(device): self.clip = CLIPModel(CLIPConfig(text_config=s['text'], vision_config=s['vision'], projection_dim=s['projection_dim'])).to(dtype)
        self.clip.requires_grad_(False).eval()
    def forward(self, images, prompts=None):
        pixels = interpolate(images, size=self.clip.config.vision_config.image_size, mode='bicubic', antialias=True)
        return self.clip.get_image_features(pixel_values=pixels).pooler_output.mean(1)

def build(a, resolution, device, dtype):
    "(flow, reward) with random weights"
    torch.manual_seed(0)
    flow = RandomPrompts(make_pipeline(a.size, resolution, device, dtype), lora_rank=a.lora_rank, guidance_scale=a.guidance).set_tokens(SIZES[a.size]['tokens'])
    if a.checkpointing: flow.gradient_checkpointing()
    return flow,RandomClipScore(a.size, device, torch.float32)

# --- One update, looked at in three ways

REFERENCE = 'reference structure'

def make_batch(flow, a, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(flow.prior(a.batch, generator=g), time_grid(a.steps, 3.).to(flow.device), ['a cat']*a.batch, g, a.transitions)

RESET = Path('/proc/self/clear_refs')   # Linux: 5 sets a process's highest memory back to what it has

def clear(flow):
    for p in flow.trainable_parameters(): p.grad = None
    gc.collect()
    if flow.device.type=='cuda': torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    elif RESET.exists(): RESET.write_text('5')

def peak_gib(flow):
    "Highest memory since `clear`: of the GPU, or of the whole process where there is none"
    if flow.device.type=='cuda': return torch.cuda.max_memory_allocated()/2**30
    if not RESET.exists(): return float('nan')
    return next(int(l.split()[1])/2**20 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))

def timed(update, flow, reward, a):
    "Median seconds and peak memory (GiB) of `repeats` updates after one to warm up"
    gpu,seconds = flow.device.type=='cuda',[]
    for i in range(1+a.repeats):
        clear(flow); batch = make_batch(flow, a, i); t0 = time.perf_counter()
        update(flow, reward, batch)
        if gpu: torch.cuda.synchronize()
        seconds.append(time.perf_counter()-t0)
    return statistics.median(seconds[1:]),peak_gib(flow)

def prepared(name, flow, reward, a):
    "The update without its set-up, which a run has once"
    if name==REFERENCE: return reference_update
    m = methods(a.checkpointing)[name]; m.setup(flow, reward)
    return lambda f,r,b: m.loss(f, r, b)[0].backward()

def operations(fn):
    "Operations of a call; nan where the plain attention that is counted does not fit"
    try: return flops(fn)
    except torch.OutOfMemoryError: return float('nan')

def looked_at(name, update, flow, reward, a):
    "A row: passes for each sample and transition, operations, seconds, memory"
    whole,part = update_passes(flow, reward, update(), make_batch(flow, a)); n = a.batch*a.transitions
    clear(flow); base = operations(lambda: sampling(flow, reward, make_batch(flow, a))); ops = operations(lambda: update()(flow, reward, make_batch(flow, a))); clear(flow)
    seconds,memory = timed(prepared(name, flow, reward, a), flow, reward, a) if a.repeats else (float('nan'),)*2
    return dict(method=name, **{k:round(v, 3) for k,v in (whole-part).per(n).items() if k!='reward'}, tflop=ops/1e12, tflop_sampling=base/1e12,
                tflop_training=(ops-base)/1e12, seconds=seconds, peak_gib=memory, tflop_per_s=ops/1e12/seconds)

def updates(a):
    "Name -> a callable that makes a fresh update"
    return {REFERENCE: lambda: reference_update,
            **{k: (lambda k=k: partial(_one, k, a.checkpointing)) for k in methods() if not a.methods or k in a.methods}}

def _one(name, checkpointed, flow, reward, batch): one_update(flow, reward, methods(checkpointed)[name], batch)

def ratios(rows):
    "Add each row's shares of the reference's"
    ref = next((r for r in rows if r['method']==REFERENCE), {})   # it may have been out of memory
    for r in rows: r.update({f'{k}_ratio': r[k]/ref.get(k, float('nan')) for k in ('tflop_training','tflop','seconds','peak_gib')})
    return rows

# --- Operations at full size, on the meta device

def parts(a, resolution):
    "Operations of each part for one sample: model forward and backward, correction, decoder and reward"
    flow,reward = build(a, resolution, 'meta', torch.bfloat16); nu = flow.make_correction()
    x = flow.prior(1).to('meta'); t = torch.full((1,), .5, device='meta'); zero = torch.zeros_like(x); y = x.clone().requires_grad_()
    both = lambda f: lambda: f().float().sum().backward()
    with torch.no_grad():
        fwd = flops(lambda: flow.velocity(x, t, ['a cat'])); see = flops(lambda: reward(flow.decode(x), ['a cat'])); look = flops(lambda: nu(x, t, ['a cat'], (zero, zero)))
    return dict(velocity=fwd, velocity_backward=flops(both(lambda: flow.velocity(x, t, ['a cat'])))-fwd, base_backward=flops(both(lambda: flow.base_velocity(y, t, ['a cat'])))-fwd,
                reward=see, reward_backward=flops(both(lambda: reward(flow.decode(y), ['a cat'])))-see, correction=look, correction_backward=flops(both(lambda: nu(x, t, ['a cat'], (zero, zero))))-look)

def at_full_size(a, resolution):
    "Operations of an update of VGG-Flow and of the reference, from the parts' operations and the passes that `update_passes` counts"
    p,m,N = parts(a, resolution),a.transitions,a.steps; rate = p['reward']+p['reward_backward']
    sampled = N*p['velocity']+p['reward']
    ours = m*(2*p['velocity']+p['velocity_backward']+p['base_backward']+2*rate+3*p['correction']+2*p['correction_backward']); one = ours-m*rate
    ref = m*(13*p['velocity']+8*p['velocity_backward']+3*p['base_backward']+3*rate)
    return dict(resolution=resolution, **{k:v/1e12 for k,v in p.items()}, sampling=sampled/1e12, training=ours/1e12, reference_training=ref/1e12,
                training_ratio=ours/ref, update_ratio=(sampled+ours)/(sampled+ref), reuse_training_ratio=one/ref, reuse_update_ratio=(sampled+one)/(sampled+ref))

# --- The command

def arguments():
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', choices=SIZES, default='medium' if gpu else 'small', help='random weights of this size (default: medium with a GPU, else small)')
    p.add_argument('--resolution', type=int, nargs='+', default=None, help='pixels; default 512 1024, small: 64')
    p.add_argument('--batch', type=int, default=1, help='samples'); p.add_argument('--transitions', type=int, default=5)
    p.add_argument('--steps', type=int, default=20); p.add_argument('--guidance', type=float, default=5.); p.add_argument('--lora-rank', type=int, default=8)
    p.add_argument('--repeats', type=int, default=3, help='timed updates; 0 times nothing'); p.add_argument('--methods', nargs='+', default=None, help='only these')
    p.add_argument('--checkpointing', action='store_true', help='recompute activations of the transformer'); p.add_argument('--device', default='cuda' if gpu else 'cpu')
    p.add_argument('--dtype', choices=('bfloat16','float32'), default='bfloat16' if gpu else 'float32', help='of the model; the reward is float32')
    p.add_argument('--count', action='store_true', help='only count operations at this size, on no device'); p.add_argument('--out', default='data/results', help='folder of the tables')
    a = p.parse_args(); a.resolution = a.resolution or ([64] if a.size=='small' else [512,1024])
    bad = [r for r in a.resolution if r%16]
    if bad: p.error(f'--resolution {bad[0]} is not a multiple of 16')
    unknown = [m for m in a.methods or () if m not in methods()]
    if unknown: p.error(f'unknown method {unknown[0]!r}: use one of {list(methods())}')
    return a

def device_name(a): return torch.cuda.get_device_name() if a.device.startswith('cuda') else f'CPU, {torch.get_num_threads()} thread(s), {platform.machine()}'

def measure(a):
    "Rows of all methods at all resolutions"
    name,rows = device_name(a),[]; peak = next((v for k,v in PEAK.items() if k in name), None); dtype = getattr(torch, a.dtype)
    for resolution in a.resolution:
        flow,reward = build(a, resolution, a.device, dtype); here = []
        for method,update in updates(a).items():
            try: here.append(dict(resolution=resolution, **looked_at(method, update, flow, reward, a)))
            except torch.OutOfMemoryError: print(f'{method} at {resolution}: out of memory, left out', flush=True); clear(flow); continue
            r = here[-1]; r['share_of_peak'] = r['tflop_per_s']*1e12/peak if peak else float('nan')
            print(f"{resolution}  {method:24s} {r['seconds']:.3g} s  {r['tflop']:.4g} TFLOP  {r['peak_gib']:.3g} GiB  forward {r['forward']:g}  backward {r['backward']:g}  reward gradients {r['reward_backward']:g}", flush=True)
            save(a, rows+ratios(here), 'cost')   # what is measured is kept
        rows += here
        del flow,reward; gc.collect()
    return rows

def save(a, rows, kind):
    "Write the table and its record, which names device, versions and settings"
    folder = Path(a.out); folder.mkdir(parents=True, exist_ok=True); file = folder/f"sd3-{kind}-{a.size}{'' if a.count else '-'+torch.device(a.device).type}.csv"
    with file.open('w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n'); w.writeheader(); w.writerows({k:f'{v:.6g}' if isinstance(v, float) else v for k,v in r.items()} for r in rows)
    import diffusers, transformers
    settings = {k:v for k,v in vars(a).items() if k not in ('out','count')}
    file.with_suffix('.json').write_text(json.dumps(dict(device='none: counted on the meta device' if a.count else device_name(a), settings=settings,
        versions=dict(vggflow=__version__, torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__, python=platform.python_version())), indent=1)+'\n')
    return file

def main():
    a = arguments()
    rows = [at_full_size(a, r) for r in a.resolution] if a.count else measure(a)
    if not rows: sys.exit('nothing fitted the memory: lower --batch, --transitions or --resolution, or pass --checkpointing')
    for r in rows:
        if a.count: print(f"{r['resolution']}: training {r['training']:.4g} TFLOP, {r['training_ratio']:.3f} of the reference structure; update with sampling {r['update_ratio']:.3f}; with reuse {r['reuse_training_ratio']:.3f} and {r['reuse_update_ratio']:.3f}")
        else: print(f"{r['resolution']}  {r['method']:24s} of the reference: training operations {r['tflop_training_ratio']:.3f}, all operations {r['tflop_ratio']:.3f}, seconds {r['seconds_ratio']:.3f}")
    print(save(a, rows, 'operations' if a.count else 'cost'))

if __name__=='__main__': sys.exit(main())
