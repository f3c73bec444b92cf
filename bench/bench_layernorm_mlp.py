"""x + fc2(gelu(fc1(layer_norm(x)))), one encoder layer."""

import pytest

from bench import operations


@pytest.mark.parametrize("provider", operations.LAYERNORM_MLP.providers)
def bench_layernorm_mlp(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.LAYERNORM_MLP, shape, provider)
