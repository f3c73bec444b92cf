"""Gradients of every operator at full sizes: as near to float64 as eager PyTorch's, and the same bits every time.

Inputs, calls and checks are those of the benchmark, which times what is tested here.
"""

import pytest
import torch

from bench import gradients, operations
from bench.operations import Operation
from bench.shapes import SMOKE, Shape
from tests.gpu.conftest import size

OPERATIONS = [operations.ATTENTION_BACKWARD, operations.LOSS]
OPERATIONS += [value for value in vars(gradients).values() if isinstance(value, Operation)]
SHAPES = size([Shape("L", 16, 640, 2), Shape("B", 16, 512, 8), Shape("S", 8, 512, 1), Shape("T", 32, 512, 8)], SMOKE)


def found_by(operation, shape, inputs):
    return operation.call("triton", shape)(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.kind)
def test_gradients(operation, shape, dtype, device):
    torch.manual_seed(0)
    inputs = operation.inputs(shape, dtype, device)
    found = found_by(operation, shape, inputs)
    operation.check("triton", shape, found, inputs)  # raises GateError
    for _ in range(size(3, 1)):
        again = found_by(operation, shape, inputs)
        pairs = [(found, again)] if isinstance(found, torch.Tensor) else zip(found, again, strict=True)
        assert all(torch.equal(*pair) for pair in pairs), "differs between runs"
