"""`python -m tests.support.huge_offsets`: attention in tensors whose elements lie more than 2**31 apart, on the CPU.

The memory is reserved and never touched but for a few pages. Strides fit 32 bits, offsets do not: strides of 2**31 and
more would be passed as 64-bit integers and hide the bug. Run by tests/kernels/test_attention.py.
"""

import mmap

import tests.conftest as conftest  # sets up the interpreter  # isort: skip
import torch

from segmenter.kernels import attention as kernel
from segmenter.kernels import configs, launch, reference
from tests.support.parity import assert_bitwise_equal, assert_parity

FAR = 2**30 + 2**28
CONFIGS = [configs.AttentionConfig(32, 32, 4, 2, descriptors) for descriptors in (False, True)]


def far_apart(shape, strides):
    """A float16 tensor with these strides, not written to."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name
    memory = mmap.mmap(-1, 2 * elements + 4096, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides)


def place(tensor, strides):
    placed = far_apart(tensor.shape, strides)
    placed.copy_(tensor)
    assert sum((size - 1) * stride for size, stride in zip(placed.shape, strides, strict=True)) > 2**31
    return placed


def run(qkv, h, config):
    x = qkv.view(*qkv.shape[:2], 3 * h, -1)
    return kernel._run(x, x, x, (h, 0, h, 2 * h), 0.25, True, config)[0]


def check_batches(config):
    for N in (34, 40):  # two single rows and a tile; a tile and a masked one
        qkv = torch.randn(3, N, 3 * 16).half()
        want = run(qkv, 1, config)
        assert_parity(want, reference.explicit_attention(qkv.double(), 1), reference.explicit_attention(qkv, 1))
        assert_bitwise_equal(run(place(qkv, (FAR, 48, 1)), 1, config), want)
        q, k, v = qkv.view(3, N, 3, 1, 16).unbind(2)
        for i in range(3):
            tensors = [q, k, v]
            tensors[i] = place(tensors[i], (FAR, 16, 16, 1))
            assert_bitwise_equal(kernel._run(*tensors, (1, 0, 0, 0), 0.25, False, config)[0], want)


def check_output(config):
    qkv = torch.randn(3, 34, 48).half()
    want = run(qkv, 1, config)
    launch.torch = conftest.POISONED_TORCH
    launch.torch.empty = lambda shape, **kwargs: far_apart(shape, (FAR, shape[-1], 1))
    x = qkv.view(3, 34, 3, 16)
    o = kernel._run(x, x, x, (1, 0, 1, 2), 0.25, False, config)[0]
    launch.torch = torch
    assert o.stride(0) == FAR
    assert_bitwise_equal(o, want)


def check_rows():
    """Rows so far apart that offsets inside a tile would overflow."""
    qkv = torch.randn(1, 3, 48).half()
    want = kernel.attention(qkv, 1)
    far = place(qkv, (1, FAR, 1))
    assert_bitwise_equal(kernel.attention(far, 1), want)
    assert_bitwise_equal(kernel.cross_attention(*far.view(1, 3, 3, 1, 16).unbind(2)), want)


if __name__ == "__main__":
    torch.manual_seed(0)
    for config in CONFIGS:
        check_batches(config)
        print("batches", flush=True)
        check_output(config)
        print("output", flush=True)
    check_rows()
    print("rows")
