"""Shared fixtures. Nothing here needs a GPU: without one, the kernels run in Triton's interpreter."""

import contextlib
import functools
import gc
import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segmenter import ops

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: @triton.jit looks at it
if ops.why_no_triton():
    sys.modules["triton"] = None  # a Triton that is too old counts as none: pytest.importorskip skips
elif not torch.cuda.is_available():
    from tests.support import interpreter

    interpreter.patch()

from segmenter.model import Segmenter
from tests.gpu import compile_first
from tests.support.parity import check_guards, guarded
from tests.support.tiny import tiny_model

NO_KERNELS = ops.why_no_triton()
DEFINITIONS = ("reference", "reference_backward", "reference_maps", "reference_rotary", "reference_queries")
NOT_POISONED = {f"segmenter.kernels.{name}" for name in ("configs", "operators", *DEFINITIONS)}


def pytest_report_header() -> str:
    return f"kernels are not tested: {NO_KERNELS}" if NO_KERNELS else "kernels are tested"


class WithoutKernels(pytest.Module):
    def collect(self):
        pytest.skip(NO_KERNELS, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The folders whose tests need the kernels are skipped where there are none."""
    if NO_KERNELS and module_path.parent.name in ("kernels", "gpu"):
        return WithoutKernels.from_parent(parent, path=module_path)
    return None


def pytest_collection_finish():
    """What is imported by now stays: a garbage collection, which some tests ask for, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=60, help="mutated files of each format, in tests/test_fuzz.py")
    parser.addoption("--cases", type=int, default=200, help="random cases of tests/kernels/test_random_cases.py")
    parser.addoption("--backward-cases", type=int, default=500, help="the same of gradients")
    parser.addoption("--steps", type=int, default=15, help="of the two trainings in tests/training/test_curves.py")
    compile_first.pytest_addoption(parser)


@pytest.fixture
def model() -> Segmenter:
    return tiny_model()


def _poisoned(function):
    def allocate(*args, **kwargs):
        tensor = function(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return allocate


def _poisoned_torch() -> types.ModuleType:
    """A copy of the module `torch` whose empty tensors hold NaN or the largest integer. A real module, for Dynamo."""
    module = types.ModuleType("torch")
    module.__dict__.update(torch.__dict__)
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(module, name, _poisoned(getattr(torch, name)))
    return module


POISONED_TORCH = _poisoned_torch()


@functools.lru_cache(1)
def _poisonable(n_modules: int) -> list[types.ModuleType]:
    """The kernels' modules that name `torch`, while so many modules are imported."""
    names = [n for n in list(sys.modules) if n.startswith("segmenter.kernels.") and n not in NOT_POISONED]
    return [sys.modules[name] for name in names if hasattr(sys.modules[name], "torch")]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the name `torch` inside the kernels' modules, and nothing for anybody else."""
    for module in _poisonable(len(sys.modules)):
        monkeypatch.setattr(module, "torch", POISONED_TORCH)


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[torch.Tensor]]:
    """What the kernels allocate within it lies between NaN guards, which are checked at its end."""
    allocated = []

    def empty(*args, **kwargs):
        tensor = guarded(_poisoned(torch.empty)(*args, **kwargs))
        allocated.append(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch)
        monkeypatch.setattr(POISONED_TORCH, "empty", empty)
        yield allocated
    for tensor in allocated:
        check_guards(tensor, "of an output")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What the kernels allocate is NaN until written, so an output that a kernel leaves out is always found.

    (`new_empty` cannot be replaced like this; test_launch.py sees to it that only fake implementations use it.)
    """
    poison(monkeypatch)
    if "segmenter.kernels.repeat" in sys.modules:  # what a test puts in place of something must not be passed by
        sys.modules["segmenter.kernels.repeat"].forget()


@pytest.fixture
def guarded_outputs():
    with guarded_allocations() as allocated:
        yield allocated
    assert any(tensor.numel() for tensor in allocated), "no kernel wrote anything"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: more threads only wait for each other, and the last bits stay the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
