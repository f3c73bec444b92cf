"""The tail of training: upsampling, cross-entropy and the gradient of the low-resolution masks."""

import pytest

from bench import operations

TRAINING = True


@pytest.mark.parametrize("provider", operations.LOSS.providers)
def bench_loss(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.LOSS, shape, provider)
