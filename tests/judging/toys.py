"A flow, a reward and features that cost nothing"

from pathlib import Path

import torch

from vggflow.theory.flow import GaussianFlow

PROMPTS = ["a", "b", "c"]


class Toy(GaussianFlow):
    "Images of 8 x 8 from a Gaussian; notes what it draws"

    def __init__(self, mean=0.0):
        torch.manual_seed(0)
        super().__init__(torch.full((192,), mean), torch.full((192,), 0.5))
        self.drawn = []

    def prior(self, n, cond=None, generator=None):
        return torch.randn(n, 192, generator=generator)

    def decode(self, x):
        self.drawn.append(len(x))
        return (0.5 + 0.1 * x).view(-1, 3, 8, 8)

    def describe(self):
        return dict(model="toy", guidance_scale=1.0)


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


def block_means(images):
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


def all_files(folder):
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
