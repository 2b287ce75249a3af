"Orders of the two integrators, on a flow whose end is known"

import math

import pytest
import torch

from vggflow.theory.flow import GaussianFlow, sample, time_grid


@pytest.mark.parametrize("method,order", [("euler", 1), ("midpoint", 2)])
def test_the_error_falls_with_the_order_of_the_integrator(method, order):
    flow = GaussianFlow([1.0, -2.0], [0.5, 2.0]).double()
    x0 = flow.prior(64, generator=torch.Generator().manual_seed(0))
    end = flow.mean + flow.std * x0

    def error(steps):
        with torch.no_grad():
            path = sample(flow, x0, time_grid(steps).double(), base=True, method=method)
        return (path.x1 - end).norm().item()

    measured = math.log2(error(160) / error(320))
    assert measured > order - 0.1  # midpoint gains one more by this flow's symmetry
