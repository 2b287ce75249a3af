"Names made of contents: what they notice, and what they do not"

import hashlib
import importlib.util

import torch
from toys import Toy, brightness

from vggflow.judging.fingerprints import base_fingerprint, checksum
from vggflow.judging.rewards import WeightedSum


class Net(torch.nn.Module):
    def __init__(self, n=100, scale=1.0):
        super().__init__()
        self.big = torch.nn.Linear(n, n)
        self.scale = scale
        torch.nn.init.ones_(self.big.weight)
        torch.nn.init.zeros_(self.big.bias)


def scaled(k):
    return lambda images, prompts: k * images.mean((1, 2, 3))


def test_functions_are_named_by_their_code():
    assert checksum(brightness) == checksum(brightness)
    assert checksum(brightness) != checksum(lambda x, p: x.mean((1, 2, 3)) * 2)
    assert checksum(dict(a=1)) != checksum(dict(a=2))


def test_helpers_in_the_file_of_a_function_count(tmp_path):
    file = tmp_path / "r.py"

    def function(text):
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("r", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.f

    body = "def helper(x): return {}*x\ndef f(x, p): return helper(x.mean((1, 2, 3)))\n"
    first, second = (function(body.format(k)) for k in (1, 2))
    assert checksum(first) == checksum(second)  # the file as it is now
    before = checksum(first)
    file.write_text(body.format(1))
    assert checksum(first) != before


def test_a_network_is_named_by_weights_and_settings():
    one, two = Net(), Net()
    assert checksum(one) == checksum(two) != checksum(Net(scale=2.0))
    two.scale = 2.0
    assert checksum(one) != checksum(two)
    assert checksum(one, whole=False) == checksum(two, whole=False)
    two.scale = 1.0
    two.eval()
    assert checksum(one) == checksum(two)
    with torch.no_grad():
        two.big.weight[37, 41] += 1e-6
    assert checksum(one) != checksum(two)
    assert checksum(one.bfloat16()) != checksum(Net())


def test_an_adapter_is_no_part_of_the_frozen_weights():
    one, two = Net(), Net()
    for net in (one, two):
        net.lora_a = torch.nn.Linear(3, 3)
    assert checksum(one, whole=False) == checksum(two, whole=False)
    assert checksum(one) != checksum(two)


def test_values_that_a_function_holds_count():
    assert checksum(scaled(1)) == checksum(scaled(1)) != checksum(scaled(2))


def test_a_sum_is_named_by_its_weights_and_functions():
    bright, dark = (WeightedSum((scaled(k), 1.0)) for k in (1, -1))
    assert checksum(bright) != checksum(dark)
    assert checksum(bright) == checksum(WeightedSum((scaled(1), 1.0)))
    assert checksum(bright) != checksum(WeightedSum((scaled(1), 2.0)))


def test_prompts_are_fingerprinted_in_chunks():
    "No more at once than the batch; what is one chunk has the name that it had"
    prompts, flow = list("abcdefg"), Toy()
    key = base_fingerprint(flow, prompts, 1)
    assert flow.drawn == [7]
    x = flow.prior(7, prompts, generator=torch.Generator().manual_seed(7))
    y = flow.decode(flow.base_velocity(x, torch.full((7,), 0.5), prompts))
    content = y.detach().numpy().tobytes() + repr((prompts, 1)).encode()
    assert key == hashlib.sha256(content).hexdigest()[:20]
    flow.drawn.clear()
    base_fingerprint(flow, prompts, 1, 3)
    assert flow.drawn == [3, 3, 1]
