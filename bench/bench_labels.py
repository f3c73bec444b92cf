"""The tail of inference: low-resolution masks to a label for every pixel."""

import pytest

from bench import operations


@pytest.mark.parametrize("provider", operations.MASKS_TO_LABELS.providers)
def bench_masks_to_labels(benchmark, harness, shape, provider):
    harness.operation(benchmark, operations.MASKS_TO_LABELS, shape, provider)


@pytest.mark.parametrize("provider", operations.NOISE_TO_LABELS.providers)
def bench_noise_to_labels(benchmark, harness, shape, provider):
    """The worst case of what looks at classes first: nearly all of them could win everywhere."""
    harness.operation(benchmark, operations.NOISE_TO_LABELS, shape, provider)
