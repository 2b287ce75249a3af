"The adapter for Stable Diffusion 3, on the emoji pipeline and on a random one with other settings"
import math, pytest, torch
from diffusers import StableDiffusion3Pipeline, SD3Transformer2DModel
import vggflow
from vggflow.emoji import asset, load_flow, load_reward
from vggflow.finetune import FinetuneConfig, finetune
from vggflow.flow import sample, time_grid
from vggflow.methods import VGGFlow
from vggflow.sd3 import SD3Flow, quietly, soft_clamp

COND = ['a cat', 'an owl', 'a fish on a blue background']

@pytest.fixture(scope='module')
def flow(): return load_flow()

@pytest.fixture
def point(flow): return flow.prior(3, generator=torch.Generator().manual_seed(0)), torch.tensor([.1,.5,.9])

def shaken(**kw):
    "A flow whose adapter is not zero"
    f = load_flow(**kw); torch.manual_seed(1)
    for p in f.trainable_parameters(): torch.nn.init.normal_(p, std=.05)
    return f

def test_starts_at_the_base(flow, point):
    with torch.no_grad(): assert torch.equal(flow.velocity(*point, COND), flow.base_velocity(*point, COND))

def test_base_ignores_the_adapter(flow, point):
    with torch.no_grad():
        f = shaken(); assert torch.allclose(f.base_velocity(*point, COND), flow.base_velocity(*point, COND), atol=1e-6)
        assert not torch.allclose(f.velocity(*point, COND), flow.base_velocity(*point, COND), atol=1e-2)

def test_adapter_back_on_after_an_error(point):
    f = shaken()
    with torch.no_grad(): before = f.velocity(*point, COND)
    with pytest.raises(ValueError, match='one prompt for each sample'): f.base_velocity(*point, COND[:1])
    with torch.no_grad(): assert torch.equal(before, f.velocity(*point, COND))
    assert all(p.requires_grad for p in f.trainable_parameters())

def test_sampler_is_the_stock_pipeline(flow):
    x0, times = flow.prior(3, generator=torch.Generator().manual_seed(2)), time_grid(8)
    flow.guidance_scale = 2.
    try:
        with torch.no_grad(): own = sample(flow, x0, times, COND, base=True).x1
    finally: flow.guidance_scale = 1.
    with quietly(): pipe = StableDiffusion3Pipeline.from_pretrained(asset('base'))
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(COND, latents=x0, sigmas=(1-times[:-1]).tolist(), guidance_scale=2., output_type='latent').images
    assert torch.allclose(own, stock, atol=1e-3)

def test_images_are_the_stock_pipeline(flow):
    with quietly(): pipe = StableDiffusion3Pipeline.from_pretrained(asset('base'))
    pipe.set_progress_bar_config(disable=True); x0, times = flow.prior(1, generator=torch.Generator().manual_seed(3)), time_grid(20)
    stock = torch.tensor(pipe('a cat', latents=x0, sigmas=(1-times[:-1]).tolist(), guidance_scale=1., output_type='np').images).permute(0,3,1,2)
    with torch.no_grad(): own = flow.decode(sample(flow, x0, times, ['a cat'], base=True).x1).clamp(0,1)
    assert torch.allclose(own, stock, atol=2e-3)

@pytest.mark.parametrize('scale', [1., 3.])
def test_jvp_and_vjp_in_double(scale):
    f = SD3Flow.from_pretrained(asset('base'), guidance_scale=scale, dtype=torch.float64); torch.manual_seed(0)
    x,u,w = (torch.randn(3,16,8,8,dtype=torch.float64) for _ in range(3)); t = torch.tensor([.1,.5,.9])
    field = lambda a: f.base_velocity(a, t, COND)
    _,Ju = torch.func.jvp(field, (x,), (u,)); _,pull = torch.func.vjp(field, x)
    with torch.no_grad(): fd = (field(x+1e-4*u)-field(x-1e-4*u))/2e-4
    assert (Ju-fd).norm() < 1e-5*fd.norm()
    assert torch.allclose((w*Ju).sum(), (pull(w)[0]*u).sum(), rtol=1e-9)

def test_forward_ad_with_dual_numbers(flow, point):
    import torch.autograd.forward_ad as fwAD
    x,t = point; u = torch.randn_like(x)
    with fwAD.dual_level(): tangent = fwAD.unpack_dual(flow.base_velocity(fwAD.make_dual(x, u), t, COND)).tangent
    assert torch.allclose(tangent, torch.func.jvp(lambda a: flow.base_velocity(a, t, COND), (x,), (u,))[1], atol=1e-4)

def test_guidance_detaches_the_empty_prompt_in_training(point):
    f = shaken(); w = torch.randn(3,16,8,8)
    grad = lambda: torch.autograd.grad((f.velocity(*point, COND)*w).sum(), f.trainable_parameters())
    one = grad(); f.guidance_scale = 2.; two = grad()
    assert all(torch.allclose(b, 2*a, atol=1e-4*(1+a.abs().max())) for a,b in zip(one, two))

def test_saved_lora_is_read_by_diffusers(tmp_path, point):
    f = shaken(lora_rank=4, lora_alpha=10); f.save_lora(tmp_path)
    with quietly(): pipe = StableDiffusion3Pipeline.from_pretrained(asset('base')); pipe.load_lora_weights(tmp_path)
    x,t = point; c,p = f.encode(COND)
    with torch.no_grad():
        stock = -pipe.transformer(x, encoder_hidden_states=c, pooled_projections=p, timestep=1000*(1-t), return_dict=False)[0]
        assert torch.allclose(f.velocity(x, t, COND), stock, atol=1e-4)
    g = load_flow(lora_rank=4, lora_alpha=10); g.load_lora(tmp_path)
    with torch.no_grad(): assert torch.allclose(g.velocity(x, t, COND), stock, atol=1e-4)
    with pytest.raises(ValueError, match='lora_rank'): load_flow(lora_rank=2).load_lora(tmp_path)

def test_state_round_trip(point):
    f,g = shaken(), load_flow(); g.load_trainable_state(f.trainable_state())
    with torch.no_grad(): assert torch.equal(f.velocity(*point, COND), g.velocity(*point, COND))
    with pytest.raises(ValueError, match='lora_rank'): load_flow(lora_rank=2).load_trainable_state(f.trainable_state())

def test_prompts_are_encoded_once(flow, monkeypatch):
    calls = []; real = flow.pipe.encode_prompt
    monkeypatch.setattr(flow.pipe, 'encode_prompt', lambda p, *a, **k: (calls.append(list(p)), real(p, *a, **k))[1])
    flow.encode(['a big lion', 'a big lion', 'a small lion']); flow.encode(['a small lion'])
    assert calls == [['a big lion', 'a small lion']]

def test_decode_keeps_gradients(flow):
    z = (8*torch.randn(2,16,8,8)).requires_grad_(True); x = flow.decode(z) # far out: most pixels saturate
    g = torch.autograd.grad(x.sum(), z)[0]
    assert x.shape == (2,3,32,32) and x.dtype == torch.float32 and (g.flatten(1).abs().amax(1) > 0).all()
    y = torch.tensor([-2.,.5,3.]); assert torch.allclose(soft_clamp(y), torch.tensor([-.2,.5,1.2]))

def test_no_prompt_is_the_empty_prompt(flow, point):
    with torch.no_grad(): assert torch.equal(flow.base_velocity(*point), flow.base_velocity(*point, ['']*3))

def test_other_shapes_and_half_precision():
    "Size, channels and precision come from the configuration"
    with quietly(): pipe = StableDiffusion3Pipeline.from_pretrained(asset('base'), dtype=torch.bfloat16)
    c = dict(pipe.transformer.config); pipe.transformer = SD3Transformer2DModel.from_config({**c, 'sample_size':16, 'pos_embed_max_size':8, 'num_layers':2, 'qk_norm':'rms_norm'}).to(torch.bfloat16)
    f = SD3Flow(pipe, lora_rank=2); x = f.prior(2)
    assert x.shape == (2,16,16,16) and x.dtype == torch.float32 and f.trainable_parameters()[0].dtype == torch.float32
    v = f.velocity(x, torch.tensor([.2,.8]), ['a cat','a dog']); assert v.dtype == torch.float32
    assert f.decode(x).dtype == torch.float32 and f.decode(x).shape == (2,3,64,64)
    v.square().sum().backward(); assert any(p.grad is not None and p.grad.abs().max() > 0 for p in f.trainable_parameters())

@pytest.mark.parametrize('options', [dict(mode=m) for m in ('residual','trajectory','exact','exact-jittered','finite-difference','paper')]+[dict(mode='trajectory', mu=.9), dict(correction=False)], ids=str)
def test_every_mode_in_half_precision_with_guidance(options):
    "A bfloat16 model, float32 adapter, states and losses, guidance on: two updates move the adapter and ν, and leave the base alone"
    f = load_flow(dtype=torch.bfloat16, guidance_scale=2., lora_rank=2); method = VGGFlow(beta=10., clip=.8, **options)
    x,t = f.prior(2, generator=torch.Generator().manual_seed(0)),torch.tensor([.3,.7])
    with torch.no_grad(): base = f.base_velocity(x, t, COND[:2])
    before = {k: p.clone() for k,p in f.trainable_state().items()}
    h = finetune(f, load_reward(), method, FinetuneConfig(updates=2, batch_size=2, steps=4, transitions=2, lr=1e-3, seed=0), prompts=COND, progress=False)
    assert all(math.isfinite(v) for r in h.rows for v in r.values() if isinstance(v, float))
    after = f.trainable_state(); assert all(p.dtype==torch.float32 for p in after.values()) and any(not torch.equal(p, before[k]) for k,p in after.items())
    with torch.no_grad(): assert torch.equal(base, f.base_velocity(x, t, COND[:2])) and not torch.equal(base, f.velocity(x, t, COND[:2]))
    if method.learn:
        with torch.no_grad(): g = method.value.nu(x, t, COND[:2], base, torch.zeros_like(x))
        assert h.rows[-1]['consistency']>0 and g.dtype==torch.float32 and g.abs().max()>0
