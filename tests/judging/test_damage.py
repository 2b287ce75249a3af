"Damage of pictures, and what extractors answer to it"

import pytest
import torch

from vggflow.judging.damage import DAMAGES, damaged
from vggflow.worlds.responses import responses, responses_table


def test_the_blur_is_that_of_torchvision():
    from torchvision.transforms import functional

    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = damaged(x, "blur", 0.5)
    theirs = functional.gaussian_blur(x, 9, 0.04 * 64 * 0.5)
    inner = slice(8, -8)  # torchvision mirrors at the border
    assert (ours - theirs)[..., inner, inner].abs().max() < 1e-4


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_picture_has_its_own_damage(kind):
    "Of a batch as of one picture alone, where nothing is drawn"
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.0, 0.4, 1.0])
    together = damaged(x, kind, strength, torch.Generator().manual_seed(1))
    assert torch.allclose(together[0], x[0], atol=1e-5)
    assert 0 <= together.min() and together.max() <= 1
    if kind not in ("noise", "shift", "tint", "specks"):
        alone = damaged(x[1:2], kind, 0.4)
        assert torch.allclose(together[1:2], alone, atol=1e-5)


def pixels(x):
    return x.flatten(1) - x.mean((1, 2, 3))[:, None]


def test_responses_have_one_unit():
    "A scale of the features changes nothing; the answers are those of the pictures"
    few = dict(pictures=24, size=32, strengths=(0.5,))
    found = responses(pixels, **few)
    larger = responses(lambda x: 7 * pixels(x), **few)
    assert found["vendor"] == pytest.approx(larger["vendor"], rel=1e-4)
    assert found == responses(pixels, **few)
    table = responses_table({"pixels": pixels}, **few).splitlines()
    assert len(table) == 2 + 5 + len(DAMAGES)
    assert f"| vendor | {found['vendor']:.2f} |" in table
