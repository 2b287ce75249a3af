"Metrics against independent answers"

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch import nn

from vggflow.judging.metrics import (
    alignment,
    diversity,
    fid_beside_floor,
    frechet_distance,
    per_prompt_fid,
)


def by_the_book(a, b):
    "The Gaussian formula with covariance matrices and a matrix root"
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + np.trace(cov_a + cov_b - 2 * root)


def matrix_root(matrix):
    return torch.tensor(scipy.linalg.sqrtm(matrix.numpy()).real)


@pytest.mark.parametrize("n,m,d", [(50, 40, 6), (300, 200, 12), (20, 400, 8)])
def test_frechet_is_the_formula(n, m, d):
    noise = torch.Generator().manual_seed(n)
    a = torch.randn(n, d, generator=noise) @ torch.randn(d, d, generator=noise)
    b = 1.3 * torch.randn(m, d, generator=noise) + 0.5
    exact = by_the_book(a, b)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    assert abs(frechet_distance(a, 1.01 * b) / exact - 1) > 1e-4  # teeth


def test_frechet_of_few_images_in_many_dimensions():
    "Rank-deficient: the formula on the span of the data, where matrix roots behave"
    noise = torch.Generator().manual_seed(0)
    a = torch.randn(8, 300, generator=noise)
    b = torch.randn(9, 300, generator=noise) + 0.2
    found = frechet_distance(a, b)
    # 17 directions hold everything
    span = torch.linalg.svd(torch.cat([a, b]), full_matrices=False)[2].T
    assert found == pytest.approx(frechet_distance(a @ span, b @ span), rel=1e-5)
    cov_a, cov_b = (torch.cov((x @ span).T.double()) for x in (a, b))
    cross = torch.linalg.svdvals(matrix_root(cov_a) @ matrix_root(cov_b)).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    exact = means + cov_a.trace() + cov_b.trace() - 2 * cross
    assert found == pytest.approx(exact.item(), rel=1e-4)


def test_frechet_needs_two():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.randn(1, 3), torch.randn(5, 3))


def test_diversity_is_the_mean_over_pairs():
    features = torch.randn(7, 5)
    unit = nn.functional.normalize(features, dim=1)
    pairs = [1 - (a @ b).item() for a, b in itertools.combinations(unit, 2)]
    assert diversity(features) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity(torch.cat([features[:1]] * 4)) == pytest.approx(0, abs=1e-6)
    assert diversity(3 * features) == pytest.approx(diversity(features), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        diversity(features[:1])


def test_per_prompt_fid_stays_within_prompts():
    a, b = torch.randn(10, 4), torch.randn(10, 4) + 5
    sets = {"p": a, "q": b}
    assert per_prompt_fid(sets, sets) == pytest.approx(0, abs=1e-6)
    assert per_prompt_fid(sets, {"p": b, "q": a}) > 50
    with pytest.raises(ValueError, match="prompt 'q'"):
        per_prompt_fid(sets, {"p": a})


def test_frechet_comes_to_the_distance_of_known_gaussians():
    "Full covariance matrices: the truth from their roots, the estimate from more samples"
    noise, d = torch.Generator().manual_seed(3), 10
    first = torch.randn(d, d, generator=noise)
    second = torch.eye(d) + 0.3 * torch.randn(d, d, generator=noise)
    mean = torch.linspace(-1, 1, d)

    def estimate(n, second):
        one = torch.randn(n, d, generator=noise) @ first.T
        two = mean + torch.randn(n, d, generator=noise) @ second.T
        return frechet_distance(one, two)

    cov_a, cov_b = (m.double() @ m.double().T for m in (first, second))
    root = matrix_root(cov_a)
    cross = matrix_root(root @ cov_b @ root).trace()
    exact = mean.double().square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    few, some, many = (
        np.mean([estimate(n, second) for _ in range(8)]) / exact.item() - 1
        for n in (20, 200, 20_000)
    )
    assert few > 2 * some > 0 and abs(many) < 0.005
    assert abs(estimate(20_000, 1.1 * second) / exact.item() - 1) > 0.01  # teeth


@pytest.mark.parametrize("n,m,d", [(60, 50, 16), (24, 32, 64)])
def test_frechet_is_that_of_torchmetrics(n, m, d):
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(nn.Module):
        num_features = d

        def forward(self, x):
            return x.flatten(1)

    noise, size = torch.Generator().manual_seed(d), (1, d // 8, 8)
    a = torch.rand(n, *size, generator=noise)
    b = 0.7 * torch.rand(m, *size, generator=noise) + 0.1
    theirs = fid.FrechetInceptionDistance(
        feature=Flat(), normalize=False, input_img_size=size
    ).set_dtype(torch.float64)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    ours = frechet_distance(a.flatten(1), b.flatten(1))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_floor_and_sample_sizes_are_reported():
    noise = torch.Generator().manual_seed(0)
    one, two, many = (
        {prompt: torch.randn(n, 40, generator=noise) for prompt in "xy"}
        for n in (16, 16, 64)
    )
    result = fid_beside_floor(one, many, two)
    assert (result.n, result.m, result.prompts) == (16, 64, 2)
    assert result.fid == per_prompt_fid(one, many)
    assert result.base == per_prompt_fid(two, many) > 5
    assert "n = 16" in str(result) and "m = 64" in str(result)
    with pytest.raises(ValueError, match="as many images"):
        fid_beside_floor(one, many, many)


def test_alignment_is_the_mean_cosine():
    a, b = torch.randn(9, 7), torch.randn(9, 7)
    pairs = zip(a.numpy(), b.numpy())
    cosines = [1 - scipy.spatial.distance.cosine(x, y) for x, y in pairs]
    assert alignment(a, b) == pytest.approx(np.mean(cosines), abs=1e-5)
    with pytest.raises(ValueError, match="prompt of each"):
        alignment(a, b[:3])
