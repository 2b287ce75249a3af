"A name that a user wrote is found, or answered in one line that helps."

import dataclasses
import pickle

import pytest

from vggflow.common.names import choose, is_import_path, load_object


def test_a_mistyped_name_is_answered_with_the_nearest():
    assert choose("red", ["red", "blue"], "colour") == "red"
    with pytest.raises(ValueError, match="^no colour 'rde'; did you mean 'red'\\?$"):
        choose("rde", ["red", "blue"], "colour")
    with pytest.raises(ValueError, match="^no colour 'x'; there are: blue, red$"):
        choose("x", ["red", "blue"], "colour")


@pytest.mark.parametrize("text", ["my.py:Mine", "/a b/my.py:Mine", "package.module:Mine"])
def test_an_import_path_is_known_by_its_form(text):
    assert is_import_path(text)


@pytest.mark.parametrize(
    "text", ["VGG-Flow", "my.py", "my.py:", ":Mine", "a-b:c", "owner/name"]
)
def test_a_name_is_no_import_path(text):
    assert not is_import_path(text)
    with pytest.raises(ValueError, match="write module:name or path/to/file.py:name"):
        load_object(text, "method")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    width: int = 3\n"
    )
    return file


def test_an_object_of_a_file_is_one_class_however_often_it_is_asked_for(file):
    Mine = load_object(f"{file}:Mine", "method")
    assert load_object(f"{file}:Mine", "method") is Mine
    assert dataclasses.asdict(Mine()) == dict(width=3)
    assert pickle.loads(pickle.dumps(Mine(4))) == Mine(4)


def test_a_changed_file_is_read_again(file):
    load_object(f"{file}:Mine", "method")
    file.write_text("Mine = 'something else'\n")
    assert load_object(f"{file}:Mine", "method") == "something else"


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("value = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_object("only_here:value", "reward") == 5


@pytest.mark.parametrize(
    "source,name,says",
    [
        (
            "x = 1\ny = x / 0\n",
            "f",
            r"mine.py, line 2: ZeroDivisionError: division by zero",
        ),
        ("def f(:\n", "f", r"mine.py, line 1: SyntaxError"),
        (
            "import no_such_thing\n",
            "f",
            r"line 1: ModuleNotFoundError: No module named 'no_such",
        ),
        ("class Mine: pass\n", "Mien", r"has no 'Mien'; did you mean 'Mine'\?"),
        ("raise ValueError('a\\nb')\n", "f", r"line 1: ValueError: a"),
    ],
)
def test_what_cannot_be_imported_says_which_file_which_name_and_why(
    tmp_path, source, name, says
):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=says) as error:
        load_object(f"{tmp_path}/mine.py:{name}", "method")
    assert str(error.value).startswith(
        f"method '{tmp_path}/mine.py:{name}' cannot be imported"
    )
    assert "\n" not in str(error.value)


def test_a_missing_file_or_module_is_named():
    with pytest.raises(ValueError, match="there is no file /none/mine.py"):
        load_object("/none/mine.py:Mine", "model")
    with pytest.raises(
        ValueError, match="reward 'no_module:f' .*No module named 'no_module'"
    ):
        load_object("no_module:f", "reward")
