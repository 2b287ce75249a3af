"Metrics against independent answers"
import itertools
import numpy as np, pytest, scipy.linalg, torch
from vggflow.metrics import EfficientNetFeatures, diversity, frechet_distance, per_prompt_fid

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
    from vggflow.emoji import draw_factors, render
    x,y = (render(draw_factors(48, torch.Generator().manual_seed(s))) for s in (0,1)); h = EfficientNetFeatures()
    assert h(x).shape == (48,1280) and not h(x).requires_grad
    same = frechet_distance(h(x), h(y))
    assert frechet_distance(h(x), h((y+.08*torch.randn(y.shape)).clamp(0,1))) > 1.2*same
    assert diversity(h(y[:1].repeat(16,1,1,1)+.005*torch.randn(16,3,32,32))) < .3*diversity(h(y))
