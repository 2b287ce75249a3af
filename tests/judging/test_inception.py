"FID with Inception beside its formula; where the weights come from; what a program reads"

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vggflow.judging.image_sets import evaluate_sets
from vggflow.judging.inception import (
    PUBLISHED,
    inception_fid,
    inception_numbers,
    inception_weights,
)


class RandomInception(FeatureExtractorInceptionV3):
    "The network without its download"

    def load_state_dict(self, *_):
        torch.manual_seed(0)
        for part in self.modules():
            if isinstance(part, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(part.weight)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of weights in the published layout"
    file = tmp_path_factory.mktemp("inception") / PUBLISHED
    torch.save({}, file)
    net = RandomInception("inception-v3-compat", ["2048"], str(file))
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Saved images of two prompts, of a model, its base and the base again"
    root = tmp_path_factory.mktemp("sets")
    noise = np.random.default_rng(0)
    for name, bright in dict(finetuned=90, base=0, **{"base-again": 0}).items():
        for place in range(2):
            folder = root / name / f"{place:05}"
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = noise.integers(0, 160, (48, 48, 3), dtype=np.uint8) + bright
                file = folder / f"{number:05}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(file)
        drawn = dict(prompts=["a", "b"])
        (root / name / "drawn.json").write_text(json.dumps(drawn))
    return {name: files_of(root / name) for name in ("finetuned", "base", "base-again")}


def files_of(folder):
    "Files of each prompt"
    return {p: sorted((folder / f"{k:05}").glob("*.png")) for k, p in enumerate("ab")}


def pooled(of):
    return [file for files in of.values() for file in files]


def features(files, weights):
    "By the network alone, float64"
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    images = [np.array(Image.open(file).convert("RGB")) for file in files]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return net(images)[0].double().numpy()


def test_it_is_the_distance_of_the_gaussians_of_inceptions_features(sets, weights):
    one, other = (features(pooled(sets[k]), weights) for k in ("finetuned", "base"))
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    mean = ((one.mean(0) - other.mean(0)) ** 2).sum()
    wanted = mean + np.trace(covariances[0] + covariances[1] - 2 * root)
    ours = inception_fid(pooled(sets["finetuned"]), pooled(sets["base"]), weights)
    assert ours == pytest.approx(wanted, rel=0.01)
    floor = inception_fid(pooled(sets["base-again"]), pooled(sets["base"]), weights)
    assert floor < ours / 2, "the brighter set is the farther one"


def test_evaluation_json_has_it_and_every_key_is_documented(sets, weights, tmp_path):
    def brightness(images, prompts=None):
        return images.mean((1, 2, 3))

    def small(images):
        return torch.nn.functional.avg_pool2d(images, 12).flatten(1)

    judges = dict(rewards=dict(reward=brightness), features=dict(perceptual=small))
    about = dict(reward=["mine"], model="", lora="", seed=1)
    how = dict(progress=False, about=about)
    record = evaluate_sets(tmp_path, sets, **judges, **how, inception=weights)
    assert record == json.loads((tmp_path / "evaluation.json").read_text())
    assert record["version"] == 1 and set(record["inception"]["fid"]) == {
        "finetuned",
        "base-again",
    }
    assert record["inception"]["images"] == 8
    chapter = json.loads(Path("nbs/4_judging/image_sets.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in chapter["cells"])
    first_column = re.findall(r"^\| (`[^|]+) \|", text, re.M)
    documented = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    assert set(record) == documented
    without = evaluate_sets(tmp_path / "n", sets, **judges, **how)
    assert without["inception"] == {} and without["sets"] == record["sets"]


def test_weights_are_found_in_torchs_cache_or_by_name(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception_weights() is None and inception_weights("none") is None
    assert inception_weights(str(weights)) == weights
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / PUBLISHED).symlink_to(weights)
    assert inception_weights().name == PUBLISHED
    assert inception_numbers(dict(finetuned={}), weights) == {}, "nothing to compare with"
    monkeypatch.setattr("vggflow.judging.inception.fidelity_version", lambda: "")
    assert inception_weights() is None
    with pytest.raises(ValueError, match=r"pip install vggflow\[fid\]"):
        inception_weights(str(weights))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("run_by_a_pickle"),)


def test_a_file_that_runs_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="has no weights of torch-fidelity's Inception"):
        inception_weights("evil.pth")
    assert not Path("run_by_a_pickle").exists()


def test_saved_images_of_any_depth_are_read_as_everywhere(tmp_path, weights):
    shade = np.full((48, 48), 40000, np.uint16)
    Image.fromarray(shade).save(tmp_path / "deep.png")
    grey = np.full((48, 48, 3), round(40000 / 257), np.uint8)
    Image.fromarray(grey).save(tmp_path / "plain.png")
    Image.fromarray(grey + 30).save(tmp_path / "brighter.png")
    names = ("deep.png", "plain.png", "brighter.png")
    deep, plain, brighter = ([tmp_path / name] * 2 for name in names)
    assert inception_fid(deep, plain, weights) == pytest.approx(0, abs=1e-3)
    assert inception_fid(deep, brighter, weights) > 0.1
