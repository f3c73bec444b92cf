"""Class masks from decoded patch and class tokens."""

import pytest

from bench import operations


@pytest.mark.parametrize("provider", operations.MASK_HEAD.providers)
def bench_mask_head(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.MASK_HEAD, shape, provider)
