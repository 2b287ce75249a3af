"""What an update costs: passes and operations beside the loop that has those of the public preview."""
import csv, subprocess, sys
from pathlib import Path
import pytest, torch
from vggflow.methods.cost import counted, flops, one_update, reference_update, update_passes
from vggflow.theory.flow import GaussianFlow, time_grid
from vggflow.methods.methods import AdjointMatching, Batch, VGGFlow, VGGFlowPMP
from vggflow.train import method_of

ROOT = Path(__file__).parents[2]

def batch(n=3, steps=8, transitions=4):
    torch.manual_seed(0); flow = GaussianFlow(torch.zeros(2), torch.full((2,), .6)); g = torch.Generator().manual_seed(0)
    return flow,Batch(flow.prior(n, generator=g), time_grid(steps), None, g, transitions)

def passes(method):
    flow,b = batch(); whole,part = update_passes(flow, lambda x, _: x.sum(1), lambda f,r,b: one_update(f, r, method, b), b)
    return (whole-part).per(3*4)

@pytest.mark.parametrize('method,forward,backward,gradients', [
    (VGGFlow(), 2, 2, 2), (method_of('sd3', 'VGG-Flow'), 2, 2, 1), (VGGFlow(reuse=True), 2, 2, 1), (VGGFlow(correction=False), 2, 1, 1), (VGGFlow(mode='trajectory'), 2, 2, 2), (VGGFlow(mode='exact'), 3, 2, 2),
    (VGGFlowPMP(), 2+8/4, 1+8/4, 1/4), (AdjointMatching(), 2+8/4, 1+8/4, 1/4)], ids=lambda m: getattr(m, 'mode', '')+'-reuse'*getattr(m, 'reuse', False) or (type(m).__name__ if not isinstance(m, (int,float)) else str(m)))
def test_passes_of_a_method(method, forward, backward, gradients):
    p = passes(method); assert (p['forward'],p['backward'],p['reward_backward'])==pytest.approx((forward,backward,gradients))

def test_the_reference_has_the_passes_that_were_counted():
    flow,b = batch(); whole,part = update_passes(flow, lambda x, _: x.sum(1), reference_update, b)
    assert (whole-part).per(3*4)==dict(forward=13, backward=11, reward=3, reward_backward=3)

def test_a_tap_changes_nothing():
    flow,b = batch(); reward = lambda x, _: x.sum(1)
    one = lambda r: (lambda m: (m.setup(flow, r), torch.manual_seed(1), b.generator.manual_seed(2), m.loss(flow, r, b)[0])[-1])(VGGFlow())
    torch.manual_seed(3); a = one(reward)
    with counted(flow, reward) as (_,r): torch.manual_seed(3); c = one(r)
    assert torch.equal(a, c)

def test_operations_of_a_product():
    a,w = torch.randn(3, 5),torch.randn(5, 7, requires_grad=True)
    assert flops(lambda: a@w)==2*3*5*7 and flops(lambda: (a@w).sum().backward())==2*2*3*5*7
    assert flops(lambda: torch.func.grad(lambda y: (y@w).sum())(a))==2*2*3*5*7   # forward, and the gradient of y; w is a constant here

def test_an_update_costs_a_third_of_the_reference(tmp_path):
    "The numbers that issue and README promise, by the benchmark itself, at its small configuration with guidance"
    p = subprocess.run([sys.executable, ROOT/'benchmarks/sd3_gpu.py', '--size', 'small', '--repeats', '0', '--steps', '8', '--transitions', '2', '--methods', 'VGG-Flow', 'VGG-Flow, reuse', '--device', 'cpu', '--out', tmp_path], capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-2000:]
    ref,ours,one = csv.DictReader((tmp_path/'sd3-cost-small-cpu.csv').open())
    assert (float(ref['forward']),float(ref['backward']),float(ref['reward_backward']))==(13,11,3)
    assert float(ours['forward'])<=3 and float(ours['backward'])<=3 and float(ours['reward_backward'])==2
    assert float(one['reward_backward'])==1
    for r in (ours, one): assert float(r['tflop_training_ratio'])<=.30 and float(r['tflop_ratio'])<=.45
