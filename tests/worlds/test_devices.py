"Where tensors are, without a GPU: everything on a device of fake tensors, which refuses operations across devices"
import subprocess, sys
from pathlib import Path

def test_every_tensor_is_on_the_models_device():
    p = subprocess.run([sys.executable, Path(__file__).parents[1]/'fake_gpu.py'], capture_output=True, text=True, timeout=900)
    lines = [l for l in p.stdout.splitlines() if l.startswith(('ok','FAILED'))]; failed = [l for l in lines if l.startswith('FAILED')]
    assert p.returncode==0 and len(lines)==24 and len(failed)==1 and 'wrong device' in failed[0] and 'device' in failed[0].split('Error')[-1], p.stdout+p.stderr[-3000:]
