"Tables of prompts, pictures and lists of prompts as they come, told apart or refused"

import json

import numpy as np
import pytest
from PIL import Image

from vggflow.common.files import counting_order
from vggflow.common.images import as_rgb
from vggflow.judging.image_sets import saved_images
from vggflow.judging.prompts import load_prompts


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("index.csv", ",description\n0,a cat\n1,a dog\n", "no column 'of prompts'"),
        ("semicolon.csv", "description;\na cat;\n", "no column|may be a name"),
        ("unnamed.csv", "prompt2,,\na,b,c\n", "no column 'of prompts'"),
        ("quote.csv", 'prompt\na cat\n"a big dog\na red fish\n', "quote is not closed"),
        ("twice.csv", "prompt,prompt\na,b\n", "names 'prompt' twice"),
        ("none.json", '[{"":"x","description":"a cat"}]', "no column 'of prompts'"),
        ("numbers.json", "[1, 2]", "row 1 of .* is 1: write prompts"),
        ("lists.json", '[["a"]]', "row 1 of .* write prompts"),
        ("null.jsonl", "null\n", "row 1 of .* is None"),
        ("half.json", '["\\ud800 cat"]', "half a character"),
        ("deep.json", "[" * 100_000, "nested too deeply|cannot be read"),
    ],
)
def test_a_table_that_may_mean_something_else_is_refused(tmp_path, name, text, says):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        load_prompts(str(file))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_spreadsheet_that_names_its_separator_is_read(tmp_path):
    file = tmp_path / "excel.csv"
    file.write_text("sep=;\r\nprompt;seed\r\na cat;1\r\na, b;2\r\n")
    assert load_prompts(str(file)) == ["a cat", "a, b"]


def test_an_index_without_a_name_beside_prompts_is_left_alone(tmp_path):
    file = tmp_path / "pandas.csv"
    file.write_text(",prompt\n0,a cat\n1,a dog\n")
    assert load_prompts(str(file)) == ["a cat", "a dog"]


@pytest.mark.parametrize("limit", [1.5, "3", None, -1])
def test_a_limit_is_a_count(limit):
    with pytest.raises(ValueError, match="limit must be at least 0"):
        load_prompts("animals", limit)


def test_the_see_through_level_of_a_deep_grey_picture_is_white(tmp_path):
    levels = np.array([[0, 30000], [65535, 0]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "clear.png", transparency=0)
    shown = np.array(as_rgb(Image.open(tmp_path / "clear.png")))[..., 0]
    assert shown.tolist() == [[255, round(30000 / 257)], [255, 255]]


def test_a_deep_picture_whose_zero_is_white_is_not_inverted(tmp_path):
    levels = np.array([[0, 65535], [13107, 0]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "w.tif", tiffinfo={262: 0})
    shown = np.array(as_rgb(Image.open(tmp_path / "w.tif")))[..., 0]
    assert shown.tolist() == [[255, 0], [255 - 51, 255]]
    Image.fromarray(levels).save(tmp_path / "b.tif")
    shown = np.array(as_rgb(Image.open(tmp_path / "b.tif")))[..., 0]
    assert shown.tolist() == [[0, 255], [51, 0]]


def test_names_with_digits_of_other_scripts_are_sorted():
    names = ["00001", "٣", "²", "10", "2", "a①"]
    assert sorted(names, key=counting_order)[0] in names


@pytest.mark.parametrize(
    "said",
    [
        {"prompts": "ab"},
        [None, "a"],
        [1, 2],
        ["", "b"],
        [{"a": 1}, {"b": 2}],
        [["a"], ["b"]],
        {"prompts": 5},
    ],
    ids=str,
)
def test_a_list_of_prompts_beside_pictures_is_checked(tmp_path, said):
    for name in ("00000", "00001"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "00000.png")
    (tmp_path / "prompts.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="write a JSON list of the prompts") as caught:
        saved_images(tmp_path)
    assert "\n" not in str(caught.value)
