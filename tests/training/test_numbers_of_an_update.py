"Random numbers and the learning rate of each update"

import pytest
import torch

from vggflow.theory.flow import GaussianFlow
from vggflow.training.config import FinetuneConfig
from vggflow.training.update import draw_samples, follow_weights, learning_rate_factor


def noise_of(update: int, seed: int = 0):
    "Noise, and what a method draws after it"
    flow = GaussianFlow([0.0, 0.0], 0.6)
    samples = draw_samples(flow, FinetuneConfig(batch_size=4, seed=seed), update=update)
    return torch.cat([samples.x0, samples.uniform(3)], dim=1)


def test_every_update_and_every_sample_draws_numbers_of_its_own():
    first = noise_of(0)
    assert torch.equal(first, noise_of(0))
    for other in (noise_of(1), noise_of(0, seed=1), first.roll(1, 0)):
        assert (first != other).all()


def test_the_cosine_falls_from_one_to_zero():
    config = FinetuneConfig(updates=10, schedule="cosine")
    factors = [learning_rate_factor(config, update) for update in range(11)]
    assert factors[0] == 1 and factors[10] == pytest.approx(0, abs=1e-12)
    assert factors[5] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)


def test_the_average_keeps_the_share_that_its_decay_says():
    average = dict(weight=torch.zeros(3))
    follow_weights(average, dict(weight=torch.ones(3)), decay=0.9)
    assert torch.allclose(average["weight"], torch.full((3,), 0.1))
