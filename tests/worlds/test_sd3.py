"The adapter for Stable Diffusion 3, on the emoji pipeline and on a random one with other settings"
import json, math, pytest, torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline, SD3Transformer2DModel
from huggingface_hub import errors as hub
from tiny_sd3 import make_tiny_sd3, make_tiny_taesd
from vggflow.worlds.emoji import asset, load_flow, load_reward
from vggflow.commands.export import export_lora, load_correction
from vggflow.training.loop import FinetuneConfig, finetune
from vggflow.theory.flow import sample, time_grid
from vggflow.methods.methods import AdjointMatching, DRaFT, ReFL, VGGFlow, VGGFlowPMP
from vggflow.worlds.sd3 import SD3Flow, lora_settings, quietly, soft_clamp

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

# ---- tiny pipelines saved and reloaded: all three text encoders, without T5, and of the kind of 3.5

TWO = ['a cat','two owl']

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Folders of pipelines, made once"
    root = tmp_path_factory.mktemp('tiny')
    return dict(t5=make_tiny_sd3(root/'t5'), no_t5=make_tiny_sd3(root/'no_t5', t5=False), sd35=make_tiny_sd3(root/'sd35', sd35=True, dtype=torch.bfloat16),
                wide=make_tiny_sd3(root/'wide', heads=4), taesd=make_tiny_taesd(root/'taesd'), root=root)

def reload(folder, shake=.2, **kw):
    "A flow from disk, with an adapter that is not zero unless `shake` is"
    torch.manual_seed(3)
    with quietly(): f = SD3Flow.from_pretrained(folder, **{'max_sequence_length':8, 'text_batch':1, **kw})
    f.pipe.set_progress_bar_config(disable=True)
    for p in f.trainable_parameters() if shake else (): torch.nn.init.normal_(p, std=shake)
    return f

X,T = torch.randn(2,4,8,8, generator=torch.Generator().manual_seed(0)),torch.tensor([.2,.7])
def pull(f): return torch.func.vjp(lambda y: f.base_velocity(y, T, TWO), X)[1](X)[0]
def pull_by_autograd(f):
    y = X.clone().requires_grad_(); return torch.autograd.grad((f.base_velocity(y, T, TWO)*X).sum(), y)[0]
def adapter_gradient(f):
    torch.manual_seed(5); return torch.autograd.grad((f.velocity(X, T, TWO)*X).sum(), f.trainable_parameters())
def same(a, b, eps=1e-5): return all(torch.allclose(p, q, atol=eps*(1+q.abs().max().item())) for p,q in zip(a, b))

@pytest.mark.parametrize('kind', ['t5','no_t5'])
def test_stock_pipeline_draws_the_same_bit_for_bit(tiny, kind, tmp_path):
    "Own sampler, own scheduler times, own LoRA file against `StableDiffusion3Pipeline.__call__` with guidance; T5 present and absent"
    f = reload(tiny[kind], guidance_scale=4., max_sequence_length=256, lora_rank=4, lora_alpha=6); f.save_lora(tmp_path)
    none = {} if kind=='t5' else dict(text_encoder_3=None, tokenizer_3=None)
    with quietly(): pipe = StableDiffusion3Pipeline.from_pretrained(tiny[kind], **none)
    pipe.set_progress_bar_config(disable=True)
    def images(p, what='pt'): return p(TWO, latents=X, num_inference_steps=5, guidance_scale=4., output_type=what).images
    plain = images(pipe, 'latent'); pipe.load_lora_weights(tmp_path)
    with torch.no_grad(): own = sample(f, X, f.times(5), TWO).x1; shown = f.decode(own).clamp(0,1)
    assert torch.equal(images(pipe), images(f.pipe)) and (images(pipe, 'latent')-plain).abs().max()>1e-2
    assert torch.allclose(own, images(pipe, 'latent'), atol=1e-5) and torch.allclose(shown, images(pipe), atol=1e-5)

def test_times_are_the_schedulers(tiny):
    f = reload(tiny['t5']); s = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny['t5']/'scheduler')
    for n in (1,5,20):
        s.set_timesteps(n); assert torch.equal((1000*(1-f.times(n)[:-1])).float(), s.timesteps) and f.times(n)[0]==0 and f.times(n)[-1]==1
    assert torch.equal(f.times(5, 2.), time_grid(5, 2.)) and torch.allclose(f.times(5).float(), time_grid(5, 3.), atol=1e-6)
    f.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match='use_dynamic_shifting=True.*give a shift'): f.times(5)
    f.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match='FlowMatchHeunDiscreteScheduler'): f.times(5)

@pytest.mark.parametrize('scale', [1.,3.])
def test_checkpointing_changes_no_gradient(tiny, scale):
    "The adapter's, and the base's by torch.func and by autograd; the adapter is on again afterwards"
    f = reload(tiny['t5'], guidance_scale=scale, lora_dropout=.3); a,b = pull(f),adapter_gradient(f)
    with torch.no_grad(): v = f.velocity(X, T, TWO)
    f.gradient_checkpointing(True)
    assert torch.equal(pull(f), a) and torch.equal(pull_by_autograd(f), a) and same(adapter_gradient(f), b)
    with torch.no_grad(): assert torch.equal(f.velocity(X, T, TWO), v)

def test_checkpointing_keeps_less(tiny):
    "Bytes that the VJP of the base keeps"
    f,kept = reload(tiny['t5']),[]
    for on in (False,True):
        f.gradient_checkpointing(on); n = 0
        def count(x): nonlocal n; n += x.numel(); return x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x): f.base_velocity(X.clone().requires_grad_(), T, TWO)
        kept.append(n)
    assert kept[1]<.5*kept[0]

def test_guidance_in_turn_and_detached_base(tiny):
    both,turn,off,plain = (reload(tiny['t5'], **kw) for kw in (dict(guidance_scale=3.), dict(guidance_scale=3., cfg_batched=False), dict(guidance_scale=3., detach_base=True), {}))
    with torch.no_grad(): assert torch.allclose(both.velocity(X, T, TWO), turn.velocity(X, T, TWO), atol=1e-5)
    assert torch.allclose(pull(both), pull(turn), atol=1e-5) and torch.allclose(pull(off), 3*pull(plain), atol=1e-5) and not torch.allclose(pull(both), pull(off), atol=1e-2)

def test_dropout_acts_in_training_only(tiny):
    f,g = reload(tiny['t5'], lora_dropout=.5),reload(tiny['t5'])
    with torch.no_grad(): assert torch.equal(f.velocity(X, T, TWO), g.velocity(X, T, TWO)) and torch.equal(f.base_velocity(X, T, TWO), g.base_velocity(X, T, TWO))
    assert torch.equal(f.base_velocity(X, T, TWO), g.base_velocity(X, T, TWO)) and torch.equal(pull(f), pull(g))
    assert not same(adapter_gradient(f), adapter_gradient(g), 1e-2) and not any(d.training for d in f._drops)

def test_decoders(tiny):
    "Slicing, tiling and recomputation give the plain decoder's gradient; the tiny decoder works where gradients are wanted"
    grad = lambda f: torch.func.grad(lambda z: f.decode(z).square().sum())(2*X)
    f = reload(tiny['t5']); want = grad(f)
    for kw in (dict(decode_checkpointing=True), dict(vae_slicing=True)): assert torch.allclose(grad(reload(tiny['t5'], **kw)), want, atol=1e-5)
    g = reload(tiny['t5'], vae_tiling=True); g.vae.tile_latent_min_size,g.vae.tile_sample_min_size = 4,8
    tiled = grad(g); g.configure(vae_tiling=True, decode_checkpointing=True); assert torch.allclose(grad(g), tiled, atol=1e-5) and not torch.allclose(tiled, want, atol=1e-2)
    h = reload(tiny['t5'], taesd=tiny['taesd'])
    with torch.no_grad(): assert torch.equal(h.decode(X), f.decode(X))
    small = grad(h); h.configure(decode_checkpointing=True)
    assert h.decode(X).shape==(2,3,16,16) and torch.allclose(grad(h), small, atol=1e-5) and not torch.allclose(small, want, atol=1e-2)

def test_compiled_calls_are_the_same(tiny):
    "Without gradients, finetuned and base"
    f,g = reload(tiny['t5'], compile='eager'),reload(tiny['t5'])
    with torch.no_grad():
        for _ in range(2): assert torch.allclose(f.velocity(X, T, TWO), g.velocity(X, T, TWO), atol=1e-5) and torch.allclose(f.base_velocity(X, T, TWO), g.base_velocity(X, T, TWO), atol=1e-5)
        assert torch.allclose(f.decode(X), g.decode(X), atol=1e-5)
    assert torch.allclose(pull(f), pull(g), atol=1e-5)

def test_prompts_on_disk(tiny, tmp_path):
    "Read back exactly; damaged and foreign files, other lengths and a missing T5 are told apart"
    a = reload(tiny['t5'], embeddings=tmp_path).encode(TWO); files = sorted(tmp_path.iterdir()); assert len(files)==2
    b = reload(tiny['no_t5'], embeddings=tmp_path).encode(TWO); reload(tiny['t5'], embeddings=tmp_path, max_sequence_length=4).encode(TWO)
    others = [f for f in tmp_path.iterdir() if f not in files]; assert len(others)==4 and not torch.equal(a[0], b[0])
    files[0].write_bytes(b'junk'); files[1].write_bytes(others[0].read_bytes())
    f = reload(tiny['t5'], embeddings=tmp_path); made = []; real = f.pipe.encode_prompt
    f.pipe.encode_prompt = lambda p,*r,**k: (made.extend(p), real(p, *r, **k))[1]
    assert torch.equal(f.encode(TWO)[0], a[0]) and made==TWO
    f.drop_text_encoders(); g = reload(tiny['t5'], embeddings=tmp_path); g.drop_text_encoders()
    assert g.pipe.text_encoder_3 is None and torch.equal(g.encode(TWO)[1], a[1])   # after the encoders have gone
    with pytest.raises(ValueError, match='encode\\(prompts\\)'): g.encode(['a horse'])

def test_size_and_targets(tiny):
    f = reload(tiny['sd35'], image_size=8, lora_targets=['attn.to_q']); assert f.prior(1).shape==(1,4,4,4) and f.decode(f.prior(1)).shape==(1,3,8,8)
    assert f.velocity(f.prior(1), T[:1], TWO[:1]).shape==(1,4,4,4) and f.describe()['latent_size']==4 and f.describe()['lora_targets']==['attn.to_q']
    assert any('attn2.to_q' in k for k in reload(tiny['sd35']).trainable_state()) and not any('attn2' in k for k in f.trainable_state())
    assert reload(tiny['sd35']).transformer.dtype==torch.float32 and reload(tiny['t5'], dtype='bf16').transformer.dtype==torch.bfloat16 and reload(tiny['t5'], dtype='bf16').velocity(X, T, TWO).dtype==torch.float32

def test_from_a_pipeline_object(tiny):
    f = reload(make_tiny_sd3(None), lora_rank=2); g = reload(tiny['t5'], lora_rank=2); assert f.describe()['model']=='unnamed'
    with torch.no_grad(): assert torch.allclose(f.velocity(X, T, TWO), g.velocity(X, T, TWO), atol=1e-5)
    assert SD3Flow.from_pretrained(make_tiny_sd3(None), dtype='bf16').transformer.dtype==torch.bfloat16

@pytest.mark.parametrize('options,text', [(dict(lora_rnak=4), "did you mean \\['lora_rank'\\]"), (dict(image_size=15), 'multiple of 4 up to 32'), (dict(correction='unet'), "'transformer' or 'adapter'"),
    (dict(device='cuda'), 'no CUDA GPU'), (dict(dtype='bf17'), 'bfloat16'), (dict(lora_dropout=1.), 'lora_dropout'), (dict(taesd='VAE'), 'not an AutoencoderTiny')], ids=str)
def test_wrong_options_are_refused(tiny, options, text):
    if options.get('device') and torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(ValueError, match=text): reload(tiny['t5'], **{k: tiny['t5']/'vae' if v=='VAE' else v for k,v in options.items()})

def test_wrong_options_are_found_before_the_weights(tiny, monkeypatch):
    def loads(*args, **kw): raise AssertionError('weights were loaded')
    monkeypatch.setattr(StableDiffusion3Pipeline, 'from_pretrained', loads); five = make_tiny_taesd(tiny['root']/'five-early', channels=5)
    for options,text in [(dict(image_size=15), 'multiple of 4 up to 32'), (dict(lora_rank=0), 'lora_rank'), (dict(lora_rank='8'), "lora_rank.*'8'"), (dict(lora_dropout=1.), 'lora_dropout'), (dict(correction='unet'), "'transformer' or 'adapter'"),
        (dict(correction_layers=0), 'correction_layers must be at least 1, got 0'), (dict(lora_targets=['to_w','attn.q']), r"\['to_w', 'attn.q'\] match no layer.*attn.to_q"), (dict(lora_targets='attn.to_q'), 'match no layer'),
        (dict(taesd=five), '5 channels'), (dict(taesd=tiny['t5']/'vae'), 'not an AutoencoderTiny'), (dict(device='gpu'), "unknown device 'gpu'")]:
        with pytest.raises(ValueError, match=text) as e: reload(tiny['t5'], **options)
        assert '\n' not in str(e.value)
    with pytest.raises(AssertionError, match='loaded'): reload(tiny['t5'], lora_targets=['attn.to_q','attn.to_w'], image_size=8)

def test_other_weights_of_the_same_name_are_another_run(tiny, tmp_path):
    "Transformer and decoder are told from others; the adapter and its correction are not part of it, and neither is the device's precision of what is asked"
    f,g = reload(tiny['t5'], lora_rank=2, correction='adapter'),reload(tiny['sd35'], lora_rank=2); mark = f.fingerprint(); pale = lambda x, p: x.mean((1,2,3))
    torch.nn.init.ones_(f.trainable_parameters()[0]); f.make_correction(); del f._marks; assert f.fingerprint() == mark != g.fingerprint() and set(mark) == {'weights'}
    t = reload(tiny['t5'], taesd=make_tiny_taesd(tmp_path/'tiny')).fingerprint(); assert t['weights'] == mark['weights'] and t['taesd'] != reload(tiny['t5'], taesd=make_tiny_taesd(tmp_path/'other', seed=1)).fingerprint()['taesd']
    def go(flow): return finetune(flow, pale, ReFL(), FinetuneConfig(updates=1, batch_size=2, steps=2), out=tmp_path/'run', prompts=TWO, progress=False)
    go(reload(tiny['t5'], lora_rank=2)); assert lora_settings(tmp_path/'run/lora')['lora_rank'] == 2   # written without `train.run`
    other = reload(tiny['t5'], lora_rank=2)
    with torch.no_grad(): other.transformer.proj_out.weight.mul_(1.01)
    with pytest.raises(ValueError, match='holds another run .about.weights'): go(other)
    record = tmp_path/'run/config.json'; said = json.loads(record.read_text()); del said['about']; record.write_text(json.dumps(said)); go(other)   # an old record does not say

def test_other_models_are_refused(tiny):
    with pytest.raises(ValueError, match='5 channels'): reload(tiny['t5'], taesd=make_tiny_taesd(tiny['root']/'five', channels=5))
    with pytest.raises(ValueError, match='has an adapter already'): SD3Flow(reload(tiny['t5']).pipe)
    with pytest.raises(ValueError, match='did you mean .*wide'): reload(tiny['root']/'wid')
    with pytest.raises(ValueError, match='no model_index.json'): reload(tiny['taesd'])
    broken = tiny['root']/'broken'; broken.mkdir(); (broken/'model_index.json').write_text((tiny['t5']/'model_index.json').read_text())
    with pytest.raises(ValueError, match='is missing'): reload(broken)
    (broken/'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match='holds a FluxPipeline, not a StableDiffusion3Pipeline'): reload(broken)

@pytest.mark.parametrize('error,text', [('GatedRepoError', 'accept its licence at https://huggingface.co/stabilityai/.*hf auth login'), ('RepositoryNotFoundError', 'did you mean stabilityai/stable-diffusion-3.5-medium.*hf auth login'),
    ('RevisionNotFoundError', "no revision 'v9'"), ('LocalEntryNotFoundError', 'hf download'), ('EntryNotFoundError', 'not in the format of diffusers'), ('OfflineModeIsEnabled', 'check the connection')])
def test_errors_of_the_hub_name_the_remedy(monkeypatch, error, text):
    "And nothing large is asked for"
    e = getattr(hub, error).__new__(getattr(hub, error), 'text')
    def fail(*a, **k): raise e
    monkeypatch.setattr('huggingface_hub.hf_hub_download', fail); monkeypatch.setattr(StableDiffusion3Pipeline, 'from_pretrained', lambda *a, **k: pytest.fail('asked for the weights'))
    with pytest.raises(ValueError, match=text): SD3Flow.from_pretrained('stabilityai/stable-difusion-3.5-medium', revision='v9')

def test_a_lora_that_does_not_fit(tiny, tmp_path):
    "The first layer and both shapes are named"
    reload(tiny['t5'], lora_rank=4, lora_alpha=6).save_lora(tmp_path/'l'); name = 'transformer_blocks.0.attn.add_k_proj'
    s = lora_settings(tmp_path/'l'); assert (s['lora_rank'],s['lora_alpha'])==(4,6) and 'attn.to_q' in s['lora_targets']
    for folder,kw,text in [('wide', dict(lora_rank=4, lora_alpha=6), rf'another architecture: at {name} it has \(4, 16\), this model \(4, 32\)'), ('t5', {}, rf'{name} it has \(4, 16\), the flow \(8, 16\).*lora_rank'),
                           ('t5', dict(lora_rank=4), 'lora_alpha 6, the flow 4'), ('t5', {**s, 'lora_targets':['attn.to_q']}, f'{name} is adapted in it only.*lora_targets')]:
        with pytest.raises(ValueError, match=text): reload(tiny[folder], **kw).load_lora(tmp_path/'l')
    with pytest.raises(ValueError, match='no adapter can be read'): reload(tiny['t5']).load_lora(tmp_path/'nothing')
    f = reload(tiny['t5'], shake=0, **s); f.load_lora(tmp_path/'l'); assert all(p.abs().max()>0 for p in f.trainable_parameters())

@pytest.mark.parametrize('on', [False,True], ids=['plain','checkpointed'])
def test_adapter_correction(tiny, on):
    "Zero at the start; reads prompt, time, state and hints; differentiable forwards and backwards; the flow does not notice it"
    f = reload(tiny['t5'], correction='adapter', guidance_scale=2., gradient_checkpointing=on)
    with torch.no_grad(): before = f.velocity(X, T, TWO),f.base_velocity(X, T, TWO)
    nu,hints = f.make_correction(),(X,X.flip(0)); assert nu(X, T, TWO, hints).abs().max()==0
    for p in nu.parameters(): torch.nn.init.normal_(p, std=.2)
    out = nu(X, T, TWO, hints); out.square().sum().backward(); assert all(p.grad is not None for p in nu.parameters()) and all(p.grad.abs().max()>0 for p in [*nu.inlet.parameters(), *nu.head.parameters()]) and sum(p.grad.abs().max()>0 for p in nu.lora.values())>.8*len(nu.lora)
    for other in (nu(X, T, TWO[::-1], hints), nu(X, T+.1, TWO, hints), nu(X.flip(1), T, TWO, hints), nu(X, T, TWO, hints[::-1])): assert (out-other).abs().max()>1e-4
    _,tangent = torch.func.jvp(lambda y: nu(y, T, TWO, hints), (X,), (X,))
    with torch.no_grad(): fd = (nu(1.001*X, T, TWO, hints)-nu(.999*X, T, TWO, hints))/2e-3
    assert (tangent-fd).norm()<1e-2*fd.norm()
    with torch.no_grad(): assert torch.equal(f.velocity(X, T, TWO), before[0]) and torch.equal(f.base_velocity(X, T, TWO), before[1])
    assert all(p.requires_grad and p.grad is None for p in f.trainable_parameters()) and not any('correction' in k for k in f.trainable_state())

# ---- all methods

METHODS = dict(vgg=lambda: VGGFlow(beta=5., clip=.8), pmp=lambda: VGGFlowPMP(beta=5.), am=lambda: AdjointMatching(beta=5.), draft=lambda: DRaFT(k=2), refl=lambda: ReFL(last=.5))
PALE = lambda images, prompts: (images.mean((1,2,3))*torch.tensor([1.+('cat' in p) for p in prompts]))

def update(folder, method, out=None, updates=1, seed=0, **kw):
    "A run of a few updates on a pipeline from disk"
    f = reload(folder, shake=0, **kw); m = METHODS[method]()
    h = finetune(f, PALE, m, FinetuneConfig(updates=updates, batch_size=2, steps=4, transitions=2, lr=1e-2, seed=seed, save_every=1), out=out, prompts=[*TWO,'a red fish'], progress=False)
    assert all(math.isfinite(v) for r in h.rows for v in r.values() if isinstance(v, float)); return f,m,h

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('kind,scale', [('t5',3.),('no_t5',1.)])
def test_every_method_on_a_reloaded_pipeline(tiny, method, kind, scale):
    "One update moves the adapter and leaves the base alone; all memory savers on, it does the same"
    f,_,h = update(tiny[kind], method, guidance_scale=scale); g = reload(tiny[kind], shake=0, guidance_scale=scale)
    with torch.no_grad(): assert torch.equal(f.base_velocity(X, T, TWO), g.base_velocity(X, T, TWO)) and not torch.equal(f.velocity(X, T, TWO), g.velocity(X, T, TWO))
    saved,_,h2 = update(tiny[kind], method, guidance_scale=scale, cfg_batched=False, gradient_checkpointing=True, decode_checkpointing=True)
    assert h2.rows[0]['loss']==pytest.approx(h.rows[0]['loss'], rel=1e-4) and h2.rows[0]['grad_norm']==pytest.approx(h.rows[0]['grad_norm'], rel=1e-4)

def test_everything_on_with_3_5_in_half_precision(tiny, tmp_path):
    f,m,h = update(tiny['sd35'], 'vgg', updates=2, dtype='bfloat16', guidance_scale=2., correction='adapter', lora_dropout=.1, cfg_batched=False, gradient_checkpointing=True, decode_checkpointing=True,
                   vae_slicing=True, taesd=tiny['taesd'], embeddings=tmp_path/'e', image_size=8, out=tmp_path/'run')
    assert f.describe()['correction']=='adapter' and all(p.dtype==torch.float32 for p in [*f.trainable_parameters(), *m.parameters()]) and len(list((tmp_path/'e').iterdir()))>=2
    assert any(p.abs().max()>0 for p in m.value.correction.head.parameters())
    export_lora(f, tmp_path/'out', run=tmp_path/'run'); g = reload(tiny['sd35'], shake=0, dtype='bfloat16', correction='adapter', image_size=8, guidance_scale=2.); g.load_lora(tmp_path/'out')
    value = load_correction(g, tmp_path/'out', PALE); z = X[:,:,:4,:4]
    with torch.no_grad():
        v = f.velocity(z, T, TWO); assert torch.allclose(g.velocity(z, T, TWO), v, atol=1e-2)
        assert torch.allclose(value.nu(z, T, TWO, v, z), m.value.nu(z, T, TWO, v, z), atol=1e-2*m.value.nu(z, T, TWO, v, z).abs().max()) and value.unit==m.value.unit

def test_resumed_with_dropout_and_a_second_adapter(tiny, tmp_path):
    "An interrupted run goes on bit for bit"
    kw = dict(guidance_scale=2., correction='adapter', lora_dropout=.2)
    whole = update(tiny['t5'], 'vgg', tmp_path/'a', updates=2, **kw); update(tiny['t5'], 'vgg', tmp_path/'b', updates=1, **kw); rest = update(tiny['t5'], 'vgg', tmp_path/'b', updates=2, **kw)
    assert all(torch.equal(a, b) for a,b in zip(whole[0].trainable_state().values(), rest[0].trainable_state().values()))
    assert all(torch.equal(a, b) for a,b in zip(whole[1].state_dict().values(), rest[1].state_dict().values()))

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('kind,scale', [('t5',1.), ('no_t5',3.)])
def test_every_method_resumes_bit_for_bit(tiny, method, kind, scale, tmp_path):
    "T5 present and absent, guidance off and on"
    whole = update(tiny[kind], method, tmp_path/'a', updates=2, guidance_scale=scale); update(tiny[kind], method, tmp_path/'b', updates=1, guidance_scale=scale)
    rest = update(tiny[kind], method, tmp_path/'b', updates=2, guidance_scale=scale)
    assert all(torch.equal(a, b) for a,b in zip(whole[0].trainable_state().values(), rest[0].trainable_state().values()))

def test_export_overwrites_nothing(tiny, tmp_path):
    f,m,_ = update(tiny['t5'], 'refl', tmp_path/'run'); out = export_lora(f, tmp_path/'out', run=tmp_path/'run'); card = (out/'README.md').read_text()
    assert sorted(p.name for p in out.iterdir())==['README.md','pytorch_lora_weights.safetensors'] and card.startswith('---\nlibrary_name: diffusers') and 'license' not in card.split('---')[1]
    assert 'Nothing was measured' in card and 'ReFL' in card and str(tmp_path) not in card
    with pytest.raises(ValueError, match='README.md.* already'): export_lora(f, out)
    with pytest.raises(ValueError, match='no value correction'): load_correction(f, out)
    with pytest.raises(ValueError, match='no run directory'): export_lora(f, tmp_path/'x', run=out)
    assert not (tmp_path/'x').exists() and not list(tmp_path.glob('.*.tmp'))
