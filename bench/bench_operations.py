"""The operations that are timed alone, each by every provider that has it; bench/operations.py says what they are."""

from collections.abc import Callable

import pytest

from bench import operations


def _benchmark(operation: operations.Operation) -> Callable:
    @pytest.mark.parametrize("provider", operation.providers)
    def run(benchmark, harness, shape, provider):
        harness.operation(benchmark, operation, shape, provider)

    return run


bench_attention = _benchmark(operations.ATTENTION)
bench_attention_backward = _benchmark(operations.ATTENTION_BACKWARD)
bench_layernorm_mlp = _benchmark(operations.LAYERNORM_MLP)
bench_mask_head = _benchmark(operations.MASK_HEAD)
bench_masks_to_labels = _benchmark(operations.MASKS_TO_LABELS)
bench_noise_to_labels = _benchmark(operations.NOISE_TO_LABELS)
bench_loss = _benchmark(operations.LOSS)
