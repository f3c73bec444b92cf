"""Attention of packed qkv, one encoder layer; and with its gradient, in one call as training does."""

import pytest

from bench import operations


@pytest.mark.parametrize("provider", operations.ATTENTION.providers)
def bench_attention(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.ATTENTION, shape, provider)


@pytest.mark.parametrize("provider", operations.ATTENTION_BACKWARD.providers)
def bench_attention_backward(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.ATTENTION_BACKWARD, shape, provider)
