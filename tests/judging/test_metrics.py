"Metrics against independent answers"
import inspect, itertools, json, shutil, sys
import numpy as np, pytest, scipy.linalg, scipy.spatial, torch
from torch import nn
from vggflow.judging.metrics import (ClipFeatures, DreamSimFeatures, EfficientNetFeatures, _efficientnet, alignment, diversity, fid_beside_floor, fit,
                             frechet_distance, per_prompt_fid)

def by_the_book(a, b):
    "The Gaussian formula with covariance matrices and a matrix root"
    a,b = a.double().numpy(),b.double().numpy(); sa,sb = np.cov(a.T),np.cov(b.T)
    return ((a.mean(0)-b.mean(0))**2).sum() + np.trace(sa+sb-2*scipy.linalg.sqrtm(sa@sb).real)

@pytest.mark.parametrize('n,m,d', [(50,40,6), (300,200,12), (20,400,8)])
def test_frechet_is_the_formula(n, m, d):
    g = torch.Generator().manual_seed(n)
    a,b = torch.randn(n,d,generator=g)@torch.randn(d,d,generator=g), 1.3*torch.randn(m,d,generator=g)+.5
    assert frechet_distance(a, b) == pytest.approx(by_the_book(a, b), rel=1e-6)

def test_frechet_of_few_images_in_many_dimensions():
    "Rank-deficient: the formula on the span of the data, where matrix roots behave"
    g = torch.Generator().manual_seed(0); a,b = torch.randn(8,300,generator=g), torch.randn(9,300,generator=g)+.2
    q = torch.linalg.svd(torch.cat([a,b]), full_matrices=False)[2].T # 17 directions hold everything
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a@q, b@q), rel=1e-5)
    sa,sb = (torch.cov((x@q).T.double()) for x in (a,b)); ra,rb = (torch.tensor(scipy.linalg.sqrtm(s.numpy()).real) for s in (sa,sb))
    root = torch.linalg.svdvals(ra@rb).sum()
    assert frechet_distance(a, b) == pytest.approx(((a-0).mean(0)-b.mean(0)).square().sum().item() + (sa.trace()+sb.trace()-2*root).item(), rel=1e-4)

def test_frechet_needs_two():
    with pytest.raises(ValueError, match='at least 2'): frechet_distance(torch.randn(1,3), torch.randn(5,3))

def test_diversity_is_the_mean_over_pairs():
    f = torch.randn(7,5); e = torch.nn.functional.normalize(f, dim=1)
    pairs = [1-(a@b).item() for a,b in itertools.combinations(e, 2)]
    assert diversity(f) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity(torch.cat([f[:1]]*4)) == pytest.approx(0, abs=1e-6)
    assert diversity(3*f) == pytest.approx(diversity(f), abs=1e-6)
    with pytest.raises(ValueError): diversity(f[:1])

def test_per_prompt_fid_stays_within_prompts():
    a,b = torch.randn(10,4), torch.randn(10,4)+5
    assert per_prompt_fid({'p':a,'q':b}, {'p':a,'q':b}) == pytest.approx(0, abs=1e-6)
    assert per_prompt_fid({'p':a,'q':b}, {'p':b,'q':a}) > 50
    with pytest.raises(ValueError, match="prompt 'q'"): per_prompt_fid({'p':a,'q':b}, {'p':a})

def test_efficientnet_features_notice_noise():
    pytest.importorskip('efficientnet_lite_pytorch')
    from vggflow.worlds.emoji import draw_factors, render
    x,y = (render(draw_factors(48, torch.Generator().manual_seed(s))) for s in (0,1)); h = EfficientNetFeatures()
    assert h(x).shape == (48,1280) and not h(x).requires_grad
    same = frechet_distance(h(x), h(y))
    assert frechet_distance(h(x), h((y+.08*torch.randn(y.shape)).clamp(0,1))) > 1.2*same
    assert diversity(h(y[:1].repeat(16,1,1,1)+.005*torch.randn(16,3,32,32))) < .3*diversity(h(y))

def test_frechet_comes_to_the_distance_of_known_gaussians():
    "Full covariance matrices: the truth from their roots, the estimate from ever more samples"
    g = torch.Generator().manual_seed(3); d = 10; draw = lambda n, m, L: m+torch.randn(n, d, generator=g)@L.T
    L,K = torch.randn(d, d, generator=g),torch.eye(d)+.3*torch.randn(d, d, generator=g); m = torch.linspace(-1, 1, d)
    a,b = (M.double()@M.double().T for M in (L,K)); ra = torch.tensor(scipy.linalg.sqrtm(a.numpy()).real)
    exact = (m.double().square().sum() + a.trace()+b.trace() - 2*torch.tensor(scipy.linalg.sqrtm((ra@b@ra).numpy()).real).trace()).item()
    off = [np.mean([frechet_distance(draw(n, 0*m, L), draw(n, m, K)) for _ in range(8)])/exact-1 for n in (20,200,20_000)]
    assert off[0] > 2*off[1] > 0 and abs(off[2]) < .005
    assert abs(frechet_distance(draw(20_000, 0*m, L), draw(20_000, m, 1.1*K))/exact-1) > .01   # teeth

@pytest.mark.parametrize('n,m,d', [(60,50,16), (24,32,64)])
def test_frechet_is_that_of_torchmetrics(n, m, d):
    fid = pytest.importorskip('torchmetrics.image.fid')
    class Flat(nn.Module):
        num_features = d
        def forward(self, x): return x.flatten(1)
    g = torch.Generator().manual_seed(d); a,b = torch.rand(n, 1, d//8, 8, generator=g),.7*torch.rand(m, 1, d//8, 8, generator=g)+.1
    theirs = fid.FrechetInceptionDistance(feature=Flat(), normalize=False, input_img_size=(1,d//8,8)).set_dtype(torch.float64)
    theirs.update(a.double(), real=True); theirs.update(b.double(), real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(theirs.compute().item(), rel=1e-5)

def test_floor_and_sample_sizes_are_reported():
    g = torch.Generator().manual_seed(0); sets = [{p: torch.randn(n, 40, generator=g) for p in 'xy'} for n in (16,16,64)]
    one,two,many = sets; r = fid_beside_floor(one, many, two)
    assert (r.n,r.m,r.prompts) == (16,64,2) and r.fid == per_prompt_fid(one, many) and r.base == per_prompt_fid(two, many)
    assert r.base > 5 and 'n = 16' in str(r) and 'm = 64' in str(r)
    with pytest.raises(ValueError, match='as many images'): fid_beside_floor(one, many, many)

def test_alignment_is_the_mean_cosine():
    a,b = torch.randn(9,7), torch.randn(9,7)
    assert alignment(a, b) == pytest.approx(np.mean([1-scipy.spatial.distance.cosine(x, y) for x,y in zip(a.numpy(), b.numpy())]), abs=1e-5)
    with pytest.raises(ValueError, match='prompt of each'): alignment(a, b[:3])

def test_fit_lets_gradients_pass_and_keeps_what_fits():
    x = torch.rand(2,3,32,32); assert torch.equal(fit(x, 32), x)
    x = torch.rand(1,3,30,50, requires_grad=True); y = fit(x, 17); assert y.shape == (1,3,17,17)
    y.sum().backward(); assert x.grad[...,20:30].abs().min() > 0 and (x.grad[...,:5] == 0).all()   # the margin is cut off
    assert fit(torch.rand(1,3,7,7), 40).shape == (1,3,40,40)

def test_clip_features_are_those_of_transformers(tmp_path):
    from transformers import CLIPModel, CLIPTokenizer
    from vggflow.worlds.emoji import asset, load_clip
    ours,net,tok,x = load_clip(),CLIPModel.from_pretrained(asset('clip')),CLIPTokenizer.from_pretrained(asset('clip')),torch.rand(4,3,32,32)
    ps = ['a cat','a dog','a cat','a red fox']
    shipped = lambda x: torch.nn.functional.normalize(net.get_image_features(2*x-1).pooler_output, dim=-1)   # transformers alone
    ids = tok(ps, padding='max_length', max_length=tok.model_max_length, truncation=True, return_tensors='pt').input_ids
    with torch.no_grad():
        texts = torch.nn.functional.normalize(net.get_text_features(ids).pooler_output, dim=-1)
        assert torch.allclose(ours(x), shipped(x), atol=1e-5) and torch.allclose(ours.similarity(x, ps), (shipped(x)*texts).sum(1), atol=1e-5)
        f = tmp_path/'clip'; shutil.copytree(asset('clip'), f)
        (f/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.5]*3, image_std=[.5]*3)))
        assert torch.allclose(ClipFeatures(f)(x), shipped(x), atol=1e-5)                    # the folder's word is taken
        assert (ClipFeatures(asset('clip'))(x)-shipped(x)).abs().max() > 1e-2               # without it CLIP's own mean and deviation
        CLIPModel.from_pretrained(f).bfloat16().save_pretrained(f); half = ClipFeatures(f)
        assert half(x).dtype == torch.float32 and (half(x)-shipped(x)).abs().max() < .05
    y = torch.rand(2,3,50,64, requires_grad=True); ours.similarity(y, ps[:2]).sum().backward()
    assert y.grad.abs().sum() > 0 and not any(p.requires_grad for p in ours.parameters())

def test_folding_does_not_change_efficientnet():
    pytest.importorskip('efficientnet_lite_pytorch'); x = torch.randn(3,3,96,96)
    with torch.no_grad(): a,b = (n.extract_features(x).mean((2,3)) for n in (_efficientnet(), _efficientnet(fold=False)))
    assert (a-b).abs().max() < 1e-4*b.abs().max() and not any(isinstance(m, nn.BatchNorm2d) for m in _efficientnet().modules())

def test_dreamsim_is_asked_for_by_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'dreamsim', None)
    with pytest.raises(ImportError, match=r'vggflow\[metrics\]'): DreamSimFeatures()

HUB = """from dreamsim.feature_extraction.vision_transformer import VisionTransformer
def dino_vitb16(**k): return VisionTransformer(patch_size=16, embed_dim=24, depth=12, num_heads=2, mlp_ratio=2, qkv_bias=True)
"""

@pytest.fixture(scope='module')
def small_ensemble(tmp_path_factory):
    "The files of DreamSim's ensemble, from its own classes with small towers, and random weights"
    pytest.importorskip('dreamsim')
    import peft, dreamsim.model as M, dreamsim.feature_extraction.load_clip_as_dino as clip, dreamsim.feature_extraction.load_open_clip_as_dino as oclip
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer
    d,mp = tmp_path_factory.mktemp('dreamsim'),pytest.MonkeyPatch(); torch.manual_seed(0)
    small = lambda patch_size=16: VisionTransformer(patch_size=patch_size, embed_dim=24, depth=12, num_heads=2, mlp_ratio=2, qkv_bias=True)
    for m in (clip,oclip): mp.setattr(m, 'vit_base', small)
    (d/'facebookresearch_dino_main').mkdir(); (d/'facebookresearch_dino_main/hubconf.py').write_text(HUB)
    head = [f'mlp.{i}.{k}' for i in (0,2,4) for k in ('weight','bias')]+['last_layer.weight']
    torch.save(dict(student={f'module.head.{k}': torch.zeros(1) for k in head}), d/'dino_vitb16_pretrain.pth')
    for n in ('clip','open_clip'):
        v = small(); v.pos_drop = nn.LayerNorm(24)
        torch.save(dict(state_dict={**v.state_dict(), 'proj': torch.randn(24,16)}), d/f'{n}_vitb16_pretrain.pth.tar')
    net = M.PerceptualModel(**M.dreamsim_args['model_config']['ensemble'], device='cpu', load_dir=str(d), normalize_embeds=True)
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=2, target_modules=['qkv']))
    for k,p in net.named_parameters():
        if 'lora_B' in k: nn.init.normal_(p)
    net.save_pretrained(d/'ensemble_lora'); yield d
    mp.undo()

def test_dreamsim_on_a_small_ensemble(small_ensemble):
    "The package's own loader, networks and distance"
    hub = torch.hub.get_dir(); torch.manual_seed(1); ds = DreamSimFeatures(folder=small_ensemble, batch_size=2); x = torch.rand(5,3,32,32)
    assert torch.hub.get_dir() == hub and not any(p.requires_grad for p in ds.parameters())
    e = ds(x); assert e.shape == (5,24+16+16) and torch.allclose(e.norm(dim=1), torch.ones(5), atol=1e-5)
    big = fit(x, 224); theirs = torch.cat([ds.net(big[i:i+1], big[i+1:i+2]) for i in range(4)])
    assert torch.allclose(1-(e[:-1]*e[1:]).sum(1), theirs, atol=1e-5) and theirs.min() > 0
    assert diversity(e[:2]) == pytest.approx(theirs[0].item(), abs=1e-5)
    with ds.net.disable_adapter(): assert (ds(x)-e).abs().max() > 1e-3        # the adapters were loaded
    y = torch.rand(2,3,32,32, requires_grad=True); ds(y)[:,:3].sum().backward(); assert y.grad.abs().sum() > 0
    assert torch.allclose(ds(x[:1]), e[:1], atol=1e-5)                        # one image

def test_our_call_is_the_packages_own():
    "Every option that we pass exists in the installed package"
    M = pytest.importorskip('dreamsim.model')
    assert {'pretrained','device','cache_dir','normalize_embeds','dreamsim_type'} <= set(inspect.signature(M.dreamsim).parameters)
