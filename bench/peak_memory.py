"""Peak memory of one call on a CPU: python -m bench.peak_memory MODEL PROVIDER -> bytes beyond the loaded model.

A process of its own, so that neither another provider's leftovers nor the loading of the model count. Linux only: the
kernel's high-water mark of resident memory is reset just before the call, and free memory is given back (glibc).
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from bench.models import PROVIDERS, ROOT, SHIPPED, build, picture


def peak_memory(model: str, provider: str) -> int:
    """Bytes that one call adds to the resident memory of a fresh process at its peak.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", "bench.peak_memory", model, provider]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    name, provider = sys.argv[1:]
    model = build(name)
    pixels = picture(None if name == SHIPPED else 512)
    PROVIDERS[provider](build("Seg-T-Mask/32"), picture(64))  # loads libraries and thread pools
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory freed just now would be reused without being counted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        PROVIDERS[provider](model, pixels)
    print(max(0, _status("VmHWM") - before))


if __name__ == "__main__":
    main()
