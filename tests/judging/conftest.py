"Tiny reward models, made once"

import numpy as np
import pytest
import torch
from PIL import Image

from vggflow.common.torchvision_cpu import cure

cure()  # before transformers meets torchvision
import tiny_rewards  # noqa: E402


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    "A CLIP as a hub would give it, and an aesthetic head"
    folder = tmp_path_factory.mktemp("clip")
    tiny_rewards.save_tiny_clip(folder)
    return folder


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    "ImageReward as a hub would give it"
    folder = tmp_path_factory.mktemp("blip")
    tiny_rewards.save_tiny_blip(folder)
    return folder


@pytest.fixture(scope="session")
def pictures():
    "PIL images of the network's size, so that resizing is the identity, and as tensors"
    shape = (3, tiny_rewards.SIZE, tiny_rewards.SIZE, 3)
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tensors = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    return [Image.fromarray(array) for array in raw], tensors
