"Prompt sets: every form that text can name them in, and one line for what cannot be read"

import json

import pytest

from vggflow.common.data import prompts_folder
from vggflow.judging.prompts import (
    PROMPT_SETS,
    SIMPLE_ANIMALS,
    load_prompts,
    read_prompt_file,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("VGGFLOW_PROMPTS", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    return tmp_path


def write(file, text):
    file.write_text(text, encoding="utf8")
    return file


@pytest.mark.parametrize(
    "name,text,column,want",
    [
        ("a.txt", "\ufeffa red fox\n\n  an owl \na red fox\n", "", ["a red fox", "an owl"]),
        (
            "a.csv",
            'id,prompt\n1,"a cat, asleep"\n2,\n3,b\n',
            "",
            ["a cat, asleep", "b"],
        ),
        ("a.csv", 'id,what\n1,"two\nlines"\n', "what", ["two\nlines"]),
        ("a.tsv", "Prompts\tseed\na\t1\nb\t2\n", "", ["a", "b"]),
        ("a.csv", "anything\nx\n", "anything", ["x"]),
        ("a.csv", "id;prompt;seed\n1;a cat, asleep;2\n", "", ["a cat, asleep"]),
        ("a.csv", "id\tPROMPT\n1\ta\n2\tb\n", "", ["a", "b"]),
        ("a.csv", "id|what\n1|a, b\n", "what", ["a, b"]),
        ("a.csv", "prompt\na cat, asleep\nb\n", "", ["a cat, asleep", "b"]),
        ("a.csv", "a red fox\nan owl\n", "", ["a red fox", "an owl"]),
        ("a.csv", '"two\nlines"\nan owl\n', "", None),
        ("a.csv", "Caption \r\na fox\r\nb\r\n", "", ["a fox", "b"]),
        (
            "a.txt",
            "a\u2028b\nc\x85d\r\ne\x0cf\rg",
            "",
            ["a\u2028b", "c\x85d", "e\x0cf", "g"],
        ),
        ("a.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": null}\n', "", ["a\u2028b"]),
        ("a.jsonl", '{"any": "x"}\n{"any": "y"}\n', "", ["x", "y"]),
        (
            "a.jsonl",
            '{"caption": "one"}\n\n{"caption": "two"}\n',
            "caption",
            ["one", "two"],
        ),
        ("a.jsonl", '"é"\n"b"\n', "", ["é", "b"]),
        ("a.json", '["x", "y"]', "", ["x", "y"]),
        ("a.json", '[{"text": "x"}]', "", ["x"]),
    ],
)
def test_files(here, name, text, column, want):
    file = write(here / name, text)
    if want is None:
        with pytest.raises(ValueError, match="write a line 'prompt' before it"):
            read_prompt_file(file, column)
        return
    assert read_prompt_file(file, column) == want
    assert load_prompts(f"{file}:{column}" if column else str(file)) == want


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_says_its_encoding(here, encoding):
    (here / "a.csv").write_text("prompt;n\nein Bär;1\n", encoding=encoding)
    assert load_prompts(here / "a.csv") == ["ein Bär"]


def test_parquet(here):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(dict(caption=["a", "b", "a"])).to_parquet(here / "a.parquet")
    assert load_prompts(f"{here}/a.parquet:caption") == ["a", "b"]


def test_what_is_too_large_is_not_read(here):
    "A file of holes takes no place on the disk, and 300 MiB where it is read"
    for name in ("a.txt", "a.csv", "a.jsonl"):
        with (here / name).open("wb") as file:
            file.truncate(300 << 20)
        with pytest.raises(ValueError, match="has 300 MiB.* at most 256"):
            load_prompts(str(here / name))


def test_a_parquet_that_unpacks_to_too_much_is_not_read(here):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame(dict(caption=[f"a {n:09d} " * 900 for n in range(30_000)]))
    table.to_parquet(here / "a.parquet", compression="zstd")
    assert (here / "a.parquet").stat().st_size < 2**25
    with pytest.raises(ValueError, match="at most 256"):
        load_prompts(f"{here}/a.parquet:caption")


def test_names_files_and_prompts_together(here):
    write(here / "sets" / "mine.txt", "one\ntwo\n")
    write(here / "sets" / "pickapic.txt", "three\none\n")
    found = load_prompts(["@mine.txt", "a cat: asleep", "pickapic", "animals"])
    assert found[:5] == ["one", "two", "a cat: asleep", "three", "cat"]
    assert load_prompts("animals") == SIMPLE_ANIMALS and len(load_prompts("emoji")) == 24
    assert load_prompts(None) == load_prompts([]) == load_prompts("") == []
    every_ninth = [SIMPLE_ANIMALS[i * 9] for i in range(5)]
    assert load_prompts("animals", 5) == every_ninth
    assert load_prompts("a (b.c) 3.5", 7) == ["a (b.c) 3.5"]


def test_a_file_that_is_there_is_a_file(here, monkeypatch):
    "Whatever its suffix; what is none and looks like none is a prompt"
    monkeypatch.chdir(here)
    (here / "sets" / "bare").write_text("two\n")
    files = {"P.TXT": "x\n", "notes": "x\n", "A.CSV": "id,prompt\n1,x\n"}
    files["B.JSONL"] = '{"prompt": "x"}\n'
    for name, text in files.items():
        write(here / name, text)
        assert load_prompts(name) == ["x"]
    assert load_prompts("A.CSV:prompt") == ["x"] and load_prompts("@bare") == ["two"]
    assert load_prompts("a cat: asleep") == ["a cat: asleep"]
    assert load_prompts("x" * 500) == ["x" * 500]
    with pytest.raises(ValueError, match="limit must be at least 0"):
        load_prompts("animals", -1)


def test_the_folder_of_a_clone(here, monkeypatch):
    monkeypatch.delenv("VGGFLOW_PROMPTS")
    monkeypatch.delenv("VGGFLOW_ROOT", raising=False)
    (here / "experiments.toml").touch()
    (here / "deep").mkdir()
    monkeypatch.chdir(here / "deep")
    assert prompts_folder() == here / "data" / "prompts"


def write_what_cannot_be_read(here):
    (here / "h.txt").write_bytes(b"\xff\xfe\xff")
    files = {
        "e.csv": "id,n\n1,2\n",
        "f.txt": "\n \n",
        "g.json": '{"a": 1}',
        "i.jsonl": "no json",
        "j.jsonl": '{"prompt": "a"}\n{"text": "b"}',
        "k.jsonl": '{"prompt": "a"}\n"b"',
        "l.jsonl": '{"prompt": 3}',
        "m.jsonl": '{"prompt": "a"}\n\n{"prompt": ',
        "n.csv": "cat\ndog\n",
        "o.csv": "id,prompt\n1,a cat\n2,a dog, asleep\n",
        "q.txt": "a\0c\0a\0t\0",
        "r.json": '["a", null]',
        "s.json": "null",
    }
    for name, text in files.items():
        write(here / name, text)


@pytest.mark.parametrize(
    "spec,says",
    [
        ("animal", "did you mean 'animals'"),
        ("drawbnch", "did you mean 'drawbench'"),
        ("@no.txt", "no file of prompts"),
        ("/no/where.csv", "no file of prompts"),
        ("{}/e.csv", "no column"),
        ("{}/e.csv:caption", "no column 'caption'"),
        ("{}/f.txt:caption", "it has no column"),
        ("{}/NO.TXT", "no file of prompts"),
        ("{}/j.jsonl", "row 2 of .* has no column"),
        ("{}/k.jsonl", "row 2 of .* is a str"),
        ("{}/l.jsonl", "a prompt is text"),
        ("{}/f.txt", "no prompts in"),
        ("{}/g.json", "holds a dict"),
        ("{}/h.txt", "UTF-8"),
        ("{}/i.jsonl", "cannot be read as .jsonl .* row 1 is no JSON"),
        ("{}/m.jsonl", "row 3 is no JSON"),
        ("{}/n.csv", "its first line, 'cat', may be a name or a prompt"),
        ("{}/o.csv", "row 2 has 3 columns, the first line 2"),
        ("{}/n.csv:what", "no column 'what'"),
        ("{}/q.txt", "zero bytes"),
        ("{}/r.json", "row 2 of .* is a NoneType"),
        ("{}/s.json", "holds a NoneType"),
        ("{}", "is a folder: name a file of prompts in it"),
    ],
)
def test_one_line_for_what_cannot_be_read(here, spec, says):
    write_what_cannot_be_read(here)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        load_prompts(spec.format(here))
    assert "\n" not in str(caught.value)


def test_a_column_of_numbers_that_is_named_is_read_as_text(here):
    write_what_cannot_be_read(here)
    assert load_prompts(f"{here}/e.csv:n") == ["2"]


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_published_sets_from_the_hub(here, monkeypatch, name):
    repository, files, column = PROMPT_SETS[name]
    folder, asked = here / "snapshot", []
    for part in ("data", "benchmark"):
        (folder / part).mkdir(parents=True)

    def snapshot(repo, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(OSError, match="write .*txt"):
        load_prompts(name)
    assert asked == [(repository, "dataset", list(files))]
    if column == "caption":
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        shard = files[0].replace("*", "00000-of-00001") + ".parquet"
        pandas.DataFrame({column: ["a", "b", "a"]}).to_parquet(folder / shard)
    elif column:
        write(folder / "x.csv", f"{column},Category\na,c\nb,d\n")
    for file in [] if column else files:
        write(folder / file, json.dumps(["a", file]))
    assert load_prompts(name) == ["a", *(["b"] if column else files)]


def test_published_sets_offline(here, monkeypatch):
    def away(*args, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(OSError, match="write drawbench.txt there") as caught:
        load_prompts("drawbench")
    assert "sayakpaul/drawbench" in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_of_weights_is_said_not_to_be_used(here):
    (here / "weighted.csv").write_text("prompt,weight\na cat,3\na dog,1\n")
    with pytest.warns(UserWarning, match="'weight', which is not used"):
        assert load_prompts(here / "weighted.csv") == ["a cat", "a dog"]
