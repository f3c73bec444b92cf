"""What attention is looked at by, at full sizes: as near to float64 as eager PyTorch, and the same bits every time.

Inputs, calls and checks are those of the benchmark, which times what is tested here.
"""

import pytest
import torch

from bench import maps
from bench.operations import Operation
from bench.shapes import SMOKE, Shape
from segmenter.kernels import (
    attention_rows,
    attention_statistics,
    attention_transposed,
    configs_maps,
    reference_maps,
)
from tests.gpu.conftest import size
from tests.support.parity import assert_parity

TYPES = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS = [value for value in vars(maps).values() if isinstance(value, Operation)]
SHAPES = size([Shape("L", 16, 640, 2), Shape("B", 32, 512, 8), Shape("S", 8, 512, 1), Shape("T", 8, 1024)], SMOKE)
LIMITS = {torch.float32: {"max_ratio": 4.0, "frobenius": 4.0}}  # as in tests/kernels/test_attention_maps.py


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.kind)
def test_at_the_sizes_of_the_model(operation, shape, dtype, device):
    torch.manual_seed(0)
    inputs, run = operation.inputs(shape, dtype, device), operation.call("triton", shape)
    found = run(*inputs)
    operation.check("triton", shape, found, inputs)  # raises GateError
    for _ in range(size(20, 1)):
        assert torch.equal(run(*inputs), found), "differs between runs"


def heads(N, d, dtype, device, count=1):
    generator = torch.Generator(device).manual_seed(N)
    return [torch.randn(2, N, 2, d, generator=generator, device=device).to(dtype) for _ in range(count)]


def calls(side, config=None):
    """(name, kernel, definition) of functions of q, k and x."""
    grid, last = (side, side), () if config is None else (config,)
    yield (
        "rows",
        lambda q, k, x: attention_rows._run(q[:, :37], k, 0.1, *last),
        lambda q, k, x: reference_maps.attention_rows(q[:, :37], k, 0.1),
    )
    yield (
        "transposed",
        lambda q, k, x: attention_transposed._run(q, k, x, 0.1, *last),
        lambda q, k, x: reference_maps.attention_transposed(q, k, x, 0.1),
    )
    for i, name in enumerate(reference_maps.STATISTICS):
        yield (
            name,
            lambda q, k, x, i=i: attention_statistics._run(q, k, grid, 1, 0.1, *last)[i],
            lambda q, k, x, i=i: reference_maps.attention_statistics(q, k, grid, 1, 0.1)[i],
        )


def check(side, d, dtype, device, config=None, only=None):
    N = side * side + 3  # tokens before and after the patches
    q, k = heads(N, d, dtype, device, 2)
    x = heads(N, 17, torch.float32, device)[0]
    for name, kernel, definition in calls(side, config):
        if only is None or name in only:
            exact = definition(q.double(), k.double(), x.double())
            limits = LIMITS.get(dtype, {})
            assert_parity(kernel(q, k, x), exact, definition(q, k, x), context=f"{name} {config}", **limits)


@pytest.mark.parametrize("d", size([16, 32, 64, 80, 128], [16]))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_head_sizes(d, dtype, device):
    check(size(31, 5), d, dtype, device)


SHIPPED = [
    pytest.param(name, config, id=f"{name}-{config.block_m}x{config.block_n}-{config.num_stages}")
    for name, table in configs_maps.TABLES.items()
    for config in dict.fromkeys(row.config for row in table if row.kind == "half")
]


@pytest.mark.parametrize(("name", "config"), SHIPPED)
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_every_configuration(name, config, dtype, device):
    only = {"attention_rows": ("rows",), "attention_transposed": ("transposed",)}
    check(size(31, 7), 64, dtype, device, config, only.get(name, reference_maps.STATISTICS))
