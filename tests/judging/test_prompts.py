"Prompt sets: every form that text can name them in, and one line for what cannot be read"
import json
import pytest
from vggflow.judging import prompts as P
from vggflow.judging.prompts import PROMPT_SETS, SIMPLE_ANIMALS, load_prompts, read_prompt_file

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv('VGGFLOW_PROMPTS', str(tmp_path/'sets')); (tmp_path/'sets').mkdir(); return tmp_path

def write(f, text): f.write_text(text, encoding='utf8'); return f

@pytest.mark.parametrize('name,text,column,want', [
    ('a.txt', '﻿a red fox\n\n  an owl \na red fox\n', '', ['a red fox', 'an owl']), ('a.csv', 'id,prompt\n1,"a cat, asleep"\n2,\n3,b\n', '', ['a cat, asleep', 'b']),
    ('a.csv', 'id,what\n1,"two\nlines"\n', 'what', ['two\nlines']), ('a.tsv', 'Prompts\tseed\na\t1\nb\t2\n', '', ['a', 'b']), ('a.csv', 'anything\nx\n', '', ['x']),
    ('a.jsonl', '{"caption": "one"}\n\n{"caption": "two"}\n', 'caption', ['one', 'two']), ('a.jsonl', '"é"\n"b"\n', '', ['é', 'b']), ('a.json', '["x", "y"]', '', ['x', 'y']), ('a.json', '[{"text": "x"}]', '', ['x'])])
def test_files(here, name, text, column, want):
    f = write(here/name, text); assert read_prompt_file(f, column) == want == load_prompts(f'{f}:{column}' if column else str(f))

def test_parquet(here):
    pd = pytest.importorskip('pandas'); pytest.importorskip('pyarrow'); pd.DataFrame(dict(caption=['a', 'b', 'a'])).to_parquet(here/'a.parquet'); assert load_prompts(f'{here}/a.parquet:caption') == ['a', 'b']

def test_names_files_and_prompts_together(here):
    write(here/'sets'/'mine.txt', 'one\ntwo\n'); write(here/'sets'/'pickapic.txt', 'three\none\n')
    assert load_prompts(['@mine.txt', 'a cat: asleep', 'pickapic', 'animals'])[:5] == ['one', 'two', 'a cat: asleep', 'three', 'cat']
    assert load_prompts('animals') == SIMPLE_ANIMALS and load_prompts(None) == load_prompts([]) == load_prompts('') == [] and len(load_prompts('emoji')) == 24
    assert load_prompts('animals', 5) == [SIMPLE_ANIMALS[i*9] for i in range(5)] and load_prompts('a (b.c) 3.5', 7) == ['a (b.c) 3.5']

def test_a_file_that_is_there_is_a_file(here, monkeypatch):
    "Whatever its suffix; what is none and looks like none is a prompt"
    monkeypatch.chdir(here); (here/'sets'/'bare').write_text('two\n'); pd = '{"prompt": "x"}\n'
    for f,text in (('P.TXT', 'x\n'), ('notes', 'x\n'), ('A.CSV', 'id,prompt\n1,x\n'), ('B.JSONL', pd)): write(here/f, text); assert load_prompts(f) == ['x']
    assert load_prompts('A.CSV:prompt') == ['x'] and load_prompts('@bare') == ['two'] and load_prompts('a cat: asleep') == ['a cat: asleep'] and load_prompts('x'*500) == ['x'*500]
    with pytest.raises(ValueError, match='limit must be at least 0'): load_prompts('animals', -1)

def test_the_folder_of_a_clone(here, monkeypatch):
    monkeypatch.delenv('VGGFLOW_PROMPTS'); monkeypatch.delenv('VGGFLOW_ROOT', raising=False); (here/'experiments.toml').touch(); (here/'deep').mkdir(); monkeypatch.chdir(here/'deep')
    assert P.prompts_folder() == here/'data'/'prompts'

@pytest.mark.parametrize('spec,says', [('animal', "did you mean 'animals'"), ('drawbnch', "did you mean 'drawbench'"), ('@no.txt', 'no file of prompts'), ('/no/where.csv', 'no file of prompts'), ('{}/e.csv', 'no column'),
    ('{}/e.csv:caption', "no column 'caption'"), ('{}/f.txt:caption', 'it has no column'), ('{}/NO.TXT', 'no file of prompts'), ('{}/j.jsonl', 'row 2 of .* has no column'), ('{}/k.jsonl', 'row 2 of .* is a str'), ('{}/e.csv:n', None), ('{}/l.jsonl', 'a prompt is text'), ('{}/f.txt', 'no prompts in'), ('{}/g.json', 'holds a dict'), ('{}/h.txt', 'UTF-8'), ('{}/i.jsonl', 'cannot be read')])
def test_one_line_for_what_cannot_be_read(here, spec, says):
    write(here/'e.csv', 'id,n\n1,2\n'); write(here/'f.txt', '\n \n'); write(here/'g.json', '{"a": 1}'); (here/'h.txt').write_bytes(b'\xff\xfe\xff'); write(here/'i.jsonl', 'no json')
    for k,v in dict(j='{"prompt": "a"}\n{"text": "b"}', k='{"prompt": "a"}\n"b"', l='{"prompt": 3}').items(): write(here/f'{k}.jsonl', v)
    if says is None: assert load_prompts(spec.format(here)) == ['2']; return
    with pytest.raises((ValueError, OSError), match=says) as e: load_prompts(spec.format(here))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', PROMPT_SETS)
def test_published_sets_from_the_hub(here, monkeypatch, name):
    repo,files,column = PROMPT_SETS[name]; folder = here/'snapshot'; asked = []
    def snapshot(r, repo_type, allow_patterns): asked.append((r, repo_type, allow_patterns)); return str(folder)
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot); (folder/'data').mkdir(parents=True); (folder/'benchmark').mkdir()
    with pytest.raises(OSError, match='write .*txt'): load_prompts(name)
    assert asked == [(repo, 'dataset', list(files))]
    if column == 'caption': pytest.importorskip('pyarrow'); import pandas as pd; pd.DataFrame({column: ['a', 'b', 'a']}).to_parquet(folder/(files[0].replace('*', '00000-of-00001')+'.parquet'))
    elif column: write(folder/'x.csv', f'{column},Category\na,c\nb,d\n')
    else: [write(folder/f, json.dumps(['a', f])) for f in files]
    got = load_prompts(name); assert got[0] == 'a' and len(got) == len(set(got)) and (got[1:] == ['b'] if column else got[1:] == list(files))

def test_published_sets_offline(here, monkeypatch):
    def away(*a, **k): raise ConnectionError('no\nnetwork')
    monkeypatch.setattr('huggingface_hub.snapshot_download', away)
    with pytest.raises(OSError, match='write drawbench.txt there') as e: load_prompts('drawbench')
    assert 'sayakpaul/drawbench' in str(e.value) and '\n' not in str(e.value)
