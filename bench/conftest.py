"""Facts about machine and software that every result file carries."""

import platform
import subprocess

import numpy as np
import torch

from bench.models import ROOT


def pytest_benchmark_update_machine_info(config, machine_info):
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info.update(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        commit=commit.stdout.strip() or "unknown",
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()  # the commit stands in machine_info
