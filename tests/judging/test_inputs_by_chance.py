"""Prompts, pictures and rewards of every kind: the right value, or one line

`VGGFLOW_EXAMPLES=2000` asks for the long form."""

import csv
import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vggflow.common.trial import check_scores, try_reward
from vggflow.judging.image_sets import read_images
from vggflow.judging.prompts import read_prompt_file

often = settings(max_examples=int(os.environ.get("VGGFLOW_EXAMPLES", 40)), deadline=None)
ERRORS = (ValueError, OSError)


def in_one_line(read, *args):
    "What is read, or None where it is refused in one line"
    try:
        return read(*args)
    except ERRORS as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


# --- prompts

letters = st.characters(codec="utf-8", exclude_characters="\0\r")
prompt = st.text(letters, min_size=1, max_size=20).filter(str.strip)
prompts = st.lists(prompt, min_size=1, max_size=5)


def as_read(texts):
    "Each once, without the spaces around it"
    return list(dict.fromkeys(text.strip() for text in texts))


@often
@given(
    texts=prompts, mark=st.sampled_from(",;\t|"), name=st.sampled_from(["prompt", "TEXT"])
)
def test_a_csv_of_any_separator_is_read_back(here, texts, mark, name):
    written = io.StringIO()
    rows = csv.writer(written, delimiter=mark)
    rows.writerow(["id", name])
    rows.writerows(enumerate(texts))
    file = here / "a.csv"
    file.write_bytes(written.getvalue().encode())
    assert read_prompt_file(file) == as_read(texts)


@often
@given(texts=prompts, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_lines_of_any_encoding_are_read_back(here, texts, encoding):
    lines = [line for line in (text.replace("\n", " ") for text in texts) if line.strip()]
    file = here / "a.txt"
    file.write_bytes("\n".join(lines).encode(encoding))
    if encoding == "utf-8" and lines[0].startswith("\ufeff"):
        return  # the mark of an encoding
    assert read_prompt_file(file) == as_read(lines)


@often
@given(texts=prompts, listed=st.booleans())
def test_json_is_read_back(here, texts, listed):
    file = here / ("a.json" if listed else "a.jsonl")
    dump = json.dumps(texts, ensure_ascii=False)
    rows = (json.dumps(dict(prompt=text), ensure_ascii=False) for text in texts)
    file.write_bytes((dump if listed else "\n".join(rows)).encode())
    assert read_prompt_file(file) == as_read(texts)


@often
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)),
    ending=st.sampled_from(["txt", "csv", "tsv", "json", "jsonl"]),
)
def test_any_bytes_are_prompts_or_refused(here, content, ending):
    file = here / f"b.{ending}"
    file.write_bytes(content)
    found = in_one_line(read_prompt_file, file)
    assert found is None or all(text == text.strip() and text for text in found)


# --- pictures


@often
@given(
    mode=st.sampled_from(["1", "L", "RGB", "P", "CMYK", "I;16", "LA", "RGBA"]),
    ending=st.sampled_from(["png", "tif", "webp", "bmp"]),
    seed=st.integers(0, 999),
)
def test_pictures_are_as_bright_as_pil_shows_them(here, mode, ending, seed):
    noise = np.random.default_rng(seed)
    if mode == "I;16":
        levels = noise.integers(0, 65536, (6, 5), dtype=np.uint16)
        picture, want = Image.fromarray(levels), np.stack([levels / 65535] * 3)
    else:
        rgba = noise.integers(0, 256, (6, 5, 4), dtype=np.uint8)
        rgba[..., 3] = 255  # what is half seen has no one colour
        picture = Image.fromarray(rgba).convert("RGB").convert(mode)
        want = np.array(picture.convert("RGB")).transpose(2, 0, 1) / 255
    file = here / f"a.{ending}"
    try:
        picture.save(file, **({"lossless": True} if ending == "webp" else {}))
    except (OSError, KeyError):
        return  # PIL has no such file
    if np.array(Image.open(file)).ndim != np.array(picture).ndim and mode == "I;16":
        return  # the file has eight bits
    assert np.abs(read_images([file])[0].numpy() - want).max() < 1.01 / 255


@often
@given(content=st.binary(max_size=80))
def test_any_bytes_are_a_picture_or_refused(here, content):
    file = here / "b.png"
    file.write_bytes(content)
    in_one_line(read_images, [file])


# --- rewards

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
kinds = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
numbers = st.sampled_from([0.5, -3.0, float("nan"), float("inf")])


@often
@given(shape=shapes, kind=kinds, value=numbers, grad=st.booleans())
def test_what_a_reward_returns_is_one_number_an_image_or_named(shape, kind, value, grad):
    images = torch.rand(2, 3, 4, 4, requires_grad=True)

    def reward(x, prompts):
        fill = torch.full(shape, 0.0 if kind in (torch.int64, torch.bool) else value)
        return (fill + (x.mean() if grad else 0)).to(kind)

    found = in_one_line(try_reward, reward, "reward 'mine'", images, ["a", "b"])
    good = shape == (2,) and kind.is_floating_point and np.isfinite(value) and grad
    assert (found is not None) == good


@often
@given(st.one_of(st.none(), st.floats(), st.text(), st.lists(st.floats()), st.booleans()))
def test_what_is_no_tensor_is_named(value):
    assert in_one_line(check_scores, value, "reward 'mine'", torch.rand(2, 3, 4, 4)) is None
    with pytest.raises(ValueError, match="'mine' returned a"):
        check_scores(value, "reward 'mine'", torch.rand(2, 3, 4, 4))
