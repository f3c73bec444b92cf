"""The facts about machine and software: hardware, versions, clocks, the names that follow from them."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {short: dtype for dtype, short in SHORT.items()}
_STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def results_name(device: torch.device, dtype: torch.dtype) -> str:
    """`<device>_<torch>_<triton>_<dtype>.json`: a new stack is a new file, old ones stay."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("nvidia", "")).strip("-")
    prefix = slug if device.type == "cuda" else f"cpu-{slug}"
    versions = [re.sub(r"^(\d+\.\d+).*", r"\1", version) for version in (torch.__version__, triton_version())]
    return f"{prefix}_torch{versions[0]}_triton{versions[1]}_{SHORT[dtype]}.json"


def facts(device: torch.device) -> dict[str, Any]:
    """What was measured on: hardware, driver, clocks, versions, commit, command. No host name, no user."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found = {
        "device": device.type,
        "name": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "numpy": np.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(_without_folders(argument) for argument in sys.argv),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return found | {"cores": os.cpu_count(), "memory_bytes": memory}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": cache_bytes(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **sampling(device, ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"))(),
    }


def _without_folders(argument: str) -> str:
    """A command's argument without what only this machine has: paths of the project relative to it, others by name."""
    path = Path(argument)
    if not path.is_absolute() and ".." not in path.parts:
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def sampling(device: torch.device, fields: tuple[str, ...] = _STATE) -> Callable[[], dict[str, Any]]:
    """Starts to look at the machine now, so that a GPU is seen at work; the returned function gives what was seen.

    Of a GPU these are nvidia-smi's fields, as text with units: "unknown" without nvidia-smi or such a field. Of a CPU
    it is the load, when the function is called.
    """
    if device.type != "cuda":
        return lambda: {"load_1min": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
    unknown = dict.fromkeys(fields, "unknown")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return lambda: unknown

    def read() -> dict[str, Any]:
        try:
            text, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            return unknown
        values = [value.strip() for value in text.split(",")]
        ok = process.returncode == 0 and len(values) == len(fields)
        return dict(zip(fields, values, strict=True)) if ok else unknown

    return read


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache that inputs have to be larger than together, so that none is found there."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    try:
        sizes = [os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")]
    except (ValueError, OSError):
        sizes = []
    return max([size for size in sizes if size > 0], default=32 << 20)


def device_name(device: torch.device) -> str:
    """For people: "NVIDIA H200", "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Brand of the processor, without trademark signs."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    brand = match[1] if match else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", brand).strip()


def triton_version() -> str:
    """Release of triton, or "none"."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
