"""Where tensors are, without a GPU

Everything runs on a device of fake tensors, which refuses operations across devices."""

import subprocess
import sys
from pathlib import Path


def test_every_tensor_is_on_the_models_device():
    script = Path(__file__).parents[1] / "fake_gpu.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=900
    )
    said = done.stdout + done.stderr[-3000:]
    lines = [text for text in done.stdout.splitlines() if text[:2] in ("ok", "FA")]
    failed = [text for text in lines if text.startswith("FAILED")]
    assert done.returncode == 0 and len(lines) == 23 and len(failed) == 1, said
    assert "wrong device" in failed[0] and "device" in failed[0].split("Error")[-1], said
