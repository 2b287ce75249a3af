"Files are whole or absent, and a lock lives as long as its holder."

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vggflow.common.files import (
    is_locked,
    lock,
    read_json,
    write_json,
    write_whole,
)
from vggflow.common.hub import HubError, first_file, hub_file
from vggflow.common.images import image_grid, save_image
from vggflow.common.random import generator_of
from vggflow.common.seals import read_rows

HOLD = """
import sys, time
from vggflow.common.files import lock
with lock(sys.argv[1], 'a folder'):
    print('mine', flush=True)
    time.sleep(60)
"""


def holder(path):
    "A process that keeps a lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    return process


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, dict(β=1))

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert read_json(file) == dict(β=1) and os.listdir(file.parent) == ["a.json"]


def test_a_damaged_file_is_named_with_the_remedy(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is damaged .*: draw again"):
        read_json(tmp_path / "a.json", "draw again")
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="holds a list"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json", kind=(list, dict)) == [1]


def test_rows_end_where_a_line_is_torn(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    assert read_rows(file) == [dict(n=1), dict(n=2)]
    file.write_text('{"n": 1}\n{"n\n{"n": 3}\n')
    assert read_rows(file) == [dict(n=1)]


def test_another_process_waits_says_so_and_gets_the_lock(tmp_path):
    path = tmp_path / "deep" / ".lock"
    with lock(path, "a folder"):
        other = holder(path)
        waits = "another process works on a folder; waiting for it\n"
        assert other.stdout.readline() == waits and is_locked(path)
    assert other.stdout.readline() == "mine\n" and is_locked(path)
    other.kill()
    other.wait()


def test_a_lock_is_freed_when_its_holder_is_killed(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    other = holder(path)
    assert other.stdout.readline() == "mine\n" and is_locked(path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not is_locked(path)
    with lock(path):
        assert is_locked(path)


def test_a_child_that_inherits_the_descriptor_keeps_the_lock(tmp_path):
    "A scheduler outlives the command that began it, where that is killed"
    code = (
        "import os, subprocess, sys\nfrom vggflow.common.files import lock\n"
        "with lock(sys.argv[1]) as held:\n    os.set_inheritable(held.fileno(), True)\n"
        "    child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "    print(child.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", code, str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        assert is_locked(path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_that_cannot_be_had_is_one_error_of_both_kinds(tmp_path):
    (tmp_path / "wide").mkdir()
    assert issubclass(HubError, OSError) and issubclass(HubError, ValueError)
    with pytest.raises(HubError, match="no a.json in .*: give the folder"):
        hub_file(tmp_path / "wide", "a.json")
    with pytest.raises(HubError, match="did you mean .*wide.*owner/name"):
        hub_file(tmp_path / "wid", "a.json")


def test_the_image_grid_puts_each_image_in_its_place(tmp_path):
    images = torch.rand(5, 3, 4, 6)
    sheet = image_grid(images, columns=3, pad=2, zoom=2)
    assert sheet.shape == (18, 40, 3)
    wanted = (255 * images[4]).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(sheet[10::2, 14:26:2], wanted)
    assert (sheet[8:10] == 255).all() and (sheet[10:, 28:] == 255).all()
    assert np.array_equal(image_grid(images.permute(0, 2, 3, 1), 3, 2, 2), sheet)
    save_image(tmp_path / "a" / "sheet.png", sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "sheet.png")), sheet)


def test_random_numbers_are_named_by_numbers():
    names = [(3, 5), (5, 3), (3, 5, 0), (3, 5, 0, 0), (0,), (0, 0), (0, 0, 0), (3, 5, 1)]
    drawn = [torch.rand(1, generator=generator_of(*name)).item() for name in names * 2]
    assert drawn[: len(names)] == drawn[len(names) :] and len(set(drawn)) == len(names)


@pytest.mark.parametrize(
    "module",
    ["names", "files", "data", "hub", "provenance", "random", "images", "equations"],
)
def test_the_common_floor_is_light(module):
    code = f"import sys, vggflow.common.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_another_name_is_tried_only_where_the_first_is_not_there(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name, revision=None):
        asked.append(name)
        if name == "old.pt":
            return "/cache/old.pt"
        raise EntryNotFoundError(name) if repository == "me/has" else ConnectionError("no")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert str(first_file("me/has", ["new.pt", "old.pt"])) == "/cache/old.pt"
    assert asked == ["new.pt", "old.pt"]
    with pytest.raises(HubError, match="new.pt|no"):
        first_file("me/far", ["new.pt", "old.pt"])
    assert asked == ["new.pt", "old.pt", "new.pt"]
