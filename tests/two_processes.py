"""The checks of a world of two processes: `python two_processes.py FOLDER` does them in two processes, connected by gloo, and in one alone.
All three are forks of one that has done the slow thing, importing torch and diffusers"""
import copy, os, signal, sys, traceback, warnings
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parent))
from tiny_sd3 import make_tiny_sd3
from torch.distributed.tensor import DTensor
from vggflow import cli, train
from vggflow.judging.evaluation import Evaluator, draw
from vggflow.training.loop import FinetuneConfig, Processes, draw_batch, finetune, launched, shard, wants_shards
from vggflow.theory.flow import GaussianFlow
from vggflow.methods.methods import AdjointMatching, DRaFT, ReFL, VGGFlow, VGGFlowPMP

PROMPTS = ['a cat','a red dog','two fish']
ANALYTIC = dict(vgg=lambda: VGGFlow(beta=2., eta=lambda t: t/2, clip=.7), carried=lambda: VGGFlow(mode='trajectory', mu=.9, clip=.7), jittered=lambda: VGGFlow(mode='exact-jittered'),
                pmp=lambda: VGGFlowPMP(clip=.7), am=lambda: AdjointMatching(clip=.7), draft=lambda: DRaFT(k=2, lv=2), checkpointed=lambda: DRaFT(checkpointed=True), refl=ReFL)
OPTIONS = dict(checkpointed=dict(gradient_checkpointing=True, decode_checkpointing=True), adapter=dict(correction='adapter'), both=dict(correction='adapter', gradient_checkpointing=True))
FIVE = dict(vgg=lambda: VGGFlow(clip=.7), pmp=VGGFlowPMP, am=AdjointMatching, draft=lambda: DRaFT(k=2), refl=ReFL)


def wave(x, prompts=None): return torch.sin(x).sum(-1)
def pale(images, prompts=None): return 300*images.mean((1,2,3))


def result(flow, h): return dict(rows=[{k:v for k,v in r.items() if k!='seconds'} for r in h.rows], evals=h.evals, state={k:v.clone() for k,v in flow.trainable_state().items()})


def smooth(m):
    "AdamW with a large ε, for which a step is proportional to the gradient: with the usual one the sign of a gradient that is only rounding makes a whole step"
    m.parameter_groups = lambda flow,lr: [dict(g, eps=1.) for g in type(m).parameter_groups(m, flow, lr)]
    return m


def gaussian(method, **kw):
    torch.manual_seed(0); flow = GaussianFlow([.3,-.2], .6).double(); torch.nn.init.normal_(flow.residual.net[-1].weight, std=.3)
    extra = {k:kw.pop(k) for k in ('out','stop_on','reward','evaluate') if k in kw}
    h = finetune(flow, extra.pop('reward', wave), smooth(method), FinetuneConfig(**{**dict(updates=3, batch_size=8, steps=8, transitions=4, lr=.1), **kw}), progress=False, **extra)
    return result(flow, h)


def tiny(method, pipe, guidance_scale=1., out=None, options=None, **kw):
    from vggflow.worlds.sd3 import SD3Flow
    torch.manual_seed(0); flow = SD3Flow(copy.deepcopy(pipe), lora_rank=2, guidance_scale=guidance_scale, **(options or {}))
    h = finetune(flow, pale, smooth(method), FinetuneConfig(**{**dict(updates=2, batch_size=4, steps=3, transitions=2, lr=.01), **kw}), out=out, prompts=PROMPTS, progress=False)
    assert wants_shards() == any(isinstance(p, DTensor) for p in flow.transformer.parameters()) and not any(isinstance(p, DTensor) for p in flow.trainable_parameters())
    return result(flow, h)


def loaded(folder, t5=False):
    "The tiny pipeline, read from disk, with all its text encoders or without T5"
    from vggflow.worlds.sd3 import StableDiffusion3Pipeline, quietly
    with quietly(): return StableDiffusion3Pipeline.from_pretrained(folder/('whole' if t5 else 'tiny'), **({} if t5 else dict(text_encoder_3=None, tokenizer_3=None)))


def both(folder)->dict:
    "What must not depend on the number of processes"
    pipes = dict(tiny=loaded(folder), whole=loaded(folder, t5=True))
    out = {f'gaussian {n}': gaussian(m()) for n,m in ANALYTIC.items()}
    out['ema'] = gaussian(VGGFlow(), ema=.8, eval_every=2, evaluate=lambda f,u: dict(w=f.residual.net[-1].weight.sum().item()))
    for k,pipe in pipes.items():
        for w in (1.,3.): out.update({f'{k} {n} {w}': tiny(m(), pipe, w) for n,m in FIVE.items()})
    out.update({f'tiny {n}': tiny(VGGFlow(clip=.7), pipes['tiny'], 3., options=o) for n,o in OPTIONS.items()})
    return out


def killed(method, at=4):
    "The method, killed in an update"
    own,calls = method.prepare,[]
    def prepare(*args):
        calls.append(1)
        if len(calls)==at: raise InterruptedError
        return own(*args)
    method.prepare = prepare; return method


def interrupted(folder:Path)->dict:
    "Runs, and the same runs killed in their fourth update and called again: with dropout, so that torch's own random numbers count; T5 and guidance are there in every second"
    res = {}
    for i,(n,make) in enumerate(FIVE.items()):
        pipe = loaded(folder, t5=i%2==1); kw = dict(guidance_scale=2. if i%2==0 else 1., options=dict(lora_dropout=.3), updates=5, save_every=2, ema=.5)
        whole = tiny(make(), pipe, out=folder/f'uncut-{n}', **kw)
        try: tiny(killed(make()), pipe, out=folder/f'cut-{n}', **kw)
        except InterruptedError: res[n] = dict(whole=whole, again=tiny(make(), pipe, out=folder/f'cut-{n}', **kw))
    return res


def faults(ps)->dict:
    "A reward that fails on the second process only"
    def bad(x, prompts=None):
        bad.n += 1
        return wave(x)*(float('nan') if ps.rank==1 and bad.n==2 else 1.)
    said = {}
    bad.n = 0
    try: gaussian(ReFL(), reward=bad)
    except FloatingPointError as e: said['stops'] = str(e)
    bad.n = 0
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); said['skips'] = gaussian(ReFL(), reward=bad, stop_on=())
    try: gaussian(ReFL(), batch_size=7)
    except ValueError as e: said['odd'] = str(e)
    def fails(flow, update): raise ValueError('the evaluation is broken')
    try: gaussian(ReFL(), eval_every=1, evaluate=fails)   # raised by the first process
    except ValueError as e: said['shared'] = str(e)
    return said


def told(ps, folder)->dict:
    "A signal that reaches the second process only, in its third update"
    kw = dict(updates=5, save_every=100, ema=.5); whole = gaussian(VGGFlow(), out=folder/'told-uncut', **kw); m,calls = VGGFlow(),[]
    own = m.prepare
    def prepare(*args):
        calls.append(1)
        if len(calls)==3 and ps.rank==1: signal.raise_signal(signal.SIGTERM)
        return own(*args)
    m.prepare,code = prepare,None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: gaussian(m, out=folder/'told-cut', **kw)
        except SystemExit as e: code = e.code
    kept = sorted(int(p.name) for p in (folder/'told-cut/checkpoints').glob('[0-9]*')); ps.acc.wait_for_everyone()   # before the first one goes on
    return dict(code=code, kept=kept, whole=whole, again=gaussian(VGGFlow(), out=folder/'told-cut', **kw))


def noise(ps)->dict:
    "The rows of every process"
    g = torch.Generator().manual_seed(0); flow = GaussianFlow([0.,0.], 1.)
    b = draw_batch(flow, FinetuneConfig(batch_size=8), ['a','b','c','d','e'], g, ps)
    am = AdjointMatching().sampler(flow, b)[1]
    return dict(x0=ps.gather(b.x0), am=ps.gather(am), cond=b.cond, torch=ps.gather(torch.rand(4)))


def drawing(ps, pipe, sharded=False)->dict:
    "Images that two processes draw together, and what one draws alone; five batches of three, and seven of which the last is smaller"
    from vggflow.worlds.sd3 import SD3Flow
    torch.manual_seed(0); flow = SD3Flow(copy.deepcopy(pipe), lora_rank=2, guidance_scale=3.); res = {}
    alone = {n: draw(flow, PROMPTS, n, 3, batch_size=3)[0] for n in (5,7)}
    if sharded: shard(flow, ps.acc)
    for n in (5,7):
        images = draw(flow, PROMPTS, n, 3, batch_size=3, among=ps)[0]
        res[n] = (images is None) if not ps.main else (images-alone[n]).abs().max().item()
    return res


def judged(ps, pipe)->dict:
    "An evaluation that all call and the first one judges; a fault of the judge is everybody's"
    from vggflow.worlds.sd3 import SD3Flow
    torch.manual_seed(0); flow = SD3Flow(copy.deepcopy(pipe), lora_rank=2); said = []
    first = dict(perceptual=lambda x: x.flatten(1)) if ps.main else {}
    def judge(x, p): said.append(len(x)); return pale(x)
    e = Evaluator(flow, judge, PROMPTS, 4, 3, batch_size=5, features=first, cache=False, among=ps)
    h = finetune(flow, pale, ReFL(), FinetuneConfig(updates=1, batch_size=4, steps=3, eval_every=1), evaluate=e, prompts=PROMPTS, progress=False)
    def broken(*args): raise ValueError('the judge is ill')
    e.reward = broken
    try: finetune(flow, pale, ReFL(), FinetuneConfig(updates=1, batch_size=4, steps=3, eval_every=1), evaluate=e, prompts=PROMPTS, progress=False)
    except ValueError as error: said.append(str(error))
    return dict(evals=h.evals, said=said)


def evaluated(folder, out)->int:
    "`vggflow evaluate`: seven images of three prompts in batches of two"
    return cli.main(['evaluate', '--model', str(folder/'tiny'), '--reward', f'{__file__}:pale', '--prompts', *PROMPTS, '--images-per-prompt', '7', '--steps', '2', '--batch-size', '2', '--no-floor',
                     '--perceptual', 'none', '--clip', 'none', '--quiet', '--out', str(folder/out)])


def one(folder):
    "What one process alone finds"
    torch.save(dict(n=Processes(launched()).n, both=both(folder), evaluated=evaluated(folder, 'judged-1')), folder/'one.pt')


def two(folder):
    "What each of two finds"
    ps = Processes(launched())
    out = dict(n=ps.n, both=both(folder), micro={n: gaussian(m(), micro_batch=3, forward_batch=3) for n,m in ANALYTIC.items()},
               interrupted=interrupted(folder), faults=faults(ps), told=told(ps, folder), noise=noise(ps))
    out['drawing'],out['judged'] = drawing(ps, loaded(folder)),judged(ps, loaded(folder))
    out['evaluated'] = evaluated(folder, 'judged-2')
    out['card'] = train.main([str(folder/'card.json'), '--out', str(folder/'card2')])
    os.environ['ACCELERATE_USE_FSDP'] = 'true'   # what configs/accelerate/fsdp2.yaml sets
    pipe = loaded(folder); out['sharded drawing'] = drawing(ps, pipe, sharded=True); modes = dict(FIVE, carried=lambda: VGGFlow(mode='trajectory', mu=1.))
    out['sharded'] = {n: tiny(m(), pipe, 3.) for n,m in modes.items()} | {n: tiny(VGGFlow(clip=.7), pipe, 3., options=o) for n,o in OPTIONS.items()}
    torch.save(out, folder/f'{ps.rank}.pt')


def forked(fn, folder, **env)->int:
    "The id of a new process that calls `fn(folder)`"
    pid = os.fork()
    if pid: return pid
    code = 1
    try: os.environ.update(env); fn(folder); code = 0
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def main(folder):
    torch.set_num_threads(1); make_tiny_sd3(folder/'tiny', t5=False); make_tiny_sd3(folder/'whole')
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)   # here, so that no one else can take the port
    world = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True',
                 TORCHELASTIC_RESTART_COUNT='0', OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    pids = {forked(two, folder, **world, RANK=str(r), LOCAL_RANK=str(r)) for r in (0,1)} | {forked(one, folder)}
    while pids:
        pid,status = os.wait(); pids.discard(pid)
        if status:
            for p in pids: os.kill(p, signal.SIGKILL)
            return 1
    return 0


if __name__=='__main__': sys.exit(main(Path(sys.argv[1])))
